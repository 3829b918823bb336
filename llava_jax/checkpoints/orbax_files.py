"""Save and load checkpoints in our own format, with Orbax.

Only `save` writes such a directory:

    config.json     LlavaConfig (`"format": "llava-jax"`); written last, so a directory that has it is complete
    params/         Orbax (OCDBT): the parameter tree
    unused/         Orbax: tensors that only foreign formats need (the vision tower's last layer), kept for export
    tokenizer.*     unchanged copies of the source's

Orbax's newer interface still changes without notice, so this module uses only the stable one.
"""

import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from llava_jax.checkpoints.config_json import read_config
from llava_jax.checkpoints.outputs import new_directory
from llava_jax.checkpoints.sources import Source, Tensor, listed, read_ahead
from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, Progress, first_line, shorten
from llava_jax.data.templates import choose_template
from llava_jax.files import check_tree
from llava_jax.json_files import read_json
from llava_jax.models.llava import Params, param_shapes
from llava_jax.sharding.partition import Partition, path_of

CHUNK_BYTES = 64 * 2**20  # chunks of a stored array, so that a host that needs a slice reads little more than the slice
GROUP_BYTES = 2**30  # of tensors, restored at a time
COMMIT_BYTES = 64 * 2**20  # of tensors, committed at a time


# ---------------------------------------------------------------- loading


def load_params(directory: epath.Path, config: LlavaConfig, mesh: Mesh, dtype_of: Callable[[str], np.dtype]) -> Params:
    """Load the parameters that `save` wrote into `params/`, sharded over the mesh.

    Args:
      dtype_of: path -> the type to load a parameter in.

    Raises:
      InputError: the directory is broken, or holds another model.
    """
    import orbax.checkpoint as ocp

    shapes = param_shapes(config)
    shardings = Partition(config, mesh).shardings(shapes)
    wanted = {
        path_of(path): jax.ShapeDtypeStruct(shape.shape, dtype_of(path_of(path)), sharding=sharding)
        for (path, shape), sharding in zip(
            jax.tree_util.tree_flatten_with_path(shapes)[0], jax.tree.leaves(shardings), strict=True
        )
    }
    directory = _absolute(directory)
    stored = _stored(directory)
    _check(directory, {path: leaf.shape for path, leaf in wanted.items()}, stored)
    loaded: dict[str, jax.Array] = {}
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in wanted.values())
    with (
        _quiet(),
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
        Progress("loading", total, "B") as bar,
    ):
        for group in _groups(wanted, GROUP_BYTES):
            tree = unflatten_dict(group, sep="/")
            arguments = ocp.checkpoint_utils.construct_restore_args(tree)
            try:
                part = checkpointer.restore(
                    directory, args=ocp.args.PyTreeRestore(item=tree, restore_args=arguments, partial_restore=True)
                )
            except Exception as error:
                raise InputError(f"{directory}: cannot be read ({first_line(error)})") from None
            loaded |= flatten_dict(part, sep="/")
            bar.advance(sum(leaf.size * leaf.dtype.itemsize for leaf in group.values()))
    return unflatten_dict(loaded, sep="/")


def open_ours(directory: epath.Path) -> Source:
    """Open a directory that `save` wrote as a `Source`, for reading it tensor by tensor.

    Raises:
      InputError: the directory is broken.
    """
    config = read_config(read_json(directory / "config.json"), file=directory / "config.json")
    tensors = _open_tree(directory / "params")
    wanted, _ = jax.tree_util.tree_flatten_with_path(param_shapes(config))
    _check(
        directory / "params",
        {path_of(path): leaf.shape for path, leaf in wanted},
        {path: (tensor.shape, tensor.dtype) for path, tensor in tensors.items()},
    )
    unused = _open_tree(directory / "unused") if (directory / "unused").exists() else {}
    tensors = {path_of(path): tensors[path_of(path)] for path, _ in wanted}
    return Source(directory, config, tensors, unused, frozenset([os.fspath(directory)]))


def _open_tree(directory: epath.Path) -> dict[str, Tensor]:
    """The arrays of an Orbax directory. TensorStore reads one array 50 times as fast as Orbax, which restores trees.

    (Layout: orbax.checkpoint, `use_ocdbt` and `use_zarr3`: one key-value store, arrays under dotted names.)
    """
    import tensorstore as ts

    base = os.fspath(_absolute(directory))
    store = {"driver": "ocdbt", "base": base if "://" in base else {"driver": "file", "path": f"{base}/"}}

    def read(path: str) -> np.ndarray:
        spec = {"driver": "zarr3", "kvstore": store | {"path": path.replace("/", ".") + "/"}}
        try:
            return np.asarray(ts.open(spec, open=True).result().read().result())
        except Exception as error:
            raise InputError(f"{directory}: {path} cannot be read ({first_line(error)})") from None

    return {
        path: Tensor(path, directory.name, shape, dtype, functools.partial(read, path))
        for path, (shape, dtype) in _stored(directory).items()
    }


