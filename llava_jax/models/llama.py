"""The decoder: LLaMA (Touvron et al. 2023), Mistral (Jiang et al. 2023), Vicuna, Yi, Qwen2.

Computes what transformers' `LlamaForCausalLM` and its variants do. The letters in the names of arrays are those of
`llava_jax/__init__.py`.

The modules hold one layer. What differs between training, prefill and a decode step is only how a layer attends, so
each of `forward`, `prefill` and `decode_step` passes its own `attend` to `Block`: it applies the rotary embedding,
computes attention, and with a cache records the layer's keys and values.
"""

import functools
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llava_jax.config import TextConfig
from llava_jax.models.attention import attention, cached_attention, rope_tables, rotate
from llava_jax.models.cache import Cache, LayerCache, read_slots, to_cache, write_slots, write_step
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
            out = Dense(n * c.head_width, bias=c.qkv_bias, name=name)(x)
            if out.shape[1] == 1:  # or XLA for TPUs keeps a copy of the kernel, split into heads, for decode steps
                out = jax.lax.optimization_barrier(out)
            return out.reshape(*x.shape[:2], n, c.head_width)

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


def prefill(
    params,
    config: TextConfig,
    x_ASD: jax.Array,
    starts_A: jax.Array,
    counts_A: jax.Array,
    cache: Cache,
    slots_A: jax.Array,
    *,
    span: int,
    partition: Partition = UNSHARDED,
) -> tuple[jax.Array, Cache]:
    """Run a chunk of prompts through all layers, and write its keys and values to their slots of the cache.

    The last layer computes only keys and values for all positions, and the rest for the last position of each row.

    Args:
      x_ASD: padded on the right.
      starts_A: the position of the chunk's beginning: those before it are in the slot already.
      counts_A: positions that are not padding.
      slots_A: as in `cache.write_slots`.
      span: positions of the slots that are read, at least the largest of `starts_A`; 0 if all are 0.

    Returns:
      The last layer's output [A, D], before the final norm, at each row's last position, and the cache.
    """
    last_A = jnp.maximum(counts_A - 1, 0)
    x_A1D, new = _run_chunk(params, config, x_ASD, starts_A, cache, slots_A, last_A, span, partition)
    # Read the cache before writing to it, or the compiler keeps a copy to read from.
    x_A1D, cache = jax.lax.optimization_barrier((x_A1D, cache))
    return x_A1D[:, 0], write_slots(cache, new, slots_A, starts_A, counts_A, partition)


def continue_prompts(
    params,
    config: TextConfig,
    x_ASD: jax.Array,
    starts_A: jax.Array,
    cache: Cache,
    slots_A: jax.Array,
    *,
    span: int,
    partition: Partition = UNSHARDED,
) -> jax.Array:
    """Run what follows prompts in slots through all layers, and write nothing.

    Arguments are those of `prefill`.

    Returns:
      The last layer's output [A, S, D], before the final norm.
    """
    return _run_chunk(params, config, x_ASD, starts_A, cache, slots_A, None, span, partition)[0]


def _run_chunk(
    params, config: TextConfig, x_ASD, starts_A, cache: Cache, slots_A, last_A, span: int, partition: Partition
) -> tuple[jax.Array, Cache]:
    """The last layer's output at each row's position `last_A`, [A, 1, D], or, if that is None, at all positions; and
    the chunk's keys and values."""
    S = x_ASD.shape[1]
    rope = rope_tables(starts_A[:, None] + jnp.arange(S), config)
    # What is read of a slot is aligned on the right, so distances between positions are those between indices.
    places = jnp.arange(span + S)
    known_AT = places >= span - starts_A[:, None]
    new: list[LayerCache] = []

    def whole(i: int, k, v):
        """Keys and values of the slot and the chunk: [A, span + S, K, N]."""
        k, v = _shard_heads(partition, rotate(k, rope), v)
        new.append(to_cache(k, v, int8=cache[i].is_int8, by_position=cache[i].by_position))
        if not span:
            return k, v
        slot_k, slot_v = read_slots(cache[i], slots_A, starts_A, span, k.dtype, partition)
        return jnp.concatenate([slot_k, k], axis=1), jnp.concatenate([slot_v, v], axis=1)

    def attend(q, k, v, i):
        (q,) = _shard_heads(partition, rotate(q, rope, config.query_scale))
        k, v = whole(i, k, v)
        # Being causal, no prompt attends to the padding after it.
        segments = known_AT.astype(jnp.int32) if span else None
        window = config.sliding_window
        return attention(q, k, v, segments_BS=segments, causal=True, window=window, partition=partition)

    def attend_last(q, k, v, i):
        """What a decode step does."""
        cos, sin = (_pick(table, last_A) for table in rope)
        (q,) = _shard_heads(partition, rotate(q, (cos, sin), config.query_scale))
        distances_AT = span + last_A[:, None] - places
        visible_AT = known_AT & (distances_AT >= 0)
        if config.sliding_window:
            visible_AT &= distances_AT < config.sliding_window
        whole_cache = to_cache(*whole(i, k, v), by_position=cache[i].by_position)
        return cached_attention(q[:, 0], [(whole_cache, visible_AT)], partition)

    for i in range(config.layers):
        layer = partition.gather(params["layers"][str(i)], "decoder/layers")
        if i < config.layers - 1 or last_A is None:
            x_ASD = Block(config).apply({"params": layer}, x_ASD, functools.partial(attend, i=i))
            x_ASD = partition.constrain(x_ASD, BATCH, None, None)
        else:
            x_ASD = Block(config).apply({"params": layer}, x_ASD, functools.partial(attend_last, i=i), last_A)
    return x_ASD, tuple(new)


def decode_step(
    params,
    config: TextConfig,
    x_BD: jax.Array,
    lengths_B: jax.Array,
    cache: Cache,
    recent: Cache,
    step: jax.Array,
    partition: Partition = UNSHARDED,
) -> tuple[jax.Array, Cache]:
    """Run one more token of each row through all layers, and write its keys and values to `recent`.

    So a step writes the same position of all rows, and the cache, of which every row has another length, is only read.

    Args:
      lengths_B: positions in the cache.
      recent: a cache of the tokens since then, of which `step` are there.

    Returns:
      The last layer's output [B, D], before the final norm, and `recent`.
    """
    positions_B = lengths_B + step
    rope = rope_tables(positions_B[:, None], config)
    cached_M, recent_M = (jnp.arange(caches[0].positions) for caches in (cache, recent))
    in_cache_BM = cached_M < lengths_B[:, None]
    in_recent_BM = jnp.broadcast_to(recent_M <= step, (len(lengths_B), len(recent_M)))
    if window := config.sliding_window:
        in_cache_BM &= positions_B[:, None] - cached_M < window
        in_recent_BM &= step - recent_M < window
    x_BSD, updated = x_BD[:, None], []
    for i, (cached, new) in enumerate(zip(cache, recent, strict=True)):

        def attend(q, k, v, cached=cached, new=new):
            q, k, v = _shard_heads(partition, rotate(q, rope, config.query_scale), rotate(k, rope), v)
            updated.append(write_step(new, k[:, 0], v[:, 0], step))
            return cached_attention(q[:, 0], [(cached, in_cache_BM), (updated[-1], in_recent_BM)], partition)

        layer = partition.gather(params["layers"][str(i)], "decoder/layers")
        x_BSD = Block(config).apply({"params": layer}, x_BSD, attend)
    return x_BSD[:, 0], tuple(updated)


def _shard_heads(partition: Partition, *heads: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(partition.constrain(t, BATCH, None, TENSOR, None) for t in heads)


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
