"""The CLIP vision tower (ViT, Radford et al. 2021): tiles of pixels to features.

Computes what transformers' `CLIPVisionModel` does, up to the hidden state that LLaVA takes its features from. The
layers after that and the last norm have no parameters here.
"""

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from llava_jax.config import VisionConfig
from llava_jax.models.attention import attention
from llava_jax.models.layers import ACTIVATIONS, Dense, LayerNorm, init_layers, init_module, run_layers
from llava_jax.sharding.mesh import TILES
from llava_jax.sharding.partition import UNSHARDED, Partition


def normalise(tiles: jax.Array, config: VisionConfig, dtype=jnp.float32) -> jax.Array:
    """Scale uint8 pixels [..., H, W, 3] to 0..1 and standardise them by the mean and deviation of the training set."""
    pixels = tiles.astype(jnp.float32) / (1 / config.rescale_factor)  # divide by 255 exactly
    if config.normalize:
        mean, std = (jnp.array(x, jnp.float32) for x in (config.image_mean, config.image_std))
        pixels = (pixels - mean) / std
    return pixels.astype(dtype)


class Embedding(nn.Module):
    """Embeddings of the class token and of all patches, with their positions added."""

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
        # Patches do not overlap, so the convolution is a matmul.
        x = pixels[:, : side * p, : side * p].reshape(B, side, p, side, p, 3).swapaxes(2, 3)
        x = x.reshape(B, side * side, p * p * 3) @ patch.reshape(-1, c.width).astype(pixels.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (B, 1, c.width)), x], axis=1)
        return x + position.astype(x.dtype)


class Block(nn.Module):
    """A layer of the tower: attention and feed-forward, each with a norm before it and a residual around it."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x_BPC: jax.Array, partition: Partition = UNSHARDED) -> jax.Array:
        c = self.config
        x_BPC = x_BPC + Attention(c, name="attention")(LayerNorm(c.norm_eps, name="attention_norm")(x_BPC), partition)
        x_BPC = x_BPC + FeedForward(c, name="mlp")(LayerNorm(c.norm_eps, name="mlp_norm")(x_BPC))
        return x_BPC


class Attention(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x_BPC: jax.Array, partition: Partition) -> jax.Array:
        c = self.config
        B, P, C = x_BPC.shape
        q, k, v = (Dense(c.width, bias=True, name=name)(x_BPC).reshape(B, P, c.heads, -1) for name in ("q", "k", "v"))
        x_BPHN = attention(q * q.shape[-1] ** -0.5, k, v, partition=partition)
        return Dense(c.width, bias=True, name="o")(x_BPHN.reshape(B, P, C))


class FeedForward(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x_BPC: jax.Array) -> jax.Array:
        c = self.config
        return Dense(c.width, bias=True, name="down")(
            ACTIVATIONS[c.activation](Dense(c.ffn_width, bias=True, name="up")(x_BPC))
        )


def vision_features(
    params, config: VisionConfig, pixels_BHW3: jax.Array, partition: Partition = UNSHARDED, remat: str = "none"
) -> jax.Array:
    """The features of normalised tiles: [B, P, C] (llava/model/multimodal_encoder/clip_encoder.py).

    `params` is the `vision` part of the tree; its layers may be stacked (`layers.run_layers`).
    """
    c = config
    x = Embedding(c).apply({"params": partition.gather(params["embed"], "vision/embed")}, pixels_BHW3)
    x = LayerNorm(c.norm_eps).apply({"params": params["pre_norm"]}, x)

    def block(x_BPC, layer):
        layer = partition.gather(layer, "vision/layers")
        return partition.constrain(Block(c).apply({"params": layer}, x_BPC, partition), TILES, None, None)

    states, done = {}, 0
    for i in sorted(set(c.hidden_states)):
        states[i] = x = run_layers(block, x, params["layers"], range(done, i), remat)
        done = i
    x = jnp.concatenate([states[i] for i in c.hidden_states], axis=-1)
    return x if c.keep_class_token else x[:, 1:]


def init_params(config: VisionConfig, keys: Iterator[jax.Array]) -> dict:
    """Random parameters of the tower, one key for each module."""
    side, positions = config.image_size, config.patches_per_side**2 + 1
    x_1PC = jnp.zeros((1, positions, config.width))
    return {
        "embed": init_module(Embedding(config), keys, jnp.zeros((1, side, side, 3))),
        "pre_norm": init_module(LayerNorm(config.norm_eps), keys, x_1PC),
        "layers": init_layers(config.layers_used, Block(config), keys, x_1PC),
    }
