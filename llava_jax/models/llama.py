"""The decoder: LLaMA (Touvron et al. 2023), Mistral (Jiang et al. 2023), Vicuna, Yi, Qwen2.

Computes what transformers' `LlamaForCausalLM` and its kin do. The cache is an argument and a result: for each layer
keys [B, K, N, M] and values [B, K, M, N], whose M slots are the positions of the padded prompt and then one for each
decode step. (The layout of keys is the one that the matmul with a query reads: 1.6 times as fast on a CPU.) An int8
cache has two more arrays [B, K, M]: the scales of each slot's key and value.
"""

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llava_jax.config import LlavaConfig, TextConfig
from llava_jax.models.attention import attention, cached_attention, rope_tables, rotate
from llava_jax.models.layers import ACTIVATIONS, Dense, RMSNorm, init_layers, init_module, run_layers
from llava_jax.sharding.mesh import BATCH, TENSOR
from llava_jax.sharding.partition import UNSHARDED, Partition

Cache = tuple[tuple[jax.Array, ...], ...]  # for each layer keys and values; if they are int8, also their scales
SLOT_AXES = (3, 2, 2, 2)  # of these arrays, the axis of slots


class Block(nn.Module):
    """A layer: attention and feed-forward, each with a norm before it and a residual around it."""

    config: TextConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array, attend, only_B: jax.Array | None = None) -> jax.Array:
        """[B, S, D] to [B, S, D].

        Args:
          attend: (q, k, v), each [B, S, heads, N] before rotation -> the output of attention, shaped like q.
          only_B: the one position of each row whose output is computed: [B, 1, D]; None for all.
        """
        c = self.config
        normed = RMSNorm(c.norm_eps, name="attention_norm")(x_BSD)
        x_BSD, queries = (x_BSD, normed) if only_B is None else (_pick(x_BSD, only_B), _pick(normed, only_B))
        x_BSD = x_BSD + Attention(c, name="attention")(queries, normed, attend)
        return x_BSD + FeedForward(c, name="mlp")(RMSNorm(c.norm_eps, name="mlp_norm")(x_BSD))


def _pick(x: jax.Array, position_B: jax.Array) -> jax.Array:
    """One position of each row: [B, S, ...] to [B, 1, ...]."""
    return jnp.take_along_axis(x, position_B.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)


class Attention(nn.Module):
    config: TextConfig

    @nn.compact
    def __call__(self, queries_BQD: jax.Array, x_BSD: jax.Array, attend) -> jax.Array:
        c = self.config

        def heads(name, x, n):
            return Dense(n * c.head_width, c.qkv_bias, name)(x).reshape(*x.shape[:2], n, c.head_width)

        out = attend(heads("q", queries_BQD, c.heads), heads("k", x_BSD, c.kv_heads), heads("v", x_BSD, c.kv_heads))
        return Dense(c.width, c.o_bias, "o")(out.reshape(*queries_BQD.shape[:2], c.heads * c.head_width))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    config: TextConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        c = self.config
        gate = ACTIVATIONS[c.activation](Dense(c.ffn_width, c.mlp_bias, "gate")(x_BSD))
        return Dense(c.width, c.mlp_bias, "down")(gate * Dense(c.ffn_width, c.mlp_bias, "up")(x_BSD))


# ---------------------------------------------------------------- the whole decoder; `params` is the `decoder` part


def embed(params, config: LlavaConfig, ids: jax.Array, partition: Partition = UNSHARDED) -> jax.Array:
    """Token embeddings [..., D]."""
    table_VD = partition.gather(params["embed"], "decoder/embed")["embedding"]
    return table_VD[ids]


def logits(params, config: LlavaConfig, x: jax.Array, partition: Partition = UNSHARDED) -> jax.Array:
    """Last norm and head: [..., D] to [..., V] in float32."""
    x = RMSNorm(config.text.norm_eps).apply({"params": params["norm"]}, x)
    if config.text.tied_head:
        table_VD = partition.gather(params["embed"], "decoder/embed")["embedding"]
        return jnp.einsum("...D,VD->...V", x, table_VD, preferred_element_type=jnp.float32)
    kernel_DV = partition.gather(params["head"], "decoder/head")["kernel"]
    return jnp.einsum("...D,DV->...V", x, kernel_DV, preferred_element_type=jnp.float32)


