"""Floating-point operations that a model needs, not counting recomputation: benchmarks compute MFU from them, and plans
compare compiled programs with them.

Counted are two per weight and position, where the weights are the kernels of `param_shapes`, and two per pair of
positions and head element in each of attention's two matmuls. Norms, activations and lookups are not counted.
"""

import functools
import math
from typing import NamedTuple

from flax.traverse_util import flatten_dict

from llava_jax.config import LlavaConfig
from llava_jax.models.llava import param_shapes


class Weights(NamedTuple):
    """Numbers of weights that are multiplied with each position, by part of the model."""

    decoder: int  # kernels of all layers
    keys_values: int  # the part of `decoder` that computes keys and values
    head: int
    tower: int  # kernels of the layers in use
    patches: int  # the patch embedding
    projector: int
    positions: int  # not weights: positions of a tile in the tower, its patches and any class token


@functools.cache
def weights(model: LlavaConfig) -> Weights:
    """Count weights from the shapes of the parameters."""
    shapes = {path: x.shape for path, x in flatten_dict(param_shapes(model), sep="/").items()}
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}

    def kernels(part: str, ends: tuple[str, ...] = ("kernel",)) -> int:
        return sum(n for path, n in sizes.items() if path.startswith(part) and path.endswith(ends))

    return Weights(
        decoder=kernels("decoder/layers/"),
        keys_values=kernels("decoder/layers/", ("attention/k/kernel", "attention/v/kernel")),
        head=model.text.width * model.text.vocab_size,  # if tied, the embeddings
        tower=kernels("vision/layers/"),
        patches=sizes["vision/embed/patch"],
        projector=kernels("projector/"),
        positions=shapes["vision/embed/position"][0],
    )


def step_flops(
    model: LlavaConfig, tune: str, rows: int, length: int, tiles: int, *, layers_only: bool = False
) -> float:
    """FLOPs of a training step: forward, backward for the activations, and backward for the weights that are trained.
    Padding is counted.

    Args:
      tune: the trained parts, as in `train.config.TUNE`.
      rows, length, tiles: rows of a batch, positions and tiles of each row.
      layers_only: leave out head and projector, for batches with few labelled positions.
    """
    t, v, w = model.text, model.vision, weights(model)
    decoder_passes = 3 if "decoder" in tune else 2
    tower_passes = 3 if "vision" in tune else 1
    scores = t.layers * t.heads * t.head_width * rows * length**2  # two matmuls, half of each masked
    tower = tiles * rows * w.positions * (w.tower + v.layers_used * 2 * v.width * w.positions)
    layers = 2 * (w.decoder * rows * length * decoder_passes + scores * 3 + tower * tower_passes)
    if layers_only:
        return layers
    head = 2 * w.head * rows * length * decoder_passes
    return layers + head + 2 * w.projector * rows * tiles * v.features_per_tile * 3


def decoder_flops(model: LlavaConfig, rows: int, length: int, seen: float) -> float:
    """FLOPs of the decoder for `length` new positions per row, each attending to `seen`, and of the head for the last.

    In the last layer, all positions but the last need only keys and values.
    """
    t, w = model.text, weights(model)
    rest = (w.decoder - w.keys_values) // t.layers + 2 * t.heads * t.head_width * seen  # of one layer
    through = (t.layers - 1) * length + 1  # of positions, summed over layers
    return 2 * rows * (length * w.keys_values + through * rest + w.head)


def encode_flops(model: LlavaConfig, tiles: int) -> float:
    """FLOPs of the tower and the projector."""
    v, w = model.vision, weights(model)
    tower = w.positions * (w.tower + v.layers_used * 2 * v.width * w.positions) + w.patches * v.patches_per_side**2
    return 2 * tiles * (tower + v.features_per_tile * w.projector)
