"""The model against the reference's own numbers, all four golden checkpoints, read directly and converted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.to_orbax import to_orbax
from helpers import CHECKPOINTS, GOLDEN, golden_json, load_golden, make_row, one_device
from llava_jax import config as c
from llava_jax.checkpoints import checkpoint
from llava_jax.data.splice import IGNORE, splice
from llava_jax.data.templates import choose_template
from llava_jax.models import llama, llava
from llava_jax.models.attention import attention, cached_attention
from llava_jax.models.cache import new_cache, to_cache
from llava_jax.sharding.mesh import make_mesh
from llava_jax.sharding.partition import Partition

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=CHECKPOINTS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return load_golden(name)


@functools.partial(jax.jit, static_argnames="config")
def _outputs(params, batch, config):
    return llava.embed_batch(params, config, batch), llava.forward(params, config, batch)


def test_everything_equals_the_reference(name, model):
    """Ids, masks, positions, labels exactly; input embeddings, logits and loss within 1e-4 in float32."""
    found, params = model
    cases = [case for case in golden_json("checkpoints/index.json") if case["checkpoint"] == name]
    assert len(cases) == 12
    for case in cases:
        want = np.load(GOLDEN / "checkpoints" / name / f"expected.{case['key'].removeprefix(name + '.')}.npz")
        rows = [
            make_row(
                talk, [GOLDEN / "images" / p for p in image_files], case["template"], found.config, found.tokenizer
            )
            for talk, image_files in zip(case["conversations"], case["images"], strict=True)
        ]
        for b, row in enumerate(rows):
            valid = want["in_mask"][b]
            np.testing.assert_array_equal(row.ids, want["input_ids"][b][valid])
            labels = want["in_labels"][b][valid]
            if (labels != IGNORE).any():  # else the reference gave the sample up: see test_prompts.py
                np.testing.assert_array_equal(row.labels, labels)
            rows[b] = dataclasses.replace(row, labels=labels)
        batch = splice(rows, found.config, max_length=case["max_length"], padding_side=case["padding_side"])
        valid = want["attention_mask"]
        np.testing.assert_array_equal(batch.segments > 0, valid)
        np.testing.assert_array_equal(batch.positions, want["position_ids"])
        np.testing.assert_array_equal(batch.labels, want["labels"])

        embeds, logits = map(np.asarray, _outputs(params, batch, found.config))
        np.testing.assert_allclose(embeds[valid], want["inputs_embeds"][valid], atol=TOLERANCE, rtol=0)
        at = want["logits_positions"]
        np.testing.assert_allclose(logits[:, at][valid[:, at]], want["logits"][valid[:, at]], atol=TOLERANCE, rtol=0)
        np.testing.assert_array_equal(logits.argmax(-1)[valid], want["argmax"][valid])

        predicted, target = jax.nn.log_softmax(logits[:, :-1]), batch.labels[:, 1:]
        trained = target != IGNORE
        picked = np.take_along_axis(np.asarray(predicted), np.where(trained, target, 0)[..., None], -1)[..., 0]
        if trained.any():
            assert -picked[trained].mean() == pytest.approx(float(want["loss"]), abs=TOLERANCE)
        else:
            assert np.isnan(want["loss"])


def test_converted_it_is_the_same_model(name, model, tmp_path):
    """Bit for bit; its template goes along."""
    to_orbax(GOLDEN / "checkpoints" / name, tmp_path / "orbax")
    found = checkpoint.open_checkpoint(tmp_path / "orbax")
    jax.tree.map(np.testing.assert_array_equal, found.load(one_device(), np.float32), model[1])
    for config in (model[0].config, found.config):
        assert choose_template(config) == ("mistral_instruct" if "mistral" in name else "llava_v1")
    written = dict(template=found.config.template, template_from=found.config.template_from)
    assert model[0].config.replace(**written, name=found.config.name) == found.config


def test_last_vision_layer_is_neither_kept_nor_computed(name, model):
    config, params = model[0].config, model[1]
    assert sorted(params["vision"]["layers"]) == [str(i) for i in range(config.vision.layers - 1)]
    assert "post_norm" not in params["vision"]


# ---------------------------------------------------------------- pieces


def random_heads(B=2, S=300, H=4, K=2, N=8, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    q, k, v = (jax.random.normal(key, (B, S, heads, N)) for key, heads in zip(keys, (H, K, K), strict=True))
    return q / N**0.5, k, v


def naive_attention(q, k, v, mask):
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("bshn,bthn->bhst", q, k, dtype=np.float64)
    scores = np.where(mask[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhst,bthn->bshn", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("S", [5, 300, 700])
def test_attention_equals_the_definition(S, segments, window, devices):
    """Both ways of running plain attention, whole blocks and parts of them."""
    q, k, v = random_heads(S=S)
    ids = np.ones((2, S), np.int32)
    if segments:
        ids[:, S // 3 :] = 2
        ids[1, -2:] = 0
    i, j = np.ogrid[:S, :S]
    mask = (j <= i)[None] & (ids[:, :, None] == ids[:, None])
    mask = mask & (i - j < window) if window else mask
    partition = Partition(c.tiny(), make_mesh({"data": devices}, jax.devices()[:devices]))
    segments_BS = jnp.array(ids) if segments else None
    got = attention(q, k, v, segments_BS=segments_BS, causal=True, window=window, partition=partition)
    np.testing.assert_allclose(got, naive_attention(*map(np.asarray, (q, k, v)), mask), atol=2e-6)


def test_attention_without_mask():
    q, k, v = random_heads(K=4)
    want = naive_attention(*map(np.asarray, (q, k, v)), np.ones((2, 300, 300), bool))
    np.testing.assert_allclose(attention(q, k, v), want, atol=2e-6)


@pytest.mark.parametrize("by_position", [False, True])
def test_cached_attention_equals_the_last_row_of_attention(by_position):
    """In two caches, behind which there is something else."""
    q, k, v = random_heads()
    whole = attention(q, k, v, causal=True)[:, -1]
    beyond = jnp.full((2, 20, *k.shape[2:]), 1e4)
    parts = []
    for positions in (slice(0, 200), slice(200, None)):
        n = k[:, positions].shape[1]
        filled = [jnp.concatenate([x[:, positions], beyond], axis=1) for x in (k, v)]
        parts.append(
            (to_cache(*filled, by_position=by_position), jnp.broadcast_to(jnp.arange(n + 20) < n, (2, n + 20)))
        )
    np.testing.assert_allclose(cached_attention(q[:, -1], parts), whole, atol=2e-6)


def prefill(params, config, x_BSD, lengths, positions, *, int8=False):
    """Prompts in a new cache, each in its own slot."""
    B = len(x_BSD)
    cache = new_cache(config, B, positions, x_BSD.dtype, int8=int8)
    return llama.prefill(params, config, x_BSD, jnp.zeros(B, int), lengths, cache, jnp.arange(B), span=0)


@pytest.mark.parametrize("window", [None, 7])
def test_prefill_gives_what_a_whole_pass_gives(window):
    """The last layer's short cut, and the cache, under padding and a sliding window."""
    config = c.tiny()
    config = config.replace(text=dataclasses.replace(config.text, sliding_window=window, layers=3))
    params = jax.tree.map(lambda x: 5 * x, llava.init_params(config, jax.random.key(0)))["decoder"]
    x_BSD = jax.random.normal(jax.random.key(1), (3, 20, 32))
    lengths = jnp.array([20, 11, 1])
    positions = jnp.broadcast_to(jnp.arange(20), (3, 20))
    whole = llama.forward(params, config.text, x_BSD, positions, (positions < lengths[:, None]).astype(int))
    last, cache = prefill(params, config.text, x_BSD, lengths, 32)
    np.testing.assert_allclose(last, whole[jnp.arange(3), lengths - 1], atol=1e-5)
    shapes = [(layer.keys.shape, layer.values_BKMN.shape) for layer in cache]
    assert shapes == [((3, 2, 8, 32), (3, 2, 32, 8))] * 3