def decode(
    params,
    config: LlavaConfig,
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
      The last layer's output [B, S, D] (not yet normed).
    """
    c = config.text
    rope = rope_tables(positions_BS, c)

    def attend(q, k, v):
        q, k, v = _shard_heads(partition, rotate(q, rope, c.query_scale), rotate(k, rope), v)
        q, k, v = checkpoint_name((q, k, v), "attention")
        static = dict(causal=True, window=c.sliding_window, partition=partition, saved="attention")
        return attention(q, k, v, segments_BS=segments_BS, **static)

    def block(x_BSD, layer):
        layer = partition.gather(layer, "decoder/layers")
        return partition.constrain(Block(c).apply({"params": layer}, x_BSD, attend), BATCH, None, None)

    return run_layers(block, x_BSD, params["layers"], range(c.layers), remat)


def prefill(
    params,
    config: LlavaConfig,
    x_BSD: jax.Array,
    lengths_B: jax.Array,
    slots: int,
    *,
    int8: bool = False,
    partition: Partition = UNSHARDED,
) -> tuple[jax.Array, Cache]:
    """Run prompts, padded on the right, through all layers, and fill the cache with their keys and values.

    The last layer computes only keys and values for all positions, and the rest for the last position of each row.

    Args:
      slots: M, the size of the cache.
      int8: quantize keys and values to int8, which halves the memory of the cache.

    Returns:
      The last layer's output [B, D] (not yet normed) at each row's last position, and the cache.
    """
    c = config.text
    rope = rope_tables(jnp.arange(x_BSD.shape[1])[None], c)
    last_B = jnp.maximum(lengths_B - 1, 0)
    cache = []

    def attend(q, k, v):
        q, k, v = _shard_heads(partition, rotate(q, rope, c.query_scale), rotate(k, rope), v)
        cache.append(_fresh_cache(k, v, slots, int8, partition))
        # Being causal, no prompt attends to the padding after it.
        return attention(q, k, v, causal=True, window=c.sliding_window, partition=partition)

    def attend_last(q, k, v):
        q = rotate(q, tuple(table[0, last_B][:, None] for table in rope), c.query_scale)
        q, k, v = _shard_heads(partition, q, rotate(k, rope), v)
        cache.append(_fresh_cache(k, v, slots, int8, partition))
        positions = jnp.arange(k.shape[1])
        visible_BS = positions < last_B[:, None]
        if c.sliding_window:
            visible_BS &= last_B[:, None] - positions < c.sliding_window
        own = (_pick(t, last_B)[:, 0] for t in (k, v))
        return cached_attention(q[:, 0], *own, _as_cached(k, v, int8=False), visible_BS, partition)

    for i in range(c.layers):
        layer = partition.gather(params["layers"][str(i)], f"decoder/layers/{i}")
        if i < c.layers - 1:
            x_BSD = partition.constrain(Block(c).apply({"params": layer}, x_BSD, attend), BATCH, None, None)
        else:
            x_BSD = Block(c).apply({"params": layer}, x_BSD, attend_last, last_B)
    return x_BSD[:, 0], tuple(cache)


def _shard_heads(partition: Partition, *heads: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(partition.constrain(t, BATCH, None, TENSOR, None) for t in heads)


def _as_cached(k_BSKN: jax.Array, v_BSKN: jax.Array, int8: bool) -> tuple[jax.Array, ...]:
    """Keys and values in the layout and dtype of the cache, one slot for each position."""
    k_BKNS, v_BKSN = k_BSKN.transpose(0, 2, 3, 1), v_BSKN.swapaxes(1, 2)
    if not int8:
        return k_BKNS, v_BKSN
    (k_BKNS, k_scale_BKS), (v_BKSN, v_scale_BKS) = _quantized(k_BKNS, axis=2), _quantized(v_BKSN, axis=3)
    return k_BKNS, v_BKSN, k_scale_BKS, v_scale_BKS


def _quantized(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Each vector along `axis` as int8, its largest absolute value as 127, and the scales to multiply by."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
    whole = jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return whole, jnp.squeeze(scale, axis)


def _fresh_cache(k_BSKN: jax.Array, v_BSKN: jax.Array, slots: int, int8: bool, partition: Partition):
    """A layer's cache of `slots` slots, the first of them filled with a prompt's keys and values."""
    empty = slots - k_BSKN.shape[1]

    def padded(x, axis):
        x = jnp.pad(x, [(0, empty if i == axis else 0) for i in range(x.ndim)])
        return partition.constrain(x, BATCH, TENSOR, *(None,) * (x.ndim - 2))

    return tuple(padded(x, axis) for x, axis in zip(_as_cached(k_BSKN, v_BSKN, int8), SLOT_AXES, strict=False))


def decode_step(
    params,
    config: LlavaConfig,
    x_BD: jax.Array,
    positions_B: jax.Array,
    visible_BM: jax.Array,
    slot: jax.Array,
    cache: Cache,
    partition: Partition = UNSHARDED,
) -> tuple[jax.Array, Cache]:
    """A decode step: run one more token of each row, and write its keys and values to `slot` of the cache.

    Args:
      positions_B: the tokens' positions.
      visible_BM: the cache slots that each row attends to; it always attends to its own token.

    Returns:
      The last layer's output [B, D] (not yet normed), and the cache.
    """
    c = config.text
    rope = rope_tables(positions_B[:, None], c)
    x_BSD = x_BD[:, None]
    updated = []
    for i, cached in enumerate(cache):

        def attend(q, k, v, cached=cached):
            q, k = rotate(q, rope, c.query_scale), rotate(k, rope)
            out = cached_attention(q[:, 0], k[:, 0], v[:, 0], cached, visible_BM, partition)
            # Read the cache before writing to it, or the compiler keeps a copy to read from.
            out, cached = jax.lax.optimization_barrier((out, cached))
            own = _as_cached(k, v, int8=len(cached) > 2)
            put = jax.lax.dynamic_update_slice_in_dim
            updated.append(tuple(put(x, new, slot, axis) for x, new, axis in zip(cached, own, SLOT_AXES, strict=False)))
            return out

        layer = partition.gather(params["layers"][str(i)], f"decoder/layers/{i}")
        x_BSD = Block(c).apply({"params": layer}, x_BSD, attend)
    return x_BSD[:, 0], tuple(updated)


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
