"""Compare two checkpoints in any formats, streaming tensor by tensor."""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llava_jax.checkpoints.checkpoint import open_any
from llava_jax.checkpoints.sources import EMBEDDING, HEAD, read_ahead
from llava_jax.console import Progress

# The largest relative error of rounding to a dtype.
ROUNDING = {
    np.dtype(ml_dtypes.bfloat16): 2.0**-8, np.dtype(np.float16): 2.0**-11, np.dtype(np.float32): 2.0**-24,
    np.dtype(np.float64): 2.0**-53,
}  # fmt: skip
STRIP = 2**20


class Difference(NamedTuple):
    """The comparison of a tensor in two checkpoints."""

    path: str
    result: str  # identical | equal within rounding | different | only in A | only in B
    absolute: float = 0.0  # largest difference
    relative: float = 0.0  # largest difference, relative to the larger magnitude
    note: str = ""  # about differing shapes


def verify(
    a: str | os.PathLike, b: str | os.PathLike, *, vision_tower: str | os.PathLike | None = None
) -> Iterator[Difference]:
    """Compare two checkpoints in our layout.

    "Equal within rounding" means that values differ by no more than the rounding error of the coarser dtype (including
    float16 subnormals).

    Raises:
      InputError: a checkpoint is not a complete LLaVA.
    """
    one, two = (open_any(where, vision_tower=vision_tower) for where in (a, b))
    first, second = one.tensors | one.unused, two.tensors | two.unused
    both = [path for path in first if path in second]
    reads: list[Any] = [
        (tensor.nbytes, tensor.read) for path in both for tensor in (first[path], second[path])
    ]  # fmt: skip
    with Progress("comparing", sum(nbytes for nbytes, _ in reads), "B") as bar:
        arrays = read_ahead(reads)
        for path in both:
            x, y = next(arrays), next(arrays)
            yield compare_vocabulary(path, x, y) if path in (EMBEDDING, HEAD) else compare(path, x, y)
            bar.advance(x.nbytes + y.nbytes)
    # Either checkpoint may lack tensors that LLaVA does not use; they are reported, but make no difference.
    yield from (Difference(path, "only in A") for path in first if path not in second)
    yield from (Difference(path, "only in B") for path in second if path not in first)


def compare_vocabulary(path: str, x: np.ndarray, y: np.ndarray) -> Difference:
    """Compare a tensor over the tokens that both vocabularies have: some of transformers' conversions add tokens."""
    if x.shape == y.shape:
        return compare(path, x, y)
    common = tuple(slice(min(a, b)) for a, b in zip(x.shape, y.shape, strict=True))
    found = compare(path, np.ascontiguousarray(x[common]), np.ascontiguousarray(y[common]))
    return found._replace(note=f"common rows of {list(x.shape)} and {list(y.shape)}")


def compare(path: str, x: np.ndarray, y: np.ndarray) -> Difference:
    """Compare two arrays, strip by strip."""
    if x.shape != y.shape:
        return Difference(path, "different", float("inf"), float("inf"), f"{list(x.shape)} and {list(y.shape)}")
    same_type = x.dtype == y.dtype
    x, y = x.reshape(-1), y.reshape(-1)
    if same_type and np.array_equal(x.view(np.uint8), y.view(np.uint8)):
        return Difference(path, "identical")
    rounding = max(ROUNDING[x.dtype], ROUNDING[y.dtype])
    smallest = 2.0**-25 if np.dtype(np.float16) in (x.dtype, y.dtype) else 0.0  # half of float16's smallest subnormal
    absolute = relative = 0.0
    within = True
    for i in range(0, x.size, STRIP):
        p, q = x[i : i + STRIP].astype(np.float64), y[i : i + STRIP].astype(np.float64)
        with np.errstate(invalid="ignore"):
            gap = np.where((p == q) | (np.isnan(p) & np.isnan(q)), 0.0, np.abs(p - q))
            gap = np.where(np.isnan(gap), np.inf, gap)
            size = np.maximum(np.abs(p), np.abs(q))
            within &= bool(np.all(np.isfinite(gap) & (gap <= np.maximum(rounding * size, smallest))))
            absolute = max(absolute, float(gap.max(initial=0.0)))
            share = np.divide(gap, size, out=np.zeros_like(gap), where=(gap > 0) & np.isfinite(size))
            relative = max(relative, float(np.where(np.isfinite(gap), share, np.inf).max(initial=0.0)))
    return Difference(path, "equal within rounding" if within else "different", absolute, relative)
