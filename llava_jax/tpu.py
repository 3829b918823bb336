"""TPU slices on a machine without a TPU, and what a program compiled for one needs of a chip.

`slice_devices` gives devices to compile for: libtpu is a wheel, and its compiler needs no TPU. Memory is exact, XLA's
own assignment of buffers; what the program does is read by `llava_jax.hlo`. Nothing here is a measured second.
"""

import dataclasses
import importlib.util
import os
import re
from typing import Any

from llava_jax.console import InputError, first_line
from llava_jax.hlo import Work


@dataclasses.dataclass(frozen=True)
class Chip:
    """Makers' figures (cloud.google.com/tpu/docs), but for `hbm`: what its compiler says that a program may use."""

    peak: float  # FLOP/s in bfloat16
    hbm: int  # bytes
    bandwidth: float  # bytes/s of HBM
    link: float  # bytes/s one way of one link to a neighbour
    wraps_at: int  # sides of a slice that are a multiple of this are rings


GIB = 2**30
CHIPS = {
    "v4": Chip(275e12, int(30.75 * GIB), 1228e9, 45e9, 4),
    "v5e": Chip(197e12, int(15.75 * GIB), 819e9, 45e9, 16),
    "v5p": Chip(459e12, int(95.73 * GIB), 2765e9, 90e9, 4),
    "v6e": Chip(918e12, int(31.24 * GIB), 1640e9, 90e9, 16),
}
DCN = 3.1e9  # bytes/s a chip has between slices: 100 Gbit/s of a host of four (an assumption; hosts differ)


# ---------------------------------------------------------------- slices


def parse_topology(topology: str) -> tuple[str, tuple[int, ...]]:
    """`"v5e:4x8"` as a kind of chip and the sides of the slice.

    Raises:
      InputError: the kind is unknown, or the sides are not written like that.
    """
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*){1,2})", topology)
    if not match or match[1] not in CHIPS:
        raise InputError(
            f"--topology {topology!r}: write it as v5e:4x8 (kinds: {', '.join(CHIPS)}; v4 and v5p have three sides)"
        )
    return match[1], tuple(map(int, match[2].split("x")))


def links(topology: str) -> int:
    """Links that feed a chip at an edge: two along a side that is a ring, one along any other."""
    kind, sides = parse_topology(topology)
    return sum(0 if n == 1 else 2 if n % CHIPS[kind].wraps_at == 0 else 1 for n in sides)


def slice_devices(topology: str, slices: int = 1) -> list:
    """Devices of a TPU slice, or of several alike, to compile for.

    Raises:
      InputError: there is no libtpu here, or no such slice.
    """
    kind, _ = parse_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("libtpu, which has the compiler for TPUs, is not installed: pip install libtpu")
    # It is not to look for this machine's own TPU, nor to keep others from it.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-8",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # a chip's two cores as one device
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **options).devices)
    except Exception as error:  # of several types, all about the topology
        raise InputError(f"--topology {topology!r}: {first_line(error)}") from None


def out_of_memory(error: BaseException) -> int | None:
    """Bytes that a program would have needed which the compiler refused for want of HBM; None for any other error."""
    found = re.search(r"\(([\d.]+)([KMG])\) exceeds available HBM|Used ([\d.]+)([KMG]) of", str(error))
    if not found:
        return None
    number, unit = filter(None, found.groups())
    return int(float(number) * 1024 ** (1 + "KMG".index(unit)))


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a chip. `peak` is the most that is in use at once, arguments and program included."""

    arguments: int
    outputs: int
    reused: int  # outputs that lie where an argument was
    temporaries: int
    program: int

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.reused + self.temporaries + self.program


def memory(compiled) -> Memory:
    """The compiler's own assignment."""
    m = compiled.memory_analysis()
    return Memory(
        m.argument_size_in_bytes,
        m.output_size_in_bytes,
        m.alias_size_in_bytes,
        m.temp_size_in_bytes,
        m.generated_code_size_in_bytes,
    )


# ---------------------------------------------------------------- the roofline


def roofline(work: Work, topology: str) -> dict[str, float]:
    """Seconds that compute, memory and network take at their peaks, each alone: the largest is the bound."""
    chip = CHIPS[parse_topology(topology)[0]]
    sent = sum(work.collectives.values())
    return {
        "compute": work.flops / chip.peak,
        "HBM": work.hbm_bytes / chip.bandwidth,
        "network": sent / (chip.link * max(1, links(topology))),
    }
