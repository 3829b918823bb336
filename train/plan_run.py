"""Plan a whole run: its batch, whether the step fits, what would fit instead, and the minimum hours of the run.

`train.plan` is the command.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llava_jax.aot import tpu, tpu_plan
from llava_jax.aot.tpu_plan import Compiled, Plan
from llava_jax.config import LlavaConfig
from llava_jax.console import note, plural
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.sharding.mesh import DATA, FSDP, TENSOR, make_mesh, row_multiple
from train.config import TrainConfig
from train.loader import Data, check_batch, open_data
from train.optim import check_rates
from train.synthetic_data import drawn_data

MAX_SLICES = 3  # larger slices to compile for, at most

PlanStep = Callable[[LlavaConfig, TrainConfig, Mesh, str, int, int, int], tuple[Plan, Compiled]]


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Batches of a run.

    rows           of a global batch
    rows_at_once   of each shard of rows (a chip, or `tensor` chips), in one accumulated part
    length, tiles  of a row; for bucketed batches, of the largest row
    conversations  per batch, estimated
    tokens         positions in use per batch, estimated
    data           the source of the lengths
    examples       number of conversations in the data
    steps          of the run
    """

    rows: int
    rows_at_once: int
    length: int
    tiles: int
    conversations: float
    tokens: float
    data: str
    examples: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way to run it: additional flags, and the plan (`compiled` is None if nothing is compiled for it yet)."""

    flags: str
    topology: str
    config: TrainConfig
    mesh: Mesh
    batch: BatchPlan
    plan: Plan
    compiled: Compiled | None


PlanWith = Callable[[str, TrainConfig, Mesh, str], Choice]  # flags, configuration, mesh, topology


def plan_run(
    args: argparse.Namespace,
    config: TrainConfig,
    model: LlavaConfig,
    tokenizer: Tokenizer | None,
    mesh: Mesh,
    default: Callable[[list], Mesh],
    plan_step: PlanStep,
) -> int:
    """Plan what `python -m train` would run.

    Args:
      args: `model`, `preset`, `topology`, `slices`, `mesh`, `examples`, `json`.
      model: with the run's image settings.
      tokenizer: the checkpoint's; needed with `--data`.
      default: makes the mesh of devices if no flag names one.
      plan_step: `train.plan.plan_step`.

    Raises:
      InputError: the step does not fit, or training would refuse the run.
    """
    check_batch(config, mesh)
    with contextlib.closing(open_lengths(config, model, tokenizer, mesh, args.examples)) as data:
        check_rates(config, plan_batch(data, config, mesh).steps, data.wanted)
        plan_with = functools.partial(plan_choice, args, model, data, plan_step)
        requested = plan_with("", config, mesh, tpu.by_sides(args.topology))
        fits = requested.plan.fits
        found = None if fits else what_fits(requested, plan_with, default, model, args.mesh, args.slices)
    show_run(args, requested, found)
    if not fits:
        tpu_plan.check_fits(requested.plan, args.topology, advice(requested, found, args.slices))
    return 0


def plan_choice(
    args: argparse.Namespace,
    model: LlavaConfig,
    data: Data,
    plan_step: PlanStep,
    flags: str,
    config: TrainConfig,
    mesh: Mesh,
    topology: str,
) -> Choice:
    """Compile the step of one choice."""
    batch = plan_batch(data, config, mesh)
    rows = batch.rows // row_multiple(mesh)
    slices = f"{args.slices} x " if args.slices > 1 else ""
    tpu_plan.note_compiling(
        f"{args.model or config.checkpoint}, {args.preset}, {slices}{topology}, mesh {tpu_plan.describe(mesh)}, "
        f"remat {config.remat}, {rows} x {row_multiple(mesh)} rows of {batch.length:,} positions and "
        f"{plural(batch.tiles, 'tile')}" + (f" in {config.accumulate} parts" if config.accumulate > 1 else "")
    )
    plan, compiled = plan_step(model, config, mesh, topology, rows, batch.length, batch.tiles)
    result = "fits" if plan.fits else "does not fit"
    note(f"{result}: {plan.peak_bytes_per_chip / 1e9:.1f} of {plan.hbm_bytes_per_chip / 1e9:.1f} GB per chip")
    return Choice(flags, topology, config, mesh, batch, plan, compiled)


# ---------------------------------------------------------------- the batch


def open_lengths(
    config: TrainConfig, model: LlavaConfig, tokenizer: Tokenizer | None, mesh: Mesh, examples: int | None
) -> Data:
    """The run's data; without `--data`, conversations of assumed lengths.

    Args:
      examples: the number of assumed conversations; None: that of the stage's own data.
    """
    multiple = row_multiple(mesh) * config.accumulate
    if config.data:
        assert tokenizer is not None  # `open_model` checks it
        return open_data(config.replace(output=""), model, tokenizer, rows_multiple=multiple)
    return drawn_data(config, model, multiple, examples)


def plan_batch(data: Data, config: TrainConfig, mesh: Mesh) -> BatchPlan:
    """The batches that training makes of the data on this mesh."""
    multiple = row_multiple(mesh) * config.accumulate
    data.resize(multiple)
    found, (length, tiles) = data.estimate(), data.largest_shape()
    return BatchPlan(
        rows=data.rows,
        rows_at_once=data.rows // multiple,
        length=length,
        tiles=tiles,
        conversations=found["conversations"],
        tokens=found["tokens"],
        data=data.samples.path,
        examples=len(data.samples),
        steps=data.total_steps,
    )


# ---------------------------------------------------------------- time


def more_bounds(compiled: Compiled, config: TrainConfig, slices: int) -> dict[str, float] | None:
    """Bounds beside the roofline's, by name."""
    return {"between slices": between_slices(compiled, config, slices)} if slices > 1 and compiled.out else None


