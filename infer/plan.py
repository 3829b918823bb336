"""Plan generation on a TPU slice: slots that fit, memory, FLOPs and bytes moved and sent per chip, from compiled
programs.

No TPU and no weights are needed.

    python -m infer.plan --model llava-v1.6-mistral-7b --topology v5e:2x2 --mesh tensor=4 --slots 16 --context 4096

compiles the engine's functions for their largest shapes: the encoder for the tiles of one image, prefill of a whole
chunk at the end of a slot, and decode steps of full slots. Without `--slots` it finds how many fit. The exit status is
1 if anything does not fit the chips.
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
from jax.sharding import Mesh, NamedSharding

from infer import compiled
from infer.features import MAX_BYTES
from infer.flags import add_cache_flag
from llava_jax.aot import tpu, tpu_plan
from llava_jax.aot.flops import decoder_flops, encode_flops
from llava_jax.aot.hlo import Work
from llava_jax.aot.tpu_plan import Compiled, Plan
from llava_jax.config import LlavaConfig
from llava_jax.console import Parser, integer, note, plural, run_main
from llava_jax.data.buckets import MAX_SLOTS, MIN_CONTEXT, Buckets
from llava_jax.data.images import max_tiles
from llava_jax.models import llava
from llava_jax.sharding.mesh import BATCH, FSDP, TENSOR, inference_mesh
from llava_jax.sharding.partition import Partition, batch_sharding

NAMES = {"encode": "an image", "prefill": "prefill of a chunk", "decode": "a decode step"}


def parser() -> Parser:
    p = Parser(
        prog="python -m infer.plan",
        description="Slots that fit, memory, FLOPs and bytes moved of generation per chip of a TPU slice.",
    )
    tpu_plan.add_flags(p)
    p.add_argument(
        "--slots", type=integer(1, 2**20), metavar="N", help="answers at a time; default: as many as fit, at most 256"
    )
    p.add_argument(
        "--context",
        type=integer(MIN_CONTEXT, 2**20),
        default=4096,
        metavar="N",
        help="positions of a slot (default 4096)",
    )
    add_cache_flag(p)
    return p


@dataclasses.dataclass(frozen=True)
class Function:
    """A function to compile, for a number of slots.

    weights    bytes of the parameters that it reads, of those on a chip
    programs   sizes of its arguments for which the engine compiles it; all of them stay on the chip
    flops      of all chips
    sent       the minimum that each chip sends
    moved      the minimum that each chip reads from and writes to HBM, if known
    steps      of its loop, if its figures are those of one step
    """

    lower: Callable[[], jax.stages.Lowered]
    weights: int
    programs: int
    flops: float
    sent: float
    moved: float | None = None
    steps: int | None = None

    def compile(self) -> Compiled:
        program = tpu_plan.compile_for_tpu(self.lower(), self.steps)
        if program.work is None or self.steps is None:
            return program
        return dataclasses.replace(program, work=Work().plus(program.work, 1 / self.steps))


class Planner:
    """Compiles the engine's functions, in bfloat16, for any number of slots."""

    def __init__(self, model: LlavaConfig, mesh: Mesh, topology: str, context: int, *, int8_cache: bool = False):
        self.model, self.context, self.int8_cache = model, context, int8_cache
        self.partition = Partition(model, mesh)
        shapes = llava.param_shapes(model, jnp.bfloat16)
        self.params = jax.tree.map(self._sharded, shapes, self.partition.shardings(shapes))
        self.hbm = tpu.CHIPS[tpu.parse_topology(topology)[0]].hbm
        self.shards, self.rows = self.partition.row_shards, batch_sharding(mesh)
        self.tiles, self.buckets = max_tiles(model), Buckets()
        # What stays on a chip whatever runs: the parameters, and the features of the last images.
        self.parameter_bytes = tpu_plan.per_chip(self.params)
        self.held = self.parameter_bytes + MAX_BYTES
        self.bytes_per_slot = self._slot_bytes(2 * self.shards) - self._slot_bytes(self.shards)
        self._encode: Compiled | None = None

    @staticmethod
    def _sharded(x, sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def slots(self, number: int) -> compiled.Slots:
        """The shapes and shardings of `number` slots."""
        partition = self.partition
        new = functools.partial(
            compiled.new_slots, slots=number, positions=self.context, dtype=jnp.bfloat16, int8=self.int8_cache,
            partition=partition,
        )  # fmt: skip

        def sharded(x):
            spec = partition.activation_spec(x.shape, *(BATCH, TENSOR, None, None)[: x.ndim])
            return self._sharded(x, NamedSharding(self.rows.mesh, spec))

        return jax.tree.map(sharded, jax.eval_shape(new))

    def _slot_bytes(self, number: int) -> int:
        return tpu_plan.per_chip(self.slots(number))

    def plans(self, number: int) -> dict[str, tuple[Plan, Compiled]]:
        """The plan of each function for `number` slots, rounded up to whole shards; the keys are those of `NAMES`.

        Only that of prefill, not compiled, if the slots alone are too large.
        """
        number = -(-number // self.shards) * self.shards
        functions, slot_bytes = self._functions(number), self._slot_bytes(number)
        if slot_bytes > self.hbm:  # the compiler fails on what is far too large
            programs = {"prefill": Compiled(0.0, slot_bytes + functions["prefill"].weights)}
        else:
            programs = {name: self._compiled(name, function) for name, function in functions.items()}
        code = {name: functions[name].programs * one.memory.program for name, one in programs.items() if one.memory}
        plans = {}
        for name, program in programs.items():
            function, memory = functions[name], program.memory
            others = self.held - function.weights + sum(code.values()) - (memory.program if memory else 0)
            program = dataclasses.replace(program, peak=program.peak + others + (slot_bytes if name == "encode" else 0))
            plans[name] = self._plan(function, program), program
        return plans

    def _compiled(self, name: str, function: Function) -> Compiled:
        if name != "encode":
            return function.compile()
        self._encode = self._encode or function.compile()  # for any number of slots
        return self._encode

    def _plan(self, function: Function, program: Compiled) -> Plan:
        work = program.work
        return Plan(
            fits=program.memory is not None and program.peak <= self.hbm,
            peak_bytes_per_chip=program.peak,
            hbm_bytes_per_chip=self.hbm,
            parameter_bytes_per_chip=self.parameter_bytes,
            optimizer_bytes_per_chip=0,
            executed_flops_per_chip=work.flops if work else None,
            model_flops_per_chip=function.flops / self.partition.device_count,
            collective_bytes_per_chip=work.collectives if work else None,
            least_collective_bytes_per_chip=function.sent,
            compile_seconds=round(program.seconds, 1),
            moved_bytes_per_chip=work.hbm_bytes if work else None,
            least_moved_bytes_per_chip=function.moved,
        )

    def _functions(self, number: int) -> dict[str, Function]:
        model, params, context, devices = self.model, self.params, self.context, self.partition.device_count
        slots, static = self.slots(number), dict(span=context, eos_ids=model.text.eos_ids, partition=self.partition)
        chunks, decoder = self.buckets.chunk_sizes(context), tpu_plan.per_chip(params["decoder"])
        functions = {}
        if self.tiles:
            side, tiles = model.vision.image_size, self.buckets.up("tiles", -(-self.tiles // devices)) * devices
            images = jax.ShapeDtypeStruct((tiles, side, side, 3), np.uint8)
            functions["encode"] = Function(
                functools.partial(compiled.encode.lower, params, images, partition=self.partition),
                self.parameter_bytes - decoder, 1, encode_flops(model, tiles), 0.0,
            )  # fmt: skip
        chunk = self._sharded(
            jax.ShapeDtypeStruct((self.shards, chunks[-1], model.text.width), jnp.bfloat16), self.rows
        )
        functions["prefill"] = Function(
            functools.partial(compiled.prefill.lower, params, slots, chunk, self._prompt_rows(slots), **static),
            decoder,
            len(chunks) * len(self.buckets.prefill_spans(context)),
            decoder_flops(model, self.shards, chunks[-1], context - chunks[-1] / 2),
            self._sent(1, chunks[-1]),
        )
        stopped, steps = self._rows(number, np.bool_), jax.ShapeDtypeStruct((), np.int32)
        functions["decode"] = Function(
            functools.partial(compiled.decode.lower, params, slots, stopped, steps, **static),
            decoder,
            len(self.buckets.decode_spans(context)),
            decoder_flops(model, number, 1, context),
            self._sent(number // self.shards, number // self.shards),
            self._weights_read() + tpu_plan.per_chip(slots.cache),
            compiled.STEPS,
        )
        return functions

    def _rows(self, number: int, dtype, *dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((number, *dims), dtype, sharding=self.rows)

    def _prompt_rows(self, slots: compiled.Slots) -> compiled.Rows:
        """Of a chunk for one slot of each shard."""
        numbers, flags = self._rows(self.shards, np.int32), self._rows(self.shards, np.bool_)
        like = lambda x: self._rows(self.shards, x.dtype, *x.shape[1:])  # noqa: E731
        keys, controls, history = jax.tree.map(like, (slots.keys, slots.controls, slots.history))
        shapes: Any = (*(numbers,) * 4, *(flags,) * 3, keys, controls, history)
        return compiled.Rows(*shapes)

    def _sent(self, rows: int, positions: int) -> float:
        """The minimum that each chip sends for `positions` of its `rows`: an all-reduce along `tensor` of two results
        per layer, in bfloat16, and an all-gather along `fsdp` of the decoder's weights."""
        text, tensor, fsdp = self.model.text, self.partition.size(TENSOR), self.partition.size(FSDP)
        through = (text.layers - 1) * positions + rows  # the last layer computes only each row's last position
        results = 2 * through * text.width * 2
        weights = sum(
            tpu_plan.per_chip(x) * (fsdp - 1)
            for x in jax.tree.leaves(self.params["decoder"])
            if FSDP in x.sharding.spec
        )
        return 2 * results * (tensor - 1) / tensor + weights

    def _weights_read(self) -> int:
        """Bytes of the weights that a decode step reads on each chip: of the embeddings it reads only some rows."""
        decoder, fsdp = self.params["decoder"], self.partition.size(FSDP)
        read = [x for part, x in decoder.items() if part != "embed" or self.model.text.tied_head]
        return sum(
            tpu_plan.per_chip(x) * (fsdp if FSDP in x.sharding.spec else 1) for x in jax.tree.leaves(read)
        )  # fmt: skip

    # ------------------------------------------------------------ how many slots fit

    def slots_that_fit(self, number: int, peak: int) -> int:
        """How many slots fit at most, by arithmetic from the peak with `number` slots."""
        more = (self.hbm - peak) // self.bytes_per_slot * self.shards
        return max(0, min(number + more, MAX_SLOTS // self.shards * self.shards))

    def search(self) -> tuple[int, dict[str, tuple[Plan, Compiled]]]:
        """A number of slots that fits, at most a 32nd below the largest, and its plans; 0 and plans that do not fit if
        none does.

        It starts with what fits beside a 16th of the chip for temporaries and programs. What is compiled then tells how
        many should fit. (A program for few slots does not: its code, for one, has another size.)
        """
        number = max(self.shards, self.slots_that_fit(0, self.held + self.hbm // 16))
        best, too_many, plans_of = 0, MAX_SLOTS + self.shards, {}
        while best + best // 32 < number < too_many:
            plans = plans_of[number] = self.plans(number)
            parts = ", ".join(f"{name} {plan.peak_bytes_per_chip / 1e9:.2f} GB" for name, (plan, _) in plans.items())
            note(f"{plural(number, 'slot')}: {parts} per chip")
            if fits(plans):
                best = number
            else:
                too_many = number
            number = max(best, min(self.slots_that_fit(number, peak(plans)), too_many - self.shards))
        return best, plans_of[best or too_many]


def peak(plans: dict[str, tuple[Plan, Compiled]]) -> int:
    """Of the function that needs the most memory."""
    return max(plan.peak_bytes_per_chip for plan, _ in plans.values())


def fits(plans: dict[str, tuple[Plan, Compiled]]) -> bool:
    return all(plan.fits for plan, _ in plans.values())


def whole(plans: dict[str, tuple[Plan, Compiled]]) -> Plan:
    """The plan of the last function, with memory and time of all."""
    return dataclasses.replace(
        list(plans.values())[-1][0],
        fits=fits(plans),
        peak_bytes_per_chip=peak(plans),
        compile_seconds=round(sum(plan.compile_seconds for plan, _ in plans.values()), 1),
    )


def main() -> int:
    args = parser().parse_args(sys.argv[1:])
    model = tpu_plan.model_of(args.model)
    mesh = tpu_plan.mesh_of(args.mesh, lambda devices: inference_mesh(model, devices), args.topology)
    title = (
        f"{args.model}, {args.topology}, mesh {tpu_plan.describe(mesh)}, "
        f"slots of {args.context:,} positions{', int8 cache' if args.int8_cache else ''}"
    )
    tpu_plan.note_compiling(title)
    planner = Planner(model, mesh, args.topology, args.context, int8_cache=args.int8_cache)
    if args.slots is None:
        slots, plans = planner.search()
        fit = slots
    else:
        slots = -(-args.slots // planner.shards) * planner.shards
        plans = planner.plans(slots)
        fit = planner.slots_that_fit(slots, peak(plans))
    if args.json:
        numbers = dict(
            slots=slots, context=args.context, bytes_per_slot=planner.bytes_per_slot, slots_that_fit=fit
        )  # fmt: skip
        functions = {name: dataclasses.asdict(plan) for name, (plan, _) in plans.items()}
        print(json.dumps(dataclasses.asdict(whole(plans)) | numbers | {"functions": functions}))
    else:
        print(title)
        for name, (plan, program) in plans.items():
            tpu_plan.show(plan, program, args.topology, NAMES[name])
        size = f"{planner.bytes_per_slot / 1e6:,.1f} MB of a chip each"
        fit_too = f"{fit} fit" if args.slots is None else "without --slots it finds how many fit"
        print(f"{plural(slots, 'slot')} of {size}; {fit_too}")
    smaller = "fewer --slots or a smaller --context" if args.slots else "a smaller --context"
    advice = f"try {smaller}{'' if args.int8_cache else ', --int8-cache'}, or more chips along tensor"
    tpu_plan.check_fits(whole(plans), args.topology, advice)
    return 0


if __name__ == "__main__":
    run_main(main)
