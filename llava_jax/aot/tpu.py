"""TPU slices on a machine without a TPU, and what a program compiled for one needs of a chip.

`slice_devices` gives devices to compile for: libtpu is a wheel, and its compiler needs no TPU. Memory is exact, XLA's
own assignment of buffers; what the program does is read by `llava_jax.aot.hlo`. Nothing here is a measured second.
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

# Slices as they are usually reserved (cloud.google.com/tpu/docs), by what their names begin with: kind, what a chip
# counts for in the number behind it (v4, v5p and v7x: two cores), sides by number of chips.
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
MOST_CHIPS = 10_000  # of several slices: what a plan takes grows with them
DCN = 3.1e9  # bytes/s a chip has between slices: 100 Gbit/s of a host of four (an assumption; hosts differ)


# ---------------------------------------------------------------- slices


def parse_topology(topology: str) -> tuple[str, tuple[int, ...]]:
    """`"v5e:4x8"`, or `"v5litepod-32"`, as a kind of chip and the sides of the slice.

    Raises:
      InputError: the kind is unknown, no slice has that name, or the sides are not written like that.
    """
    if (named := re.fullmatch(r"(\w+)-([0-9]{1,6})", topology)) and named[1] in SLICES:
        kind, each, slices = SLICES[named[1]]
        known = {each * chips: text for chips, text in slices.items()}
        if int(named[2]) not in known:
            raise InputError(f"--topology {shorten(topology)}: {named[1]} comes in {', '.join(map(str, known))}")
        topology = f"{kind}:{known[int(named[2])]}"
    match = re.fullmatch(r"(\w+):([1-9][0-9]{0,4}(?:x[1-9][0-9]{0,4}){1,2})", topology)
    if not match or match[1] not in CHIPS:
        raise InputError(
            f"--topology {shorten(topology)!r}: write it as v5e:4x8 (kinds: {', '.join(CHIPS)}; v4, v5p and v7x have "
            "three sides), or as v5litepod-32"
        )
    sides = tuple(map(int, match[2].split("x")))
    largest = CHIPS[match[1]].largest
    if any(side > most for side, most in zip(sorted(sides, reverse=True), reversed(largest), strict=False)):
        most = "x".join(str(side) for side in largest if side > 1)
        raise InputError(f"--topology {shorten(topology)}: {match[1]} comes in slices of up to {most} chips")
    return match[1], sides


def by_sides(topology: str) -> str:
    """`"v5e:4x4"` of that or of `"v5litepod-16"`."""
    kind, sides = parse_topology(topology)
    return f"{kind}:{'x'.join(map(str, sides))}"


def slice_name(topology: str) -> str | None:
    """The name under which a slice is reserved, `v5litepod-16`; None for one of unusual sides."""
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
    """Topologies of the same chips with more of them, from the smallest on."""
    kind, sides = parse_topology(topology)
    known = next(known for of, _, known in SLICES.values() if of == kind)
    return [f"{kind}:{text}" for chips, text in known.items() if chips > math.prod(sides)]


def device_count(topology: str) -> int:
    """Devices of a slice: its chips, or their cores where each is a device."""
    kind, sides = parse_topology(topology)
    return math.prod(sides) * CHIPS[kind].cores


def links(topology: str) -> int:
    """Links that feed a chip at an edge: two along a side that is a ring, one along any other."""
    kind, sides = parse_topology(topology)
    return sum(0 if n == 1 else 2 if n % CHIPS[kind].wraps_at == 0 else 1 for n in sides)


def slice_devices(topology: str, slices: int = 1) -> list:
    """Devices of a TPU slice, or of several alike, to compile for: one for each chip, of v7x one for each core.

    Raises:
      InputError: there is no libtpu here, or no such slice.
    """
    kind, sides = parse_topology(topology)
    if (chips := math.prod(sides) * slices) > MOST_CHIPS:
        raise InputError(f"--slices {slices}: {slices} x {topology} are {chips} chips, more than {MOST_CHIPS}")
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
        name = by_sides(topology).replace("v7x", "tpu7x")  # as libtpu spells it
        return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except Exception as error:  # of several types, all about the topology
        raise InputError(f"--topology {shorten(topology)!r}: {shorten(first_line(error))}") from None


def out_of_memory(error: BaseException) -> int | None:
    """Bytes that a program would have needed which the compiler refused for want of HBM; None for any other error."""
    found = re.search(r"\(([\d.]+)([KMGTPE])\) exceeds available HBM|Used ([\d.]+)([KMGTPE]) of", str(error))
    if not found:
        return None
    number, unit = filter(None, found.groups())
    return int(float(number) * 1024 ** (1 + "KMGTPE".index(unit)))


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
