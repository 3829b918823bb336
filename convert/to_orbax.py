"""Foreign checkpoints to our Orbax directory, one tensor at a time."""

import dataclasses
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.combine import combine
from llava_jax.checkpoint import find_directory, save
from llava_jax.console import InputError, note
from llava_jax.sources import Tensor
from llava_jax.tokenizer import load_tokenizer

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
# Of each float type: the unsigned integer of its width, and the exponent's bits, all set in NaN and infinity alone.
EXPONENTS = {
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float64): (np.uint64, 0x7FF0000000000000),
}
STRIP = 2**18  # elements that are looked at together: they stay in a core's cache


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
      InputError: the source does not make a whole LLaVA, or the destination exists or cannot be written.
    """
    find = lambda where: where and find_directory(where)  # noqa: E731
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
    tensors, unused = (
        {path: _looked_at(tensor, allow_nonfinite) for path, tensor in part.items()}
        for part in (opened.tensors, opened.unused)
    )
    files = load_tokenizer(tokenizer).files
    cast = dtype and DTYPES[dtype]
    sources = [path for path in (start, base, delta, vision_tower, opened.directory) if path]
    save(
        destination, tensors, opened.config, files, unused=unused, dtype=cast, overwrite=overwrite, sources=sources
    )  # fmt: skip


def _looked_at(tensor: Tensor, allow: bool) -> Tensor:
    """The tensor, which complains of NaN and infinity when it is read."""

    def read() -> np.ndarray:
        array = tensor.read()
        if not is_finite(array):
            where = f"{tensor.file}: tensor {tensor.name} holds NaN or infinity"
            if not allow:
                raise InputError(f"{where}; --allow-nonfinite converts it all the same")
            note(f"warning: {where}")
        return array

    return dataclasses.replace(tensor, read=read)


def is_finite(array: np.ndarray) -> bool:
    """Whether no element of a float array (C order) is NaN or infinite."""
    kind, exponent = EXPONENTS[array.dtype]
    bits, magnitude = array.reshape(-1).view(kind), kind(~(1 << (8 * array.itemsize - 1)) & np.iinfo(kind).max)
    return all(np.max(bits[i : i + STRIP] & magnitude) < exponent for i in range(0, bits.size, STRIP))
