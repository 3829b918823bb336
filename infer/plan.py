"""Plan generation on a TPU slice: memory, FLOPs and bytes sent per chip, from compiled programs.

No TPU and no weights are needed.

    python -m infer.plan --model llava-v1.6-mistral-7b --topology v5e:2x2 --mesh tensor=4 --batch 8 --context 4096

compiles the functions that the engine runs: image encoder, prefill, and the decode loop, whose figures are those of one
step. The exit status is 1 if any of them does not fit the chips.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from infer import compiled
from infer.flags import add_cache_flag
from infer.next_token import row_keys
from infer.sampling import Sampling
from llava_jax.aot import tpu, tpu_plan
from llava_jax.aot.flops import decoder_flops, encode_flops
from llava_jax.aot.tpu_plan import Compiled, Plan
from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, Parser, integer, run_main
from llava_jax.data.images import max_tiles
from llava_jax.models import llava
from llava_jax.sharding.mesh import FSDP, TENSOR, inference_mesh, row_multiple
from llava_jax.sharding.partition import Partition, batch_sharding

NAMES = {"encode": "images", "prefill": "prefill", "decode": "a decode step"}


def parser() -> Parser:
    p = Parser(
        prog="python -m infer.plan", description="Memory, FLOPs and bytes sent of generation per chip of a TPU slice."
    )
    tpu_plan.add_flags(p)
    p.add_argument("--batch", type=integer(1, 2**20), default=1, metavar="N", help="batch size (default 1)")
    p.add_argument(
        "--context", type=integer(2, 2**20), default=4096, metavar="N", help="positions of the cache (default 4096)"
    )
    p.add_argument(
        "--new-tokens", type=integer(1, 2**20 - 1), default=512, metavar="N",
        help="positions of --context kept for the answer (default 512)",
    )  # fmt: skip
    add_cache_flag(p)
    p.add_argument(
        "--tiles-per-row", type=integer(0, 512), metavar="N",
        help="image tiles per row (default: the maximum of one image)",
    )  # fmt: skip
    return p


def plan_generation(
    model: LlavaConfig,
    mesh: Mesh,
    topology: str,
    batch: int,
    context: int,
    new_tokens: int,
    tiles: int,
    int8_cache: bool = False,
) -> dict[str, tuple[Plan, Compiled]]:
    """Compile the engine's functions, in bfloat16; the keys are those of `NAMES`.

    If prefill does not fit, decoding is not compiled.
    """
    rows = -(-batch // row_multiple(mesh)) * row_multiple(mesh)
    side, length = model.vision.image_size, context - new_tokens
    partition = Partition(model, mesh)
    static = dict(partition=partition)
    params = llava.param_shapes(model, jnp.bfloat16)
    shardings = partition.shardings(params)
    params = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), params, shardings)

    def of_rows(dtype, *dims):
        return jax.ShapeDtypeStruct((rows, *dims), dtype, sharding=batch_sharding(mesh))

    keys, sampling_params = jax.eval_shape(lambda: (row_keys(0, np.arange(rows)), Sampling().params()))
    numbers, flags = of_rows(np.int32), of_rows(bool)
    hbm, held = tpu.CHIPS[tpu.parse_topology(topology)[0]].hbm, tpu_plan.per_chip(params)
    plans = {}

    def add(name: str, lower: Callable, batch: Any, used: int, flops: float, min_sent: float):
        program = tpu_plan.too_large(batch, used, hbm) or tpu_plan.compile_for_tpu(lower(), unknown_trips=1)
        # The other functions' weights stay on the chip.
        program = dataclasses.replace(program, peak=program.peak + held - used)
        plan = Plan(
            fits=program.memory is not None and program.peak <= hbm,
            peak_bytes_per_chip=program.peak,
            hbm_bytes_per_chip=hbm,
            parameter_bytes_per_chip=held,
            optimizer_bytes_per_chip=0,
            executed_flops_per_chip=program.work.flops if program.work else None,
            model_flops_per_chip=flops / mesh.size,
            collective_bytes_per_chip=program.work.collectives if program.work else None,
            least_collective_bytes_per_chip=min_sent,
            compile_seconds=round(program.seconds, 1),
        )
        plans[name] = plan, program
        return program.out

    decoder = tpu_plan.per_chip(params["decoder"])
    rows_per_shard = rows // row_multiple(mesh)
    if tiles:
        images = of_rows(np.uint8, tiles, side, side, 3)
        lower = functools.partial(compiled.encode.lower, params, images, **static)
        add("encode", lower, images, held - decoder, encode_flops(model, rows * tiles), 0.0)
    x_BSD = of_rows(jnp.bfloat16, length, model.text.width)
    options = static | dict(eos_ids=model.text.eos_ids)
    cache = dict(new_tokens=new_tokens, int8_cache=int8_cache)
    lower = functools.partial(
        compiled.prefill.lower, params, x_BSD, numbers, numbers, keys, sampling_params, **cache, **options
    )
    flops = decoder_flops(model, rows, length, length / 2)
    min_sent = min_bytes_sent(params, model, mesh, rows_per_shard, rows_per_shard * length)
    state = add("prefill", lower, x_BSD, decoder, flops, min_sent)
    if state is not None:
        steps = jax.ShapeDtypeStruct((), np.int32)
        lower = functools.partial(
            compiled.decode_on("tpu").lower, params, state, flags, steps, sampling_params, **options
        )
        add(
            "decode",
            lower,
            state.cache,
            decoder,
            decoder_flops(model, rows, 1, context),
            min_bytes_sent(params, model, mesh, rows_per_shard, rows_per_shard),
        )
    return plans


def min_bytes_sent(params: dict, model: LlavaConfig, mesh: Mesh, rows: int, positions: int) -> float:
    """The minimum that each chip sends for `positions` of its `rows`: an all-reduce along `tensor` of two results per
    layer, in bfloat16, and an all-gather along `fsdp` of the decoder's weights."""
    tensor, fsdp = mesh.shape[TENSOR], mesh.shape[FSDP]
    through = (model.text.layers - 1) * positions + rows  # the last layer computes only each row's last position
    results = 2 * through * model.text.width * 2
    weights = sum(
        tpu_plan.per_chip(x) * (fsdp - 1) for x in jax.tree.leaves(params["decoder"]) if FSDP in x.sharding.spec
    )
    return 2 * results * (tensor - 1) / tensor + weights