def between_slices(compiled: Compiled, config: TrainConfig, slices: int) -> float:
    """Seconds of the all-reduce of gradients between slices: each chip sends and receives its shard once."""
    parts = jax.tree.leaves(compiled.out[0].trained)
    size = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in parts)
    size *= np.dtype(config.reduce_dtype or config.dtype).itemsize
    return 2 * size * (slices - 1) / slices / tpu.DCN


def min_hours(choice: Choice, slices: int) -> float | None:
    """Hours of the run with every step at the roofline; None if the program's work is unknown."""
    if choice.compiled is None or choice.compiled.work is None:
        return None
    bounds = tpu.roofline(choice.compiled.work, choice.topology)
    bounds |= more_bounds(choice.compiled, choice.config, slices) or {}
    return choice.batch.steps * max(bounds.values()) / 3600


# ---------------------------------------------------------------- what would fit


def what_fits(
    requested: Choice,
    plan_with: PlanWith,
    default: Callable[[list], Mesh],
    model: LlavaConfig,
    mesh_flag: str | None,
    slices: int,
) -> Choice | None:
    """Compile alternatives, and return the first that fits: full remat, more accumulated parts, another mesh on the
    same slice, a larger slice."""
    config, mesh, topology = requested.config, requested.mesh, requested.topology
    if config.remat != "full":
        less = plan_with("--remat full", config.replace(remat="full"), mesh, topology)
        if less.plan.fits:
            return less
        requested, config = less, less.config
    if found := more_parts(requested, plan_with):
        return found
    for sizes in other_meshes(model, mesh, slices):
        other = make_mesh(sizes, list(mesh.devices.flat))
        flags = " ".join(filter(None, (requested.flags, f"--mesh {tpu_plan.describe(other)}")))
        if config.global_batch_size % row_multiple(other) == 0:
            tried = dataclasses.replace(requested, flags=flags, mesh=other, compiled=None)
            if found := more_parts(tried, plan_with):
                return found
    if mesh_flag:
        return None
    return larger_slice(requested, plan_with, default, slices)


