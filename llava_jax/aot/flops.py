"""Floating-point operations that a model needs, whatever is computed twice to save memory: what training and generation
are measured against, and what plans compare compiled programs with.

Two for each weight and position, its weights being the kernels of the parameters' own shapes; two for each pair of
positions in the two products of attention. Norms, activations and lookups are not counted.
"""

import functools
import math
from typing import NamedTuple

from flax.traverse_util import flatten_dict

from llava_jax.config import LlavaConfig
from llava_jax.models.llava import param_shapes


class Weights(NamedTuple):
    """Numbers of a model that are multiplied with every position that passes them; and how many of these a tile has."""

    decoder: int  # kernels of all layers
    keys_values: int  # of them those that make keys and values
    head: int
    tower: int  # kernels of all layers that are used
    patches: int  # what makes a patch's embedding
    projector: int
    positions: int  # of a tile in the tower: its patches, and a class token if there is one


@functools.cache
def weights(model: LlavaConfig) -> Weights:
    """Counted from the shapes of the parameters."""
    shapes = {path: x.shape for path, x in flatten_dict(param_shapes(model), sep="/").items()}
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}

    def kernels(part: str, ends: tuple[str, ...] = ("kernel",)) -> int:
        return sum(n for path, n in sizes.items() if path.startswith(part) and path.endswith(ends))

    return Weights(
        decoder=kernels("decoder/layers/"),
        keys_values=kernels("decoder/layers/", ("attention/k/kernel", "attention/v/kernel")),
        head=model.text.width * model.text.vocab_size,  # the embeddings, if it is tied to them
        tower=kernels("vision/layers/"),
        patches=sizes["vision/embed/patch"],
        projector=kernels("projector/"),
        positions=shapes["vision/embed/position"][0],
    )


def step_flops(
    model: LlavaConfig, tune: str, rows: int, length: int, tiles: int, *, layers_only: bool = False
) -> float:
    """Of a training step: forward, backward for the gradient that is passed on, and once more for the weights' own
    where they are trained. Padding is counted.

    Args:
      tune: the parts that are trained, as `train.config.TUNE` has them.
      rows, length, tiles: rows of a batch, positions and tiles of each.
      layers_only: without head and projector, for batches of which few positions have labels.
    """
    t, v, w = model.text, model.vision, weights(model)
    decoder_passes = 3 if "decoder" in tune else 2
    tower_passes = 3 if "vision" in tune else 1
    scores = t.layers * t.heads * t.head_width * rows * length**2  # two products, half of each masked
    tower = tiles * rows * w.positions * (w.tower + v.layers_used * 2 * v.width * w.positions)
    layers = 2 * (w.decoder * rows * length * decoder_passes + scores * 3 + tower * tower_passes)
    if layers_only:
        return layers
    head = 2 * w.head * rows * length * decoder_passes
    return layers + head + 2 * w.projector * rows * tiles * v.features_per_tile * 3


def decoder_flops(model: LlavaConfig, rows: int, length: int, seen: float) -> float:
    """Of the decoder for `length` new positions a row, each of which sees `seen`, and the head for the last.

    Of the last layer all positions but the last need keys and values only.
    """
    t, w = model.text, weights(model)
    rest = (w.decoder - w.keys_values) // t.layers + 2 * t.heads * t.head_width * seen  # of a layer
    through = (t.layers - 1) * length + 1  # of positions, summed over layers
    return 2 * rows * (length * w.keys_values + through * rest + w.head)


def encode_flops(model: LlavaConfig, tiles: int) -> float:
    """Of the tower and the projector."""
    v, w = model.vision, weights(model)
    tower = w.positions * (w.tower + v.layers_used * 2 * v.width * w.positions) + w.patches * v.patches_per_side**2
    return 2 * tiles * (tower + v.features_per_tile * w.projector)
