"""LoRA: the layer by its definition, a start that changes nothing, merging, every mesh, the files of an adapter."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from convert.to_orbax import to_orbax
from helpers import GOLDEN, load_golden, one_device
from llava_jax import config as c
from llava_jax import sandbox
from llava_jax.checkpoints.checkpoint import open_checkpoint
from llava_jax.console import InputError
from llava_jax.data.splice import Batch
from llava_jax.models import llava
from llava_jax.models.layers import REMAT, Dense
from llava_jax.sharding.mesh import make_mesh, parse_mesh
from llava_jax.sharding.partition import UNSHARDED, Partition
from train import lora
from train.config import TrainConfig
from train.loss import loss_sum
from train.parameters import export_params
from train.step import setup

CONFIG = TrainConfig(tune="lora", lora_rank=4, lora_alpha=8.0, lora_dropout=0.25, dtype="float32", checkpoint="base")


def some_batch() -> Batch:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 512, (4, 24)).astype(np.int32)
    whole = np.ones_like(ids)
    return Batch(np.zeros((4, 0, 28, 28, 3), np.uint8), ids, -whole, np.cumsum(whole, 1) - 1, whole, ids)


@functools.cache
def start(config=CONFIG, mesh=None):
    """A random model, frozen, and the state."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), llava.param_shapes(c.tiny()))
    frozen, state, _, _ = setup(params, c.tiny(), config, mesh or one_device(), 8)
    return frozen, state


def trained_a_while(state):
    """B is no longer zero."""
    rng = np.random.default_rng(1)
    moved = jax.tree.map(
        lambda x: x + jax.device_put(rng.standard_normal(x.shape, np.float32), x.sharding), state.trained
    )
    return dataclasses.replace(state, trained=moved)


def test_a_layer_adds_the_product_of_its_factors():
    rng = np.random.default_rng(0)
    x, w, a, b = (rng.standard_normal(shape, np.float32) for shape in ((512, 64), (64, 8), (64, 4), (4, 8)))
    params = {"kernel": w, "lora_a": a, "lora_b": b}
    np.testing.assert_allclose(Dense(8).apply({"params": params}, x), x @ w, atol=1e-4)
    with lora.adapted(CONFIG):
        np.testing.assert_allclose(Dense(8).apply({"params": {"kernel": w}}, x), x @ w, atol=1e-4)
        np.testing.assert_allclose(Dense(8).apply({"params": params}, x), x @ w + 2 * x @ a @ b, atol=1e-3)
        # Through the identity we see what dropout leaves.
        seen = {"kernel": np.zeros((64, 64)), "lora_a": np.eye(64), "lora_b": np.eye(64) / lora.scale(CONFIG)}
        ones, layer = np.ones((512, 64), np.float32), Dense(64)
        keys = [jax.random.key(i, impl="rbg") for i in (0, 1)]
        kept, other = (layer.apply({"params": seen | {"lora_key": key}}, ones) for key in keys)
    assert np.unique(kept).tolist() == [0.0, pytest.approx(4 / 3)]
    assert np.mean(np.asarray(kept) == 0) == pytest.approx(0.25, abs=0.01)
    assert np.any(kept != other)
    with lora.adapted(CONFIG.replace(lora_dropout=0.999)):
        assert np.mean(layer.apply({"params": seen | {"lora_key": keys[0]}}, ones) != 0) < 0.01


def test_every_layer_and_linear_drops_in_its_own_way():
    _, state = start()
    layers = lora.add_dropout(state.trained["decoder"]["layers"], jax.random.key(0, impl="rbg"))
    keys = [x for path, x in flatten_dict(layers, sep="/").items() if path.endswith("lora_key")]
    assert [x.shape for x in keys] == [(2,)] * 7
    assert len({tuple(map(int, jax.random.key_data(key))) for x in keys for key in x}) == 14
    assert "lora_key" not in str(state.trained)


