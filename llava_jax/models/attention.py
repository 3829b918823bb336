"""Rotary positions and attention: over whole sequences, by kernels for TPUs and GPUs, and over a cache."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llava_jax.config import TextConfig
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
    q_BSHN: jax.Array,
    k_BSKN: jax.Array,
    v_BSKN: jax.Array,
    *,
    segments_BS: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
    partition: Partition = UNSHARDED,
    saved: str | None = None,
) -> jax.Array:
    """Self-attention over a whole sequence (Vaswani et al. 2017), scores and softmax in float32.

    A query attends to keys of its own segment; if `causal`, to those up to itself; with `window`, to the last of them.
    Grouped-query attention: K divides H, and keys are not repeated. The output at padding is unspecified but finite.

    Args:
      q_BSHN: scaled by 1 / sqrt(N).
      saved: the name by which `layers.REMAT` saves the output.

    Returns:
      [B, S, H, N] in the dtype of q.
    """
    platform = partition.platform
    if platform == "tpu" and causal and _splash_supports(q_BSHN, k_BSKN, partition):
        return splash_attention(q_BSHN, k_BSKN, v_BSKN, segments_BS, window=window, partition=partition, saved=saved)
    if platform == "gpu" and _cudnn_supports(q_BSHN):
        out = _cudnn_attention(q_BSHN, k_BSKN, v_BSKN, segments_BS, causal, window)
    else:
        head_by_head = platform == "cpu" and partition.device_count == 1 and q_BSHN.shape[1] > BLOCK
        out = _plain_attention(q_BSHN, k_BSKN, v_BSKN, segments_BS, causal, window, head_by_head)
    return checkpoint_name(out, saved) if saved else out


def _plain_attention(q_BSHN, k_BSKN, v_BSKN, segments_BS, causal, window, head_by_head) -> jax.Array:
    """Attention by matmuls, batched over key/value heads or one head at a time.

    One at a time keeps the scores in a CPU's cache: 3.6 times as fast there for 3,072 positions and 16 heads. For short
    sequences they fit anyway.
    """
    B, S, H, N = q_BSHN.shape
    K = k_BSKN.shape[2]
    q_BKGSN = q_BSHN.reshape(B, S, K, H // K, N).transpose(0, 2, 3, 1, 4)
    k_BKNS, v_BKSN = k_BSKN.transpose(0, 2, 3, 1), v_BSKN.swapaxes(1, 2)
    masked = causal or window is not None or segments_BS is not None
    segments_BS = jnp.ones((B, S), jnp.int32) if segments_BS is None else segments_BS
    size = max(BLOCK, -(-S // MAX_BLOCKS)) if masked or head_by_head else S
    head = functools.partial(_head_attention, size=size, masked=masked, causal=causal, window=window)
    if head_by_head:
        flat = jax.tree.map(lambda x: x.reshape(B * K, *x.shape[2:]), (q_BKGSN, k_BKNS, v_BKSN))
        out = jax.lax.map(lambda x: head(*x), (*flat, jnp.repeat(segments_BS, K, axis=0)))
    else:
        out = jax.vmap(jax.vmap(head, in_axes=(0, 0, 0, None)))(q_BKGSN, k_BKNS, v_BKSN, segments_BS)
    return out.reshape(B, H, S, N).swapaxes(1, 2)


def _head_attention(q_GSN, k_NS, v_SN, segments_S, *, size, masked, causal, window) -> jax.Array:
    """[G, S, N]: the queries that share a head of keys, a block of `size` positions at a time.

    Keys that no query of a block attends to are left out of its matmul.
    """
    G, S, N = q_GSN.shape
    blocks = []
    for start in range(0, S, size):
        queries = slice(start, min(start + size, S))
        keys = slice(max(0, start - window + 1) if window else 0, queries.stop if causal else S)
        rows = q_GSN[:, queries].reshape(-1, N)
        scores = jnp.dot(rows, k_NS[:, keys], preferred_element_type=jnp.float32)
        if masked:
            mask = jnp.tile(_mask(segments_S, queries, keys, causal, window), (G, 1))
            scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        # The maximum cancels out. Stopping its gradient halves the time of the backward pass on a CPU.
        scores = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(scores, axis=-1, keepdims=True)
        out = jnp.dot(scores.astype(v_SN.dtype), v_SN[keys], preferred_element_type=jnp.float32) / total
        blocks.append(out.astype(q_GSN.dtype).reshape(G, -1, N))
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
    q_BSHN: jax.Array,
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

    S = q_BSHN.shape[1]
    block = splash_block(S)
    padded = -(-S // block) * block
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )

    def on_one_device(q_BSHN, k_BSKN, v_BSKN, *segments_BS):
        shape = (padded, padded)
        mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * q_BSHN.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=saved,
            interpret=interpret,
        )
        heads = [x.swapaxes(1, 2) for x in (q_BSHN, k_BSKN, v_BSKN)]
        heads = [jnp.pad(x, ((0, 0), (0, 0), (0, padded - S), (0, 0))) for x in heads]
        ids = [kernels.SegmentIds(x, x) for x in (jnp.pad(x, ((0, 0), (0, padded - S))) for x in segments_BS)]
        return jax.vmap(kernel)(*heads, *ids)[:, :, :S].swapaxes(1, 2)

    rows_BS = () if segments_BS is None else (segments_BS,)
    return partition.map_heads(on_one_device, q_BSHN, k_BSKN, v_BSKN, rows_BS=rows_BS)


def _splash_supports(q_BSHN: jax.Array, k_BSKN: jax.Array, partition: Partition) -> bool:
    """The kernels need whole lanes (N a multiple of 128) and key/value heads that `tensor` divides."""
    return q_BSHN.shape[3] % 128 == 0 and k_BSKN.shape[2] % partition.size(TENSOR) == 0


def splash_block(S: int) -> int:
    """Positions of a block: the largest number up to 512 for which padding to whole blocks adds at most an eighth."""
    return next((n for n in (512, 384, 256) if -S % n <= S / 8), 128)


def _cudnn_supports(q_BSHN: jax.Array) -> bool:
    """All that cuDNN's attention takes on every GPU since Ampere."""
    return q_BSHN.dtype in (jnp.bfloat16, jnp.float16) and q_BSHN.shape[3] <= 128 and q_BSHN.shape[3] % 8 == 0


