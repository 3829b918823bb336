"""Foreign checkpoints to our Orbax directory, one tensor at a time."""

import os
from pathlib import Path

from convert.combine import combine
from convert.finite import finite
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

    Memory stays within the interpreter's own, 1 GB and the largest tensor, whatever the model's size.

    Args:
      source: a whole LLaVA, a plain language model, a LoRA adapter, or a delta; a directory or a hub name.
      base: the model that an adapter, a delta or a first stage's projector belongs to.
      delta: the difference to `base`; then `source` is of no account.
      vision_tower: a CLIP directory or hub name, for what comes without its tower.
      projector: a trained projector's file, to put in.
      projector_type: of a fresh projector, for a plain language model: linear, mlpNx_gelu.
      aspect_ratio: for a plain language model: square, pad or anyres.
      seed: of a fresh projector.
      dtype: "bfloat16", "float16" or "float32"; None stores each tensor as it is.
      allow_nonfinite: say which tensors hold NaN or infinity, and go on.
      overwrite: replace the destination.

    Raises:
      InputError: the source does not make a whole LLaVA, the destination exists or cannot be written, or the seed is
        out of range.
    """
    SEED.check("--seed", seed)
    find = lambda where: None if where is None else find_directory(where)  # noqa: E731
    start, base, delta, vision_tower = find_directory(source), find(base), find(delta), find(vision_tower)
    opened, tokenizer = combine(
        start,
        base=base,
        delta=delta,
        vision_tower=vision_tower,
        projector=projector and Path(projector),
        projector_type=projector_type,
        aspect_ratio=aspect_ratio,
        seed=seed,
        name="" if os.path.exists(source) else os.fspath(source),
    )
    opened = finite(opened, dtype, allow_nonfinite)
    files = load_tokenizer(tokenizer).files
    sources = [path for path in (start, base, delta, vision_tower, *opened.files) if path]
    save(destination, opened.tensors, opened.config, files, unused=opened.unused, overwrite=overwrite, sources=sources)
