"""What compiled TPU programs hold: 7B models whole, and of what takes longer to compile than a test may, narrow ones or
a few layers.

To compile all models whole, on all slices, takes hours: `benchmarks/tpu_plan.py` does. What it found, which is in
docs/tpu-plan.json, is held to the same limits here.
"""

import dataclasses
import functools
import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import ROOT
from infer import plan as infer_plan
from llava_jax import config as c
from llava_jax.aot import hlo, tpu, tpu_plan
from llava_jax.data.splice import Batch
from llava_jax.models import llava
from llava_jax.sharding.mesh import FSDP, make_mesh
from llava_jax.sharding.partition import Partition, batch_sharding
from train import __main__ as train_main
from train import plan as train_plan
from train.config import PRESETS
from train.step import TrainState

compiles = pytest.mark.tpu_compile
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: no compiler for TPUs")

TEXT = c.TextConfig(vocab_size=4096, width=1024, ffn_width=2816, layers=2, heads=8, kv_heads=8)
VISION = c.VisionConfig(image_size=112, width=256, ffn_width=1024, layers=3, heads=4)
MODEL = c.preset("v1.5-7b").replace(text=TEXT, vision=VISION)


def plan_step(model: c.LlavaConfig, preset: str, topology: str, rows: int, length: int, tiles: int) -> tpu_plan.Plan:
    """Of a step over a slice, all of it along fsdp."""
    mesh = tpu_plan.mesh_of(None, functools.partial(make_mesh, {"fsdp": -1}), topology)
    return train_plan.plan_step(model, PRESETS[preset], mesh, topology, rows, length, tiles)[0]


def plan_7b(preset: str, topology: str) -> tpu_plan.Plan:
    """Of one full row a chip."""
    config, model = PRESETS[preset], c.preset("v1.5-7b")
    model = model.replace(aspect_ratio=config.aspect_ratio or model.aspect_ratio)
    tiles = train_plan.default_tiles(model, config.max_length)
    return plan_step(model, preset, topology, 1, config.max_length, tiles)


def sent(needs: tpu_plan.Plan) -> float:
    return sum(needs.collective_bytes_per_chip.values())


def check_step(needs: tpu_plan.Plan):
    assert needs.fits
    assert needs.executed_flops_per_chip <= 1.36 * needs.model_flops_per_chip
    assert sent(needs) <= 1.10 * needs.least_collective_bytes_per_chip


@compiles
@needs_libtpu
def test_stages_of_a_7b_model_compute_at_most_four_fifths_of_full_training():
    full = plan_7b("v1.5-finetune", "v5e:4x4")
    check_step(full)
    for preset in ("v1.5-pretrain", "v1.5-finetune-lora"):
        needs = plan_7b(preset, "v5e:2x4")
        assert needs.fits
        assert needs.executed_flops_per_chip <= 0.80 * full.executed_flops_per_chip
        assert sent(needs) <= 1.10 * needs.least_collective_bytes_per_chip


@compiles
@needs_libtpu
def test_nothing_moves_that_grows_with_the_sequence():
    """Neither for the splice nor the embedding nor the loss, which is two chunks of 512 positions: all but parameters
    and gradients is less than a third of a row's activations, sent once, to one chip."""
    needs = plan_step(MODEL, "v1.5-finetune", "v6e:2x4", rows=1, length=1024, tiles=4)
    check_step(needs)
    assert sent(needs) - needs.least_collective_bytes_per_chip < 1024 * TEXT.width * 2 / 3