def _stored(directory: epath.Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Path -> shape and type of each array in an Orbax directory."""
    import orbax.checkpoint as ocp

    check_tree(directory)
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            stored = checkpointer.metadata(_absolute(directory))
            stored = getattr(stored, "item_metadata", stored)
            leaves = flatten_dict(dict(getattr(stored, "tree", stored)), sep="/")
            return {path: (tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in leaves.items()}
        except Exception as error:
            raise InputError(f"{directory}: not an Orbax checkpoint, or a broken one ({first_line(error)})") from None


def _absolute(directory: epath.Path) -> epath.Path:
    """Orbax requires absolute paths."""
    return directory if "://" in os.fspath(directory) else directory.absolute()


def _check(directory, wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple]) -> None:
    problems = [
        f"{what}: {listed(which, 70)}"
        for what, which in [
            ("missing tensors", [p for p in wanted if p not in stored]),
            ("unknown tensors", [p for p in stored if p not in wanted]),
            (
                "tensors of the wrong shape",
                [
                    f"{p} {list(stored[p][0])} should be {list(wanted[p])}"
                    for p in wanted
                    if p in stored and stored[p][0] != tuple(wanted[p])
                ],
            ),
        ]
        if which
    ]
    if problems:
        raise InputError(shorten(f"{shorten(directory)}: {'; '.join(problems)}", 299))


def _groups(leaves: Mapping[str, jax.ShapeDtypeStruct], limit: int):
    group: dict[str, jax.ShapeDtypeStruct] = {}
    size = 0
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
    unused: Mapping[str, Any] | None = None,
    dtype=None,
    overwrite: bool = False,
    sources: Sequence[str | os.PathLike] = (),
) -> None:
    """Write a checkpoint directory in our format. It appears whole, or not at all.

    Only the calling process writes; it must be able to address all leaves.

    Args:
      params: the tree, or `{path: leaf}`; leaves are arrays, or tensors of a `Source`, which `save` reads, writes and
        releases one at a time.
      config: is stored with the template that it selects.
      tokenizer_files: name -> contents.
      unused: `Source.unused`, so that an export can contain all tensors.
      dtype: the stored type; None for each leaf's own.
      overwrite, sources: as in `new_directory`.

    Raises:
      InputError: the directory exists, or cannot be written.
    """
    with new_directory(directory, overwrite=overwrite, sources=sources) as staged:
        _save_tree(staged / "params", params, dtype, directory)
        if unused:
            _save_tree(staged / "unused", unused, dtype, directory)
        for name, contents in tokenizer_files.items():
            (staged / name).write_bytes(contents)
        template_from = config.template_from or "config.json"
        settings = config.replace(template=choose_template(config), template_from=template_from).to_json()
        (staged / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _save_tree(path: epath.Path, params: Any, dtype, directory) -> None:
    import orbax.checkpoint as ocp
    import tensorstore as ts

    tree = params if any(isinstance(v, Mapping) for v in params.values()) else unflatten_dict(params, sep="/")
    leaves = jax.tree.leaves(tree)
    with Progress(f"writing {path.name}", sum(leaf.nbytes for leaf in leaves), "B") as bar:

        class Streamed(ocp.type_handlers.NumpyHandler):
            """Reads, writes and releases tensors one by one; threads read a few ahead.

            Several tensors are committed at once, while the next are prepared: Orbax would commit each, and every
            commit rewrites the store's tree.
            """

            async def serialize(self, values, infos, args=None):
                cast = lambda value: value.read().astype(dtype or value.dtype, copy=False)  # noqa: E731
                arrays = read_ahead([(value.nbytes, functools.partial(cast, value)) for value in values])
                # TensorStore flushes every write to the disk by default, which takes 20 times as long as the writes.
                caches = {"cache_pool": {"total_bytes_limit": 0}, "cache_pool#ocdbt": {"total_bytes_limit": 10**8}}
                context = ts.Context(caches | {"file_io_sync": False})
                self.transaction, staged, committing = ts.Transaction(), 0, None
                for i, (value, info, array) in enumerate(zip(values, infos, arrays, strict=True)):
                    info.ts_context = context
                    for written in await super().serialize([array], [info], args and [args[i]]):
                        written.result()
                    del array
                    staged += value.nbytes
                    if staged >= COMMIT_BYTES or i + 1 == len(values):
                        if committing:
                            committing.result()
                        committing = self.transaction.commit_async()
                        bar.advance(staged)
                        self.transaction, staged = ts.Transaction(), 0
                if committing:
                    committing.result()
                return []

            async def _open_and_write(self, array, spec, context):
                store = await ts.open(
                    ts.Spec(spec), create=True, open=True, context=context, transaction=self.transaction
                )
                await store.write(array, can_reference_source_data_indefinitely=True)

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
        try:
            with _quiet(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
                checkpointer.save(path, args=ocp.args.PyTreeSave(tree, save_args=arguments))
        except (InputError, OSError):
            raise
        except Exception as error:  # TensorStore's errors: a full disk, no permission
            raise InputError(f"{directory}: cannot be written ({first_line(error)})") from None


@functools.cache
def silence_late_futures() -> None:
    """Suppress TensorStore's tracebacks about a closed event loop: Orbax closes the loop when one file cannot be read
    or written, while TensorStore is still handling the others."""
    previous = sys.unraisablehook

    def hook(problem: "sys.UnraisableHookArgs") -> None:
        is_closed = problem.exc_type is RuntimeError and str(problem.exc_value) == "Event loop is closed"
        code = getattr(problem.object, "cr_code", None)  # of a coroutine
        if not (is_closed or (code and f"{os.sep}orbax{os.sep}" in code.co_filename)):
            previous(problem)

    sys.unraisablehook = hook


class _quiet:
    """Silences the logs of Orbax and its dependencies, which do not concern the user."""

    def __enter__(self):
        silence_late_futures()
        self.logger = logging.getLogger("absl")
        self.level = self.logger.level
        self.logger.setLevel(logging.CRITICAL)

    def __exit__(self, *_):
        self.logger.setLevel(self.level)
