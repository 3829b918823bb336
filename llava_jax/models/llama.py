"""The decoder: LLaMA (Touvron et al. 2023), Mistral (Jiang et al. 2023), Vicuna, Yi, Qwen2.

Computes what transformers' `LlamaForCausalLM` and its variants do. The letters in the names of arrays are those of
`llava_jax/__init__.py`.

The modules hold one layer. What differs between training, prefill and a decode step is only how a layer attends, so
each of `forward`, `prefill` and `decode_step` passes its own `attend` to `Block`: it applies the rotary embedding,
computes attention, and with a cache records the layer's keys and values.
"""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llava_jax.config import TextConfig
from llava_jax.models.attention import LayerCache, attention, cached_attention, rope_tables, rotate
from llava_jax.models.layers import ACTIVATIONS, SAVED_ATTENTION, Dense, RMSNorm, init_layers, init_module, run_layers
from llava_jax.sharding.mesh import BATCH, TENSOR
from llava_jax.sharding.partition import UNSHARDED, Partition

# (q [B, Q, H, N], k [B, S, K, N], v [B, S, K, N]) before rotation -> the output of attention [B, Q, H, N]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Block(nn.Module):
    """A layer: attention and feed-forward, each with a norm before it and a residual around it."""

    config: TextConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array, attend: Attend, position_B: jax.Array | None = None) -> jax.Array:
        """[B, S, D] to [B, S, D], or, with `position_B`, to [B, 1, D]: the output at that position of each row."""
        c = self.config
        normed_BSD = normed_BQD = RMSNorm(c.norm_eps, name="attention_norm")(x_BSD)
        if position_B is not None:
            x_BSD, normed_BQD = _pick(x_BSD, position_B), _pick(normed_BSD, position_B)
        x_BSD = x_BSD + Attention(c, name="attention")(normed_BQD, normed_BSD, attend)
        return x_BSD + FeedForward(c, name="mlp")(RMSNorm(c.norm_eps, name="mlp_norm")(x_BSD))


def _pick(x: jax.Array, position_B: jax.Array) -> jax.Array:
    """One position of each row: [B, S, ...] to [B, 1, ...]."""
    return jnp.take_along_axis(x, position_B.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)


class Attention(nn.Module):
    config: TextConfig

    @nn.compact
    def __call__(self, x_BQD: jax.Array, x_BSD: jax.Array, attend: Attend) -> jax.Array:
        """Queries from `x_BQD`, keys and values from `x_BSD`: [B, Q, D]."""
        c = self.config

        def heads(name, x, n):
            return Dense(n * c.head_width, bias=c.qkv_bias, name=name)(x).reshape(*x.shape[:2], n, c.head_width)

        out = attend(heads("q", x_BQD, c.heads), heads("k", x_BSD, c.kv_heads), heads("v", x_BSD, c.kv_heads))
        return Dense(c.width, bias=c.o_bias, name="o")(out.reshape(*x_BQD.shape[:2], c.heads * c.head_width))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    config: TextConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        c = self.config
        gate = ACTIVATIONS[c.activation](Dense(c.ffn_width, bias=c.mlp_bias, name="gate")(x_BSD))
        return Dense(c.width, bias=c.mlp_bias, name="down")(
            gate * Dense(c.ffn_width, bias=c.mlp_bias, name="up")(x_BSD)
        )


# ---------------------------------------------------------------- the whole decoder; `params` is the `decoder` part


def embed(params, ids: jax.Array, partition: Partition = UNSHARDED) -> jax.Array:
    """Token embeddings [..., D]."""
    table_VD = partition.gather(params["embed"], "decoder/embed")["embedding"]
    return table_VD[ids]


def logits(params, config: TextConfig, x: jax.Array, partition: Partition = UNSHARDED) -> jax.Array:
    """Final norm and head: [..., D] to [..., V] in float32."""
    x = RMSNorm(config.norm_eps).apply({"params": params["norm"]}, x)
    if config.tied_head:
        table_VD = partition.gather(params["embed"], "decoder/embed")["embedding"]
        return jnp.einsum("...D,VD->...V", x, table_VD, preferred_element_type=jnp.float32)
    kernel_DV = partition.gather(params["head"], "decoder/head")["kernel"]
    return jnp.einsum("...D,DV->...V", x, kernel_DV, preferred_element_type=jnp.float32)


