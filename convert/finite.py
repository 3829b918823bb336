"""Convert tensors to a dtype, and check them for NaN and infinity."""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np

from llava_jax.checkpoints.sources import Source, Tensor
from llava_jax.console import InputError, note

# For each float dtype: the unsigned integer of its width, and its exponent bits, all set only in NaN and infinity.
EXPONENTS = {
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float64): (np.uint64, 0x7FF0000000000000),
}
STRIP = 2**18  # elements checked at a time, which fit into a core's cache


def check_finite(source: Source, dtype: str | None, allow: bool) -> Source:
    """A checkpoint in a dtype (None: each tensor's own) that raises `InputError` when a tensor with NaN or infinity is
    read.

    Args:
      allow: warn instead.
    """
    tensors, unused = (
        {path: _checked(tensor, dtype, allow, source.directory) for path, tensor in part.items()}
        for part in (source.tensors, source.unused)
    )
    return dataclasses.replace(source, tensors=tensors, unused=unused)


def _checked(tensor: Tensor, dtype: str | None, allow: bool, directory: Path) -> Tensor:
    target = np.dtype(dtype or tensor.dtype)

    def read() -> np.ndarray:
        array = tensor.read()
        fault = None if is_finite(array) else "has NaN or infinity"
        if array.dtype != target:
            with np.errstate(over="ignore"):
                array = array.astype(target)
            if not fault and not is_finite(array):
                fault = f"has numbers too large for {target}"
        if fault:
            message = f"{directory / tensor.file}: tensor {tensor.name} {fault}"
            if not allow:
                raise InputError(f"{message}; --allow-nonfinite converts it anyway")
            note(f"warning: {message}")
        return array

    return dataclasses.replace(tensor, dtype=target, read=read)


def is_finite(array: np.ndarray) -> bool:
    """Whether all elements of a float array (C order) are finite."""
    kind, exponent = EXPONENTS[array.dtype]
    bits, magnitude = array.reshape(-1).view(kind), kind(2 ** (8 * array.itemsize - 1) - 1)
    return all(np.max(bits[i : i + STRIP] & magnitude) < exponent for i in range(0, bits.size, STRIP))
