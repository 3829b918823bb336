"""Directories of checkpoints: found by path or hub name, and written whole or not at all. Local ones, and `gs://`."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from llava_jax.console import InputError, first_line, shorten
from llava_jax.sources import has_tensors

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "merges.txt"]


def find_directory(where: str | os.PathLike) -> Path:
    """The directory of a checkpoint: a local one, `gs://...`, or that of a hub name (`org/model`) in the hub's cache.

    Raises:
      InputError: it is neither.
    """
    where = os.fspath(where)
    name = shorten(where)
    path = epath.Path(where) if "://" in where else Path(where)
    try:
        if path.is_dir():
            return path
        exists = path.exists()
    except Exception as error:  # an object store without its client, without permission
        reason = first_line(error).replace(where, name)
        raise InputError(f"{name}: cannot be read ({reason})") from None
    if exists:
        raise InputError(f"{name}: a file, not a checkpoint directory")
    if not HUB_NAME.fullmatch(where):
        raise InputError(f"{name}: no such directory")
    import huggingface_hub

    try:
        directory = Path(huggingface_hub.snapshot_download(where, allow_patterns=HUB_FILES))
        if not has_tensors(directory):  # older repositories, CLIP's among them, have no safetensors
            directory = Path(huggingface_hub.snapshot_download(where, allow_patterns=[*HUB_FILES, "*.bin"]))
        return directory
    except Exception as error:  # connection, permission, validation: the hub's own hierarchy of errors
        raise InputError(f"{name}: no such directory, and the hub did not give it ({first_line(error)})") from None


@contextlib.contextmanager
def new_directory(
    directory: str | os.PathLike, *, overwrite: bool = False, sources: Sequence[Path] = ()
) -> Iterator[epath.Path]:
    """A directory to write into that appears under its name when the block ends, whole or not at all.

    It is written beside its place and then moved there. Object stores (`gs://`) cannot move a directory: there it is
    written in its place, and whoever writes `config.json` last, and reads it first, knows that it is whole.

    Args:
      overwrite: replace what is there, if it is a checkpoint.
      sources: directories that are read meanwhile, and must not be replaced.

    Raises:
      InputError: the directory exists and is not to be replaced, or cannot be written.
    """
    given, remote = shorten(os.fspath(directory)), "://" in os.fspath(directory)
    directory = epath.Path(directory) if remote else epath.Path(directory).resolve()
    if directory.exists():
        if not overwrite:
            raise InputError(f"{given}: exists already; --overwrite replaces it")
        read = [Path(path).resolve() for path in sources if "://" not in os.fspath(path)]
        if any(directory in (path, *path.parents) or path in directory.parents for path in read):
            raise InputError(f"{given}: holds what is to be read; write elsewhere")
        if not directory.is_dir() or (any(directory.iterdir()) and not (directory / "config.json").exists()):
            raise InputError(f"{given}: no checkpoint (there is no config.json), so it is not replaced")
    staged = directory if remote else directory.parent / f".{directory.name[:200]}.incomplete"
    replaced = staged.parent / f".{directory.name[:200]}.replaced"
    new_parents = [] if remote else [parent for parent in staged.parents if not parent.exists()]
    try:
        staged.rmtree(missing_ok=True)
        staged.mkdir(parents=True, exist_ok=True)
        yield staged
        if not remote:
            replaced.rmtree(missing_ok=True)
            if directory.exists():
                directory.rename(replaced)
            staged.rename(directory)
            replaced.rmtree(missing_ok=True)
    except OSError as error:
        raise InputError(f"{given}: cannot be written ({first_line(error)})") from None
    except BaseException:
        if remote:
            staged.rmtree(missing_ok=True)
        raise
    finally:
        if not remote:
            staged.rmtree(missing_ok=True)
        with contextlib.suppress(OSError):  # of the first that holds something: the new directory
            for parent in new_parents:
                os.rmdir(parent)
