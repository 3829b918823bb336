"""Find the directory of a checkpoint by its path (local or `gs://`) or hub name."""

import os
import re
from pathlib import Path

from llava_jax.checkpoints.sources import has_tensors
from llava_jax.console import InputError, first_line, shorten
from llava_jax.files import remote_path

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "merges.txt"]


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
