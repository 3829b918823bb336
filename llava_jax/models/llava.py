"""LLaVA as pure functions: encode tiles, splice with one gather, run the decoder. Training and inference call these.

Parameters are a plain nested dictionary, one entry for each layer (training stacks them: `layers.run_layers`):

    vision/{embed,pre_norm,layers/0..}   projector/linear_0..   newline
    decoder/{embed,layers/0..,norm,head}
"""

import dataclasses

import jax
import jax.numpy as jnp

from llava_jax.config import LlavaConfig
from llava_jax.data.splice import TEXT, Batch
from llava_jax.models import clip, llama
from llava_jax.models.layers import init_module
from llava_jax.models.projector import Projector, project
from llava_jax.sharding.mesh import BATCH
from llava_jax.sharding.partition import UNSHARDED, Partition

Params = dict

# So that jitted functions take a batch.
jax.tree_util.register_dataclass(Batch, [field.name for field in dataclasses.fields(Batch)], [])


def encode_tiles(
    params: Params, config: LlavaConfig, tiles_BTHW3: jax.Array, partition: Partition = UNSHARDED, remat: str = "none"
) -> jax.Array:
    """The feature table of each row: [B, R, D], tile after tile, then the newline if the model has one.

    Args:
      tiles_BTHW3: uint8 pixels.
      remat: what stacked layers save for the backward pass.

    Source: llava/model/llava_arch.py `encode_images`.
    """
    B, T = tiles_BTHW3.shape[:2]
    dtype = params["decoder"]["embed"]["embedding"].dtype
    pixels = clip.normalise(tiles_BTHW3.reshape(B * T, *tiles_BTHW3.shape[2:]), config.vision, dtype)
    pixels = partition.constrain(pixels, BATCH, None, None, None)
    features = clip.vision_features(params["vision"], config.vision, pixels, partition, remat)
    features = project(params.get("projector", {}), config, features, partition)
    table_BRD = partition.constrain(features.reshape(B, -1, features.shape[-1]), BATCH, None, None)
    if config.has_newline:
        newline = jnp.broadcast_to(params["newline"].astype(table_BRD.dtype), (B, 1, table_BRD.shape[-1]))
        table_BRD = jnp.concatenate([table_BRD, newline], axis=1)
    return table_BRD


def splice_embeddings(
    params: Params,
    config: LlavaConfig,
    features_BRD: jax.Array | None,
    ids_BS: jax.Array,
    feature_rows_BS: jax.Array,
    partition: Partition = UNSHARDED,
) -> jax.Array:
    """Input embeddings [B, S, D]: a token's, or the feature row that `splice.splice` put there.

    `features_BRD` None means that no row has an image.
    """
    x_BSD = partition.constrain(llama.embed(params["decoder"], ids_BS, partition), BATCH, None, None)
    if features_BRD is None:
        return x_BSD
    rows = jnp.maximum(feature_rows_BS, 0)[..., None]
    seen_BSD = jnp.take_along_axis(features_BRD, rows, axis=1, mode="promise_in_bounds")
    return jnp.where((feature_rows_BS == TEXT)[..., None], x_BSD, seen_BSD.astype(x_BSD.dtype))


def embed_batch(
    params: Params, config: LlavaConfig, batch: Batch, partition: Partition = UNSHARDED, remat: str = "none"
) -> jax.Array:
    """Input embeddings [B, S, D] of a whole batch."""
    features = encode_tiles(params, config, batch.tiles, partition, remat) if batch.tiles.shape[1] else None
    return splice_embeddings(params, config, features, batch.ids, batch.feature_rows, partition)


def forward(params: Params, config: LlavaConfig, batch: Batch, partition: Partition = UNSHARDED) -> jax.Array:
    """Logits [B, S, V] in float32 for every position of a batch."""
    x_BSD = embed_batch(params, config, batch, partition)
    x_BSD = llama.forward(params["decoder"], config.text, x_BSD, batch.positions, batch.segments, partition=partition)
    return llama.logits(params["decoder"], config.text, x_BSD, partition)


def init_params(config: LlavaConfig, key: jax.Array, dtype=jnp.float32) -> Params:
    """Random parameters; with `jax.eval_shape` the shapes that a checkpoint must have."""
    keys = iter(jax.random.split(key, 8 + config.vision.layers_used + config.text.layers))
    params = {"vision": clip.init_params(config.vision, keys), "decoder": llama.init_params(config.text, keys)}
    if projector := init_module(Projector(config), keys, jnp.zeros((1, config.projector_in))):
        params["projector"] = projector
    if config.has_newline:
        width = config.text.width
        params["newline"] = jax.random.normal(next(keys), (width,)) / width**0.5
    return jax.tree.map(lambda x: x.astype(dtype), params)


def param_shapes(config: LlavaConfig, dtype=jnp.float32) -> Params:
    """The tree of `jax.ShapeDtypeStruct` that the parameters of a model have."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))