@pytest.fixture
def optimized():
    """Compile as the commands do; `conftest.py` has XLA optimize little."""
    names = "jax_disable_most_optimizations", "jax_optimization_level"
    before = {name: jax.config.values[name] for name in names}
    for name, value in zip(names, (False, "UNKNOWN"), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


SLOTS, CONTEXT = 64, 4096  # enough that a layer's cache does not stay in a core's own memory


def planner_of(kv_heads: int, *, int8: bool) -> infer_plan.Planner:
    """Of slots over four chips, along tensor."""
    model = MODEL.replace(text=dataclasses.replace(TEXT, kv_heads=kv_heads))
    mesh = tpu_plan.mesh_of("tensor=4", None, "v5e:2x2")
    return infer_plan.Planner(model, mesh, "v5e:2x2", CONTEXT, int8_cache=int8)


@compiles
@needs_libtpu
@pytest.mark.parametrize(
    ("axes", "f"),
    [("tensor=4", llava.encode_tiles), ("tensor=4", llava.embed_batch), ("fsdp=2,tensor=2", llava.encode_tiles)],
)
def test_the_tower_sends_nothing_along_tensor(axes, f):
    """Features are gathered once, where the decoder needs them; along `fsdp` weights are."""
    mesh, rows, tiles, side = tpu_plan.mesh_of(axes, None, "v5e:2x2"), 8, 5, VISION.image_size
    partition, params = Partition(MODEL, mesh), llava.param_shapes(MODEL, jnp.bfloat16)

    def of_rows(dtype, *dims):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=batch_sharding(mesh))

    params = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), params, partition.shardings(params)
    )
    if f is llava.encode_tiles:
        given = of_rows(np.uint8, rows * tiles, side, side, 3)
        weights = jax.tree.leaves((params["vision"], params["projector"]))
        needed = sum(tpu_plan.per_chip(x) for x in weights if FSDP in x.sharding.spec) if mesh.shape[FSDP] == 2 else 0
    else:
        given = Batch(of_rows(np.uint8, rows, tiles, side, side, 3), *[of_rows(np.int32, rows, 512)] * 5)
        needed = rows * tiles * VISION.features_per_tile * TEXT.width * 2 * 3 / 4
    lowered = jax.jit(f, static_argnums=(1, 3)).lower(params, MODEL, given, partition)
    assert tpu_plan.compile_for_tpu(lowered).work.collectives == ({"all-gather": needed} if needed else {})


@compiles
@needs_libtpu
@pytest.mark.parametrize(("kv_heads", "int8"), [(4, False), (8, True)])  # grouped heads, and not
@pytest.mark.usefixtures("optimized")
def test_generation_holds_one_cache_and_reads_it_once(kv_heads, int8):
    planner = planner_of(kv_heads, int8=int8)
    made = planner.plans(SLOTS)
    assert list(made) == ["encode", "prefill", "decode"]
    cache = tpu_plan.per_chip(planner.slots(SLOTS).cache)
    vectors = 2 * TEXT.layers * SLOTS * CONTEXT * kv_heads // 4  # heads are not repeated
    assert cache == vectors * (TEXT.head_width + 4 if int8 else TEXT.head_width * 2)
    for name in ("prefill", "decode"):
        needs, one = made[name]
        assert needs.fits and one.memory.reused >= cache
        assert one.memory.temporaries < cache / 10  # neither a second cache nor weights in another layout
        held = planner.parameter_bytes + planner._slot_bytes(SLOTS) + infer_plan.MAX_BYTES
        programs = 25 * max(one.memory.program for _, one in made.values())
        assert held < needs.peak_bytes_per_chip < held + cache / 10 + programs
    decode = made["decode"][0]
    assert 0.95 < decode.moved_bytes_per_chip / decode.least_moved_bytes_per_chip <= 1.10
    # Two sums a layer and a token's embedding; to draw it all logits, for the likeliest one a number and its place.
    assert decode.collective_bytes_per_chip.keys() == {"all-reduce", "all-gather"}
    logits = SLOTS * TEXT.vocab_size * 4
    assert sent(decode) <= decode.least_collective_bytes_per_chip + 2 * logits * 3 / 4 + 4096


