"""The plan of a whole run: its batch, whether the step fits, what would make it fit, how long the run is at least.

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
from train.drawn import drawn_data
from train.loader import Data, check_batch, open_data
from train.optim import check_rates

MOST_SLICES = 3  # larger slices that are compiled for

PlanStep = Callable[[LlavaConfig, TrainConfig, Mesh, str, int, int, int], tuple[Plan, Compiled]]


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Batches of a run.

    rows           of a global batch
    rows_at_once   of each shard of rows (a chip, or `tensor` chips), in one of the accumulated parts
    length, tiles  of a row; of bucketed batches, of the largest
    conversations  of a batch, about
    tokens         positions in use of a batch, about
    data           where the lengths are from
    examples       conversations of the data
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
    """A way to run it: flags beside those given, and what the compiler says (`made` None: nothing yet)."""

    flags: str
    topology: str
    config: TrainConfig
    mesh: Mesh
    batch: BatchPlan
    needs: Plan
    made: Compiled | None


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
      tokenizer: of the checkpoint; needed where there is data.
      default: the mesh of devices, where none is named.
      plan_step: `train.plan.plan_step`.

    Raises:
      InputError: it does not fit, or training would refuse it.
    """
    check_batch(config, mesh)
    with contextlib.closing(open_lengths(config, model, tokenizer, mesh, args.examples)) as data:
        check_rates(config, plan_batch(data, config, mesh).steps, data.wanted)
        plan_with = functools.partial(plan_choice, args, model, data, plan_step)
        asked = plan_with("", config, mesh, tpu.by_sides(args.topology))
        found = None if asked.needs.fits else what_fits(asked, plan_with, default, model, args.mesh, args.slices)
    show_run(args, asked, found)
    if not asked.needs.fits:
        tpu_plan.check_fits(asked.needs, args.topology, advice(asked, found, args.slices))
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
    """Compile the step of one way to run it."""
    batch = plan_batch(data, config, mesh)
    rows = batch.rows // row_multiple(mesh)
    slices = f"{args.slices} x " if args.slices > 1 else ""
    tpu_plan.note_compiling(
        f"{args.model or config.checkpoint}, {args.preset}, {slices}{topology}, mesh {tpu_plan.describe(mesh)}, "
        f"remat {config.remat}, {rows} x {row_multiple(mesh)} rows of {batch.length:,} positions and "
        f"{plural(batch.tiles, 'tile')}" + (f" in {config.accumulate} parts" if config.accumulate > 1 else "")
    )
    needs, made = plan_step(model, config, mesh, topology, rows, batch.length, batch.tiles)
    says = "fits" if needs.fits else "does not fit"
    note(f"{says}: {needs.peak_bytes_per_chip / 1e9:.1f} of {needs.hbm_bytes_per_chip / 1e9:.1f} GB a chip")
    return Choice(flags, topology, config, mesh, batch, needs, made)


# ---------------------------------------------------------------- the batch


def open_lengths(
    config: TrainConfig, model: LlavaConfig, tokenizer: Tokenizer | None, mesh: Mesh, examples: int | None
) -> Data:
    """The run's data; without `--data`, conversations of assumed lengths.

    Args:
      examples: the number of the latter; None: as many as the stage's data has.
    """
    multiple = row_multiple(mesh) * config.accumulate
    if config.data:
        assert tokenizer is not None  # as `open_model` sees to
        return open_data(config.replace(output=""), model, tokenizer, rows_multiple=multiple)
    return drawn_data(config, model, multiple, examples)


def plan_batch(data: Data, config: TrainConfig, mesh: Mesh) -> BatchPlan:
    """The batches that training would make of the data on this mesh."""
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


# ---------------------------------------------------------------- how long it takes


def more_bounds(made: Compiled, config: TrainConfig, slices: int) -> dict[str, float] | None:
    """Bounds beside the roofline's, by name."""
    return {"between slices": between_slices(made, config, slices)} if slices > 1 and made.out else None


