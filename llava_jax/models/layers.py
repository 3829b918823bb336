"""Pieces that vision tower and decoder are built from: norms, rotary positions, attention, a run through layers."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llava_jax.config import TextConfig
from llava_jax.sharding.mesh import AXES, BATCH, FSDP, TENSOR, manual_axes, row_multiple

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


def _all_but_weights(primitive, *_, **parameters) -> bool:
    """Of weights that were gathered each device keeps its cut."""
    return primitive.name != "all_gather" and parameters.get("name") != "gathered"


# What a layer leaves for the backward pass, which computes the rest again.
REMAT = {
    "full": checkpoint_policies.save_only_these_names("lora"),  # the narrow middle of adapters (train/lora.py)
    "minimal": checkpoint_policies.save_only_these_names("lora", "attention"),  # and, in the decoder, in and out of it
    "dots": checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": _all_but_weights,
}

BLOCK = 192  # positions of queries whose scores plain attention holds at once
MOST_BLOCKS = 16  # so many at most: each is a piece of program


def Dense(features: int, bias: bool = False, name: str | None = None) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, kernel_init=nn.initializers.normal(0.02), name=name)


class RMSNorm(nn.Module):
    """Root mean square layer norm (Zhang and Sennrich 2019), computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm (Ba et al. 2016), computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale + bias).astype(x.dtype)


# ---------------------------------------------------------------- a run through layers


def run_layers(block, x: jax.Array, layers: dict, span: range, remat: str = "none") -> jax.Array:
    """`x = block(x, layer)` for the layers numbered `span`.

    Args:
      layers: parameters, one entry for each layer (`"0"`, `"1"`, ...); or, for training, stacked along a leading
        axis, which are scanned, so that the program does not grow with their number.
      remat: of stacked layers: a key of `REMAT`.
    """
    if "0" in layers or not span:
        for i in span:
            x = block(x, layers[str(i)])
        return x
    block = jax.checkpoint(block, policy=REMAT[remat], prevent_cse=False)
    if len(span) < jax.tree.leaves(layers)[0].shape[0]:
        layers = jax.tree.map(lambda w: w[span.start : span.stop], layers)
    return jax.lax.scan(lambda x, layer: (block(x, layer), None), x, layers)[0]


# ---------------------------------------------------------------- rotary positions