def main() -> int:
    args = parser().parse_args(sys.argv[1:])
    if args.context <= args.new_tokens:
        raise InputError(f"--context {args.context}: must be above --new-tokens {args.new_tokens}")
    model = tpu_plan.model_of(args.model)
    mesh = tpu_plan.mesh_of(args.mesh, lambda devices: inference_mesh(model, devices), args.topology)
    tiles = max_tiles(model) if args.tiles_per_row is None else args.tiles_per_row
    title = (
        f"{args.model}, {args.topology}, mesh {tpu_plan.describe(mesh)}, {args.batch} x {args.context:,} positions, "
        f"{args.new_tokens} of them new{', int8 cache' if args.int8_cache else ''}, {tiles} tiles"
    )
    tpu_plan.note_compiling(title)
    sizes = args.batch, args.context, args.new_tokens, tiles
    plans = plan_generation(model, mesh, args.topology, *sizes, args.int8_cache)
    last = list(plans.values())[-1][0]
    largest = max((plan for plan, _ in plans.values()), key=lambda plan: plan.peak_bytes_per_chip)
    if args.json:
        whole = dataclasses.replace(
            last,
            fits=largest.fits and last.fits,
            peak_bytes_per_chip=largest.peak_bytes_per_chip,
            compile_seconds=round(sum(plan.compile_seconds for plan, _ in plans.values()), 1),
        )
        parts = {name: dataclasses.asdict(plan) for name, (plan, _) in plans.items()}
        print(json.dumps(dataclasses.asdict(whole) | {"functions": parts}))
    else:
        print(title)
        for name, (plan, program) in plans.items():
            tpu_plan.show(plan, program, args.topology, NAMES[name])
    smaller = "a smaller --batch or --context" + ("" if args.int8_cache else ", --int8-cache")
    advice = f"try {smaller}, or more chips along tensor"
    tpu_plan.check_fits(next((plan for plan, _ in plans.values() if not plan.fits), last), args.topology, advice)
    return 0


if __name__ == "__main__":
    run_main(main)