def test_a_cache_in_int8_stays_near_another():
    config = c.tiny()
    params = llava.init_params(config, jax.random.key(0))["decoder"]
    x_BSD = jax.random.normal(jax.random.key(1), (3, 20, 32))
    lengths, results = jnp.array([20, 11, 1]), {}
    for int8 in (False, True):
        x_BD, cache = prefill(params, config.text, x_BSD, lengths, 32, int8=int8)
        recent = new_cache(config.text, 3, 4, x_BSD.dtype)
        for step in range(4):
            more = jax.random.normal(jax.random.key(2 + step), (3, 32))
            x_BD, recent = llama.decode_step(params, config.text, more, lengths, cache, recent, jnp.int32(step))
        results[int8] = x_BD, cache
    (exact, _), (near, small) = results[False], results[True]
    assert [x.dtype.name for x in jax.tree.leaves(small[0])] == ["int8", "int8", "float32", "float32"]
    size = float(jnp.max(jnp.abs(exact)))
    np.testing.assert_allclose(near, exact, atol=0.02 * size)
    assert float(jnp.max(jnp.abs(near - exact))) > 1e-5 * size


def test_several_feature_layers_and_the_class_token():
    """Transformers allows a list of layers, concatenated, and the class token to stay."""
    base = c.tiny(merge="flat", aspect_ratio="pad")
    vision = dataclasses.replace(base.vision, feature_layers=(-1, 1), keep_class_token=True)
    config = base.replace(vision=vision)
    params = llava.init_params(config, jax.random.key(0))
    assert len(params["vision"]["layers"]) == 3
    assert params["projector"]["linear_0"]["kernel"].shape == (32, 32)
    assert llava.encode_tiles(params, config, np.zeros((2, 28, 28, 3), np.uint8)).shape == (2, 17, 32)


