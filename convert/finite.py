"""Tensors in the type that was asked for, seen to hold neither NaN nor infinity on the way."""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np

from llava_jax.checkpoints.sources import Source, Tensor
from llava_jax.console import InputError, note

# Of each float type: the unsigned integer of its width, and the exponent's bits, all set in NaN and infinity alone.
EXPONENTS = {
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float64): (np.uint64, 0x7FF0000000000000),
}
STRIP = 2**18  # elements that are looked at together: they stay in a core's cache


def finite(source: Source, dtype: str | None, allow: bool) -> Source:
    """The checkpoint in another type (None: each tensor's own), whose tensors complain when they are read.

    Args:
      allow: only say which tensors hold NaN or infinity.
    """
    tensors, unused = (
        {path: _checked(tensor, dtype, allow, source.directory) for path, tensor in part.items()}
        for part in (source.tensors, source.unused)
    )
    return dataclasses.replace(source, tensors=tensors, unused=unused)


def _checked(tensor: Tensor, dtype: str | None, allow: bool, directory: Path) -> Tensor:
    kind = np.dtype(dtype or tensor.dtype)

    def read() -> np.ndarray:
        array = tensor.read()
        fault = None if is_finite(array) else "holds NaN or infinity"
        if array.dtype != kind:
            with np.errstate(over="ignore"):
                array = array.astype(kind)
            if not fault and not is_finite(array):
                fault = f"has numbers too large for {kind}"
        if fault:
            message = f"{directory / tensor.file}: tensor {tensor.name} {fault}"
            if not allow:
                raise InputError(f"{message}; --allow-nonfinite converts it all the same")
            note(f"warning: {message}")
        return array

    return dataclasses.replace(tensor, dtype=kind, read=read)


def is_finite(array: np.ndarray) -> bool:
    """Whether no element of a float array (C order) is NaN or infinite."""
    kind, exponent = EXPONENTS[array.dtype]
    bits, magnitude = array.reshape(-1).view(kind), kind(~(1 << (8 * array.itemsize - 1)) & np.iinfo(kind).max)
    return all(np.max(bits[i : i + STRIP] & magnitude) < exponent for i in range(0, bits.size, STRIP))
