"""The decoder: LLaMA (Touvron et al. 2023), Mistral (Jiang et al. 2023), Vicuna, Yi, Qwen2.

As transformers' `LlamaForCausalLM` and its kin compute it. A layer's cache is a pair, keys [B, K, N, M]
and values [B, K, M, N], an argument and a result; slots are positions of the padded prompt and then one for each
step. (Keys lie the way that their product with a query reads them: 1.6 times as fast on a CPU.) In int8 there are two
more arrays [B, K, M], what the numbers of a slot's key and of its value are to be multiplied by.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from llava_jax.config import LlavaConfig, TextConfig
from llava_jax.models.layers import (
    ACTIVATIONS,
    Dense,
    RMSNorm,
    attention,
    cached_attention,
    rope_tables,
    rotate,
    run_layers,
)
from llava_jax.sharding.mesh import BATCH, TENSOR, constrain, gather

Cache = tuple[tuple[jax.Array, ...], ...]  # for each layer keys and values; int8 ones and their scales
SLOT_AXES = (3, 2, 2, 2)  # along which these arrays have their slots


class Block(nn.Module):
    """A layer: attention and feed-forward, each behind a norm and beside a residual."""

    config: TextConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array, attend, only_B: jax.Array | None = None) -> jax.Array:
        """`attend(q, k, v)`, each [B, S, heads, N] before rotation, gives what the queries see.

        With `only_B` the one position of each row whose output is wanted: [B, 1, D].
        """
        c = self.config
        normed = RMSNorm(c.norm_eps, name="attention_norm")(x_BSD)
        x_BSD, queries = (x_BSD, normed) if only_B is None else (_pick(x_BSD, only_B), _pick(normed, only_B))
        x_BSD = x_BSD + Attention(c, name="attention")(queries, normed, attend)
        return x_BSD + FeedForward(c, name="mlp")(RMSNorm(c.norm_eps, name="mlp_norm")(x_BSD))


def _pick(x: jax.Array, position_B: jax.Array) -> jax.Array:
    """[B, S, ...] to [B, 1, ...]: one position of each row."""
    return jnp.take_along_axis(x, position_B.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)


class Attention(nn.Module):
    config: TextConfig

    @nn.compact
    def __call__(self, queries_BQD: jax.Array, x_BSD: jax.Array, attend) -> jax.Array:
        c = self.config

        def heads(name, x, n):
            return Dense(n * c.head_width, c.qkv_bias, name)(x).reshape(*x.shape[:2], n, c.head_width)

        seen = attend(heads("q", queries_BQD, c.heads), heads("k", x_BSD, c.kv_heads), heads("v", x_BSD, c.kv_heads))
        return Dense(c.width, c.o_bias, "o")(seen.reshape(*queries_BQD.shape[:2], c.heads * c.head_width))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    config: TextConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        c = self.config
        gate = ACTIVATIONS[c.activation](Dense(c.ffn_width, c.mlp_bias, "gate")(x_BSD))
        return Dense(c.width, c.mlp_bias, "down")(gate * Dense(c.ffn_width, c.mlp_bias, "up")(x_BSD))


# ---------------------------------------------------------------- whole decoder; `params` is the `decoder` part


def embed(params, config: LlavaConfig, ids: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """Token embeddings [..., D]."""
    table_VD = gather(params["embed"], "decoder/embed", config, mesh)["embedding"]
    return table_VD[ids]


def logits(params, config: LlavaConfig, x: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """Last norm and head: [..., D] to [..., V] in float32."""
    x = RMSNorm(config.text.norm_eps).apply({"params": params["norm"]}, x)
    if config.text.tied_head:
        table_VD = gather(params["embed"], "decoder/embed", config, mesh)["embedding"]
        return jnp.einsum("...D,VD->...V", x, table_VD, preferred_element_type=jnp.float32)
    kernel_DV = gather(params["head"], "decoder/head", config, mesh)["kernel"]
    return jnp.einsum("...D,DV->...V", x, kernel_DV, preferred_element_type=jnp.float32)


def decode(
    params,
    config: LlavaConfig,
    x_BSD: jax.Array,
    positions_BS: jax.Array,
    segments_BS: jax.Array,
    *,
    mesh: Mesh | None = None,
    remat: str = "none",
) -> jax.Array:
    """Run whole sequences through all layers, which may be stacked (`layers.run_layers`).

    Args:
      positions_BS: for rotation.
      segments_BS: a token sees those before it in its own segment; 0 is padding.
      remat: what stacked layers save for the backward pass.

    Returns:
      The last layer's output [B, S, D] (not yet normed).
    """
    c = config.text
    rope = rope_tables(positions_BS, c)

    def attend(q, k, v):
        q, k, v = checkpoint_name(_cut_heads(mesh, rotate(q, rope, c.query_scale), rotate(k, rope), v), "attention")
        static = dict(causal=True, window=c.sliding_window, mesh=mesh, saved="attention")
        return attention(q, k, v, segments_BS=segments_BS, **static)

    def block(x_BSD, layer):
        layer = gather(layer, "decoder/layers", config, mesh)
        return constrain(Block(c).apply({"params": layer}, x_BSD, attend), mesh, BATCH, None, None)

    return run_layers(block, x_BSD, params["layers"], range(c.layers), remat)


def prefill(
    params,
    config: LlavaConfig,
    x_BSD: jax.Array,
    lengths_B: jax.Array,
    slots: int,
    *,
    int8: bool = False,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, Cache]:
    """Run prompts, padded on the right, through all layers and keep their keys and values.

    Of the last layer only keys and values are computed for all positions, the rest for a row's last one.

    Args:
      slots: M, room in the cache.
      int8: keep keys and values in half the memory.

    Returns:
      The last layer's output [B, D] (not yet normed) at each row's last position, and the cache.
    """
    c = config.text
    rope = rope_tables(jnp.arange(x_BSD.shape[1])[None], c)
    last_B = jnp.maximum(lengths_B - 1, 0)
    cache = []

    def attend(q, k, v):
        q, k, v = _cut_heads(mesh, rotate(q, rope, c.query_scale), rotate(k, rope), v)
        cache.append(_fresh_cache(k, v, slots, int8, mesh))
        return attention(q, k, v, causal=True, window=c.sliding_window, mesh=mesh)  # padding is behind all queries

    def attend_last(q, k, v):
        q = rotate(q, tuple(table[0, last_B][:, None] for table in rope), c.query_scale)
        q, k, v = _cut_heads(mesh, q, rotate(k, rope), v)
        cache.append(_fresh_cache(k, v, slots, int8, mesh))
        positions = jnp.arange(k.shape[1])
        visible_BS = positions < last_B[:, None]
        if c.sliding_window:
            visible_BS &= last_B[:, None] - positions < c.sliding_window
        own = (_pick(t, last_B)[:, 0] for t in (k, v))
        return cached_attention(q[:, 0], *own, _as_cached(k, v, int8=False), visible_BS, mesh)

    for i in range(c.layers):
        layer = gather(params["layers"][str(i)], f"decoder/layers/{i}", config, mesh)
        if i < c.layers - 1:
            x_BSD = constrain(Block(c).apply({"params": layer}, x_BSD, attend), mesh, BATCH, None, None)
        else:
            x_BSD = Block(c).apply({"params": layer}, x_BSD, attend_last, last_B)
    return x_BSD[:, 0], tuple(cache)


def _cut_heads(mesh: Mesh | None, *heads: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(constrain(t, mesh, BATCH, None, TENSOR, None) for t in heads)


def _as_cached(k_BSKN: jax.Array, v_BSKN: jax.Array, int8: bool) -> tuple[jax.Array, ...]:
    """Keys and values as the cache has them, in as many slots as there are positions."""
    k_BKNS, v_BKSN = k_BSKN.transpose(0, 2, 3, 1), v_BSKN.swapaxes(1, 2)
    if not int8:
        return k_BKNS, v_BKSN
    (k_BKNS, k_scale_BKS), (v_BKSN, v_scale_BKS) = _quantized(k_BKNS, axis=2), _quantized(v_BKSN, axis=3)
    return k_BKNS, v_BKSN, k_scale_BKS, v_scale_BKS


def _quantized(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Each vector along `axis` as whole numbers from -127 to 127, the largest one of these, and what to multiply by."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
    whole = jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return whole, jnp.squeeze(scale, axis)


def _fresh_cache(k_BSKN: jax.Array, v_BSKN: jax.Array, slots: int, int8: bool, mesh: Mesh | None):
    spare = slots - k_BSKN.shape[1]

    def with_room(x, axis):
        x = jnp.pad(x, [(0, spare if i == axis else 0) for i in range(x.ndim)])
        return constrain(x, mesh, BATCH, TENSOR, *(None,) * (x.ndim - 2))

    return tuple(with_room(x, axis) for x, axis in zip(_as_cached(k_BSKN, v_BSKN, int8), SLOT_AXES, strict=False))


def decode_one(
    params,
    config: LlavaConfig,
    x_BD: jax.Array,
    positions_B: jax.Array,
    visible_BM: jax.Array,
    slot: jax.Array,
    cache: Cache,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, Cache]:
    """Run one more token a row, whose keys and values go to `slot` of the cache.

    Args:
      positions_B: the tokens' positions.
      visible_BM: filled slots that each row sees; its own token it always does.

    Returns:
      The last layer's output [B, D] (not yet normed), and the cache.
    """
    c = config.text
    rope = rope_tables(positions_B[:, None], c)
    x_BSD = x_BD[:, None]
    grown = []
    for i, cached in enumerate(cache):

        def attend(q, k, v, cached=cached):
            q, k = rotate(q, rope, c.query_scale), rotate(k, rope)
            seen = cached_attention(q[:, 0], k[:, 0], v[:, 0], cached, visible_BM, mesh)
            # Read first, then write, in this order: or the compiler keeps a copy of the cache to read from.
            seen, cached = jax.lax.optimization_barrier((seen, cached))
            own = _as_cached(k, v, int8=len(cached) > 2)
            put = jax.lax.dynamic_update_slice_in_dim
            grown.append(tuple(put(x, new, slot, axis) for x, new, axis in zip(cached, own, SLOT_AXES, strict=False)))
            return seen

        layer = gather(params["layers"][str(i)], f"decoder/layers/{i}", config, mesh)
        x_BSD = Block(c).apply({"params": layer}, x_BSD, attend)
    return x_BSD[:, 0], tuple(grown)