def forward(
    params,
    config: TextConfig,
    x_BSD: jax.Array,
    positions_BS: jax.Array,
    segments_BS: jax.Array,
    *,
    partition: Partition = UNSHARDED,
    remat: str = "none",
) -> jax.Array:
    """Run whole sequences through all layers, which may be stacked (`layers.run_layers`).

    Args:
      positions_BS: of the rotary embedding.
      segments_BS: a token attends to those before it in its own segment; 0 is padding.
      remat: what stacked layers save for the backward pass.

    Returns:
      The last layer's output [B, S, D], before the final norm.
    """
    rope = rope_tables(positions_BS, config)

    def attend(q, k, v):
        q, k, v = _shard_heads(partition, rotate(q, rope, config.query_scale), rotate(k, rope), v)
        q, k, v = checkpoint_name((q, k, v), SAVED_ATTENTION)
        return attention(
            q, k, v, segments_BS=segments_BS, causal=True, window=config.sliding_window, partition=partition,
            saved=SAVED_ATTENTION,
        )  # fmt: skip

    def block(x_BSD, layer):
        layer = partition.gather(layer, "decoder/layers")
        return partition.constrain(Block(config).apply({"params": layer}, x_BSD, attend), BATCH, None, None)

    return run_layers(block, x_BSD, params["layers"], range(config.layers), remat)


# ---------------------------------------------------------------- with a cache


Cache = tuple[LayerCache, ...]  # an argument and a result, one for each layer
SLOT_AXES = (3, 2, 2, 2)  # of the arrays of a layer's cache


def prefill(
    params,
    config: TextConfig,
    x_BSD: jax.Array,
    lengths_B: jax.Array,
    slots: int,
    *,
    int8: bool = False,
    partition: Partition = UNSHARDED,
) -> tuple[jax.Array, Cache]:
    """Run prompts, padded on the right, through all layers, and fill a new cache with their keys and values.

    The last layer computes only keys and values for all positions, and the rest for the last position of each row.

    Args:
      slots: M, the size of the cache.
      int8: quantize keys and values to int8, which takes half the memory of bfloat16.

    Returns:
      The last layer's output [B, D], before the final norm, at each row's last position, and the cache.
    """
    rope = rope_tables(jnp.arange(x_BSD.shape[1])[None], config)
    last_B = jnp.maximum(lengths_B - 1, 0)
    cache = []

    def attend(q, k, v):
        q, k, v = _shard_heads(partition, rotate(q, rope, config.query_scale), rotate(k, rope), v)
        cache.append(_new_cache(k, v, slots, int8, partition))
        # Being causal, no prompt attends to the padding after it.
        return attention(q, k, v, causal=True, window=config.sliding_window, partition=partition)

    def attend_last(q, k, v):
        """What a decode step does: the last query attends to the prompt's keys, and to its own."""
        cos, sin = (table[0, last_B][:, None] for table in rope)
        q = rotate(q, (cos, sin), config.query_scale)
        q, k, v = _shard_heads(partition, q, rotate(k, rope), v)
        cache.append(_new_cache(k, v, slots, int8, partition))
        positions = jnp.arange(k.shape[1])
        visible_BS = positions < last_B[:, None]
        if config.sliding_window:
            visible_BS &= last_B[:, None] - positions < config.sliding_window
        own_k, own_v = (_pick(t, last_B)[:, 0] for t in (k, v))
        return cached_attention(q[:, 0], own_k, own_v, _cached(k, v, int8=False), visible_BS, partition)

    for i in range(config.layers):
        layer = partition.gather(params["layers"][str(i)], "decoder/layers")
        if i < config.layers - 1:
            x_BSD = partition.constrain(Block(config).apply({"params": layer}, x_BSD, attend), BATCH, None, None)
        else:
            x_BSD = Block(config).apply({"params": layer}, x_BSD, attend_last, last_B)
    return x_BSD[:, 0], tuple(cache)