def between_slices(made: Compiled, config: TrainConfig, slices: int) -> float:
    """Seconds in which gradients are summed over slices: each chip its part, sent and received once."""
    parts = jax.tree.leaves(made.out[0].trained)
    size = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in parts)
    size *= np.dtype(config.reduce_dtype or config.dtype).itemsize
    return 2 * size * (slices - 1) / slices / tpu.DCN


def least_hours(choice: Choice, slices: int) -> float | None:
    """Of the run, if each step took no longer than the roofline allows; None where the work is not known."""
    if choice.made is None or choice.made.work is None:
        return None
    bounds = tpu.roofline(choice.made.work, choice.topology)
    bounds |= more_bounds(choice.made, choice.config, slices) or {}
    return choice.batch.steps * max(bounds.values()) / 3600


# ---------------------------------------------------------------- what would fit


def what_fits(
    asked: Choice,
    plan_with: PlanWith,
    default: Callable[[list], Mesh],
    model: LlavaConfig,
    mesh_flag: str | None,
    slices: int,
) -> Choice | None:
    """The nearest to what was asked that fits: less kept for the backward pass, more parts, another mesh on the same
    slice, a larger slice. Each is compiled."""
    config, mesh, topology = asked.config, asked.mesh, asked.topology
    if config.remat != "full":
        less = plan_with("--remat full", config.replace(remat="full"), mesh, topology)
        if less.needs.fits:
            return less
        asked, config = less, less.config
    if found := more_parts(asked, plan_with):
        return found
    for sizes in other_meshes(model, mesh, slices):
        other = make_mesh(sizes, list(mesh.devices.flat))
        flags = " ".join(filter(None, (asked.flags, f"--mesh {tpu_plan.describe(other)}")))
        if config.global_batch_size % row_multiple(other) == 0:
            tried = dataclasses.replace(asked, flags=flags, mesh=other, made=None)
            if found := more_parts(tried, plan_with):
                return found
    if mesh_flag:
        return None
    return larger_slice(asked, plan_with, default, slices)


