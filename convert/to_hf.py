"""Convert any supported checkpoint to transformers' format or the original's."""

import os

from convert.finite import check_finite
from llava_jax.checkpoints.checkpoint import open_any
from llava_jax.checkpoints.directories import find_directory
from llava_jax.checkpoints.hf_files import write_hf, write_projector
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.sizes import SHARD_BYTES


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
    """Write a checkpoint in the `transformers` or `original` format, or only its projector.

    Args:
      source: our Orbax directory, or any complete LLaVA that `to-orbax` reads.
      form: "transformers" or "original".
      part: "model" or "projector".
      dtype: "bfloat16", "float16" or "float32"; None keeps each tensor's dtype.
      shard_bytes: the largest file size.
      vision_tower: a CLIP directory, for original checkpoints without their tower.
      allow_nonfinite: warn about tensors with NaN or infinity instead of raising.

    Raises:
      InputError: the format cannot express the model, the destination exists or cannot be written, or `shard_bytes` is
        out of range.
    """
    SHARD_BYTES.check("--max-shard-size", shard_bytes)
    tower = None if vision_tower is None else find_directory(vision_tower)
    opened = check_finite(open_any(source, vision_tower=tower), dtype, allow_nonfinite)
    sources: list[str | os.PathLike] = [opened.directory, *opened.files]
    if part == "projector":
        write_projector(destination, opened, overwrite=overwrite, sources=sources)
        return
    tokenizer = load_tokenizer(opened.directory)
    write_hf(destination, opened, tokenizer, form=form, shard_bytes=shard_bytes, overwrite=overwrite, sources=sources)
