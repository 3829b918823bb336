"""Reading safetensors files: the header whole and checked, tensors one at a time by plain reads.

The format is a length, a JSON header and bytes (https://github.com/huggingface/safetensors). The library of that
name maps files into memory, where every page that was touched counts as ours until the file is closed; with
plain reads a checkpoint of any size passes through the memory of its largest tensor.
"""

import json
import math
import os

import ml_dtypes
import numpy as np

from llava_jax.console import InputError

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32), "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}  # fmt: skip
MAX_HEADER = 100 * 2**20  # as the format says


class File:
    """An open safetensors file.

    Attributes:
      tensors: name -> (dtype, shape, first byte, last byte + 1), offsets in the file.
      metadata: the strings under `__metadata__`.
    """

    def __init__(self, path: str | os.PathLike):
        """Read the header.

        Raises:
          InputError: the file is truncated, its header is broken, or its tensors overlap or leave gaps.
        """
        self.path = os.fspath(path)
        try:
            size = os.path.getsize(self.path)
            with open(self.path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, MAX_HEADER):
                    raise InputError(
                        f"{self.path}: truncated, or no safetensors file ({size} bytes, header of {length} bytes)"
                    )
                header = json.loads(file.read(length))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}: the safetensors header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise InputError(f"{self.path}: the safetensors header is no JSON object")
        self.metadata = header.pop("__metadata__", {})
        self.tensors = {name: self._entry(name, entry, 8 + length) for name, entry in header.items()}
        self._check_places(8 + length, size)

    def _entry(self, name: str, entry, start: int):
        try:
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            first, last = entry["data_offsets"]
            ok = all(type(n) is int and n >= 0 for n in (*shape, first, last))
        except (KeyError, TypeError, ValueError):
            ok = False
        if not ok:
            raise InputError(f"{self.path}: tensor {name!r} has a broken header entry: {str(entry)[:200]}")
        if last - first != math.prod(shape) * dtype.itemsize:
            raise InputError(
                f"{self.path}: tensor {name!r} of shape {list(shape)} and type {entry['dtype']} wants "
                f"{math.prod(shape) * dtype.itemsize} bytes, its offsets give {last - first}"
            )
        return dtype, shape, start + first, start + last

    def _check_places(self, start: int, size: int) -> None:
        at, before = start, None
        for name, (_, _, first, last) in sorted(self.tensors.items(), key=lambda item: item[1][2:]):
            if first < at:
                raise InputError(f"{self.path}: tensors {before!r} and {name!r} overlap")
            if first > at:
                raise InputError(f"{self.path}: {first - at} bytes before tensor {name!r} belong to none")
            at, before = last, name
        if at > size:
            raise InputError(
                f"{self.path}: truncated: tensor {before!r} ends at byte {at}, the file has {size}; fetch it again"
            )
        if at < size:
            raise InputError(f"{self.path}: {size - at} bytes after the last tensor belong to none")

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own."""
        dtype, shape, first, last = self.tensors[name]
        out = np.empty(math.prod(shape), dtype)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(first)
            view, done = memoryview(out.view(np.uint8)), 0
            while done < last - first:
                n = file.readinto(view[done:])
                if not n:
                    raise InputError(f"{self.path}: truncated within tensor {name!r}; fetch it again")
                done += n
        return out.reshape(shape)
