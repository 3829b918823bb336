"""Our checkpoints, or anybody's, to transformers' format or the original's."""

import os

from convert.finite import finite
from convert.sizes import SHARD_BYTES
from llava_jax.checkpoints.checkpoint import open_any
from llava_jax.checkpoints.directories import find_directory
from llava_jax.checkpoints.hf_files import write_hf, write_projector
from llava_jax.data.tokenizer import load_tokenizer


def to_hf(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    form: str = "transformers",
    part: str = "model",
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    vision_tower: str | os.PathLike | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint in the format of `transformers` or of the `original`, or its projector alone.

    Args:
      source: an Orbax directory of ours; any other checkpoint that `to-orbax` takes whole will do as well.
      form: "transformers" or "original".
      part: "model" or "projector".
      dtype: "bfloat16", "float16" or "float32"; None stores each tensor as it is.
      shard_bytes: of a file, at most.
      vision_tower: a CLIP directory, for originals that come without their tower.
      allow_nonfinite: say which tensors hold NaN or infinity, and go on.

    Raises:
      InputError: the format cannot express the model, the destination exists or cannot be written, or `shard_bytes` is
        out of range.
    """
    SHARD_BYTES.check("--max-shard-size", shard_bytes)
    tower = None if vision_tower is None else find_directory(vision_tower)
    opened = finite(open_any(source, vision_tower=tower), dtype, allow_nonfinite)
    kept = dict(overwrite=overwrite, sources=[opened.directory, *opened.files])
    if part == "projector":
        write_projector(destination, opened, **kept)
        return
    tokenizer = load_tokenizer(opened.directory)
    write_hf(destination, opened, tokenizer, form=form, shard_bytes=shard_bytes, **kept)