def test_it_starts_as_the_model_it_came_from():
    _, state = start()
    factors = {path: x for path, x in flatten_dict(state.trained, sep="/").items() if "lora" in path}
    assert len(factors) == 14
    for path, x in factors.items():
        if path.endswith("lora_b"):
            assert not np.any(x)
        else:  # uniform within +-1 / sqrt(in)
            bound = x.shape[1] ** -0.5
            assert 0.95 * bound < np.abs(x).max() <= bound
            assert np.std(x) == pytest.approx(bound / 3**0.5, rel=0.15)
    assert np.any(np.asarray(start(CONFIG.replace(seed=1))[1].trained["decoder"]["layers"]["mlp"]["up"]["lora_a"])
                  != factors["decoder/layers/mlp/up/lora_a"])  # fmt: skip


def test_only_the_targets_have_factors():
    _, state = start(CONFIG.replace(lora_targets=("q", "down")))
    names = {path for path in flatten_dict(state.trained, sep="/") if "lora" in path}
    assert names == {f"decoder/layers/{part}/lora_{x}" for part in ("attention/q", "mlp/down") for x in "ab"}


def test_merged_weights_and_every_mesh_give_the_same_loss():
    model, batch = c.tiny(), some_batch()
    loss = jax.jit(loss_sum, static_argnums=(2, 3, 4))
    frozen, state = start()
    untouched = float(loss(frozen | {"projector": state.trained["projector"]}, batch, model, CONFIG))
    state = trained_a_while(state)
    flat = flatten_dict(frozen, sep="/") | flatten_dict(state.trained, sep="/")
    both = unflatten_dict(flat, sep="/")
    want = float(loss(both, batch, model, CONFIG))
    assert abs(want - untouched) > 1

    for path in list(flat):
        if path.endswith("lora_a"):
            base = path.removesuffix("lora_a")
            factors = (np.asarray(flat.pop(base + name)) for name in lora.FACTORS)
            flat[base + "kernel"] = lora.merged(np.asarray(flat[base + "kernel"]), *factors, CONFIG)
    got = float(loss(unflatten_dict(flat, sep="/"), batch, model, CONFIG))
    assert got == pytest.approx(want, rel=1e-6)

    dropout = jax.random.key(1, impl="rbg")
    want = float(loss(both, batch, model, CONFIG, UNSHARDED, dropout))
    assert abs(got - want) > 0.1
    mesh = make_mesh(parse_mesh("fsdp=4,tensor=2"))
    frozen, state = start(mesh=mesh)
    state = trained_a_while(state)
    assert frozen["decoder"]["layers"]["mlp"]["down"]["kernel"].sharding.spec == P(None, "tensor", "fsdp")
    assert state.trained["decoder"]["layers"]["mlp"]["down"]["lora_a"].sharding.spec == P(None, "tensor", "fsdp")
    both = unflatten_dict(flatten_dict(frozen, sep="/") | flatten_dict(state.trained, sep="/"), sep="/")
    assert float(loss(both, batch, model, CONFIG, Partition(model, mesh), dropout)) == pytest.approx(want, rel=1e-6)


def test_full_remat_keeps_the_narrow_products(monkeypatch):
    frozen, state = start()
    batch = some_batch()

    def flops() -> float:
        def f(trained):
            both = unflatten_dict(flatten_dict(frozen, sep="/") | flatten_dict(trained, sep="/"), sep="/")
            return loss_sum(both, batch, c.tiny(), CONFIG)

        return jax.jit(jax.grad(f)).lower(state.trained).cost_analysis()["flops"]

    kept = flops()
    monkeypatch.setitem(REMAT, "full", jax.checkpoint_policies.nothing_saveable)
    factors = {path: x for path, x in flatten_dict(state.trained, sep="/").items() if path.endswith("lora_a")}
    narrow = sum(2 * batch.ids.size * x[0].size for x in factors.values())  # a scan's body is counted once
    assert len(factors) == 7
    assert flops() - kept == pytest.approx(narrow, rel=0.05)


def test_dropout_is_one_operation_for_each_adapter():
    """Forward, and again where the backward pass computes a layer anew."""
    frozen, state, step_fn, _ = setup(llava.param_shapes(c.tiny()), c.tiny(), CONFIG, one_device(), 8)
    text = step_fn.lower(frozen, state, some_batch()).as_text()
    assert text.count("stablehlo.rng_bit_generator") == 2 * 7


@pytest.mark.parametrize("rank", [4, 16])  # the former is not sharded by columns
def test_factors_are_sharded_by_rows(rank):
    mesh = make_mesh({"fsdp": 8})
    for name in ("attention/o", "mlp/down"):
        assert Partition(c.tiny(), mesh).spec(f"decoder/layers/0/{name}/lora_a", (64, rank)) == P("fsdp", None)


