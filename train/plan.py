"""Plan a run of `python -m train` on a TPU slice from its compiled step. Needs no TPU and no weights.

    python -m train.plan --model llava-v1.5-7b --preset v1.5-finetune --topology v5e:8x8

takes the flags of `python -m train`, and compiles the step that the run would execute: its batch comes from `--data`,
or has lengths like those of LLaVA's own data, and all positions are labelled. Prints memory, FLOPs and bytes sent per
chip and the minimum hours of the run; if the step does not fit, prints what would, with exit status 1.
`--rows-per-chip` compiles a step of that many full rows, whatever the batch.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Sequence

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from llava_jax.aot import tpu, tpu_plan
from llava_jax.aot.flops import step_flops
from llava_jax.aot.tpu_plan import Compiled, Plan
from llava_jax.checkpoints.checkpoint import open_checkpoint
from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, Parser, integer, note, ranges, run_main
from llava_jax.data.images import max_tiles
from llava_jax.data.splice import Batch
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.models import llava
from llava_jax.models.layers import REMAT
from llava_jax.sharding.mesh import DATA, FSDP, TENSOR, make_mesh, row_multiple
from llava_jax.sharding.partition import batch_sharding
from train.__main__ import add_fields, config_of
from train.config import PRESETS, TrainConfig, check_preset
from train.plan_run import between_slices, more_bounds, plan_run
from train.step import TrainState, setup

POLICIES = tuple(reversed(REMAT))  # each saves fewer activations than the previous one
MAX_ROWS = 16  # per chip, in a search
BEST = 5  # choices that a search prints
STEPS = 1000  # of the schedule that is compiled in; the number does not change the program


def parser() -> Parser:
    p = Parser(
        prog="python -m train.plan", description="Memory, FLOPs and bytes sent of training per chip of a TPU slice."
    )
    tpu_plan.add_flags(p, model_is_needed=False)
    p.add_argument(
        "--preset", metavar="NAME",
        help=f"the stage: {', '.join(PRESETS)}; default: full fine-tuning of the model's version, with the "
        "checkpoint's own template and images",
    )  # fmt: skip
    p.add_argument(
        "--slices", type=integer(1, 1024), default=1, metavar="N", help="number of slices, data parallel between them"
    )
    p.add_argument(
        "--examples", type=integer(1, 10**7), metavar="N", help="number of conversations to assume without --data"
    )
    p.add_argument(
        "--rows-per-chip", type=integer(1, 2**16), metavar="N",
        help="compile this many full rows per chip (or per `tensor` chips), whatever the batch",
    )  # fmt: skip
    p.add_argument(
        "--seq", type=ranges(TrainConfig)["max_length"], metavar="N", help="sets --max-length and --positions-per-row"
    )
    p.add_argument(
        "--search", action="store_true",
        help="compile many meshes, remat policies and rows per chip, and print the best that fit",
    )  # fmt: skip
    add_fields(p.add_argument_group("the run, as for python -m train"), known=("mesh",))
    return p


def batch_shapes(model: LlavaConfig, mesh: Mesh, rows: int, length: int, tiles: int) -> Batch:
    """The shapes of a global batch, sharded by rows."""
    side, sharding = model.vision.image_size, batch_sharding(mesh)
    ids = jax.ShapeDtypeStruct((rows, length), np.int32, sharding=sharding)
    return Batch(jax.ShapeDtypeStruct((rows, tiles, side, side, 3), np.uint8, sharding=sharding), *[ids] * 5)


def default_tiles(model: LlavaConfig, length: int) -> int:
    """The number of tiles whose features fill a row, but at least those of one image."""
    return max(max_tiles(model), length // model.vision.features_per_tile)


def plan_step(
    model: LlavaConfig, config: TrainConfig, mesh: Mesh, topology: str, rows: int, length: int, tiles: int
) -> tuple[Plan, Compiled]:
    """Compile the step for `rows` rows per shard of rows, each of `length` positions and `tiles` tiles."""
    frozen, state, step, _ = setup(llava.param_shapes(model), model, config, mesh, STEPS)
    rows *= row_multiple(mesh)
    batch = batch_shapes(model, mesh, rows, length, tiles)
    hbm = tpu.CHIPS[tpu.parse_topology(topology)[0]].hbm
    parameters, optimizer = tpu_plan.per_chip((frozen, state.trained)), tpu_plan.per_chip(state.opt_state)
    compiled = tpu_plan.too_large(batch, parameters + optimizer, hbm) or tpu_plan.compile_for_tpu(
        step.lower(frozen, state, batch)
    )
    return Plan(
        fits=compiled.memory is not None and compiled.peak <= hbm,
        peak_bytes_per_chip=compiled.peak,
        hbm_bytes_per_chip=hbm,
        parameter_bytes_per_chip=parameters,
        optimizer_bytes_per_chip=optimizer,
        executed_flops_per_chip=compiled.work.flops if compiled.work else None,
        model_flops_per_chip=step_flops(model, config.tune, rows, length, tiles) / mesh.size,
        collective_bytes_per_chip=compiled.work.collectives if compiled.work else None,
        least_collective_bytes_per_chip=min_collective_bytes(frozen, state, model, config, mesh, rows, length, tiles),
        compile_seconds=round(compiled.seconds, 1),
    ), compiled


def min_collective_bytes(
    frozen: dict,
    state: TrainState,
    model: LlavaConfig,
    config: TrainConfig,
    mesh: Mesh,
    rows: int,
    length: int,
    tiles: int,
) -> float:
    """The minimum that each chip sends in a step, given how arrays are sharded.

    Along `fsdp`, an all-gather of the parameters, a second one for layers that the backward pass recomputes, and a
    reduce-scatter of the gradients; along `data`, an all-reduce of the gradients; along `tensor`, an all-reduce of two
    results per layer of the decoder, forward and backward, an all-gather of the features, and an all-reduce of the
    gradients of what encodes tiles.
    """
    size = np.dtype(config.dtype).itemsize
    wider = np.dtype(config.reduce_dtype or config.dtype).itemsize / size  # a gradient relative to its parameter
    fsdp, data, tensor = (mesh.shape[axis] for axis in (FSDP, DATA, TENSOR))
    trained = flatten_dict(state.trained, sep="/")
    total = 0.0
    for path, x in (flatten_dict(frozen, sep="/") | trained).items():
        mine = math.prod(x.sharding.shard_shape(x.shape)) * size
        if FSDP in x.sharding.spec:
            again = config.remat != "none" and "/layers/" in path and (path.startswith("decoder/") or path in trained)
            total += mine * (fsdp - 1) * (1 + again + (path in trained) * wider)
        elif path in trained:
            total += 2 * mine * wider * (fsdp - 1) / fsdp
        if path in trained:
            total += 2 * mine * wider * (data - 1) / data
            if path.startswith(("vision/", "projector/")):
                total += 2 * mine * wider * (tensor - 1) / tensor
    rows //= row_multiple(mesh)
    features = rows * tiles * model.vision.features_per_tile * model.text.width * size
    results = 4 * model.text.layers * rows * length * model.text.width * size
    return total + (features + 2 * results) * (tensor - 1) / tensor


def advice(config: TrainConfig, args, plan: Plan, mesh: Mesh) -> str:
    """Advice on how to make full rows fit."""
    held = plan.parameter_bytes_per_chip + plan.optimizer_bytes_per_chip
    more = []
    if args.rows_per_chip > 1:
        more.append("fewer --rows-per-chip")
    if config.remat != "full":
        more.append("--remat full")
    if mesh.shape[DATA] > args.slices:
        more.append("fsdp instead of data in --mesh")
    if not more or held > 0.8 * plan.hbm_bytes_per_chip:
        least = math.ceil(plan.peak_bytes_per_chip * mesh.size / plan.hbm_bytes_per_chip)
        cores = tpu.CHIPS[tpu.parse_topology(args.topology)[0]].cores
        more.append(f"a slice of more than {max(least, mesh.size) // cores} such chips")
    return "try " + ", or ".join(more)


# ---------------------------------------------------------------- --search


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way to run a step, and its plan. `useful`: the MFU at the roofline's bound; 0 if the step does not fit or its
    work is unknown."""

    mesh: str
    remat: str
    rows_per_chip: int
    plan: Plan
    bound: str = ""
    useful: float = 0.0


