"""One step: against the reference's curves, against itself split in every way, and what it leaves alone."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from helpers import GOLDEN, golden_json, load_golden, make_row, one_device
from llava_jax import config as c
from llava_jax.console import InputError
from llava_jax.data.splice import IGNORE, Batch, pack, splice
from llava_jax.models import llama, llava
from llava_jax.models.layers import REMAT
from llava_jax.sharding.mesh import make_mesh, parse_mesh
from llava_jax.sharding.partition import Partition, put_rows
from train import loss as loss_module
from train.config import PRESETS, TrainConfig
from train.parameters import export_params
from train.step import setup
from training import PLAIN, conversations, random_params, start

CURVES = golden_json("training.json")


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("curve", CURVES["curves"])
def test_losses_and_gradient_norms_of_the_reference(curve):
    name, stage = curve.rsplit(".", 1)
    want = CURVES["curves"][curve]
    case = next(x for x in golden_json("checkpoints/index.json") if x["key"] == f"{name}.{want['batch']}")
    found, params = load_golden(name)
    rows = [
        make_row(talk, [GOLDEN / "images" / p for p in image_files], case["template"], found.config, found.tokenizer)
        for talk, image_files in zip(case["conversations"], case["images"], strict=True)
    ]
    theirs = np.load(GOLDEN / "checkpoints" / name / f"expected.{want['batch']}.npz")
    labels = (theirs["in_labels"][b][theirs["in_mask"][b]] for b in range(len(rows)))  # it gave some up
    rows = [dataclasses.replace(row, labels=own) for row, own in zip(rows, labels, strict=True)]
    batch = splice(rows, found.config, max_length=case["max_length"])

    tune = {"pretrain": "projector", "finetune": "projector,decoder"}[stage]
    config = PLAIN.replace(tune=tune, learning_rate=want["lr"])
    frozen, state, step, _, batch = start(config, batch, found.config, params=dict(params))
    losses, norms = [], []
    for _ in range(8):
        state, metrics = step(frozen, state, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    np.testing.assert_allclose(losses, want["losses"], rtol=2e-4)
    np.testing.assert_allclose(norms, want["grad_norms"], rtol=2e-4)


# ---------------------------------------------------------------- the same however it is split

STILL = PLAIN.replace(tune="projector,decoder,vision", learning_rate=0.0, adam_b1=0.0)  # so that `mu` is the gradient


def loss_and_gradients(batches: list[Batch], mesh=None, accumulate: int = 1):
    """Over all batches, as if they were one."""
    frozen, state, step, evaluate, _ = start(STILL.replace(accumulate=accumulate), batches[0], mesh=mesh)
    loss, gradients, count = 0.0, None, 0
    for batch in batches:
        batch = jax.tree.map(lambda x: put_rows(x, mesh or one_device()), batch)
        state, metrics = step(frozen, state, batch)
        if accumulate > 1:  # an evaluation is computed in the same parts
            sums = evaluate(frozen, state, batch)
            assert int(sums["labelled"]) == int(metrics["labelled"])
            assert float(sums["loss_sum"] / sums["labelled"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)
        weight = int(metrics["labelled"])
        loss, count = loss + weight * float(metrics["loss"]), count + weight
        parts = {path: weight * np.asarray(x) for path, x in flatten_dict(moments(state).mu, sep="/").items()}
        gradients = parts if gradients is None else {path: x + parts[path] for path, x in gradients.items()}
    return loss / count, {path: x / count for path, x in gradients.items()}


def moments(state):
    return next(part for part in state.opt_state if hasattr(part, "mu"))


@functools.cache
def one_by_one():
    rows = conversations(c.tiny())
    length = splice(rows, c.tiny()).ids.shape[1]
    return loss_and_gradients([splice([row], c.tiny(), length=length, tiles=6) for row in rows])


@pytest.mark.parametrize(
    ("packed", "mesh", "devices", "accumulate"),
    [
        (False, "data=2,fsdp=2,tensor=2", 8, 2),
        (True, "fsdp=2", 2, 4),
        (True, "fsdp=8", 8, 1),
        (True, "fsdp=1", 1, 2),
        (False, "data=2", 2, 1),
        (False, "fsdp=1", 1, 4),
    ],
)
def test_loss_and_gradients_are_those_of_the_conversations_one_by_one(packed, mesh, devices, accumulate):
    rows = conversations(c.tiny())
    if packed:
        batch = pack([rows[:3], rows[3:5], rows[5:6], rows[6:11], rows[11:13], rows[13:]], c.tiny(), batch=8)
    else:
        batch = splice(rows, c.tiny())
    mesh = make_mesh(parse_mesh(mesh), jax.devices()[:devices])
    loss, gradients = loss_and_gradients([batch], mesh, accumulate)
    want_loss, want = one_by_one()
    assert loss == pytest.approx(want_loss, rel=1e-5)
    assert gradients.keys() == want.keys()
    norm = np.sqrt(sum(np.sum(x * x) for x in want.values()))
    for path, x in want.items():
        # A bias of keys changes nothing: all of its gradient is rounding.
        size = norm if path == "vision/layers/attention/k/bias" else np.abs(x).max()
        np.testing.assert_allclose(gradients[path], x, atol=1e-5 * size, rtol=0, err_msg=path)


def test_gradients_in_bfloat16_are_those_of_float32_but_for_rounding():
    config = STILL.replace(dtype="bfloat16")
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    frozen, state, step, _, batch = start(config, splice(conversations(c.tiny()), c.tiny()), mesh=mesh)
    state, metrics = step(frozen, state, batch)
    want_loss, want = one_by_one()
    assert float(metrics["loss"]) == pytest.approx(want_loss, rel=0.01)
    got = flatten_dict(moments(state).mu, sep="/")
    off = np.sqrt(sum(np.sum((got[path] - x) ** 2) for path, x in want.items()))
    assert off < 0.02 * np.sqrt(sum(np.sum(x * x) for x in want.values()))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_chunks_of_the_head_add_up(monkeypatch, tied, trained):
    """Six chunks, of which the last ones are needed by no row and skipped."""
    rng = np.random.default_rng(0)
    model = c.tiny()
    model = model.replace(text=dataclasses.replace(model.text, tied_head=tied))
    x_BSD = rng.standard_normal((3, 700, 32), np.float32)
    targets_BS = np.where(rng.random((3, 700)) < 0.5, rng.integers(0, 512, (3, 700)), IGNORE)
    params = {name: random_params(model)["decoder"][name] for name in ("norm", "embed" if tied else "head")}

    def naive(params, x_BSD):
        logits = jax.nn.log_softmax(llama.logits(params, model.text, x_BSD))
        picked = jnp.take_along_axis(logits, np.maximum(targets_BS, 0)[..., None], axis=-1)[..., 0]
        return -0.37 * jnp.sum(jnp.where(targets_BS != IGNORE, picked, 0))

    @jax.jit
    def ours(params, x_BSD):
        return 0.37 * loss_module.head_loss(
            params, x_BSD, jnp.array(targets_BS), model, Partition(model, one_device()), trained
        )

    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 128 * 3 * 512)
    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(params, x_BSD) for f in (ours, naive))
    assert float(ours(params, x_BSD)) == pytest.approx(float(want[0]), rel=1e-5)  # as evaluation has it
    if not trained:
        assert not any(np.any(x) for x in jax.tree.leaves(got[1][0]))
        got, want = (got[0], got[1][1]), (want[0], want[1][1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), got, want)


@pytest.mark.parametrize(("trained", "products"), [(True, 3), (False, 2)])
def test_logits_are_computed_once(trained, products):
    """And where the head is not trained, its gradient is not."""
    model, D, n = c.tiny(), 32, 128
    params = {name: random_params(model)["decoder"][name] for name in ("norm", "head")}

    def loss(params, x_BSD):
        return loss_module.head_loss(
            params, x_BSD, jnp.zeros((2, n), int), model, Partition(model, one_device()), trained
        )

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, jnp.zeros((2, n, D))).compile()
    product = 2 * 2 * n * D * model.text.vocab_size
    assert compiled.cost_analysis()["flops"] / product == pytest.approx(products, abs=0.5)


@pytest.mark.parametrize(("asked", "summed"), [(None, "bf16"), ("float32", "f32")])
def test_gradients_are_summed_over_devices_in_the_precision_asked_for(asked, summed):
    """Weights are gathered in the compute dtype all the same."""
    model, mesh = c.tiny(), make_mesh({"fsdp": 4}, jax.devices()[:4])
    config = PLAIN.replace(dtype="bfloat16", reduce_dtype=asked)
    frozen, state, step, _ = setup(random_params(model), model, config, mesh, 8)
    batch = jax.tree.map(lambda x: put_rows(x, mesh), splice(conversations(model)[:4], model))
    text = step.lower(frozen, state, batch).as_text()
    types = {
        kind: set(re.findall(rf'"stablehlo.{kind}".*?-> tensor<[\dx]*x(\w+)>', text, re.S))
        for kind in ("all_gather", "reduce_scatter")
    }
    assert types == {"all_gather": {"bf16"}, "reduce_scatter": {summed}}


# ---------------------------------------------------------------- what is trained, and what it costs

MODELS = {  # of the presets, tiny
    "v1": c.tiny(projector="linear", merge="flat", aspect_ratio="square"),
    "v1.5": c.tiny(merge="flat", aspect_ratio="pad"),
    "v1.6": c.tiny(),
}
TRAINED = {
    "projector": {"projector"},
    "projector,decoder": {"projector", "decoder", "newline"},
    "projector,decoder,vision": {"projector", "decoder", "newline", "vision"},
    "lora": {"projector", "lora_a", "lora_b"},
}


ALIKE = {  # presets whose step is that of another: they differ in their data
    "v1-finetune": PRESETS["v1.5-finetune"].replace(aspect_ratio="square", image_first="random"),
    "v1-finetune-scienceqa": PRESETS["v1.5-finetune"].replace(aspect_ratio="square", epochs=12.0),
    "v1.5-finetune-task": PRESETS["v1.5-finetune"],
}


def test_presets_that_are_alike():
    assert {name: PRESETS[name] for name in ALIKE} == ALIKE


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ALIKE])
def test_every_preset_trains_what_it_says_and_nothing_else(name):
    """Loss falls; there is optimizer state for the trained tensors only; all others stay as they were, bit for bit."""
    model, config = MODELS[name.split("-")[0]], PRESETS[name].replace(lora_rank=4, lora_alpha=8.0)

    def is_trained(path):
        return not TRAINED[config.tune].isdisjoint({path.split("/")[0], path.split("/")[-1]})

    before = {
        path: x.astype(np.float32 if is_trained(path) else jnp.bfloat16)
        for path, x in flatten_dict(random_params(model), sep="/").items()
    }
    frozen, state, step, _, batch = start(config, splice(conversations(model)[:6], model), model, total_steps=12)
    trained = flatten_dict(state.trained, sep="/")
    assert all(is_trained(path) and x.dtype == np.float32 for path, x in trained.items())
    assert not any(map(is_trained, flatten_dict(frozen, sep="/")))
    for moment in (moments(state).mu, moments(state).nu):
        assert jax.tree.map(np.shape, moment) == jax.tree.map(np.shape, state.trained)
    assert sum(x.size > 1 for x in jax.tree.leaves(state.opt_state)) == 2 * len(trained)

    losses, rates = [], []
    for _ in range(12):
        state, metrics = step(frozen, state, batch)
        losses.append(float(metrics["loss"]))
        rates.append(float(metrics["learning_rate"]))
    assert losses[-1] < losses[0]
    assert rates[:2] == [0.0, pytest.approx(config.learning_rate)]
    after = flatten_dict(export_params(frozen, state.trained), sep="/")
    assert {path for path in after if "lora" not in path} == before.keys()
    for path, x in before.items():
        assert after[path].dtype == x.dtype
        assert is_trained(path) != np.array_equal(after[path], x), path


def flops(config: TrainConfig, model, batch: Batch) -> float:
    """Executed for a step, by the compiler's count, which takes a loop's body once: models have one layer here."""
    frozen, state, step, _ = setup(llava.param_shapes(model), model, config, one_device(), 8)
    return step.lower(frozen, state, batch).compile().cost_analysis()["flops"]


def test_stage_one_computes_no_weight_gradients_of_the_decoder():
    """4 N a token without the work done again to save memory, where training the decoder takes 6 N."""
    model = c.tiny()
    text = dataclasses.replace(model.text, vocab_size=64, width=256, ffn_width=768, head_width=64, layers=1)
    model = model.replace(text=text)
    ids = jax.ShapeDtypeStruct((4, 128), np.int32)
    batch = Batch(jax.ShapeDtypeStruct((4, 1, 28, 28, 3), np.uint8), *[ids] * 5)
    shapes = flatten_dict(llava.param_shapes(model)["decoder"], sep="/")
    once = sum(np.prod(x.shape) for path, x in shapes.items() if path.endswith("kernel")) * ids.size
    attention = 6 * 2 * ids.size * ids.shape[1] * text.heads * text.head_width  # scores and sums, and their gradients

    def products(tune: str) -> float:
        return flops(PLAIN.replace(tune=tune, remat="none"), model, batch) - attention

    assert 3.9 * once < products("projector") < 4.3 * once
    assert 6.0 * once < products("projector,decoder")


def test_remat_policies_trade_memory_for_work():
    """In the order of their names, a backward pass computes less and less again."""
    model = c.tiny()
    params = llava.param_shapes(model)["decoder"]
    layers = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), params["layers"]["0"])
    model = model.replace(text=dataclasses.replace(model.text, layers=1))
    x_BSD, ids_BS = jax.ShapeDtypeStruct((2, 64, 32), np.float32), jax.ShapeDtypeStruct((2, 64), np.int32)

    def loss(layers, x_BSD, ids_BS, remat):
        return jnp.sum(llama.forward({"layers": layers}, model.text, x_BSD, ids_BS, ids_BS, remat=remat) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=3)
    count = [gradient.lower(layers, x_BSD, ids_BS, remat).cost_analysis()["flops"] for remat in REMAT]
    assert list(REMAT) == ["full", "minimal", "dots", "none"]
    assert sorted(count, reverse=True) == count
    assert len(set(count)) == 4


# ---------------------------------------------------------------- what goes wrong


def test_a_step_that_is_not_finite_is_skipped():
    model = c.tiny()
    batch = splice(conversations(model)[:2], model)
    frozen, state, step, _, batch = start(PLAIN.replace(tune="projector"), batch)
    broken = frozen | {"newline": frozen["newline"] * np.nan}
    state, metrics = step(frozen, state, batch)
    before = jax.tree.map(np.asarray, (state.trained, state.opt_state))
    for times in (1, 2):
        state, metrics = step(broken, state, batch)
        assert not metrics["ok"]
        assert (int(state.step), int(state.skipped), int(state.skipped_total)) == (1 + times, times, times)
    jax.tree.map(np.testing.assert_array_equal, (state.trained, state.opt_state), before)
    state, metrics = step(frozen, state, batch)
    assert metrics["ok"]
    assert (int(state.step), int(state.skipped), int(state.skipped_total)) == (4, 0, 2)
    assert not np.array_equal(
        state.trained["projector"]["linear_0"]["kernel"], before[0]["projector"]["linear_0"]["kernel"]
    )


def test_a_projector_without_parameters_cannot_be_trained_alone():
    model = c.tiny(projector="identity")
    model = model.replace(vision=dataclasses.replace(model.vision, width=32))
    with pytest.raises(InputError, match="no parameters to train"):
        setup(llava.param_shapes(model), model, PLAIN.replace(tune="projector"), one_device(), 8)


def test_rows_that_do_not_go_into_the_parts():
    batch = splice(conversations(c.tiny())[:3], c.tiny())
    with pytest.raises(InputError, match="3 rows does not divide into 2 equal parts"):
        start(PLAIN.replace(tune="projector", accumulate=2), batch)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(tune="decoder"), "--tune 'decoder': only projector,"),
        (dict(remat="some"), "--remat 'some': only full, minimal, dots, none"),
        (dict(steps=0), "--steps 0: must be a whole number from 1 to 2147483647"),
        (dict(steps=1.5), "--steps 1.5: must be int | None"),
        (dict(learning_rate=float("nan")), "--learning-rate nan: must be a number from 0 to 10"),
        (dict(warmup_ratio=1.1), "--warmup-ratio 1.1: must be a number from 0 to 1"),
        (dict(lora_dropout=1.0), "--lora-dropout 1.0: must be a number from 0 to 0.999"),
        (dict(lora_targets=("q", "head")), "--lora-targets head: only q, k"),
        (dict(tune="lora", lora_targets=()), "--lora-targets: name at least one"),
        (dict(epochs=0.0), "--epochs 0.0: must be a number above 0, at most 1000000"),
        (dict(epochs=1e308), "--epochs 1e+308: must be a number above 0, at most 1000000"),
        (dict(epochs=float("inf")), "--epochs inf: must be a number above 0, at most 1000000"),
        (dict(mesh="model=8"), "mesh 'model=8': write it as"),
    ],
)
def test_configurations_that_cannot_be(change, says):
    with pytest.raises(InputError) as error:
        TrainConfig(**change)
    assert str(error.value).startswith(says)
