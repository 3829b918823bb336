"""Foreign checkpoints to our Orbax directory, one tensor at a time."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np

from llava_jax.checkpoint import find_directory, save
from llava_jax.sources import open_source
from llava_jax.tokenizer import load_tokenizer

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32), None: None}


def to_orbax(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    vision_tower: str | os.PathLike | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Convert a directory of safetensors (or a hub name) to an Orbax directory.

    Memory stays within the interpreter's own and the largest tensor, whatever the model's size.

    Args:
      vision_tower: a CLIP directory, for originals that come without their tower.
      dtype: "bfloat16" or "float32"; None stores each tensor as it is.
      overwrite: replace the destination.

    Raises:
      InputError: the source is not a whole LLaVA, or the destination exists or cannot be written.
    """
    directory = find_directory(source)
    opened = open_source(directory, vision_tower=vision_tower and Path(vision_tower), name=str(source).rstrip("/"))
    files = load_tokenizer(directory).files
    save(destination, opened.tensors, opened.config, files, dtype=DTYPES[dtype], overwrite=overwrite)
