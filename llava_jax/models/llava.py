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
from llava_jax.sharding.mesh import BATCH, TILES
from llava_jax.sharding.partition import UNSHARDED, Partition

Params = dict

# So that jitted functions take a batch.
jax.tree_util.register_dataclass(Batch, [field.name for field in dataclasses.fields(Batch)], [])


def encode_tiles(
    params: Params, config: LlavaConfig, tiles_THW3: jax.Array, partition: Partition = UNSHARDED, remat: str = "none"
) -> jax.Array:
    """The features of tiles, projected to the decoder's width: [T, P, D].

    Each device encodes its shard of the tiles, and sends nothing but weights along `fsdp`. Where the mesh does not
    divide the number of tiles, empty ones are encoded with them, and dropped.

    Args:
      tiles_THW3: uint8 pixels, of any rows.
      remat: what stacked layers save for the backward pass.

    Source: llava/model/llava_arch.py `encode_images`.
    """
    T = tiles_THW3.shape[0]
    tiles_THW3 = jnp.pad(tiles_THW3, ((0, -T % partition.tile_shards), (0, 0), (0, 0), (0, 0)))
    tiles_THW3 = partition.constrain(tiles_THW3, TILES, None, None, None)
    pixels = clip.normalise(tiles_THW3, config.vision, params["decoder"]["embed"]["embedding"].dtype)
    features = clip.vision_features(params["vision"], config.vision, pixels, partition, remat)
    features_TPD = project(params.get("projector", {}), config, features, partition)
    return partition.constrain(features_TPD, TILES, None, None)[:T]


def feature_table(
    params: Params, config: LlavaConfig, features_BTPD: jax.Array, partition: Partition = UNSHARDED
) -> jax.Array:
    """The feature table of each row: [B, R, D], tile after tile, then the newline if the model has one.

    Args:
      features_BTPD: or [B, T * P, D].
    """
    B, *_, D = features_BTPD.shape
    table_BRD = partition.constrain(features_BTPD.reshape(B, -1, D), BATCH, None, None)
    if config.has_newline:
        newline = jnp.broadcast_to(params["newline"].astype(table_BRD.dtype), (B, 1, D))
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
    B, T, *pixels = batch.tiles.shape
    features_BRD = None
    if T:
        features_TPD = encode_tiles(params, config, batch.tiles.reshape(B * T, *pixels), partition, remat)
        features_TPD = partition.constrain(features_TPD, BATCH, None, None)  # gathered along `tensor`
        features_BTPD = features_TPD.reshape(B, T, *features_TPD.shape[1:])
        features_BRD = feature_table(params, config, features_BTPD, partition)
    return splice_embeddings(params, config, features_BRD, batch.ids, batch.feature_rows, partition)


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
