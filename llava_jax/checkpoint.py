"""Checkpoints on disk: ours (Orbax) saved and loaded, everybody's loaded.

Our directory, written by `save` and by nothing else:

    config.json     LlavaConfig (`"format": "llava-jax"`); written last, so a directory that has it is whole
    params/         Orbax (OCDBT): the parameter tree
    tokenizer.*     as they came

Orbax's newer interface still changes without notice, so only its stable one is used, and only here.
"""

import dataclasses
import functools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llava_jax.config import LlavaConfig, read_config, read_json
from llava_jax.console import InputError, Progress
from llava_jax.llava import Params, param_shapes
from llava_jax.prompts import choose_template
from llava_jax.sharding import param_shardings, path_of
from llava_jax.sources import Source, Tensor, open_source
from llava_jax.tokenizer import Tokenizer, load_tokenizer

CHUNK_BYTES = 64 * 2**20  # of a stored array, so that a host that wants a slice reads little more than that
GROUP_BYTES = 2**30  # restored at a time
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model"]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose parameters have not been read yet."""

    directory: Path
    config: LlavaConfig
    tokenizer: Tokenizer
    load: Callable[..., Params]  # load(mesh, dtype or path -> dtype) -> parameters, each in its place on the mesh
    source: Callable[[], Source]  # the same as it is stored, to be read tensor by tensor


def open_checkpoint(where: str | os.PathLike, *, vision_tower: str | os.PathLike | None = None) -> Checkpoint:
    """Open an Orbax directory of ours, a directory of safetensors (original or transformers), or a hub name.

    Args:
      vision_tower: a CLIP directory, for originals that come without their tower.

    Raises:
      InputError: there is no such thing, or it is not a whole LLaVA.
    """
    directory = find_directory(where)
    config_json = read_json(directory / "config.json")
    if config_json is None:
        raise InputError(f"{directory}: no checkpoint (there is no config.json)")
    name = str(where).rstrip("/")
    if config_json.get("format") == "llava-jax":
        config = read_config(config_json)
        load = functools.partial(_load_orbax, directory / "params", config)
        return Checkpoint(directory, config, load_tokenizer(directory), load, lambda: open_ours(directory))
    source = open_source(directory, vision_tower=vision_tower and Path(vision_tower), name=name)
    load = functools.partial(_load_source, source)
    return Checkpoint(directory, source.config, load_tokenizer(directory), load, lambda: source)


def find_directory(where: str | os.PathLike) -> Path:
    """The local directory of a checkpoint; a hub name (`org/model`) is fetched through the hub's cache.

    Raises:
      InputError: it is neither.
    """
    path = Path(where)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{where}: a file, not a checkpoint directory")
    if not HUB_NAME.fullmatch(str(where)):
        raise InputError(f"{where}: no such directory")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(where), allow_patterns=HUB_FILES))
    except Exception as error:  # connection, permission, validation: the hub's own hierarchy of errors
        raise InputError(
            f"{where}: no such directory, and the hub did not give it ({str(error).splitlines()[0]})"
        ) from None


def default_dtype(mesh: Mesh):
    """bfloat16 where the hardware multiplies it, float32 on CPUs."""
    return jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16


# ---------------------------------------------------------------- loading


def _load_source(source: Source, mesh: Mesh, dtype=None) -> Params:
    """Stream tensors one at a time from their files to their place on the mesh."""
    dtype_of = _dtype_of(dtype, mesh)
    shardings = param_shardings(param_shapes(source.config), source.config, mesh)
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    with Progress("loading", total, "B") as bar:

        def load(path, sharding):
            tensor = source.tensors[path_of(path)]
            whole = tensor.read().astype(dtype_of(path_of(path)), copy=False)
            bar.advance(tensor.nbytes)
            return jax.make_array_from_callback(tensor.shape, sharding, lambda index: whole[index])

        return jax.tree_util.tree_map_with_path(load, shardings)


def _dtype_of(dtype, mesh: Mesh) -> Callable[[str], np.dtype]:
    """Path -> the type to load a parameter in: one for all, one for each, or the default."""
    if isinstance(dtype, Callable) and not isinstance(dtype, type):
        return lambda path: np.dtype(dtype(path))
    return lambda path: np.dtype(dtype or default_dtype(mesh))


def _load_orbax(directory: Path, config: LlavaConfig, mesh: Mesh, dtype=None) -> Params:
    import orbax.checkpoint as ocp

    dtype_of = _dtype_of(dtype, mesh)
    shapes = param_shapes(config)
    shardings = param_shardings(shapes, config, mesh)
    wanted = {
        path_of(path): jax.ShapeDtypeStruct(shape.shape, dtype_of(path_of(path)), sharding=sharding)
        for (path, shape), sharding in zip(
            jax.tree_util.tree_flatten_with_path(shapes)[0], jax.tree.leaves(shardings), strict=True
        )
    }
    _check(directory, wanted, {path: shape for path, (shape, _) in _stored(directory).items()})
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        loaded: dict[str, jax.Array] = {}
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in wanted.values())
        with Progress("loading", total, "B") as bar:
            for group in _groups(wanted, GROUP_BYTES):
                tree = _unflatten(group)
                arguments = ocp.checkpoint_utils.construct_restore_args(tree)
                try:
                    part = checkpointer.restore(
                        directory,
                        args=ocp.args.PyTreeRestore(item=tree, restore_args=arguments, partial_restore=True),
                    )
                except Exception as error:
                    raise InputError(f"{directory}: cannot be read ({_line(error)})") from None
                loaded |= _flatten(part)
                bar.advance(sum(leaf.size * leaf.dtype.itemsize for leaf in group.values()))
    return _unflatten(loaded)


