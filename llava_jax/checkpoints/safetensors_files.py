"""Read and write safetensors files, tensor by tensor with plain reads and writes; the header is checked on opening.

The format is a length, a JSON header and bytes (https://github.com/huggingface/safetensors). The library of that
name maps files into memory, where every touched page counts as the process's until the file is closed; with plain
reads, a checkpoint of any size needs only the memory of its largest tensor.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llava_jax.console import InputError, first_line, shorten
from llava_jax.files import open_regular
from llava_jax.json_files import parse_json

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32), "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 16 * 2**20  # a hundred thousand tensors; the format allows 100 MB, which JSON could expand to gigabytes
MAX_NAME = 1000
MAX_RANK = 16
MAX_SIDE = 2**48
INDEX = "model.safetensors.index.json"
# The size of a write. Linux caches larger ones in huge pages, and a virtual machine that has lent its free memory to
# the host reclaims those at a third of the speed.
WRITE_BYTES = 2**17


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
        self.name = shorten(self.path)  # in errors
        try:
            with open_regular(self.path) as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, MAX_HEADER):
                    raise InputError(
                        f"{self.name}: truncated, or not a safetensors file ({size} bytes, header of {length} bytes)"
                    )
                text = file.read(length)
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read ({first_line(error)})") from None
        try:
            header = parse_json(text, unique=True)
        except InputError as error:
            raise InputError(f"{self.name}: the safetensors header is {error}") from None
        if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
            raise InputError(f"{self.name}: the safetensors header is not a JSON object")
        self.metadata = header.pop("__metadata__", {})
        self.tensors = {name: self._entry(name, entry, 8 + length) for name, entry in header.items()}
        self._check_places(8 + length, size)

    def _entry(self, name: str, entry, start: int):
        tensor = f"{self.name}: tensor {shorten(name)!r}"
        try:
            dtype, shape, (first, last) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            ok = type(shape) is list and len(shape) <= MAX_RANK and len(name) <= MAX_NAME
            ok = ok and all(type(n) is int and 0 <= n < MAX_SIDE for n in (*shape, first, last))
            ok = ok and math.prod(filter(None, shape)) < MAX_SIDE  # NumPy has the same limit for empty tensors
        except (KeyError, TypeError, ValueError):
            ok = False
        if not ok:
            kind = entry.get("dtype") if isinstance(entry, dict) else None
            of_kind = f" (dtype {shorten(kind, 40)})" if isinstance(kind, str) else ""
            raise InputError(f"{tensor} has a broken header entry{of_kind}")
        if last - first != math.prod(shape) * dtype.itemsize:
            raise InputError(
                f"{tensor} of shape {shorten(shape)} and type {entry['dtype']} needs "
                f"{math.prod(shape) * dtype.itemsize} bytes, but its offsets give {last - first}"
            )
        return dtype, tuple(shape), start + first, start + last

    def _check_places(self, start: int, size: int) -> None:
        at, before = start, None
        for name, (_, _, first, last) in sorted(self.tensors.items(), key=lambda item: item[1][2:]):
            if first < at:
                raise InputError(f"{self.name}: tensors {shorten(before, 60)!r} and {shorten(name, 60)!r} overlap")
            if first > at:
                raise InputError(f"{self.name}: {first - at} bytes before tensor {shorten(name)!r} belong to no tensor")
            at, before = last, name
        if at > size:
            raise InputError(
                f"{self.name}: truncated: tensor {shorten(before, 60)!r} ends at byte {at}, but the file has {size}; "
                "download it again"
            )
        if at < size:
            raise InputError(f"{self.name}: {size - at} bytes after the last tensor belong to no tensor")

    def read(self, name: str) -> np.ndarray:
        """Read one tensor into new memory."""
        dtype, shape, first, _ = self.tensors[name]
        out = np.empty(math.prod(shape), dtype)
        read_into(out, self.path, first, name)
        return out.reshape(shape)


def read_into(out: np.ndarray, path: str, first: int, name: str) -> None:
    """Fill `out` with the bytes of a file from `first` on, by plain reads.

    Raises:
      InputError: the file ends too early, or cannot be read.
    """
    try:
        with open_regular(path, buffering=0) as file:
            file.seek(first)
            view, done = out.view(np.uint8).data, 0
            while done < len(view):
                n = file.readinto(view[done:])  # type: ignore[attr-defined]  # `BinaryIO` does not declare it
                if not n:
                    raise InputError(f"{shorten(path)}: truncated within tensor {shorten(name)!r}; download it again")
                done += n
    except OSError as error:
        raise InputError(f"{shorten(path)}: cannot be read ({first_line(error)})") from None


# ---------------------------------------------------------------- writing


class Pending(NamedTuple):
    """A tensor to write: its shape and type for the header, and a function that reads its elements later."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, tensors: Mapping[str, Pending]) -> None:
    """Write a file, tensor by tensor.

    Raises:
      OSError: the file cannot be written.
    """
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}  # transformers requires the format
    at = 0
    for name, tensor in tensors.items():
        code, offsets = CODES[tensor.dtype], [at, at + tensor.nbytes]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            array = np.ascontiguousarray(tensor.read(), tensor.dtype)
            view = array.reshape(-1).view(np.uint8).data
            for i in range(0, len(view), WRITE_BYTES):
                file.write(view[i : i + WRITE_BYTES])


def write_shards(directory: Path, tensors: Mapping[str, Pending], limit: int) -> None:
    """Write `model.safetensors`, or an index and shards of at most `limit` bytes (or one tensor) each.

    Raises:
      OSError: a file cannot be written.
    """
    shards: list[dict[str, Pending]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > limit:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write(directory / "model.safetensors", shards[0])
        return
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write(directory / file, shard)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
