"""The parameters of a run: split into frozen and trained, cast, stacked and sharded for training; and exported.

    params --split_params--> frozen (compute dtype), trained (float32)      layers stacked
    frozen, trained --export_params--> params                               one entry per layer
    frozen, trained --inference_params--> params (compute dtype)            one entry per layer, LoRA merged

Trees are those of `llava_jax.models.llava`. Frozen and trained have no leaf in common; the model takes their `union`.
"""

import collections
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.models.llava import Params
from llava_jax.sharding.partition import Partition
from train import lora
from train.config import TrainConfig
from train.optim import part_of

LAYER = re.compile(r"/layers/\d+/")  # in a path; stacking removes the number


def is_trained(path: str, config: TrainConfig) -> bool:
    """Whether the parameter at `path`, stacked or not, is trained."""
    return part_of(path) in ("projector" if config.tune == "lora" else config.tune).split(",")


def load_dtype(path: str, config: TrainConfig) -> str:
    """The dtype of the parameter at `path`: float32 if trained, otherwise the compute dtype."""
    return "float32" if is_trained(path, config) else config.dtype


def union(a: Params, b: Params) -> Params:
    """One tree with the leaves of both."""
    return a | {key: union(a[key], value) if key in a else value for key, value in b.items()}


# ---------------------------------------------------------------- import


def split_params(
    params: Params, config: TrainConfig, partition: Partition
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Split parameters into frozen and trained ones, by path: layers stacked, cast and sharded, with new LoRA factors.

    Args:
      params: as `checkpoints.checkpoint` loads them, or their shapes (then the results are shapes too). This function
        empties the tree, so that each weight is in memory twice only while it is stacked.
    """
    flat = flatten_dict(params, sep="/")
    params.clear()
    layers_of = collections.Counter(LAYER.sub("/layers/", path) for path in flat)
    frozen: dict[str, Any] = {}  # arrays or shapes
    trained: dict[str, Any] = {}
    for path, layers in layers_of.items():
        stacked, dtype = "/layers/" in path, jnp.dtype(load_dtype(path, config))
        leaves = [flat.pop(path.replace("/layers/", f"/layers/{i}/")) for i in range(layers)]
        shape = ((len(leaves),) if stacked else ()) + leaves[0].shape
        sharding = partition.stacked_sharding(path, shape)
        if isinstance(leaves[0], jax.ShapeDtypeStruct):
            parameter = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        else:
            parameter = _stack(leaves, dtype, stacked, sharding)
        (trained if is_trained(path, config) else frozen)[path] = parameter
    if config.tune == "lora":
        trained |= _make_lora(frozen, config, partition)
    return frozen, trained


@functools.partial(jax.jit, static_argnames=("dtype", "stacked", "sharding"))
def _stack(leaves: list[jax.Array], dtype, stacked: bool, sharding: NamedSharding) -> jax.Array:
    leaves = [x.astype(dtype) for x in leaves]
    return jax.lax.with_sharding_constraint(jnp.stack(leaves) if stacked else leaves[0], sharding)


def _make_lora(frozen: dict[str, jax.Array], config: TrainConfig, partition: Partition) -> dict[str, jax.Array]:
    kernels = {path: frozen[path] for path in lora.adapted_kernels(frozen, config)}
    make = functools.partial(lora.init_lora, config=config)
    shapes = jax.eval_shape(make, kernels)
    return make_sharded(make, {path: partition.stacked_sharding(path, x.shape) for path, x in shapes.items()}, kernels)


def make_sharded(make: Callable, shardings: Any, *args: Any) -> Any:
    """`make(*args)` with `shardings`, a tree like the result; shapes, if the arguments are shapes."""
    if isinstance(jax.tree.leaves(args)[0], jax.ShapeDtypeStruct):
        shapes = jax.eval_shape(make, *args)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return jax.jit(make, out_shardings=shardings)(*args)


# ---------------------------------------------------------------- export


def export_params(frozen: Params, trained: Params) -> Params:
    """The whole model, one entry per layer; LoRA's factors are next to their kernels.

    Trained parameters are float32. Frozen ones (`{}` leaves them out) equal the input of `split_params` bit for bit, if
    it was in the compute dtype.
    """
    exported: dict[str, jax.Array] = {}
    for path, x in flatten_dict(union(frozen, trained), sep="/").items():
        paths, sharding = _layers(path, x)
        exported |= zip(paths, _unstack(x, sharding) if "/layers/" in path else [x], strict=True)
    return unflatten_dict(exported, sep="/")


def inference_params(
    frozen: Params, trained: Params, config: TrainConfig, place: Callable[[str, jax.Array], jax.Array]
) -> Params:
    """The whole model as inference takes it: one entry per layer, in the compute dtype, LoRA's factors merged.

    Args:
      place: puts the parameter at a path where inference wants it. It is called after each parameter is cast, so that
        no second copy of the model is in memory before.
    """
    flat = flatten_dict(union(frozen, trained), sep="/")
    factors = {path: flat.pop(path) for path in list(flat) if path.rpartition("/")[2] in lora.FACTORS}
    scale = lora.scale(config) if factors else 1.0
    exported: dict[str, jax.Array] = {}
    for path, x in flat.items():
        base, (paths, sharding) = path.removesuffix("kernel"), _layers(path, x)
        pair = [factors[base + name] for name in lora.FACTORS if base + name in factors]
        layers = _cast(x, pair, scale, jnp.dtype(config.dtype), "/layers/" in path, sharding)
        exported |= {path: place(path, layer) for path, layer in zip(paths, layers, strict=True)}
    return unflatten_dict(exported, sep="/")


def _layers(path: str, x: jax.Array) -> tuple[list[str], NamedSharding]:
    """The paths of the layers that are stacked in `x`, and the sharding of each; its own, if it isn't of a layer."""
    (head, layers, tail), stacked = path.partition("/layers/"), x.sharding
    assert isinstance(stacked, NamedSharding)
    if not layers:
        return [path], stacked
    return [f"{head}/layers/{i}/{tail}" for i in range(len(x))], NamedSharding(stacked.mesh, P(*stacked.spec[1:]))


@functools.partial(jax.jit, static_argnames="sharding")
def _unstack(x: jax.Array, sharding: NamedSharding) -> list[jax.Array]:
    return [jax.lax.with_sharding_constraint(layer, sharding) for layer in x]


@functools.partial(jax.jit, static_argnames=("scale", "dtype", "stacked", "sharding"))
def _cast(
    x: jax.Array, factors: list[jax.Array], scale: float, dtype, stacked: bool, sharding: NamedSharding
) -> list[jax.Array]:
    if factors:  # as `lora.merged`
        x = x.astype(jnp.float32) + scale * jnp.matmul(*factors, precision="highest")
    layers = x.astype(dtype) if stacked else [x.astype(dtype)]
    return [jax.lax.with_sharding_constraint(layer, sharding) for layer in layers]
