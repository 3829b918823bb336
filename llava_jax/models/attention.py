"""Rotary positions and attention: over whole sequences, by kernels for TPUs and GPUs, and over a cache."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llava_jax.config import TextConfig
from llava_jax.models.cache import LayerCache
from llava_jax.sharding.mesh import TENSOR
from llava_jax.sharding.partition import UNSHARDED, Partition

BLOCK = 192  # query positions whose scores plain attention holds at once
MAX_BLOCKS = 16  # each is unrolled in the program


def rope_tables(positions_BS: jax.Array, config: TextConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, S, N / 2] in float32 (RoFormer, Su et al. 2021; with the frequency scaling of Llama 3)."""
    half = config.head_width // 2
    frequencies = 1.0 / config.rope_theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    if scaling := config.rope_scaling:
        slow = frequencies / scaling.factor
        if scaling.kind == "linear":
            frequencies = slow
        else:
            turns = scaling.original_max_positions * frequencies / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            mix = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
            frequencies = mix * frequencies + (1 - mix) * slow
    angles = positions_BS[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BSHN: jax.Array, rope: tuple[jax.Array, jax.Array], scale: float = 1.0) -> jax.Array:
    """Rotate each head by its position; its two halves are the coordinates (transformers' `rotate_half`).

    Queries are scaled here, before rounding to their dtype.
    """
    cos, sin = (table[:, :, None, :] * scale for table in rope)
    a, b = jnp.split(x_BSHN.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BSHN.dtype)


# ---------------------------------------------------------------- over whole sequences


def attention(
    q_BQHN: jax.Array,
    k_BSKN: jax.Array,
    v_BSKN: jax.Array,
    *,
    segments_BS: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
    partition: Partition = UNSHARDED,
    saved: str | None = None,
) -> jax.Array:
    """Self-attention over a sequence (Vaswani et al. 2017), scores and softmax in float32.

    The Q queries are the last of the S positions: all of them, or, where keys and values of the first positions are
    known, the rest. A query attends to keys of its own segment; if `causal`, to those up to itself; with `window`, to
    the last of them. Grouped-query attention: K divides H, and keys are not repeated. The output at padding is
    unspecified but finite.

    Args:
      q_BQHN: scaled by 1 / sqrt(N).
      saved: the name by which `layers.REMAT` saves the output.

    Returns:
      [B, Q, H, N] in the dtype of q.
    """
    platform = partition.platform
    if platform == "tpu" and causal and _splash_supports(q_BQHN, k_BSKN, partition):
        return splash_attention(q_BQHN, k_BSKN, v_BSKN, segments_BS, window=window, partition=partition, saved=saved)
    if platform == "gpu" and _cudnn_supports(q_BQHN):
        out = _cudnn_attention(q_BQHN, k_BSKN, v_BSKN, segments_BS, causal, window)
    else:
        head_by_head = platform == "cpu" and partition.device_count == 1 and k_BSKN.shape[1] > BLOCK
        out = _plain_attention(q_BQHN, k_BSKN, v_BSKN, segments_BS, causal, window, head_by_head)
    return checkpoint_name(out, saved) if saved else out


