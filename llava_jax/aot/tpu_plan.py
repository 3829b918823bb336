"""Per-chip memory, FLOPs and bytes sent of a program on a TPU slice: compiled from shapes, shown as a table or JSON.

`train.plan` and `infer.plan` choose what to compile.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from llava_jax.aot import hlo, tpu
from llava_jax.config import LlavaConfig, preset
from llava_jax.console import InputError, note
from llava_jax.sharding.mesh import DATA, FSDP, TENSOR, make_mesh, parse_mesh


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes and FLOPs of one chip, or, for v7x, of one of its two cores. None: the program is too large to compile, or
    libtpu does not dump it.

    peak_bytes_per_chip     arguments, results, temporaries and the program itself
    hbm_bytes_per_chip      available to a program
    model_flops_per_chip    without recomputation
    collective_bytes_per_chip  sent to other chips, by kind
    least_collective_bytes_per_chip  the minimum that this sharding of parameters and activations has to send
    moved_bytes_per_chip    read from and written to HBM
    least_moved_bytes_per_chip  the minimum, where it is known
    """

    fits: bool
    peak_bytes_per_chip: int
    hbm_bytes_per_chip: int
    parameter_bytes_per_chip: int
    optimizer_bytes_per_chip: int
    executed_flops_per_chip: float | None
    model_flops_per_chip: float
    collective_bytes_per_chip: dict[str, float] | None
    least_collective_bytes_per_chip: float
    compile_seconds: float
    moved_bytes_per_chip: float | None = None
    least_moved_bytes_per_chip: float | None = None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled function. `memory` is None if it needs more than a chip has (`peak` bytes); `work` alone is None if
    libtpu does not dump programs."""

    seconds: float
    peak: int
    memory: tpu.Memory | None = None
    work: hlo.Work | None = None
    out: Any = None  # shapes and shardings of the outputs


def too_large(batch: Any, held: int, hbm: int) -> Compiled | None:
    """A result without compilation for a function whose batch alone exceeds a chip's memory; None if it does not.

    The compiler fails on batches that are far too large.

    Args:
      batch: a tree of shapes with shardings.
      held: bytes of the other arguments on a chip.
      hbm: bytes available to a program.
    """
    size = per_chip(batch)
    return Compiled(0.0, size + held) if size > hbm else None


def compile_for_tpu(lowered, unknown_trips: int | None = None) -> Compiled:
    """Compile a `jax.stages.Lowered`, and read its memory and work."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as written, without_cache():
        try:
            compiled = lowered.compile({"xla_dump_to": written, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            needed = tpu.out_of_memory(error)
            if needed is None:
                raise
            return Compiled(time.perf_counter() - start, needed)
        seconds = time.perf_counter() - start
        # `compiled.as_text()` is the same text, but fails for whole training steps on v5p and v6e with libtpu 0.0.52.
        texts = [file.read_text() for file in Path(written).glob("*.after_codegen.txt")]
    work = hlo.Program(max(texts, key=len), unknown_trips).work if texts else None
    if work is None:
        note("this version of libtpu does not dump programs: FLOPs and bytes sent are unknown")
    memory = tpu.memory(compiled)
    out = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info,
        compiled.output_shardings,
    )
    return Compiled(seconds, memory.peak, memory, work, out)


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Disable JAX's persistent cache: it stores programs for absent TPUs but cannot load them, and a cached program is
    neither compiled, nor timed, nor dumped."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]  # options are set at run time
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX checks only once whether the cache is enabled
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


# ---------------------------------------------------------------- flags


def add_flags(p: argparse.ArgumentParser, model_is_needed: bool = True) -> None:
    p.add_argument(
        "--model",
        required=model_is_needed,
        metavar="NAME",
        help="a model such as llava-v1.5-7b, or a checkpoint's directory",
    )
    p.add_argument(
        "--topology", required=True, metavar="SLICE", help="v5e:8x8, v5p:2x2x4, ..., or v5litepod-64, v5p-32, ..."
    )
    p.add_argument("--mesh", metavar="AXES", help="fsdp=64; data=2,fsdp=16,tensor=2")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def model_of(name: str) -> LlavaConfig:
    """The configuration of a model by name, or of a checkpoint's directory."""
    if os.path.isdir(name):
        from llava_jax.checkpoints.checkpoint import open_checkpoint

        return open_checkpoint(name).config
    return preset(name)


def mesh_of(text: str | None, default: Callable[[list], Mesh], topology: str, slices: int = 1) -> Mesh:
    """The mesh `text` over a slice's chips, or `default(devices)`. Keeps JAX from using this machine's accelerators."""
    sizes = parse_mesh(text) if text else None
    jax.config.update("jax_platforms", "cpu")
    devices = tpu.slice_devices(topology, slices)
    return make_mesh(sizes, devices) if sizes else default(devices)


def per_chip(tree: Any) -> int:
    """Bytes per device of a tree of arrays or shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# ---------------------------------------------------------------- output


def show(plan: Plan, compiled: Compiled, topology: str, title: str, more: dict[str, float] | None = None) -> None:
    """Print the table.

    Args:
      more: further bounds by name, in seconds.
    """
    gb = lambda n: f"{n / 1e9:,.2f} GB"  # noqa: E731
    chip = tpu.CHIPS[tpu.parse_topology(topology)[0]]
    rows = [
        ("parameters", gb(plan.parameter_bytes_per_chip)),
        ("optimizer", gb(plan.optimizer_bytes_per_chip)) if plan.optimizer_bytes_per_chip else None,
        ("activations and other temporaries", gb(compiled.memory.temporaries)) if compiled.memory else None,
        (
            "peak",
            f"{gb(plan.peak_bytes_per_chip)} of {gb(plan.hbm_bytes_per_chip)} "
            f"({plan.peak_bytes_per_chip / plan.hbm_bytes_per_chip:.0%})",
        ),
        ("model's FLOPs", f"{plan.model_flops_per_chip:.4g}"),
    ]
    if compiled.work:
        total = sum(compiled.work.collectives.values())
        kinds = ", ".join(f"{kind} {gb(n)}" for kind, n in compiled.work.collectives.items() if n >= 1e6)
        least = plan.least_collective_bytes_per_chip
        over = f"{total / least:.2f} times the minimum" if least else ""
        moved, least_moved = compiled.work.hbm_bytes, plan.least_moved_bytes_per_chip
        bounds = tpu.roofline(compiled.work, topology) | (more or {})
        slowest = max(bounds, key=bounds.__getitem__)
        useful = plan.model_flops_per_chip / chip.peak / bounds[slowest]
        rows += [
            (
                "executed FLOPs",
                f"{compiled.work.flops:.4g}, {compiled.work.flops / plan.model_flops_per_chip:.3f} times the model's",
            ),
            ("sent to other chips", gb(total) + (f" ({', '.join(filter(None, (kinds, over)))})" if total else "")),
            ("HBM", f"{gb(moved)}, {moved / least_moved:.3f} times the minimum") if least_moved else None,
            ("roofline", ", ".join(f"{name} {1000 * s:.1f} ms" for name, s in bounds.items())),
            ("bound by", f"{slowest}: MFU is at most {useful:.0%}"),
        ]
    rows.append(("compiled in", f"{plan.compile_seconds:.0f} s"))
    print(title + (f" (figures of one of a chip's {chip.cores} cores)" if chip.cores > 1 else ""))
    for row in filter(None, rows):
        print(f"  {row[0]:36}{row[1]}")


def check_fits(plan: Plan, topology: str, advice: str) -> None:
    """Raises:
    InputError: the plan does not fit.
    """
    if not plan.fits:
        raise InputError(
            f"does not fit: {plan.peak_bytes_per_chip / 1e9:.1f} GB per chip, {topology} has "
            f"{plan.hbm_bytes_per_chip / 1e9:.1f}; {advice}"
        )


def note_compiling(title: str) -> None:
    note(f"compiling {title}; this takes a minute or more")


def describe(mesh: Mesh) -> str:
    return ",".join(f"{axis}={mesh.shape[axis]}" for axis in (DATA, FSDP, TENSOR) if mesh.shape[axis] > 1) or "fsdp=1"