def decode_step(
    params,
    config: TextConfig,
    x_BD: jax.Array,
    positions_B: jax.Array,
    visible_BM: jax.Array,
    slot: jax.Array,
    cache: Cache,
    partition: Partition = UNSHARDED,
) -> tuple[jax.Array, Cache]:
    """Run one more token of each row through all layers, and write its keys and values to `slot` of the cache.

    Args:
      positions_B: the tokens' positions.
      visible_BM: the cache slots that each row attends to; it always attends to its own token.

    Returns:
      The last layer's output [B, D], before the final norm, and the cache.
    """
    rope = rope_tables(positions_B[:, None], config)
    x_BSD = x_BD[:, None]
    updated = []
    for i, cached in enumerate(cache):

        def attend(q, k, v, cached=cached):
            q, k = rotate(q, rope, config.query_scale), rotate(k, rope)
            out = cached_attention(q[:, 0], k[:, 0], v[:, 0], cached, visible_BM, partition)
            # Read the cache before writing to it, or the compiler keeps a copy to read from.
            out, cached = jax.lax.optimization_barrier((out, cached))
            new = _cached(k, v, int8=cached.key_scales_BKM is not None)
            updated.append(_map_arrays(lambda x, new, axis: _write(x, new, slot, axis), cached, new))
            return out

        layer = partition.gather(params["layers"][str(i)], "decoder/layers")
        x_BSD = Block(config).apply({"params": layer}, x_BSD, attend)
    return x_BSD[:, 0], tuple(updated)


def _shard_heads(partition: Partition, *heads: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(partition.constrain(t, BATCH, None, TENSOR, None) for t in heads)


def _cached(k_BSKN: jax.Array, v_BSKN: jax.Array, int8: bool) -> LayerCache:
    """Keys and values in the layout and dtype of the cache, one slot for each position."""
    k_BKNS, v_BKSN = k_BSKN.transpose(0, 2, 3, 1), v_BSKN.swapaxes(1, 2)
    if not int8:
        return LayerCache(k_BKNS, v_BKSN)
    (k_BKNS, k_scale_BKS), (v_BKSN, v_scale_BKS) = _quantized(k_BKNS, axis=2), _quantized(v_BKSN, axis=3)
    return LayerCache(k_BKNS, v_BKSN, k_scale_BKS, v_scale_BKS)


def _quantized(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Each vector along `axis` as int8, its largest absolute value as 127, and the scales to multiply by."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
    whole = jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return whole, jnp.squeeze(scale, axis)


def _new_cache(k_BSKN: jax.Array, v_BSKN: jax.Array, slots: int, int8: bool, partition: Partition) -> LayerCache:
    """A cache of `slots` slots, the first of them filled with a prompt's keys and values."""
    empty = slots - k_BSKN.shape[1]

    def padded(x, axis):
        x = jnp.pad(x, [(0, empty if i == axis else 0) for i in range(x.ndim)])
        return partition.constrain(x, BATCH, TENSOR, *(None,) * (x.ndim - 2))

    return _map_arrays(padded, _cached(k_BSKN, v_BSKN, int8))


def _write(x: jax.Array, new: jax.Array, slot: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, new, slot, axis)


def _map_arrays(f, *caches: LayerCache) -> LayerCache:
    """`f(*arrays, axis)` for each array of a layer's cache and the axis of its slots."""
    mapped: list[Any] = [None if x[0] is None else f(*x) for x in zip(*caches, SLOT_AXES, strict=True)]
    return LayerCache(*mapped)


# ---------------------------------------------------------------- random parameters


def init_params(config: TextConfig, keys: Iterator[jax.Array]) -> dict:
    """Random parameters of the decoder, one key for each module."""
    x_11D = jnp.zeros((1, 1, config.width))
    params = {
        "embed": {"embedding": 0.02 * jax.random.normal(next(keys), (config.vocab_size, config.width))},
        "layers": init_layers(config.layers, Block(config), keys, x_11D, lambda q, k, v: q),
        "norm": init_module(RMSNorm(config.norm_eps), keys, x_11D),
    }
    if not config.tied_head:
        params["head"] = {"kernel": 0.02 * jax.random.normal(next(keys), (config.width, config.vocab_size))}
    return params
