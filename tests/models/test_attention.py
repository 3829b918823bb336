"""The TPU's attention kernels, interpreted, against plain attention: forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import config as c
from llava_jax.models import attention as attention_module
from llava_jax.models.attention import attention, splash_attention, splash_block
from llava_jax.sharding.mesh import make_mesh
from llava_jax.sharding.partition import Partition


def inputs(dtype, length: int, rows: int = 1, heads: int = 2, kv_heads: int = 1):
    rng = np.random.default_rng(0)
    shapes = [(rows, length, n, 128) for n in (heads, kv_heads, kv_heads, heads)]
    q, *others = (rng.standard_normal(shape) for shape in shapes)
    return [jnp.asarray(x, dtype) for x in (q / np.sqrt(128), *others)]


def error(got, want) -> float:
    """Of the norm."""
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


PACKED = [1] * 70 + [2] * 110 + [0] * 20


# To round the exact gradients to bfloat16 is 0.0017 off by itself, and what they are products of has been rounded too.
# Plain attention's are 0.0029 off.
@pytest.mark.parametrize(
    ("dtype", "most", "most_backward", "segments", "window", "kv_heads"),
    [
        ("float32", 1e-5, 1e-5, PACKED, None, 1),
        ("bfloat16", 2e-3, 2.7e-3, PACKED, None, 1),
        ("float32", 1e-5, 1e-5, [1] * 130, 40, 2),
        ("bfloat16", 2e-3, 2.7e-3, [1] * 130, 40, 2),
    ],
)
def test_kernels_give_what_plain_attention_gives(dtype, most, most_backward, segments, window, kv_heads):
    q, k, v, out = inputs(dtype, len(segments), kv_heads=kv_heads)
    ids = jnp.asarray([segments], jnp.int32)

    def both(attend, *args):
        def loss(*args):
            seen = jnp.where(ids[..., None, None] > 0, attend(*args), 0)
            return jnp.sum(seen.astype(jnp.float32) * out.astype(jnp.float32)), seen

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*args)

    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    (_, want), gradients_wanted = both(
        lambda q, k, v: attention(q, k, v, segments_BS=ids, causal=True, window=window), *wide
    )
    (_, got), gradients = both(lambda q, k, v: splash_attention(q, k, v, ids, window=window, interpret=True), q, k, v)
    assert got.dtype == dtype
    assert error(got, want) < most
    for mine, theirs in zip(gradients, gradients_wanted, strict=True):
        assert error(mine, theirs) < most_backward


@pytest.mark.parametrize("mesh", [{"data": 2, "tensor": 2}])
def test_kernels_run_on_each_devices_rows_and_heads(mesh):
    q, k, v, _ = inputs("float32", 128, rows=2, heads=4, kv_heads=2)
    partition = Partition(c.tiny(), make_mesh(mesh, jax.devices()[:4]))
    ids = jnp.ones((2, 128), jnp.int32)
    got = jax.jit(lambda q, k, v: splash_attention(q, k, v, ids, partition=partition, interpret=True))(q, k, v)
    assert error(got, attention(q, k, v, causal=True)) < 1e-5


@pytest.mark.parametrize(
    ("length", "block"), [(2048, 512), (4096, 512), (577, 128), (2176, 384), (300, 128), (768, 384), (1000, 512)]
)
def test_blocks(length, block):
    assert splash_block(length) == block


@pytest.mark.parametrize(
    ("segments", "causal", "window"),
    [(None, False, None), (None, True, None), (None, True, 40), (PACKED, True, None), (PACKED, True, 40)],
)
def test_what_cudnn_is_asked_for(monkeypatch, segments, causal, window):
    """Another implementation of the same function gives what plain attention gives."""
    q, k, v, _ = inputs("float32", 200, heads=4, kv_heads=2)
    ids = None if segments is None else jnp.asarray([segments], jnp.int32)
    asked, ours = [], jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *args, implementation, **how: asked.append(implementation) or ours(*args, implementation="xla", **how),
    )
    used = slice(None) if ids is None else np.array(segments) > 0
    got = attention_module._cudnn_attention(q, k, v, ids, causal, window)[:, used]
    assert error(got, attention(q, k, v, segments_BS=ids, causal=causal, window=window)[:, used]) < 1e-5
    assert asked == ["cudnn"]


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("how", ["plain", "kernel", "cudnn"])
def test_queries_of_the_last_positions_only(monkeypatch, how, window):
    """What a chunk of a prompt attends with, after a gap: the end of attention over everything."""
    q, k, v, _ = inputs("float32", 200, heads=4, kv_heads=2)
    segments = jnp.asarray([[0] * 30 + [1] * 170], jnp.int32)  # as if the cache had 30 positions too many
    want = attention(q, k, v, segments_BS=segments, causal=True, window=window)[:, -60:]
    if how == "kernel":
        got = splash_attention(q[:, -60:], k, v, segments, window=window, interpret=True)
    elif how == "cudnn":
        theirs = jax.nn.dot_product_attention
        monkeypatch.setattr(
            jax.nn, "dot_product_attention", lambda *x, implementation, **how: theirs(*x, implementation="xla", **how)
        )
        got = attention_module._cudnn_attention(q[:, -60:], k, v, segments, True, window)
    else:
        got = attention(q[:, -60:], k, v, segments_BS=segments, causal=True, window=window)
    assert got.shape == want.shape
    assert error(got, want) < 1e-5