def meshes(model: LlavaConfig, devices: list, slices: int) -> list[Mesh]:
    """Candidates, by increasing bytes sent: `fsdp` alone, then with `tensor`, then with `data`, which replicates."""
    each, t = len(devices) // slices, model.text
    tensor_sizes = [n for n in (2, 4, 8) if each % n == 0 and n < each and t.kv_heads % n == 0]
    copies = [n for n in (2, 4) if each % n == 0 and n < each]
    sizes = [(slices, 1), *((slices, n) for n in tensor_sizes), *((slices * n, 1) for n in copies)]
    return [make_mesh({DATA: data, FSDP: -1, TENSOR: tensor}, devices) for data, tensor in sizes]


def search(
    model: LlavaConfig,
    config: TrainConfig,
    tried: list[Mesh],
    policies: Sequence[str],
    topology: str,
    slices: int,
    rows: int,
    length: int,
    tiles: int,
) -> list[Choice]:
    """Compile choices, and return them, the best first.

    For each mesh and policy, doubles the rows per chip until they do not fit, then continues with the next policy,
    which saves fewer activations. Skips a mesh on which parameters and optimizer alone exceed a chip's memory.
    """
    found = []
    chip = tpu.CHIPS[tpu.parse_topology(topology)[0]]
    for mesh in tried:
        frozen, state, *_ = setup(llava.param_shapes(model), model, config, mesh, STEPS)
        if tpu_plan.per_chip((frozen, state.trained, state.opt_state)) > chip.hbm:
            note(f"mesh {tpu_plan.describe(mesh)}: parameters and optimizer alone are too large for a chip")
            continue
        more = rows
        for remat in policies:
            while more <= MAX_ROWS:
                plan, compiled = plan_step(model, config.replace(remat=remat), mesh, topology, more, length, tiles)
                choice = Choice(tpu_plan.describe(mesh), remat, more, plan)
                if plan.fits and compiled.work:
                    bounds = tpu.roofline(compiled.work, topology)
                    bounds["between slices"] = between_slices(compiled, config, slices)
                    bound = max(bounds, key=bounds.__getitem__)
                    useful = plan.model_flops_per_chip / chip.peak / bounds[bound]
                    choice = dataclasses.replace(choice, bound=bound, useful=useful)
                found.append(choice)
                note(f"{len(found)}. {format_choice(choice)}")
                if not plan.fits:
                    break
                more *= 2
    return sorted(found, key=lambda choice: -choice.useful)