@compiles
@needs_libtpu
@pytest.mark.usefixtures("optimized")
def test_reading_a_part_of_the_slots_copies_nothing():
    planner = planner_of(4, int8=False)
    lower = planner._functions(SLOTS)["decode"].lower
    made = tpu_plan.compile_for_tpu(lower.func(*lower.args, **lower.keywords | {"span": CONTEXT // 4}), 1)
    cache = tpu_plan.per_chip(planner.slots(SLOTS).cache)
    assert made.memory.temporaries < cache / 10
    assert made.work.hbm_bytes < planner._weights_read() + cache / 3


def planner_of_costs(monkeypatch, constant: int, each: int, arrays: int, hbm: int) -> tuple[infer_plan.Planner, list]:
    """A planner whose programs take `constant + each * slots` bytes, of which it knows `arrays` for each slot; and the
    numbers that it compiles."""
    planner, compiled = object.__new__(infer_plan.Planner), []
    planner.__dict__.update(shards=2, held=0, hbm=hbm, bytes_per_slot=2 * arrays)

    def plans(number):
        compiled.append(number)
        peak = constant + each * number
        plan = tpu_plan.Plan(peak <= hbm, peak, hbm, 0, 0, None, 0.0, None, 0.0, 0.0)
        return {"decode": (plan, tpu_plan.Compiled(0.0, peak))}

    monkeypatch.setattr(planner, "plans", plans, raising=False)
    return planner, compiled


@pytest.mark.parametrize(
    ("constant", "each", "hbm", "fit", "tried"),
    [
        (100, 10, 800, 70, [74, 70]),  # as calculated from what was compiled
        (100, 11, 800, 62, [74, 62]),  # a slot costs more than its arrays
        (10, 10, 800, 78, [74, 78]),  # there is more room
        (10, 10, 2000, 198, [186, 198]),
        (100, 10, 1700, 158, [158]),  # 160 would fit too: near enough
        (100, 10, 160, 6, [14, 6]),
        (100, 10, 115, 0, [2]),  # none
        (100, 10, 10**6, 256, [256]),  # no more than an engine takes
    ],
)
def test_the_search_for_slots(monkeypatch, constant, each, hbm, fit, tried):
    planner, compiled = planner_of_costs(monkeypatch, constant, each, arrays=10, hbm=hbm)
    planner.held = 100 if fit == 0 else 0
    found, plans = planner.search()
    assert (found, compiled) == (fit, tried)
    assert infer_plan.fits(plans) == bool(fit)


@compiles
@needs_libtpu
def test_a_search_stops_where_a_chip_is_full(monkeypatch):
    """More rows until they do not fit, then as many with a policy that saves less; the best first."""
    compiled, compile_for_tpu = {}, tpu_plan.compile_for_tpu

    def compile_once(lowered):
        text = lowered.as_text()
        return compiled.get(text) or compiled.setdefault(text, compile_for_tpu(lowered))

    monkeypatch.setattr(tpu_plan, "compile_for_tpu", compile_once)
    model, config = c.tiny(), PRESETS["v1.5-finetune"]
    devices = list(tpu_plan.mesh_of("fsdp=4", None, "v5e:2x2").devices.flat)
    tried = train_plan.meshes(model, devices, 1)
    assert [tpu_plan.describe(mesh) for mesh in tried] == ["fsdp=4", "fsdp=2,tensor=2", "data=2,fsdp=2"]

    def search():
        found = train_plan.search(model, config, tried[:1], ("none", "full"), "v5e:2x2", 1, 1, length=256, tiles=1)
        assert found == sorted(found, key=lambda choice: -choice.useful)
        return {(choice.remat, choice.rows_per_chip): choice for choice in found}

    monkeypatch.setattr(train_plan, "MAX_ROWS", 2)
    found = search()
    assert {key: choice.plan.fits for key, choice in found.items()} == {("none", 1): True, ("none", 2): True}
    assert all(0 < choice.useful < 1 and choice.bound for choice in found.values())

    chip = dataclasses.replace(tpu.CHIPS["v5e"], hbm=found["none", 2].plan.peak_bytes_per_chip - 1)
    monkeypatch.setitem(tpu.CHIPS, "v5e", chip)
    found = search()
    assert next(iter(found)) != ("none", 2) and ("full", 2) in found
    assert (found["none", 2].plan.fits, found["none", 2].useful) == (False, 0)

    monkeypatch.setitem(tpu.CHIPS, "v5e", dataclasses.replace(chip, hbm=1000))
    assert search() == {}  # parameters alone are too large: nothing is compiled


@compiles
@needs_libtpu
def test_the_program_that_is_read_is_the_one_that_was_compiled():
    mesh = tpu_plan.mesh_of("fsdp=8", None, "v6e:2x4")
    cut = NamedSharding(mesh, P("fsdp"))
    shapes = [jax.ShapeDtypeStruct(shape, "bfloat16", sharding=cut) for shape in ((64, 1024), (1024, 512))]
    lowered = jax.jit(jnp.matmul).lower(*shapes)
    work = tpu_plan.compile_for_tpu(lowered).work
    assert work == hlo.Program(lowered.compile().as_text()).work
    assert work.flops == 2 * 64 * 1024 * 512 / 8 and sum(work.collectives.values()) > 0


@compiles
@needs_libtpu
def test_no_cache_keeps_it(tmp_path):
    """It could not be read again."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for name, value in zip(names, (str(tmp_path), 0), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        mesh = tpu_plan.mesh_of("fsdp=4", None, "v5e:2x2")
        shape = jax.ShapeDtypeStruct((64,), "float32", sharding=NamedSharding(mesh, P("fsdp")))
        assert tpu_plan.compile_for_tpu(jax.jit(jnp.sin).lower(shape)).peak > 0
        assert not list(tmp_path.iterdir())
        jax.jit(lambda x: jnp.cos(x) + 41)(1.0)
        assert list(tmp_path.iterdir())  # others are kept as before
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_of_a_program_that_is_not_written_down_the_memory_is_known(monkeypatch, capsys):
    lowered = types.SimpleNamespace(compile=lambda _: types.SimpleNamespace(output_shardings=()), out_info=())
    monkeypatch.setattr(tpu, "memory", lambda compiled: types.SimpleNamespace(peak=12_300_000_000))
    made = tpu_plan.compile_for_tpu(lowered)
    assert (made.peak, made.memory.peak, made.work) == (12_300_000_000, 12_300_000_000, None)
    assert "FLOPs and bytes sent are unknown\n" in capsys.readouterr().err

    step = types.SimpleNamespace(lower=lambda *_: lowered)
    monkeypatch.setattr(train_plan, "setup", lambda *_: ({}, TrainState(0, {}, (), 0, 0), step, None))
    mesh = make_mesh({"fsdp": 8})
    needs = train_plan.plan_step(MODEL, PRESETS["v1.5-finetune"], mesh, "v6e:2x4", rows=1, length=512, tiles=4)[0]
    assert needs.fits and needs.executed_flops_per_chip is None
    choices = train_plan.search(MODEL, PRESETS["v1.5-finetune"], [mesh], ["full"], "v6e:2x4", 1, 16, 512, 4)
    assert train_plan.format_choice(choices[0]).endswith("33.5 GB  fits")


# ---------------------------------------------------------------- what all models and slices gave


@pytest.fixture(scope="module")
def published():
    """The command that compiles them."""
    found = importlib.util.spec_from_file_location("published", ROOT / "benchmarks" / "tpu_plan.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plans(published):
    found = json.loads(published.PLANS.read_text())
    fields = [field.name for field in dataclasses.fields(tpu_plan.Plan)]
    return {
        command: tpu_plan.Plan(**{name: needs[name] for name in fields if name in needs})
        for command, needs in found.items()
    }


def test_the_page_shows_all_of_them(published, plans):
    assert list(plans) == published.commands()
    rows = published.table(json.loads(published.PLANS.read_text()))
    assert f"<!-- table -->\n{rows}\n<!-- end of table -->" in published.PAGE.read_text()


def test_slots_that_fit(published):
    """Of all slices that were compiled: decode steps read little but the weights and one cache, and send only what
    tensor parallelism and drawing a token need."""
    found = json.loads(published.SERVE_PLANS.read_text())
    assert found and found.keys() <= set(published.serve_commands())
    assert f"<!-- slots -->\n{published.serve_table(found)}\n<!-- end of slots -->" in published.PAGE.read_text()
    for command, needs in found.items():
        decode = needs["functions"]["decode"]
        assert needs["fits"] and needs["slots"] == needs["slots_that_fit"] > 0, command
        assert decode["moved_bytes_per_chip"] <= 1.10 * decode["least_moved_bytes_per_chip"], command
        assert sum(decode["collective_bytes_per_chip"].values()) <= 1.25 * decode["least_collective_bytes_per_chip"]


def test_none_of_them_is_refused(published):
    for command in published.commands():
        if command.startswith("train.plan"):
            args = train_plan.parser().parse_args(command.split()[1:])
            train_plan.open_model(args.model, train_main.config_of(args))


def test_all_of_them_fit_and_training_keeps_to_the_least(plans):
    assert all(needs.fits for needs in plans.values())
    for command, needs in plans.items():
        if command.startswith("train.plan"):
            assert sent(needs) <= 1.10 * needs.least_collective_bytes_per_chip, command
        if "-finetune --" in command:
            assert needs.executed_flops_per_chip <= 1.36 * needs.model_flops_per_chip, command


@pytest.mark.parametrize("model", ["7b", "13b"])
def test_stages_compute_at_most_four_fifths_on_any_slice(plans, model):
    """Of the same model's full training, with the same per-chip batch size."""
    of = {preset: [] for preset in ("pretrain", "finetune", "finetune-lora")}
    for command, needs in plans.items():
        words = command.split()
        if f"llava-v1.5-{model}" in words and "train.plan" in words and "--rows-per-chip" not in words:
            of[words[4].removeprefix("v1.5-")].append(needs.executed_flops_per_chip)
    assert len(of["pretrain"]) == len(of["finetune-lora"]) == 4 and len(of["finetune"]) >= 4
    assert max(of["pretrain"] + of["finetune-lora"]) <= 0.80 * min(of["finetune"])


def test_no_worse_than_a_text_decoder_in_maxtext(plans):
    """Its `train_compile` of Llama-2-7B, 4 rows of 2,048 a chip, full remat: 7.7 GB a chip, 1.294 times the model's
    FLOPs, 42.1 GB sent."""
    flags = "--preset v1.5-finetune --topology v5e:4x8 --rows-per-chip 4 --tiles-per-row 0"
    needs = plans[f"train.plan --model llava-v1.5-7b {flags}"]
    assert needs.peak_bytes_per_chip <= 7.7e9
    assert round(needs.executed_flops_per_chip / needs.model_flops_per_chip, 3) <= 1.294
    assert sent(needs) <= 42.1e9