def test_features_may_be_the_embeddings_before_the_first_layer():
    base = c.tiny()
    config = base.replace(vision=dataclasses.replace(base.vision, feature_layers=(0,)))
    params = llava.init_params(config, jax.random.key(0))
    assert params["vision"]["layers"] == {}
    assert llava.encode_tiles(params, config, np.zeros((2, 28, 28, 3), np.uint8)).shape == (2, 16, 32)


@pytest.mark.parametrize("projector", ["identity", "linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_projectors(projector):
    config = c.tiny(projector=projector)
    config = config.replace(vision=dataclasses.replace(config.vision, width=32))
    params = llava.init_params(config, jax.random.key(0))
    assert len(params.get("projector", {})) == c.projector_depth(projector)
    assert llava.encode_tiles(params, config, np.zeros((1, 28, 28, 3), np.uint8)).shape == (1, 16, 32)


@pytest.mark.parametrize("merge", ["flat", "spatial_unpad"])
def test_a_feature_table_has_the_tiles_of_a_row_in_order_and_then_any_newline(merge):
    config = c.tiny(merge=merge)
    params = llava.init_params(config, jax.random.key(0))
    features_BTPD = np.random.default_rng(0).standard_normal((2, 3, 16, 32), np.float32)
    table_BRD = np.asarray(llava.feature_table(params, config, features_BTPD))
    np.testing.assert_array_equal(table_BRD[:, :48], features_BTPD.reshape(2, 48, 32))
    newlines = [params["newline"]] if config.has_newline else []
    for row in table_BRD:
        np.testing.assert_array_equal(row[48:], np.reshape(newlines, (-1, 32)))


def test_tied_head_and_biases():
    config = c.tiny()
    text = dataclasses.replace(config.text, tied_head=True, qkv_bias=True, o_bias=True, mlp_bias=True)
    params = llava.init_params(config.replace(text=text), jax.random.key(0))
    assert "head" not in params["decoder"]
    assert all("bias" in params["decoder"]["layers"]["0"]["attention"][n] for n in "qkvo")
    x = jnp.ones((1, 32))
    normed = x / jnp.sqrt((x * x).mean() + 1e-5)
    np.testing.assert_allclose(
        llama.logits(params["decoder"], text, x),
        normed @ params["decoder"]["embed"]["embedding"].T,
        atol=1e-5,
    )