def format_choice(choice: Choice) -> str:
    used = f"{choice.plan.peak_bytes_per_chip / 1e9:6.1f} of {choice.plan.hbm_bytes_per_chip / 1e9:.1f} GB"
    result = "fits" if choice.plan.fits else "does not fit"
    if choice.bound:
        result = f"{choice.useful:4.0%} of peak, bound by {choice.bound}"
    return f"mesh {choice.mesh:22} remat {choice.remat:8} {choice.rows_per_chip:3} rows per chip  {used}  {result}"


def show_search(found: list[Choice], args) -> int:
    """Print the best choices, or all of them as JSON.

    Raises:
      InputError: no choice fits.
    """
    if args.json:
        print(json.dumps([dataclasses.asdict(choice) for choice in found]))
    if not any(choice.plan.fits for choice in found):
        raise InputError(f"no choice fits {args.topology}: take a larger slice, or a shorter --seq")
    if not args.json:
        print(*(format_choice(choice) for choice in found[:BEST] if choice.plan.fits), sep="\n")
    return 0


# ---------------------------------------------------------------- the command


def main() -> int:
    args = parser().parse_args(sys.argv[1:])
    check_flags(args)
    config = config_of(args)
    default = functools.partial(make_mesh, {DATA: args.slices, FSDP: -1})
    mesh = tpu_plan.mesh_of(args.mesh, default, args.topology, args.slices)
    model, tokenizer = open_model(args.model, config)
    if not args.preset:
        args.preset = "v1.6-finetune" if model.aspect_ratio == "anyres" else "v1.5-finetune"
        note(f"no --preset: {args.preset} is used, as it suits the model; give it to `python -m train` too")
        # As in training without a preset, the checkpoint decides these.
        config = config_of(args).replace(template=config.template, aspect_ratio=config.aspect_ratio)
    if args.seq:
        config = config.replace(max_length=args.seq, positions_per_row=args.seq)
    if config.aspect_ratio:
        model = model.replace(aspect_ratio=config.aspect_ratio)
    if args.search or args.rows_per_chip:
        return plan_rows(args, config, model, mesh)
    return plan_run(args, config, model, tokenizer, mesh, default, plan_step)


