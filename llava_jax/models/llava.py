"""LLaVA as pure functions: encode tiles, splice with one gather, decode. Training and inference call these.

Parameters are a plain nested dictionary, one entry for each layer (training stacks them: `layers.run_layers`):

    vision/{embed,pre_norm,layers/0..}   projector/linear_0..   newline
    decoder/{embed,layers/0..,norm,head}
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llava_jax.config import LlavaConfig
from llava_jax.data.splice import TEXT, Batch
from llava_jax.models import decoder, vision
from llava_jax.models.layers import LayerNorm, RMSNorm
from llava_jax.sharding.mesh import BATCH, constrain

Params = dict

jax.tree_util.register_dataclass(Batch, [field.name for field in dataclasses.fields(Batch)], [])


def encode_tiles(
    params: Params, config: LlavaConfig, tiles_BTHW3: jax.Array, mesh: Mesh | None = None, remat: str = "none"
) -> jax.Array:
    """The feature table of each row: [B, R, D], tile after tile, then the newline if the model has one.

    Args:
      tiles_BTHW3: uint8 pixels.
      remat: what stacked layers save for the backward pass.

    Source: llava/model/llava_arch.py `encode_images`.
    """
    B, T = tiles_BTHW3.shape[:2]
    dtype = params["decoder"]["embed"]["embedding"].dtype
    pixels = vision.normalise(tiles_BTHW3.reshape(B * T, *tiles_BTHW3.shape[2:]), config.vision, dtype)
    pixels = constrain(pixels, mesh, BATCH, None, None, None)
    features = vision.vision_features(params["vision"], config, pixels, mesh, remat)
    features = vision.project(params.get("projector", {}), config, features, mesh)
    table_BRD = constrain(features.reshape(B, -1, features.shape[-1]), mesh, BATCH, None, None)
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
    mesh: Mesh | None = None,
) -> jax.Array:
    """Input embeddings [B, S, D]: a token's, or the feature row that `splice.splice` put there.

    `features_BRD` None means that no row has an image.
    """
    x_BSD = constrain(decoder.embed(params["decoder"], config, ids_BS, mesh), mesh, BATCH, None, None)
    if features_BRD is None:
        return x_BSD
    rows = jnp.maximum(feature_rows_BS, 0)[..., None]
    seen_BSD = jnp.take_along_axis(features_BRD, rows, axis=1, mode="promise_in_bounds")
    return jnp.where((feature_rows_BS == TEXT)[..., None], x_BSD, seen_BSD.astype(x_BSD.dtype))


def embed_batch(
    params: Params, config: LlavaConfig, batch: Batch, mesh: Mesh | None = None, remat: str = "none"
) -> jax.Array:
    """Input embeddings [B, S, D] of a whole batch."""
    features = encode_tiles(params, config, batch.tiles, mesh, remat) if batch.tiles.shape[1] else None
    return splice_embeddings(params, config, features, batch.ids, batch.feature_rows, mesh)


def forward(params: Params, config: LlavaConfig, batch: Batch, mesh: Mesh | None = None) -> jax.Array:
    """Logits [B, S, V] in float32 for every position of a batch."""
    x_BSD = embed_batch(params, config, batch, mesh)
    x_BSD = decoder.decode(params["decoder"], config, x_BSD, batch.positions, batch.segments, mesh=mesh)
    return decoder.logits(params["decoder"], config, x_BSD, mesh)


def init_params(config: LlavaConfig, key: jax.Array, dtype=jnp.float32) -> Params:
    """Random parameters; with `jax.eval_shape` the shapes that a checkpoint must have."""
    c, t = config.vision, config.text
    keys = iter(jax.random.split(key, 8 + c.layers_used + t.layers))
    x_1PC = jnp.zeros((1, c.patches_per_side**2 + 1, c.width))
    x_11D = jnp.zeros((1, 1, t.width))

    def made(module, *args):
        return module.init(next(keys), *args).get("params", {})

    def layers(number, module, *args):
        init = jax.jit(lambda key: module.init(key, *args)["params"])  # traced for the first layer alone
        return {str(i): init(next(keys)) for i in range(number)}

    def first_of_three(q, k, v):
        return q

    tower = {
        "embed": made(vision.Embedding(c), jnp.zeros((1, c.image_size, c.image_size, 3))),
        "pre_norm": made(LayerNorm(c.norm_eps), x_1PC),
        "layers": layers(c.layers_used, vision.Block(c), x_1PC),
    }
    text = {
        "embed": {"embedding": 0.02 * jax.random.normal(next(keys), (t.vocab_size, t.width))},
        "layers": layers(t.layers, decoder.Block(t), x_11D, first_of_three),
        "norm": made(RMSNorm(t.norm_eps), x_11D),
    }
    if not t.tied_head:
        text["head"] = {"kernel": 0.02 * jax.random.normal(next(keys), (t.width, t.vocab_size))}
    params = {"vision": tower, "decoder": text}
    if projector := made(vision.Projector(config), jnp.zeros((1, config.projector_in))):
        params["projector"] = projector
    if config.has_newline:
        params["newline"] = jax.random.normal(next(keys), (t.width,)) / t.width**0.5
    return jax.tree.map(lambda x: x.astype(dtype), params)


def param_shapes(config: LlavaConfig, dtype=jnp.float32) -> Params:
    """The tree of `jax.ShapeDtypeStruct` that the parameters of a model have."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))