def rope_tables(positions_BS: jax.Array, config: TextConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, S, N / 2] in float32 (RoFormer, Su et al. 2021; Llama 3's stretching of low frequencies)."""
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
    """Turn each head by its position: the two halves of a head are the coordinates (transformers' rotate_half).

    Queries are scaled here, before they are rounded to their dtype.
    """
    cos, sin = (table[:, :, None, :] * scale for table in rope)
    a, b = jnp.split(x_BSHN.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BSHN.dtype)


# ---------------------------------------------------------------- attention


def attention(
    q_BSHN: jax.Array,
    k_BSKN: jax.Array,
    v_BSKN: jax.Array,
    *,
    segments_BS: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
    mesh: Mesh | None = None,
    saved: str | None = None,
) -> jax.Array:
    """Self-attention over a whole sequence (Vaswani et al. 2017), scores and softmax in float32.

    A query sees keys of its own segment, itself and before it if `causal`, and of those the last `window`.
    K may divide H (grouped heads); keys are not repeated. Rows that see nothing but padding give finite rubbish.

    Args:
      q_BSHN: scaled by 1 / sqrt(N).
      saved: name under which `REMAT` knows the result.

    Returns:
      [B, S, H, N] in the dtype of q.
    """
    platform = _platform(mesh)
    if platform == "tpu" and causal and _splash_can(q_BSHN, k_BSKN, mesh):
        return splash_attention(q_BSHN, k_BSKN, v_BSKN, segments_BS, window=window, mesh=mesh, saved=saved)
    if platform == "gpu" and q_BSHN.dtype in (jnp.bfloat16, jnp.float16):
        seen = _cudnn_attention(q_BSHN, k_BSKN, v_BSKN, segments_BS, causal, window)
    else:
        one_by_one = platform == "cpu" and (mesh is None or mesh.size == 1) and q_BSHN.shape[1] > BLOCK
        seen = _plain_attention(q_BSHN, k_BSKN, v_BSKN, segments_BS, causal, window, one_by_one)
    return checkpoint_name(seen, saved) if saved else seen


def _plain_attention(q_BSHN, k_BSKN, v_BSKN, segments_BS, causal, window, one_by_one) -> jax.Array:
    """Attention by matrix products: of all key/value heads at once, or of one after the other.

    One after the other keeps scores in a CPU's cache: 3.6 times as fast there for 3,072 positions and 16 heads. Those
    of a short sequence fit anyway.
    """
    B, S, H, N = q_BSHN.shape
    K = k_BSKN.shape[2]
    q_BKGSN = q_BSHN.reshape(B, S, K, H // K, N).transpose(0, 2, 3, 1, 4)
    k_BKNS, v_BKSN = k_BSKN.transpose(0, 2, 3, 1), v_BSKN.swapaxes(1, 2)
    masked = causal or window is not None or segments_BS is not None
    segments_BS = jnp.ones((B, S), jnp.int32) if segments_BS is None else segments_BS
    size = max(BLOCK, -(-S // MOST_BLOCKS)) if masked or one_by_one else S
    head = functools.partial(_head_attention, size=size, masked=masked, causal=causal, window=window)
    if one_by_one:
        flat = jax.tree.map(lambda x: x.reshape(B * K, *x.shape[2:]), (q_BKGSN, k_BKNS, v_BKSN))
        out = jax.lax.map(lambda x: head(*x), (*flat, jnp.repeat(segments_BS, K, axis=0)))
    else:
        out = jax.vmap(jax.vmap(head, in_axes=(0, 0, 0, None)))(q_BKGSN, k_BKNS, v_BKSN, segments_BS)
    return out.reshape(B, H, S, N).swapaxes(1, 2)


def _head_attention(q_GSN, k_NS, v_SN, segments_S, *, size, masked, causal, window) -> jax.Array:
    """[G, S, N]: the queries that share a head of keys, a block of `size` positions at a time.

    A block meets only those keys that any of its queries may see.
    """
    G, S, N = q_GSN.shape
    out = []
    for start in range(0, S, size):
        queries = slice(start, min(start + size, S))
        keys = slice(max(0, start - window + 1) if window else 0, queries.stop if causal else S)
        rows = q_GSN[:, queries].reshape(-1, N)
        scores = jnp.dot(rows, k_NS[:, keys], preferred_element_type=jnp.float32)
        if masked:
            mask = jnp.tile(_visible(segments_S, queries, keys, causal, window), (G, 1))
            scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        # The maximum cancels out: no gradient goes through it, which halves the time of the backward pass on a CPU.
        scores = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(scores, axis=-1, keepdims=True)
        seen = jnp.dot(scores.astype(v_SN.dtype), v_SN[keys], preferred_element_type=jnp.float32) / total
        out.append(seen.astype(q_GSN.dtype).reshape(G, -1, N))
    return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


def _visible(segments_S, queries: slice, keys: slice, causal: bool, window: int | None) -> jax.Array:
    """[queries, keys] who sees whom."""
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
    mesh: Mesh | None = None,
    saved: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal self-attention by JAX's Pallas kernels for TPUs, forward and backward: scores never leave the core.

    Each device runs them on its own rows and heads. Sequences are padded to whole blocks; behind all others, padding is
    seen by none of them. Arguments and result are `attention`'s; `interpret` runs the kernels anywhere, slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, S = q_BSHN.shape[:2]
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

    args = (q_BSHN, k_BSKN, v_BSKN, *(() if segments_BS is None else (segments_BS,)))
    own_rows = FSDP in manual_axes()
    if mesh is None or mesh.size == 1:
        return on_one_device(*args)
    rows = BATCH if not own_rows and B % row_multiple(mesh) == 0 else None
    specs = (P(rows, None, TENSOR),) * 3 + (P(rows),) * (len(args) - 3)
    return jax.shard_map(
        on_one_device,
        mesh=jax.sharding.get_abstract_mesh() if own_rows else mesh,
        axis_names={TENSOR} if own_rows else set(AXES),
        in_specs=specs,
        out_specs=specs[0],
        check_vma=False,
    )(*args)


def _splash_can(q_BSHN: jax.Array, k_BSKN: jax.Array, mesh: Mesh | None) -> bool:
    """The kernels want whole lanes; keys and values are cut with their queries, by whole heads."""
    return q_BSHN.shape[3] % 128 == 0 and (mesh is None or k_BSKN.shape[2] % mesh.shape[TENSOR] == 0)


def splash_block(S: int) -> int:
    """Positions of a block: the most, up to 512, that padding to whole blocks costs at most an eighth for."""
    return next((n for n in (512, 384, 256) if -S % n <= S / 8), 128)


def _cudnn_attention(q_BSHN, k_BSKN, v_BSKN, segments_BS, causal, window) -> jax.Array:
    """cuDNN leaves out what is not causal or beyond a window; segments it is shown as a mask."""
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


def _platform(mesh: Mesh | None) -> str:
    return mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()


def cached_attention(
    q_BHN: jax.Array,
    k_BKN: jax.Array,
    v_BKN: jax.Array,
    cached: tuple[jax.Array, ...],
    visible_BM: jax.Array,
    mesh: Mesh | None = None,
) -> jax.Array:
    """One query a row against its own key and the cached ones: [B, H, N].

    The new key and value come apart from the cache, so that writing them there need not wait for this.

    Args:
      q_BHN: scaled by 1 / sqrt(N).
      cached: keys [B, K, N, M] and values [B, K, M, N]; where they are int8 also what a slot's key and its value are to
        be multiplied by, both [B, K, M].
      visible_BM: which slots of the cache each row sees.
    """
    keys_BKNM, values_BKMN, *scales_BKM = cached
    B, H, N = q_BHN.shape
    K = k_BKN.shape[1]
    G = H // K
    q_BKGN = q_BHN.reshape(B, K, G, N)
    if G == 1 and _platform(mesh) == "tpu":
        # Twice: products with a single vector XLA makes sums there, for which it copies the cache.
        q_BKGN = jnp.repeat(q_BKGN, 2, axis=2)
    wide = dict(preferred_element_type=jnp.float32)
    past = jnp.einsum("BKGN,BKNM->BKGM", q_BKGN, keys_BKNM.astype(k_BKN.dtype), **wide)
    if scales_BKM:
        past *= scales_BKM[0][:, :, None]
    past = jnp.where(visible_BM[:, None, None], past, jnp.finfo(past.dtype).min)
    own = jnp.einsum("BKGN,BKN->BKG", q_BKGN, k_BKN, **wide)[..., None]
    top = jnp.maximum(jnp.max(past, axis=-1, keepdims=True), own)
    past, own = jnp.exp(past - top), jnp.exp(own - top)
    weights = past * scales_BKM[1][:, :, None] if scales_BKM else past
    seen = jnp.einsum("BKGM,BKMN->BKGN", weights.astype(v_BKN.dtype), values_BKMN.astype(v_BKN.dtype), **wide)
    seen = (seen + own * v_BKN[:, :, None]) / (jnp.sum(past, axis=-1, keepdims=True) + own)
    return seen[:, :, :G].astype(q_BHN.dtype).reshape(B, H, N)