def check_flags(args: argparse.Namespace) -> None:
    """Check that no flag would be ignored.

    Raises:
      InputError: one would, or no flag names a model.
    """
    if not (args.model or args.checkpoint):
        raise InputError("--model NAME or --checkpoint DIR is needed")
    if args.examples and args.data:
        raise InputError(
            "--examples is for a plan without --data, which determines the number of conversations; drop one"
        )
    for name in ("data", "examples"):
        if getattr(args, name) and (args.rows_per_chip or args.search):
            rows = "--search" if args.search else "--rows-per-chip"
            raise InputError(f"--{name} does not go with {rows}, which compiles full rows, whatever the data; drop one")
    if args.search and args.rows_per_chip and args.rows_per_chip > MAX_ROWS:
        raise InputError(f"--rows-per-chip {args.rows_per_chip}: --search tries at most {MAX_ROWS}")
    if args.seq and (args.max_length or args.positions_per_row):
        raise InputError("--seq sets --max-length and --positions-per-row; give either --seq or these")


def open_model(name: str | None, config: TrainConfig) -> tuple[LlavaConfig, Tokenizer | None]:
    """The model by name, or else the checkpoint's; and the checkpoint's tokenizer.

    Raises:
      InputError: the model cannot be used or contradicts the preset, or there is `--data` but no tokenizer.
    """
    model: LlavaConfig | None = None
    tokenizer = None
    if config.checkpoint:
        found = open_checkpoint(config.checkpoint, vision_tower=config.vision_tower)
        check_preset(config, found.config)
        model, tokenizer = found.config, found.tokenizer
    elif config.data:
        raise InputError("--data needs --checkpoint, whose tokenizer determines the lengths of the conversations")
    if name:
        model = tpu_plan.model_of(name)
        check_preset(config, model)
    assert model is not None  # one of them is given
    return model, tokenizer


def plan_rows(args: argparse.Namespace, config: TrainConfig, model: LlavaConfig, mesh: Mesh) -> int:
    """Plan `--rows-per-chip` full rows, or run `--search`."""
    what = args.model or config.checkpoint
    length = config.positions_per_row or config.max_length
    tiles = default_tiles(model, length) if config.tiles_per_row is None else config.tiles_per_row
    slices = f"{args.slices} x " if args.slices > 1 else ""
    if args.search:
        tried = [mesh] if args.mesh else meshes(model, list(mesh.devices.flat), args.slices)
        policies = [args.remat] if args.remat else POLICIES
        note(f"searching for {what}, {args.preset}, {slices}{args.topology}; each program takes minutes")
        rows = args.rows_per_chip or 1
        found = search(model, config, tried, policies, args.topology, args.slices, rows, length, tiles)
        return show_search(found, args)
    title = (
        f"{what}, {args.preset}, {slices}{args.topology}, mesh {tpu_plan.describe(mesh)}, remat {config.remat}; "
        f"{args.rows_per_chip} x {row_multiple(mesh)} rows of {length:,} positions and {tiles} tiles"
    )
    tpu_plan.note_compiling(title)
    plan, compiled = plan_step(model, config, mesh, args.topology, args.rows_per_chip, length, tiles)
    if args.json:
        print(json.dumps(dataclasses.asdict(plan)))
    else:
        tpu_plan.show(plan, compiled, args.topology, title, more_bounds(compiled, config, args.slices))
    tpu_plan.check_fits(plan, args.topology, advice(config, args, plan, mesh))
    return 0


if __name__ == "__main__":
    run_main(main)
