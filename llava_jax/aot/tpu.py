"""Compile for TPU slices on a machine without a TPU, and read a program's memory and roofline.

`slice_devices` returns devices to compile for: libtpu is a wheel, and its compiler needs no TPU. Memory is exact, from
XLA's buffer assignment; `llava_jax.aot.hlo` counts the program's work. No time here is measured.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from llava_jax.aot.chips import CHIPS
from llava_jax.aot.hlo import Work
from llava_jax.console import InputError, first_line, shorten

# Slices that can be reserved (cloud.google.com/tpu/docs), by the prefix of their names: kind, what a chip adds to the
# number after the prefix (v4, v5p and v7x count two cores), sides by number of chips.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
    1024: "8x8x16", 2048: "8x16x16",
}  # fmt: skip
SLICES = {
    "v4": ("v4", 2, _CUBES),
    "v5litepod": ("v5e", 1, _FLAT),
    "v5p": ("v5p", 2, _CUBES | {4096: "16x16x16", 6144: "16x16x24"}),
    "v6e": ("v6e", 1, _FLAT),
    "tpu7x": ("v7x", 2, _CUBES | {4096: "16x16x16", 8192: "16x16x32"}),
}
MAX_CHIPS = 10_000  # of all slices together: planning time grows with them
DCN = 3.1e9  # bytes/s per chip between slices: assumes 100 Gbit/s per host of four chips; hosts differ


# ---------------------------------------------------------------- slices


def parse_topology(topology: str) -> tuple[str, tuple[int, ...]]:
    """Parse `"v5e:4x8"` or `"v5litepod-32"` into a kind of chip and the sides of the slice.

    Raises:
      InputError: the kind or the name is unknown, the sides are malformed, or the slice is too large.
    """
    if (name_match := re.fullmatch(r"(\w+)-([0-9]{1,6})", topology)) and name_match[1] in SLICES:
        kind, each, slices = SLICES[name_match[1]]
        known = {each * chips: text for chips, text in slices.items()}
        if int(name_match[2]) not in known:
            raise InputError(f"--topology {shorten(topology)}: {name_match[1]} comes in {', '.join(map(str, known))}")
        topology = f"{kind}:{known[int(name_match[2])]}"
    match = re.fullmatch(r"(\w+):([1-9][0-9]{0,4}(?:x[1-9][0-9]{0,4}){1,2})", topology)
    if not match or match[1] not in CHIPS:
        raise InputError(
            f"--topology {shorten(topology)!r}: write it as v5e:4x8 (kinds: {', '.join(CHIPS)}; v4, v5p and v7x have "
            "three sides), or as v5litepod-32"
        )
    sides = tuple(map(int, match[2].split("x")))
    largest = CHIPS[match[1]].largest
    if any(side > limit for side, limit in zip(sorted(sides, reverse=True), reversed(largest), strict=False)):
        limits = "x".join(str(side) for side in largest if side > 1)
        raise InputError(f"--topology {shorten(topology)}: {match[1]} comes in slices of up to {limits} chips")
    return match[1], sides


def by_sides(topology: str) -> str:
    """Normalize `"v5litepod-16"` or `"v5e:4x4"` to `"v5e:4x4"`."""
    kind, sides = parse_topology(topology)
    return f"{kind}:{'x'.join(map(str, sides))}"


def slice_name(topology: str) -> str | None:
    """The name under which a slice is reserved, such as `v5litepod-16`; None for sides that cannot be reserved."""
    kind, sides = parse_topology(topology)
    text, chips = "x".join(map(str, sides)), math.prod(sides)
    return next(
        (
            f"{name}-{each * chips}"
            for name, (of, each, known) in SLICES.items()
            if (of, known.get(chips)) == (kind, text)
        ),
        None,
    )


def larger_slices(topology: str) -> list[str]:
    """Topologies with more chips of the same kind, smallest first."""
    kind, sides = parse_topology(topology)
    known = next(known for of, _, known in SLICES.values() if of == kind)
    return [f"{kind}:{text}" for chips, text in known.items() if chips > math.prod(sides)]


def device_count(topology: str) -> int:
    """The number of devices of a slice: its chips, or their cores if each core is a device."""
    kind, sides = parse_topology(topology)
    return math.prod(sides) * CHIPS[kind].cores


def links(topology: str) -> int:
    """The links of a chip at the edge of a slice: two along a side that is a ring, one along any other."""
    kind, sides = parse_topology(topology)
    return sum(0 if n == 1 else 2 if n % CHIPS[kind].wraps_at == 0 else 1 for n in sides)


def slice_devices(topology: str, slices: int = 1) -> list:
    """Devices of one or several equal TPU slices to compile for: one per chip, for v7x one per core.

    Raises:
      InputError: libtpu is not installed, or there is no such slice.
    """
    kind, sides = parse_topology(topology)
    if (chips := math.prod(sides) * slices) > MAX_CHIPS:
        raise InputError(f"--slices {slices}: {slices} x {topology} are {chips} chips, more than {MAX_CHIPS}")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("libtpu, the compiler for TPUs, is not installed: pip install libtpu")
    # So that libtpu neither looks for this machine's own TPU nor locks it.
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
        name = by_sides(topology).replace("v7x", "tpu7x")  # libtpu's spelling
        return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except Exception as error:  # libtpu raises several types, all about the topology
        raise InputError(f"--topology {shorten(topology)!r}: {shorten(first_line(error))}") from None


def out_of_memory(error: BaseException) -> int | None:
    """The bytes that a program needs, from the compiler's out-of-memory error; None for any other error."""
    found = re.search(r"\(([\d.]+)([KMGTPE])\) exceeds available HBM|Used ([\d.]+)([KMGTPE]) of", str(error))
    if not found:
        return None
    number, unit = filter(None, found.groups())
    return int(float(number) * 1024 ** (1 + "KMGTPE".index(unit)))


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per chip. `peak` is the maximum in use at once, including arguments and the program."""

    arguments: int
    outputs: int
    reused: int  # outputs in the buffers of donated arguments
    temporaries: int
    program: int

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.reused + self.temporaries + self.program


def memory(compiled) -> Memory:
    """The compiler's buffer assignment."""
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
    """Seconds that compute, HBM and network each take at peak rate; the largest is the bound."""
    chip = CHIPS[parse_topology(topology)[0]]
    sent = sum(work.collectives.values())
    return {
        "compute": work.flops / chip.peak,
        "HBM": work.hbm_bytes / chip.bandwidth,
        "network": sent / (chip.link * max(1, links(topology))),
    }