def more_parts(asked: Choice, plan_with: PlanWith) -> Choice | None:
    """The fewest accumulated parts that fit, if any do."""
    rows = -(-asked.batch.rows // row_multiple(asked.mesh))  # of a shard
    numbers = [
        n
        for n in numbers_of_parts(rows)
        if n >= asked.config.accumulate and (n > asked.config.accumulate or asked.made is None)
    ]

    def plan_parts(parts: int) -> Choice | None:
        flags = " ".join(filter(None, (asked.flags, f"--accumulate {parts}" if parts > 1 else "")))
        tried = plan_with(flags, asked.config.replace(accumulate=parts), asked.mesh, asked.topology)
        return tried if tried.needs.fits else None

    found = plan_parts(numbers[-1]) if numbers else None  # if that does not fit, no number does
    fewest, most = 0, len(numbers) - 1
    while found and fewest < most:
        middle = (fewest + most) // 2
        if fits := plan_parts(numbers[middle]):
            found, most = fits, middle
        else:
            fewest = middle + 1
    return found


def numbers_of_parts(rows: int) -> list[int]:
    """ceil(rows / n) of all n from 1 to `rows`, each once, from 1 on: so many parts have n rows each, or the last one
    fewer. About twice the square root of `rows` are different."""
    small = range(1, min(math.isqrt(rows) + 1, rows) + 1)
    return sorted({-(-rows // n) for n in small} | {n for n in small if -(-rows // -(-rows // n)) == n})


def other_meshes(model: LlavaConfig, mesh: Mesh, slices: int) -> Iterator[dict[str, int]]:
    """That hold fewer bytes a chip: no copies but between slices, and layers sharded in two."""
    for tensor in (1, 2):
        sizes = {DATA: slices, FSDP: mesh.size // slices // tensor, TENSOR: tensor}
        held = mesh.shape[FSDP] * mesh.shape[TENSOR], mesh.shape[TENSOR]
        if (sizes[FSDP] * tensor, tensor) > held and sizes[FSDP] and model.text.kv_heads % tensor == 0:
            yield sizes


def larger_slice(asked: Choice, plan_with: PlanWith, default: Callable, slices: int) -> Choice | None:
    """The smallest slice of the same chips that fits. One that cannot, by what its chips hold, is not compiled for."""
    needs = asked.needs
    held = (needs.parameter_bytes_per_chip + needs.optimizer_bytes_per_chip) * asked.mesh.size
    rest = (needs.peak_bytes_per_chip - held / asked.mesh.size) / asked.batch.rows_at_once
    tried = 0
    for topology in tpu.larger_slices(asked.topology):
        if held / (tpu.device_count(topology) * slices) + rest / 2 > needs.hbm_bytes_per_chip:
            continue
        mesh = tpu_plan.mesh_of(None, default, topology, slices)
        if asked.config.global_batch_size % row_multiple(mesh) or tried == MOST_SLICES:
            return None
        found = plan_with(asked.flags, asked.config, mesh, topology)
        if found.needs.fits:
            return found
        if more := more_parts(found, plan_with):
            return more
        tried += 1
    return None


# ---------------------------------------------------------------- what is shown


def show_run(args: argparse.Namespace, asked: Choice, found: Choice | None) -> None:
    """Print the plan, as a table or as JSON; `found` is what fits instead, if anything was found."""
    if args.json:
        fits_with = found and describe(found, args.slices)
        print(json.dumps(describe(asked, args.slices) | {"fits_with": fits_with}))
        return
    config = asked.config
    assert asked.made is not None
    what = args.model or config.checkpoint
    title = f"{what}, {args.preset}, {name_of(asked, args.slices)}, remat {config.remat}"
    tpu_plan.show(asked.needs, asked.made, args.topology, title, more_bounds(asked.made, config, args.slices))
    for name, text in lines(asked, args.slices):
        print(f"  {name:36}{text}")


def name_of(choice: Choice, slices: int) -> str:
    """The slice, and its mesh."""
    name = tpu.slice_name(choice.topology)
    named = f" ({name})" if name else ""
    return f"{f'{slices} x ' if slices > 1 else ''}{choice.topology}{named}, mesh {tpu_plan.describe(choice.mesh)}"


def lines(choice: Choice, slices: int) -> Iterator[tuple[str, str]]:
    """What is added to the table of a step."""
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
    if hours := least_hours(choice, slices):
        chips = hours * choice.mesh.size / tpu.CHIPS[tpu.parse_topology(choice.topology)[0]].cores
        run += f", at least {hours:.3g} hours ({chips:.3g} of chips): the roofline's bound, not measured"
    yield "run", run
    yield "fits", "yes" if choice.needs.fits else "no"


def advice(asked: Choice, found: Choice | None, slices: int) -> str:
    """What would make it fit, in one line."""
    if found is None:
        return "nor would more --accumulate, nor a larger slice of such chips: take chips with more memory"
    batch, hours, name = found.batch, least_hours(found, slices), tpu.slice_name(found.topology)
    what = [found.flags] if found.flags else []
    if found.topology != asked.topology:
        what.append(f"--topology {found.topology}" + (f" ({name})" if name else ""))
    return (
        f"what would: {' '.join(what)}, {found.needs.peak_bytes_per_chip / 1e9:.1f} GB a chip, "
        f"{plural(batch.rows_at_once, 'row')} at once, about {batch.conversations:.0f} conversations a batch"
        + (f", at least {hours:.3g} hours" if hours else "")
    )


def describe(choice: Choice, slices: int) -> dict[str, Any]:
    """What `--json` prints of it."""
    return dataclasses.asdict(choice.needs) | {
        "flags": choice.flags,
        "topology": choice.topology,
        "slice": tpu.slice_name(choice.topology),
        "mesh": tpu_plan.describe(choice.mesh),
        "accumulate": choice.config.accumulate,
        "batch": dataclasses.asdict(choice.batch),
        "least_hours": least_hours(choice, slices),
    }
