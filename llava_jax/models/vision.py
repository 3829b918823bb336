"""The CLIP vision tower and the projector: tiles of pixels to rows for the decoder.

CLIP ViT (Radford et al. 2021), as transformers' `CLIPVisionModel` computes it up to the hidden state that LLaVA
takes its features from: the layers behind it and the last norm are not here.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llava_jax.config import LlavaConfig, VisionConfig, projector_depth
from llava_jax.models.layers import ACTIVATIONS, Dense, LayerNorm, attention, run_layers
from llava_jax.sharding.mesh import BATCH, TENSOR, constrain, gather


def normalise(tiles: jax.Array, config: VisionConfig, dtype=jnp.float32) -> jax.Array:
    """uint8 pixels [..., H, W, 3] to what the tower was trained on: scaled to 0..1, mean and deviation taken out."""
    pixels = tiles.astype(jnp.float32) / (1 / config.rescale_factor)  # 255, and not a factor that is nearly 1/255
    if config.normalize:
        mean, std = (jnp.array(x, jnp.float32) for x in (config.image_mean, config.image_std))
        pixels = (pixels - mean) / std
    return pixels.astype(dtype)


class Embedding(nn.Module):
    """Patches, a class token before them, positions."""

    config: VisionConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[B, H, W, 3] to [B, 1 + patches, C]."""
        c = self.config
        normal = nn.initializers.normal(0.02)
        patch = self.param("patch", normal, (c.patch_size, c.patch_size, 3, c.width))
        token = self.param("class", normal, (c.width,))
        position = self.param("position", normal, (c.patches_per_side**2 + 1, c.width))
        B, side, p = pixels.shape[0], c.patches_per_side, c.patch_size
        # Patches do not overlap, so the convolution is a matrix product.
        x = pixels[:, : side * p, : side * p].reshape(B, side, p, side, p, 3).swapaxes(2, 3)
        x = x.reshape(B, side * side, p * p * 3) @ patch.reshape(-1, c.width).astype(pixels.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (B, 1, c.width)), x], axis=1)
        return x + position.astype(x.dtype)


class Block(nn.Module):
    """A layer of the tower: attention and feed-forward, each behind a norm and beside a residual."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x_BPC: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        c = self.config
        x_BPC = x_BPC + Attention(c, name="attention")(LayerNorm(c.norm_eps, name="attention_norm")(x_BPC), mesh)
        x_BPC = x_BPC + FeedForward(c, name="mlp")(LayerNorm(c.norm_eps, name="mlp_norm")(x_BPC))
        return x_BPC


class Attention(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x_BPC: jax.Array, mesh: Mesh | None) -> jax.Array:
        c = self.config
        B, P, C = x_BPC.shape
        q, k, v = (Dense(c.width, True, name)(x_BPC).reshape(B, P, c.heads, -1) for name in ("q", "k", "v"))
        q, k, v = (constrain(t, mesh, BATCH, None, TENSOR, None) for t in (q * q.shape[-1] ** -0.5, k, v))
        return Dense(c.width, True, "o")(attention(q, k, v, mesh=mesh).reshape(B, P, C))


class FeedForward(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x_BPC: jax.Array) -> jax.Array:
        c = self.config
        return Dense(c.width, True, "down")(ACTIVATIONS[c.activation](Dense(c.ffn_width, True, "up")(x_BPC)))


class Projector(nn.Module):
    """`linear`, `mlpNx_gelu` or `identity` (llava/model/multimodal_projector/builder.py)."""

    config: LlavaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(projector_depth(self.config.projector)):
            x = ACTIVATIONS["gelu"](x) if i else x
            x = Dense(self.config.text.width, self.config.projector_bias, f"linear_{i}")(x)
        return x


def vision_features(
    params, config: LlavaConfig, pixels_BHW3: jax.Array, mesh: Mesh | None = None, remat: str = "none"
) -> jax.Array:
    """The tower's features for normalised tiles: [B, P, C] (llava/model/multimodal_encoder/clip_encoder.py).

    `params` is the `vision` part of the tree; its layers may be stacked (`layers.run_layers`).
    """
    c = config.vision
    x = Embedding(c).apply({"params": gather(params["embed"], "vision/embed", config, mesh)}, pixels_BHW3)
    x = LayerNorm(c.norm_eps).apply({"params": params["pre_norm"]}, x)

    def block(x_BPC, layer):
        layer = gather(layer, "vision/layers", config, mesh)
        return constrain(Block(c).apply({"params": layer}, x_BPC, mesh), mesh, BATCH, None, None)

    states, done = {}, 0
    for i in sorted(set(c.hidden_states)):
        states[i] = x = run_layers(block, x, params["layers"], range(done, i), remat)
        done = i
    x = jnp.concatenate([states[i] for i in c.hidden_states], axis=-1)
    return x if c.keep_class_token else x[:, 1:]


def project(params, config: LlavaConfig, features: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """Features [..., C] to decoder width [..., D]. `params` is the `projector` part of the tree."""
    return Projector(config).apply({"params": gather(params, "projector", config, mesh)}, features)
