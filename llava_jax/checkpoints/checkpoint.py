"""Open checkpoints in all supported formats, and load them onto a mesh."""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from llava_jax.checkpoints.config_json import read_config
from llava_jax.checkpoints.directories import find_directory
from llava_jax.checkpoints.orbax_files import load_params, open_ours
from llava_jax.checkpoints.sources import Source, open_source, read_ahead
from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, Progress
from llava_jax.data.tokenizer import Tokenizer, load_tokenizer
from llava_jax.json_files import read_json
from llava_jax.models.llava import Params, param_shapes
from llava_jax.sharding.partition import Partition, path_of


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose parameters have not been read yet."""

    directory: Path
    config: LlavaConfig
    tokenizer: Tokenizer
    load: Callable[..., Params]  # load(mesh, dtype or path -> dtype) -> parameters, sharded over the mesh
    source: Callable[[], Source]  # the same as stored, for reading tensor by tensor


def open_checkpoint(where: str | os.PathLike, *, vision_tower: str | os.PathLike | None = None) -> Checkpoint:
    """Open an Orbax directory of ours, a directory of safetensors (original or transformers), or a hub name.

    Args:
      vision_tower: a CLIP directory, for original checkpoints without their tower.

    Raises:
      InputError: there is no such checkpoint, or it is not a complete LLaVA.
    """
    directory = find_directory(where)
    config_json = read_json(directory / "config.json")
    if config_json is None and (directory / "adapter_config.json").exists():
        raise InputError(f"{directory}: is an adapter; merge it into its --base with `python -m convert to-orbax`")
    if config_json is None:
        raise InputError(f"{directory}: not a checkpoint (it has no config.json)")
    if "model_type" not in config_json and (directory / "model" / "config.json").exists():
        raise InputError(f"{directory}: is a training run; its model is {directory / 'model'}")
    if config_json.get("format") == "llava-jax":
        if vision_tower is not None:
            raise InputError(
                f"{directory}: has its vision tower; --vision-tower is for original checkpoints without one"
            )
        config = read_config(config_json, file=directory / "config.json")
        load = functools.partial(_load_ours, directory / "params", config)
        return Checkpoint(directory, config, load_tokenizer(directory), load, lambda: open_ours(directory))
    source = _open_source(where, directory, vision_tower)
    load = functools.partial(_load_source, source)
    return Checkpoint(directory, source.config, load_tokenizer(directory), load, lambda: source)


def open_any(where: str | os.PathLike, *, vision_tower: str | os.PathLike | None = None) -> Source:
    """Open a checkpoint in any supported format as a `Source`, to read it tensor by tensor.

    Raises:
      InputError: there is no such checkpoint, or it is not a complete LLaVA.
    """
    directory = find_directory(where)
    if (read_json(directory / "config.json") or {}).get("format") == "llava-jax":
        return open_ours(directory)
    return _open_source(where, directory, vision_tower)


def _open_source(where: str | os.PathLike, directory: Path, vision_tower: str | os.PathLike | None) -> Source:
    hub_name = "" if os.path.exists(where) else os.fspath(where)  # a hub model's directory is named after a commit
    tower = None if vision_tower is None else find_directory(vision_tower)
    return open_source(directory, vision_tower=tower, name=hub_name)


def default_dtype(mesh: Mesh):
    """bfloat16 on accelerators, which multiply it in hardware; float32 on CPUs."""
    return jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16


# ---------------------------------------------------------------- loading


def _load_ours(directory: Path, config: LlavaConfig, mesh: Mesh, dtype=None) -> Params:
    return load_params(directory, config, mesh, _dtype_of(dtype, mesh))


def _load_source(source: Source, mesh: Mesh, dtype=None) -> Params:
    """Read tensors from their files one at a time, and shard each over the mesh."""
    dtype_of = _dtype_of(dtype, mesh)
    shardings = Partition(source.config, mesh).shardings(param_shapes(source.config))
    places = {path_of(path): sharding for path, sharding in jax.tree_util.tree_flatten_with_path(shardings)[0]}
    tensors = [source.tensors[path] for path in places]
    loaded = {}
    with Progress("loading", sum(tensor.nbytes for tensor in tensors), "B") as bar:
        arrays = read_ahead([(tensor.nbytes, tensor.read) for tensor in tensors])
        for (path, sharding), tensor, array in zip(places.items(), tensors, arrays, strict=True):
            whole = array.astype(dtype_of(path), copy=False)
            loaded[path] = jax.make_array_from_callback(tensor.shape, sharding, whole.__getitem__)
            bar.advance(tensor.nbytes)
    return unflatten_dict(loaded, sep="/")


def _dtype_of(dtype, mesh: Mesh) -> Callable[[str], np.dtype]:
    """Path -> the type to load a parameter in: `dtype` for all, `dtype(path)`, or the default."""
    if callable(dtype) and not isinstance(dtype, type):
        return lambda path: np.dtype(dtype(path))
    return lambda path: np.dtype(dtype or default_dtype(mesh))