def _plain_attention(q_BQHN, k_BSKN, v_BSKN, segments_BS, causal, window, head_by_head) -> jax.Array:
    """Attention by matmuls, batched over key/value heads or one head at a time.

    One at a time keeps the scores in a CPU's cache: 3.6 times as fast there for 3,072 positions and 16 heads. For short
    sequences they fit anyway.
    """
    B, Q, H, N = q_BQHN.shape
    S, K = k_BSKN.shape[1:3]
    q_BKGQN = q_BQHN.reshape(B, Q, K, H // K, N).transpose(0, 2, 3, 1, 4)
    k_BKNS, v_BKSN = k_BSKN.transpose(0, 2, 3, 1), v_BSKN.swapaxes(1, 2)
    masked = causal or window is not None or segments_BS is not None
    segments_BS = jnp.ones((B, S), jnp.int32) if segments_BS is None else segments_BS
    size = max(BLOCK, -(-Q // MAX_BLOCKS)) if masked or head_by_head else Q
    head = functools.partial(_head_attention, size=size, masked=masked, causal=causal, window=window)
    if head_by_head:
        flat = jax.tree.map(lambda x: x.reshape(B * K, *x.shape[2:]), (q_BKGQN, k_BKNS, v_BKSN))
        out = jax.lax.map(lambda x: head(*x), (*flat, jnp.repeat(segments_BS, K, axis=0)))
    else:
        out = jax.vmap(jax.vmap(head, in_axes=(0, 0, 0, None)))(q_BKGQN, k_BKNS, v_BKSN, segments_BS)
    return out.reshape(B, H, Q, N).swapaxes(1, 2)


def _head_attention(q_GQN, k_NS, v_SN, segments_S, *, size, masked, causal, window) -> jax.Array:
    """[G, Q, N]: the queries that share a head of keys, a block of `size` positions at a time.

    Keys that no query of a block attends to are left out of its matmul.
    """
    G, Q, N = q_GQN.shape
    S = k_NS.shape[1]
    blocks = []
    for start in range(0, Q, size):
        queries = slice(S - Q + start, S - Q + min(start + size, Q))
        keys = slice(max(0, queries.start - window + 1) if window else 0, queries.stop if causal else S)
        rows = q_GQN[:, start : start + size].reshape(-1, N)
        scores = jnp.dot(rows, k_NS[:, keys], preferred_element_type=jnp.float32)
        if masked:
            mask = jnp.tile(_mask(segments_S, queries, keys, causal, window), (G, 1))
            scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        # The maximum cancels out. Stopping its gradient halves the time of the backward pass on a CPU.
        scores = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(scores, axis=-1, keepdims=True)
        out = jnp.dot(scores.astype(v_SN.dtype), v_SN[keys], preferred_element_type=jnp.float32) / total
        blocks.append(out.astype(q_GQN.dtype).reshape(G, -1, N))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _mask(segments_S, queries: slice, keys: slice, causal: bool, window: int | None) -> jax.Array:
    """The attention mask [queries, keys]."""
    S = segments_S.shape[0]
    i, j = jnp.arange(S)[queries, None], jnp.arange(S)[None, keys]
    mask = segments_S[queries, None] == segments_S[None, keys]
    if causal:
        mask &= j <= i
    if window:
        mask &= i - j < window
    return mask


def splash_attention(
    q_BQHN: jax.Array,
    k_BSKN: jax.Array,
    v_BSKN: jax.Array,
    segments_BS: jax.Array | None = None,
    *,
    window: int | None = None,
    partition: Partition = UNSHARDED,
    saved: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal self-attention by JAX's Pallas kernels for TPUs, forward and backward: scores never leave the core.

    Each device runs them on its shard of rows and heads. Sequences are padded at the end to whole blocks; attention is
    causal, so no other position attends to that padding. Arguments and output are those of `attention`; `interpret`
    runs the kernels anywhere, slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    Q, S = q_BQHN.shape[1], k_BSKN.shape[1]
    block_q, block_kv = splash_block(Q), splash_block(S)
    padded_Q, padded_S = -(-Q // block_q) * block_q, -(-S // block_kv) * block_kv
    sizes = kernels.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv, block_q_dq=block_q,
        block_kv_dq=block_kv,
    )  # fmt: skip

    def on_one_device(q_BQHN, k_BSKN, v_BSKN, *segments_BS):
        shape, offset = (padded_Q, padded_S), S - Q
        mask = masks.LocalMask(shape, (window - 1, 0), offset) if window else masks.CausalMask(shape, offset)
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * q_BQHN.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=saved,
            interpret=interpret,
        )

        def padded(x, to):  # [B, S, H, N] to [B, H, to, N]
            return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, to - x.shape[1]), (0, 0)))

        def segments(x, to):
            return jnp.pad(x, ((0, 0), (0, to - x.shape[1])))

        ids = [kernels.SegmentIds(segments(x[:, S - Q :], padded_Q), segments(x, padded_S)) for x in segments_BS]
        out = jax.vmap(kernel)(padded(q_BQHN, padded_Q), padded(k_BSKN, padded_S), padded(v_BSKN, padded_S), *ids)
        return out[:, :, :Q].swapaxes(1, 2)

    rows_BS = () if segments_BS is None else (segments_BS,)
    return partition.map_heads(on_one_device, q_BQHN, k_BSKN, v_BSKN, rows_BS=rows_BS)