def _cudnn_attention(q_BSHN, k_BSKN, v_BSKN, segments_BS, causal, window) -> jax.Array:
    """cuDNN skips what is not causal or beyond a window; segments are passed to it as a mask."""
    mask = None if segments_BS is None else (segments_BS[:, :, None] == segments_BS[:, None])[:, None]
    return jax.nn.dot_product_attention(
        q_BSHN,
        k_BSKN,
        v_BSKN,
        mask=mask,
        scale=1.0,
        is_causal=causal,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )


# ---------------------------------------------------------------- over a cache


class LayerCache(NamedTuple):
    """Keys and values of a layer: in the model's dtype, or int8 with the scales of each slot's vectors.

    The M slots are the positions of the padded prompt and then one for each decode step. The layout of keys is the one
    that the matmul with a query reads: 1.6 times as fast on a CPU.
    """

    keys_BKNM: jax.Array
    values_BKMN: jax.Array
    key_scales_BKM: jax.Array | None = None
    value_scales_BKM: jax.Array | None = None


def cached_attention(
    q_BHN: jax.Array,
    k_BKN: jax.Array,
    v_BKN: jax.Array,
    cached: LayerCache,
    visible_BM: jax.Array,
    partition: Partition = UNSHARDED,
) -> jax.Array:
    """Attention of one query a row to its own key and the cached ones: [B, H, N].

    The new key and value are not in the cache yet, so that writing them there need not wait for this.

    Args:
      q_BHN: scaled by 1 / sqrt(N).
      visible_BM: the cache slots that each row attends to.
    """
    B, H, N = q_BHN.shape
    K = k_BKN.shape[1]
    G = H // K
    q_BKGN = q_BHN.reshape(B, K, G, N)
    if G == 1 and partition.platform == "tpu":
        # Two copies of the query: XLA for TPUs turns a matrix-vector product into a reduction, which copies the cache.
        q_BKGN = jnp.repeat(q_BKGN, 2, axis=2)
    wide = dict(preferred_element_type=jnp.float32)
    past = jnp.einsum("BKGN,BKNM->BKGM", q_BKGN, cached.keys_BKNM.astype(k_BKN.dtype), **wide)
    if cached.key_scales_BKM is not None:
        past *= cached.key_scales_BKM[:, :, None]
    past = jnp.where(visible_BM[:, None, None], past, jnp.finfo(past.dtype).min)
    own = jnp.einsum("BKGN,BKN->BKG", q_BKGN, k_BKN, **wide)[..., None]
    top = jnp.maximum(jnp.max(past, axis=-1, keepdims=True), own)
    past, own = jnp.exp(past - top), jnp.exp(own - top)
    weights = past if cached.value_scales_BKM is None else past * cached.value_scales_BKM[:, :, None]
    out = jnp.einsum("BKGM,BKMN->BKGN", weights.astype(v_BKN.dtype), cached.values_BKMN.astype(v_BKN.dtype), **wide)
    out = (out + own * v_BKN[:, :, None]) / (jnp.sum(past, axis=-1, keepdims=True) + own)
    return out[:, :, :G].astype(q_BHN.dtype).reshape(B, H, N)