def more_parts(requested: Choice, plan_with: PlanWith) -> Choice | None:
    """The choice with the fewest accumulated parts that fits, if any does."""
    rows = -(-requested.batch.rows // row_multiple(requested.mesh))  # per shard
    numbers = [
        n
        for n in numbers_of_parts(rows)
        if n >= requested.config.accumulate and (n > requested.config.accumulate or requested.compiled is None)
    ]

    def plan_parts(parts: int) -> Choice | None:
        flags = " ".join(filter(None, (requested.flags, f"--accumulate {parts}" if parts > 1 else "")))
        tried = plan_with(flags, requested.config.replace(accumulate=parts), requested.mesh, requested.topology)
        return tried if tried.plan.fits else None

    found = plan_parts(numbers[-1]) if numbers else None  # if the largest number does not fit, none does
    fewest, most = 0, len(numbers) - 1
    while found and fewest < most:
        middle = (fewest + most) // 2
        if fits := plan_parts(numbers[middle]):
            found, most = fits, middle
        else:
            fewest = middle + 1
    return found


def numbers_of_parts(rows: int) -> list[int]:
    """The distinct values of ceil(rows / n), ascending: the numbers of parts that `rows` can be divided into, with a
    last part that may be smaller. There are about 2 sqrt(rows)."""
    small = range(1, min(math.isqrt(rows) + 1, rows) + 1)
    return sorted({-(-rows // n) for n in small} | {n for n in small if -(-rows // -(-rows // n)) == n})


def other_meshes(model: LlavaConfig, mesh: Mesh, slices: int) -> Iterator[dict[str, int]]:
    """Meshes that need less memory per chip: replicated only between slices, with `tensor` 1 or 2."""
    for tensor in (1, 2):
        sizes = {DATA: slices, FSDP: mesh.size // slices // tensor, TENSOR: tensor}
        held = mesh.shape[FSDP] * mesh.shape[TENSOR], mesh.shape[TENSOR]
        if (sizes[FSDP] * tensor, tensor) > held and sizes[FSDP] and model.text.kv_heads % tensor == 0:
            yield sizes


def larger_slice(requested: Choice, plan_with: PlanWith, default: Callable, slices: int) -> Choice | None:
    """The smallest slice of the same chips that fits. Slices too small for parameters and optimizer are skipped."""
    plan = requested.plan
    held = (plan.parameter_bytes_per_chip + plan.optimizer_bytes_per_chip) * requested.mesh.size
    rest = (plan.peak_bytes_per_chip - held / requested.mesh.size) / requested.batch.rows_at_once
    tried = 0
    for topology in tpu.larger_slices(requested.topology):
        if held / (tpu.device_count(topology) * slices) + rest / 2 > plan.hbm_bytes_per_chip:
            continue
        mesh = tpu_plan.mesh_of(None, default, topology, slices)
        if requested.config.global_batch_size % row_multiple(mesh) or tried == MAX_SLICES:
            return None
        found = plan_with(requested.flags, requested.config, mesh, topology)
        if found.plan.fits:
            return found
        if more := more_parts(found, plan_with):
            return more
        tried += 1
    return None


# ---------------------------------------------------------------- output


def show_run(args: argparse.Namespace, requested: Choice, found: Choice | None) -> None:
    """Print the plan as a table or as JSON; `found` is the alternative that fits, if any."""
    if args.json:
        fits_with = found and describe(found, args.slices)
        print(json.dumps(describe(requested, args.slices) | {"fits_with": fits_with}))
        return
    config = requested.config
    assert requested.compiled is not None
    what = args.model or config.checkpoint
    title = f"{what}, {args.preset}, {name_of(requested, args.slices)}, remat {config.remat}"
    bounds = more_bounds(requested.compiled, config, args.slices)
    tpu_plan.show(requested.plan, requested.compiled, args.topology, title, bounds)
    for name, text in lines(requested, args.slices):
        print(f"  {name:36}{text}")


def name_of(choice: Choice, slices: int) -> str:
    """The slice, and its mesh."""
    name = tpu.slice_name(choice.topology)
    named = f" ({name})" if name else ""
    return f"{f'{slices} x ' if slices > 1 else ''}{choice.topology}{named}, mesh {tpu_plan.describe(choice.mesh)}"


def lines(choice: Choice, slices: int) -> Iterator[tuple[str, str]]:
    """The lines about the run, after the table of the step."""
    batch, config = choice.batch, choice.config
    parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
    yield (
        "batch",
        f"{plural(batch.rows, 'row')}{parts}, {batch.rows_at_once} x {row_multiple(choice.mesh)} at once, of "
        f"{batch.length:,} positions and {plural(batch.tiles, 'tile')}: about {batch.conversations:.0f} conversations "
        f"(--global-batch-size {config.global_batch_size})",
    )
    if config.data:
        yield "data", f"{batch.examples:,} conversations of {batch.data}"
    else:
        yield (
            "data",
            f"an assumption: {batch.examples:,} conversations, {batch.data} (--examples, or --data and --checkpoint)",
        )
    run = f"{plural(batch.steps, 'step')}, {batch.steps * batch.tokens:.3g} tokens"
    if hours := min_hours(choice, slices):
        chips = hours * choice.mesh.size / tpu.CHIPS[tpu.parse_topology(choice.topology)[0]].cores
        run += f", at least {hours:.3g} hours ({chips:.3g} of chips): the roofline's bound, not measured"
    yield "run", run
    if config.eval_benchmarks:
        yield "evaluation", "a copy of the model, and the KV cache of --eval-batch-size questions, are not counted"
    yield "fits", "yes" if choice.plan.fits else "no"


def advice(requested: Choice, found: Choice | None, slices: int) -> str:
    """Advice on how to make the step fit, in one line."""
    if found is None:
        return "neither more --accumulate nor a larger slice of these chips helps: take chips with more memory"
    batch, hours, name = found.batch, min_hours(found, slices), tpu.slice_name(found.topology)
    what = [found.flags] if found.flags else []
    if found.topology != requested.topology:
        what.append(f"--topology {found.topology}" + (f" ({name})" if name else ""))
    return (
        f"try {' '.join(what)}, {found.plan.peak_bytes_per_chip / 1e9:.1f} GB per chip, "
        f"{plural(batch.rows_at_once, 'row')} at once, about {batch.conversations:.0f} conversations a batch"
        + (f", at least {hours:.3g} hours" if hours else "")
    )


def describe(choice: Choice, slices: int) -> dict[str, Any]:
    """A choice as `--json` prints it."""
    return dataclasses.asdict(choice.plan) | {
        "flags": choice.flags,
        "topology": choice.topology,
        "slice": tpu.slice_name(choice.topology),
        "mesh": tpu_plan.describe(choice.mesh),
        "accumulate": choice.config.accumulate,
        "batch": dataclasses.asdict(choice.batch),
        "least_hours": min_hours(choice, slices),
    }