def _stored(directory: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Path -> shape and type of what an Orbax directory holds."""
    import orbax.checkpoint as ocp

    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            stored = checkpointer.metadata(directory)
            stored = getattr(stored, "item_metadata", stored)
            leaves = _flatten(dict(getattr(stored, "tree", stored)))
            return {path: (tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in leaves.items()}
        except Exception as error:
            raise InputError(f"{directory}: no Orbax checkpoint, or a broken one ({_line(error)})") from None


def open_ours(directory: Path) -> Source:
    """Open a directory that `save` wrote as a `Source`, for reading it tensor by tensor.

    Raises:
      InputError: it is broken.
    """
    import tensorstore as ts  # Orbax restores trees; single arrays are read by what it stands on

    config = read_config(read_json(directory / "config.json"))
    store = {"driver": "ocdbt", "base": f"file://{(directory / 'params').absolute()}/"}

    def read(path: str) -> np.ndarray:
        spec = {"driver": "zarr3", "kvstore": store | {"path": path.replace("/", ".") + "/"}}
        try:
            return np.asarray(ts.open(spec, open=True).result().read().result())
        except Exception as error:
            raise InputError(f"{directory}: {path} cannot be read ({_line(error)})") from None

    tensors = {
        path: Tensor(path, "params", shape, dtype, functools.partial(read, path))
        for path, (shape, dtype) in _stored(directory / "params").items()
    }
    return Source(directory, config, tensors, {})


def _check(directory: Path, wanted: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]) -> None:
    problems = [
        f"{what}: {', '.join(which)}"
        for what, which in [
            ("missing tensors", [p for p in wanted if p not in stored]),
            ("unknown tensors", [p for p in stored if p not in wanted]),
            (
                "tensors of the wrong shape",
                [
                    f"{p} {list(stored[p])} should be {list(wanted[p].shape)}"
                    for p in wanted
                    if p in stored and stored[p] != wanted[p].shape
                ],
            ),
        ]
        if which
    ]
    if problems:
        raise InputError(f"{directory}: {'; '.join(problems)}")


def _groups(leaves: Mapping[str, jax.ShapeDtypeStruct], limit: int):
    group, size = {}, 0
    for path, leaf in leaves.items():
        nbytes = leaf.size * leaf.dtype.itemsize
        if group and size + nbytes > limit:
            yield group
            group, size = {}, 0
        group[path] = leaf
        size += nbytes
    yield group


# ---------------------------------------------------------------- saving


def save(
    directory: str | os.PathLike,
    params: Any,
    config: LlavaConfig,
    tokenizer_files: Mapping[str, bytes],
    *,
    dtype=None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint directory of ours. It appears whole, or not at all.

    The calling process writes, alone; leaves must be within its reach.

    Args:
      params: the tree, or `{path: leaf}`; leaves are arrays, or tensors of a `Source`, which are then read, written
        and forgotten one at a time.
      config: goes along, with the template that it leads to.
      tokenizer_files: name -> contents.
      dtype: what to store; None for each leaf's own.
      overwrite: replace what is there.

    Raises:
      InputError: the directory exists, or cannot be written.
    """
    directory = Path(directory)
    if directory.exists() and not overwrite:
        raise InputError(f"{directory}: exists already; --overwrite replaces it")
    staged = directory.with_name(f".{directory.name}.incomplete")
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        _save_params(staged / "params", params, dtype)
        for name, contents in tokenizer_files.items():
            (staged / name).write_bytes(contents)
        settings = config.replace(template=choose_template(config)).to_json()
        (staged / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        if directory.exists():
            shutil.rmtree(directory)
        staged.rename(directory)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _save_params(directory: Path, params: Any, dtype) -> None:
    import orbax.checkpoint as ocp

    tree = params if any(isinstance(v, Mapping) for v in params.values()) else _unflatten(params)
    leaves = jax.tree.leaves(tree)
    with Progress("writing", sum(leaf.nbytes for leaf in leaves), "B") as bar:

        class Streamed(ocp.type_handlers.NumpyHandler):
            """Reads a tensor, writes it, forgets it, then turns to the next."""

            async def serialize(self, values, infos, args=None):
                for i, (value, info) in enumerate(zip(values, infos, strict=True)):
                    array = np.ascontiguousarray(value.read().astype(dtype or value.dtype, copy=False))
                    for written in await super().serialize([array], [info], args and [args[i]]):
                        written.result()
                    bar.advance(value.nbytes)
                return []

        handlers = ocp.type_handlers.create_type_handler_registry(
            (Tensor, Streamed(deepcopy_host_arrays=False)),
            (np.ndarray, ocp.type_handlers.NumpyHandler()),
            (jax.Array, ocp.type_handlers.ArrayHandler()),
        )
        here = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
        handler = ocp.PyTreeCheckpointHandler(
            type_handler_registry=handlers, use_ocdbt=True, use_zarr3=True, use_compression=False,
            multiprocessing_options=alone,
        )  # fmt: skip
        arguments = jax.tree.map(
            lambda leaf: ocp.SaveArgs(
                dtype=None if dtype is None or isinstance(leaf, Tensor) else np.dtype(dtype),
                chunk_byte_size=CHUNK_BYTES,
            ),
            tree,
        )
        with _quiet(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(tree, save_args=arguments))


# ---------------------------------------------------------------- trees


def _flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        flat |= _flatten(value, path) if isinstance(value, Mapping) else {path: value}
    return flat


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


class _quiet:
    """Orbax and its friends log what only they care about."""

    def __enter__(self):
        self.logger = logging.getLogger("absl")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_):
        self.logger.setLevel(self.level)