def test_files_of_an_adapter(tmp_path):
    _, state = start()
    params = export_params({}, trained_a_while(state).trained)
    lora.save_adapter(tmp_path / "adapter", params, c.tiny(), CONFIG)
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == "base"
    assert (described["r"], described["lora_alpha"], described["lora_dropout"]) == (4, 8.0, 0.25)
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert described["target_modules"] == sorted(linears)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    a = tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    np.testing.assert_array_equal(a, np.asarray(params["decoder"]["layers"]["1"]["attention"]["q"]["lora_a"]).T)
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].shape == (32, 4)


def test_convert_merges_an_adapter_as_we_do(tmp_path):
    found, params = load_golden("v1.5-llama")
    config = CONFIG.replace(lora_targets=("q", "down"))
    before = flatten_dict(params, sep="/")
    _, state, _, _ = setup(dict(params), found.config, config, one_device(), 8)
    trained = export_params({}, trained_a_while(state).trained)
    lora.save_adapter(tmp_path / "adapter", trained, found.config, config)
    to_orbax(tmp_path / "adapter", tmp_path / "model", base=GOLDEN / "checkpoints" / "v1.5-llama")
    after = flatten_dict(open_checkpoint(tmp_path / "model").load(one_device(), np.float32), sep="/")

    trained = flatten_dict(trained, sep="/")
    assert after.keys() == before.keys()
    for path, x in before.items():
        base = path.removesuffix("kernel")
        if base + "lora_a" in trained:
            x = lora.merged(np.asarray(x), *(np.asarray(trained[base + name]) for name in lora.FACTORS), config)
        np.testing.assert_allclose(after[path], trained.get(path, x), atol=1e-6, err_msg=path)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of random factors for the golden v1.5 checkpoint."""
    found, params = load_golden("v1.5-llama")
    _, state, _, _ = setup(dict(params), found.config, CONFIG, one_device(), 8)
    directory = tmp_path_factory.mktemp("adapter")
    lora.save_adapter(directory, export_params({}, state.trained), found.config, CONFIG)
    return directory


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"r": 0}, "r: expected an integer >= 1"),
        ({"r": -4}, "r: expected an integer >= 1"),
        ({"r": 4.5}, "r: expected an integer, got a number"),
        ({"r": True}, "r: expected an integer, got a boolean"),
        ({"r": "4"}, "r: expected an integer, got a string"),
        ({"r": 2**70}, "r: expected an integer <= 65,536"),
        ({"r": 5}, "should be"),
        ({"lora_alpha": None}, "lora_alpha: expected a number, got null"),
        ({"lora_alpha": float("nan")}, "NaN, which JSON does not have"),
        ({"lora_alpha": 10**400}, "a number of 401 digits"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern: expected an object or null, got a list"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\[...\]: expected an integer >= 1"),
        ({"alpha_pattern": {"q_proj": [1]}}, r"alpha_pattern\[...\]: expected a number, got a list"),
        ({"alpha_pattern": {"(q_proj": 1}}, r"the alpha_pattern \(q_proj: missing \)"),
        ({"rank_pattern": {"(.*.*)*x": 4}}, r"the rank_pattern \(.\*.\*\)\*x: takes more than 1 s"),
        ({"alpha_pattern": {"y" * 999 + r"|((\w|\.)+)+x": 4}}, r"the alpha_pattern yyy.*\+x: takes more than 1 s"),
        ({"rank_pattern": {"(" * 9999 + ")" * 9999: 4}}, r"the rank_pattern \(\(.*: maximum recursion"),
    ],
)
def test_an_adapter_configured_wrongly(changed, says, stabilised, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "_shared", sandbox.Worker(seconds=1))
    shutil.copytree(adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": stabilised} | changed))
    with pytest.raises(InputError, match=says) as refused:
        to_orbax(tmp_path / "adapter", tmp_path / "model", base=GOLDEN / "checkpoints" / "v1.5-llama")
    assert "adapter_config.json" in str(refused.value) or "adapter_model" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value).replace(str(tmp_path), "")) < 300
