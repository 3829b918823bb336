"""Accelerators and their published specifications, in one table.

JAX has a table of TPUs (`jax.experimental.pallas.tpu.get_tpu_info_for_chip`); it rounds more, and
lacks links between chips, the memory available to a program, and GPUs. `tests/aot/test_tpu.py` compares the two.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures (cloud.google.com/tpu/docs), except `hbm`: the compiler's limit for a program.

    The figures are those of one JAX device: a whole chip, or, for v7x, one of its two cores.
    """

    kinds: tuple[str, ...]  # substrings of the names that JAX gives such devices
    peak: float  # FLOP/s in bfloat16
    hbm: int  # bytes
    bandwidth: float  # bytes/s of HBM
    link: float  # bytes/s of one link to a neighbour, in one direction
    wraps_at: int  # sides of a slice that are multiples of this are rings
    largest: tuple[int, ...]  # sides of the largest slice; libtpu aborts the process beyond them
    cores: int = 1  # devices per chip, which share its links


GIB = 2**30
CHIPS = {
    "v4": Chip(("v4",), 275e12, int(30.75 * GIB), 1228e9, 45e9, 4, (16, 16, 16)),
    "v5e": Chip(("v5 lite", "v5e"), 197e12, int(15.75 * GIB), 819e9, 45e9, 16, (1, 16, 16)),
    "v5p": Chip(("v5p", "v5"), 459e12, int(95.73 * GIB), 2765e9, 90e9, 4, (16, 20, 28)),
    "v6e": Chip(("v6 lite", "v6e"), 918e12, int(31.24 * GIB), 1640e9, 90e9, 16, (1, 16, 16)),
    "v7x": Chip(("TPU7x", "v7x"), 2307e12 / 2, int(94.74 * GIB), 7380e9 / 2, 90e9 / 2, 4, (16, 16, 36), cores=2),
}
# FLOP/s in bfloat16, without sparsity (nvidia.com, data sheets).
GPUS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def device_peak(kind: str) -> float | None:
    """Peak FLOP/s in bfloat16 of a device by its name in JAX (`TPU v5 lite`, `NVIDIA H100 80GB HBM3`); None if
    unknown."""
    peaks = {part: chip.peak for chip in CHIPS.values() for part in chip.kinds} | GPUS
    return next((peak for part, peak in peaks.items() if part in kind), None)