def _splash_supports(q_BQHN: jax.Array, k_BSKN: jax.Array, partition: Partition) -> bool:
    """The kernels need whole lanes (N a multiple of 128) and key/value heads that `tensor` divides."""
    return q_BQHN.shape[3] % 128 == 0 and k_BSKN.shape[2] % partition.size(TENSOR) == 0


def splash_block(S: int) -> int:
    """Positions of a block: the largest number up to 512 for which padding to whole blocks adds at most an eighth."""
    return next((n for n in (512, 384, 256) if -S % n <= S / 8), 128)


def _cudnn_supports(q_BQHN: jax.Array) -> bool:
    """All that cuDNN's attention takes on every GPU since Ampere."""
    return q_BQHN.dtype in (jnp.bfloat16, jnp.float16) and q_BQHN.shape[3] <= 128 and q_BQHN.shape[3] % 8 == 0


def _cudnn_attention(q_BQHN, k_BSKN, v_BSKN, segments_BS, causal, window) -> jax.Array:
    """cuDNN skips what is not causal or beyond a window; segments, and queries of the last positions only, are passed
    to it as a mask."""
    Q, (B, S) = q_BQHN.shape[1], k_BSKN.shape[:2]
    mask = None
    if segments_BS is not None or Q < S:
        segments_BS = jnp.ones((B, S), jnp.int32) if segments_BS is None else segments_BS
        causal_too, window_too = (causal, window) if Q < S else (False, None)
        of_row = functools.partial(
            _mask, queries=slice(S - Q, S), keys=slice(0, S), causal=causal_too, window=window_too
        )
        mask = jax.vmap(of_row)(segments_BS)[:, None]
    return jax.nn.dot_product_attention(
        q_BQHN,
        k_BSKN,
        v_BSKN,
        mask=mask,
        scale=1.0,
        is_causal=causal and Q == S,
        local_window_size=(window - 1, 0) if window and Q == S else None,
        implementation="cudnn",
    )


# ---------------------------------------------------------------- over a cache


def cached_attention(
    q_BHN: jax.Array, parts: Sequence[tuple[LayerCache, jax.Array]], partition: Partition = UNSHARDED
) -> jax.Array:
    """Attention of one query per row to cached keys: [B, H, N].

    Args:
      q_BHN: scaled by 1 / sqrt(N).
      parts: caches [B, K, ...] and the positions of each that a row attends to, bool [B, M]; over all parts, every row
        attends to one at least.
    """
    B, H, N = q_BHN.shape
    K = parts[0][0].keys.shape[1]
    G = H // K
    q_BKGN = q_BHN.reshape(B, K, G, N)
    if G == 1 and partition.platform == "tpu":
        # Two copies of the query: XLA for TPUs turns a matrix-vector product into a reduction, which copies the cache.
        q_BKGN = jnp.repeat(q_BKGN, 2, axis=2)
    wide = dict(preferred_element_type=jnp.float32)

    def scores(cached: LayerCache, visible_BM: jax.Array) -> jax.Array:
        keys = "BKMN" if cached.by_position else "BKNM"
        scores_BKGM = jnp.einsum(f"BKGN,{keys}->BKGM", q_BKGN, cached.keys.astype(q_BHN.dtype), **wide)
        if cached.key_scales_BKM is not None:
            scores_BKGM *= cached.key_scales_BKM[:, :, None]
        return jnp.where(visible_BM[:, None, None], scores_BKGM, jnp.finfo(scores_BKGM.dtype).min)

    def weighted_values(cached: LayerCache, weights_BKGM: jax.Array) -> jax.Array:
        if cached.value_scales_BKM is not None:
            weights_BKGM *= cached.value_scales_BKM[:, :, None]
        values_BKMN = cached.values_BKMN.astype(q_BHN.dtype)
        return jnp.einsum("BKGM,BKMN->BKGN", weights_BKGM.astype(q_BHN.dtype), values_BKMN, **wide)

    all_scores = [scores(*part) for part in parts]
    top = functools.reduce(jnp.maximum, (jnp.max(x, axis=-1, keepdims=True) for x in all_scores))
    weights = [jnp.exp(x - top) for x in all_scores]
    total = functools.reduce(jnp.add, (jnp.sum(x, axis=-1, keepdims=True) for x in weights))
    out = functools.reduce(jnp.add, (weighted_values(cached, x) for (cached, _), x in zip(parts, weights, strict=True)))
    out = out / total
    return out[:, :, :G].astype(q_BHN.dtype).reshape(B, H, N)
