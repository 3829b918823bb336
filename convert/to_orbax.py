"""Convert foreign checkpoints to our Orbax format, one tensor at a time."""

import os
from pathlib import Path

from convert.combine import combine
from convert.finite import check_finite
from llava_jax.checkpoints.directories import find_directory
from llava_jax.checkpoints.orbax_files import save
from llava_jax.console import SEED
from llava_jax.data.tokenizer import load_tokenizer


def to_orbax(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    delta: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    projector: str | os.PathLike | None = None,
    projector_type: str | None = None,
    aspect_ratio: str | None = None,
    seed: int = 0,
    dtype: str | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert any LLaVA to an Orbax directory.

    Beyond the interpreter's own memory, this takes less than 1 GB plus the largest tensor, whatever the model's size.

    Args:
      source: a complete LLaVA, a plain language model, a LoRA adapter, or a delta; a directory or a hub name.
      base: the model that an adapter, a delta or a stage 1 projector was trained on.
      delta: the weights to add to `base`; `source` is then ignored.
      vision_tower: a CLIP directory or hub name, for weights without a tower.
      projector: the file of a trained projector to use.
      projector_type: the type of a new projector, for a plain language model: linear, mlpNx_gelu.
      aspect_ratio: for a plain language model: square, pad or anyres.
      seed: the random seed of a new projector.
      dtype: "bfloat16", "float16" or "float32"; None keeps each tensor's dtype.
      allow_nonfinite: warn about tensors with NaN or infinity instead of raising.
      overwrite: replace the destination.

    Raises:
      InputError: the source is not a complete LLaVA, the destination exists or cannot be written, or the seed is
        out of range.
    """
    SEED.check("--seed", seed)

    def find(where: str | os.PathLike | None) -> Path | None:
        return None if where is None else find_directory(where)

    start, base, delta, vision_tower = find_directory(source), find(base), find(delta), find(vision_tower)
    opened, tokenizer = combine(
        start,
        base=base,
        delta=delta,
        vision_tower=vision_tower,
        projector=Path(projector) if projector else None,
        projector_type=projector_type,
        aspect_ratio=aspect_ratio,
        seed=seed,
        name="" if os.path.exists(source) else os.fspath(source),
    )
    opened = check_finite(opened, dtype, allow_nonfinite)
    files = load_tokenizer(tokenizer).files
    sources = [path for path in (start, base, delta, vision_tower, *opened.files) if path]
    save(destination, opened.tensors, opened.config, files, unused=opened.unused, overwrite=overwrite, sources=sources)
