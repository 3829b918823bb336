"""Find the directory of a checkpoint by its path (local or `gs://`) or hub name."""

import hashlib
import os
import re
from pathlib import Path

from llava_jax.checkpoints.outputs import DIRECTORIES
from llava_jax.checkpoints.sources import has_tensors
from llava_jax.console import InputError, first_line, shorten
from llava_jax.files import open_regular, remote_path

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "merges.txt"]
BLOCKS, BLOCK_BYTES = 16, 4096  # of each file that are hashed


def find_directory(where: str | os.PathLike) -> Path:
    """The directory of a checkpoint, from its path, `gs://...` URL or hub name (`org/model`, in the hub's cache).

    Raises:
      InputError: `where` is none of these.
    """
    where = os.fspath(where)
    name = shorten(where)
    path = remote_path(where) if "://" in where else Path(where)
    try:
        if path.is_dir():
            return path
        exists = path.exists()
    except Exception as error:  # an object store whose client is missing, or that denies permission
        reason = first_line(error).replace(where, name)
        raise InputError(f"{name}: cannot be read ({reason})") from None
    if exists:
        raise InputError(f"{name}: is a file, not a checkpoint directory")
    if not HUB_NAME.fullmatch(where):
        raise InputError(f"{name}: no such directory")
    import huggingface_hub

    try:
        directory = Path(huggingface_hub.snapshot_download(where, allow_patterns=HUB_FILES))
        if not has_tensors(directory):  # older repositories, such as CLIP's, have no safetensors
            directory = Path(huggingface_hub.snapshot_download(where, allow_patterns=[*HUB_FILES, "*.bin"]))
        return directory
    except Exception as error:  # the hub raises many types: connection, permission, validation
        raise InputError(f"{name}: no such directory, and the hub download failed ({first_line(error)})") from None


def fingerprint(checkpoint: str) -> str:
    """A hash of the names, sizes and some bytes of a checkpoint's files: cheap, but differs for other weights. Other
    files in the directory, such as runs, do not count.

    Empty for a checkpoint in an object store, which is identified by its name alone.
    """
    if is_remote(checkpoint):
        return ""
    directory, digest = find_directory(checkpoint), hashlib.sha256()
    inner = (path for name in DIRECTORIES for path in (directory / name).rglob("*"))
    for path in sorted(path for path in (*directory.iterdir(), *inner) if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory)} {size}\n".encode())
        with open_regular(path) as file:
            for at in range(0, size, -(-size // BLOCKS) or 1):
                file.seek(at)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def is_remote(path: str) -> bool:
    """Whether `path` is in an object store."""
    return "://" in path
