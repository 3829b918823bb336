"""Read files that `torch.save` wrote, without torch and without running any code that the file names.

Such a file is a zip archive (stored, never compressed) of `data.pkl`, a pickle that describes how to build the tensors,
and `data/0`, `data/1`, ..., the bytes of their storages (torch/serialization.py). A pickle is a program. This module
interprets the few harmless instructions that tensors need, with a table of the only callables that it supports; a file
that names another raises `InputError`, and none of it runs. Tensors are read one at a time, on demand.

The library for this is torch itself, gigabytes that nothing else here needs.
"""

import io
import math
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llava_jax.checkpoints.safetensors_files import read_into
from llava_jax.console import InputError, first_line, shorten
from llava_jax.files import open_regular

STORAGES = {
    "DoubleStorage": np.dtype(np.float64), "FloatStorage": np.dtype(np.float32), "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64), "IntStorage": np.dtype(np.int32), "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8), "ByteStorage": np.dtype(np.uint8), "BoolStorage": np.dtype(np.bool_),
}  # fmt: skip
# More than any file of tensors needs: about a hundred bytes of pickle describe a tensor, and 40 instructions.
MAX_PICKLE = 4 * 2**20
MAX_INSTRUCTIONS = 2**20
MAX_STACK = 2**17
MAX_ARCHIVE = (
    4 * 2**20
)  # bytes that zipfile reads at once; the longest read is the list of entries, about 60 bytes each
MAX_NAME = 1000
MAX_RANK = 16
MAX_SIDE = 2**48
BROKEN = (
    zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error, OSError, EOFError,
    ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError, RuntimeError, OverflowError,
)  # fmt: skip  # what Python's zip and pickle parsers raise on damaged files


class Storage(NamedTuple):
    """An array of elements of one type; tensors are views of it."""

    key: str
    dtype: np.dtype
    size: int


class View(NamedTuple):
    """A tensor: a storage, and the layout of the tensor's elements in it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class File:
    """An open file of tensors, with the interface of `safetensors.File`.

    Attributes:
      tensors: name -> (dtype, shape, first byte, last byte + 1); the bytes run from the tensor's first element to its
        last, and include others' if the tensor is not a contiguous view.
    """

    def __init__(self, path: str | os.PathLike):
        """Read the directory of the archive, and the pickle.

        Raises:
          InputError: the file is truncated or broken, has the format before torch 1.6, or refers to anything but
            tensors.
        """
        self.path = os.fspath(path)
        name = shorten(self.path)
        try:
            with open_regular(self.path) as file:
                self.size = os.fstat(file.fileno()).st_size
                self._refuse_others(file)
                with zipfile.ZipFile(_Bounded(file, self.size)) as archive:
                    root, self._starts = self._storages(archive, file)
                    self._views = _named(_Machine(self._read_pickle(archive, root)).run())
        except InputError as error:
            says = str(error).removeprefix(f"{name}: ")  # `open_regular` adds it too
            raise InputError(f"{name}: {says}") from None
        except OSError as error:
            raise InputError(f"{name}: cannot be read ({first_line(error)})") from None
        except BROKEN as error:
            raise InputError(f"{name}: truncated or broken ({shorten(first_line(error))}); download it again") from None
        self.metadata: dict[str, str] = {}
        self.tensors = {}
        for tensor, view in self._views.items():
            try:
                self.tensors[tensor] = self._entry(view)
            except InputError as error:
                raise InputError(f"{name}: tensor {shorten(tensor, 60)!r} {error}") from None

    def _refuse_others(self, file) -> None:
        head = file.read(2)
        if head.startswith(b"\x80"):
            raise InputError(
                "is a bare pickle, the format before torch 1.6; convert it with torch: "
                "torch.save(torch.load(file, weights_only=True), file)"
            )
        if not head.startswith(b"PK"):
            raise InputError(f"not a file of torch.save, or a truncated one ({self.size} bytes)")
        file.seek(0)

    def _storages(self, archive: zipfile.ZipFile, file) -> tuple[str, dict[str, tuple[int, int]]]:
        """The archive's root folder, and key -> first byte and length of each storage."""
        infos = {info.filename: info for info in archive.infolist()}
        if len(infos) < len(archive.infolist()):
            raise InputError("its archive has entries of the same name")
        roots = [name.removesuffix("data.pkl") for name in infos if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise InputError("not a file of torch.save: it contains no data.pkl")
        root = roots[0]
        order = infos.get(f"{root}byteorder")
        if order and (order.file_size != 6 or order.compress_size != 6 or archive.read(order) != b"little"):
            raise InputError("its bytes are in big-endian order, which is not supported")
        starts = {}
        for name, info in infos.items():
            if not name.startswith(f"{root}data/"):
                continue
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise InputError(f"its entry {shorten(name)} is compressed, which torch.save never does")
            file.seek(info.header_offset)
            header = file.read(30)
            if len(header) < 30 or header[:4] != b"PK\x03\x04":
                raise InputError(f"its entry {shorten(name)} has no header where it should be; download the file again")
            start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
            if start + info.file_size > self.size:
                raise InputError(f"truncated: its entry {shorten(name)} extends past the end; download the file again")
            starts[name.removeprefix(f"{root}data/")] = start, info.file_size
        at, before = 0, ""
        for key, (start, length) in sorted(starts.items(), key=lambda item: item[1]):
            if start < at and length:
                raise InputError(f"its storages {shorten(before, 40)!r} and {shorten(key, 40)!r} overlap")
            at, before = start + length, key
        return root, starts

    def _read_pickle(self, archive: zipfile.ZipFile, root: str) -> bytes:
        info = archive.getinfo(f"{root}data.pkl")
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if not stored or not 0 < info.file_size <= min(self.size, MAX_PICKLE):
            raise InputError("its data.pkl is compressed, empty or too large for a file of tensors")
        return archive.read(info)

    def _entry(self, view: View):
        storage = view.storage
        first, length = self._starts.get(storage.key, (0, -1))
        if length < 0:
            raise InputError(f"refers to storage {shorten(storage.key, 40)!r}, which is not in the file")
        width = storage.dtype.itemsize
        layout = shorten(f"shape {list(view.shape)}, strides {list(view.strides)}, offset {view.offset}")
        if storage.size * width != length:
            raise InputError(f"refers to a storage of {storage.size} x {width} bytes, which has {length} in the file")
        if len(view.shape) != len(view.strides) or min((*view.shape, *view.strides, view.offset, 0)) < 0:
            raise InputError(f"has a broken layout: {layout}")
        if max(*view.shape, *view.strides, view.offset, math.prod(filter(None, view.shape))) > MAX_SIDE:
            raise InputError(f"has a broken layout: {layout}")
        if math.prod(view.shape) > storage.size:  # which also limits its memory to the file's size
            raise InputError(f"has more elements than its storage ({storage.size}): {layout}")
        end = view.offset + _span(view)
        if end > storage.size:
            raise InputError(f"ends at element {end} of a storage of {storage.size}: {layout}")
        return storage.dtype, view.shape, first + view.offset * width, first + end * width

    def read(self, name: str) -> np.ndarray:
        """Read one tensor into new memory."""
        dtype, shape, first, last = self.tensors[name]
        out = np.empty((last - first) // dtype.itemsize, dtype)
        read_into(out, self.path, first, name)
        strides = [s * dtype.itemsize for s in self._views[name].strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(out, shape, strides)).reshape(shape)


class _Bounded:
    """A file for zipfile that limits reads, since zipfile reads as much as the archive claims to have."""

    def __init__(self, file, size: int):
        self.seek, self.tell, self.seekable, self._file, self._size = file.seek, file.tell, file.seekable, file, size

    def read(self, n: int = -1) -> bytes:
        left = self._size - self.tell()
        n = left if n is None or n < 0 else min(n, left)
        if n > MAX_ARCHIVE:
            raise InputError("not a file of torch.save: its archive has too many entries")
        return self._file.read(max(n, 0))


def _span(view: View) -> int:
    """Elements of the storage from the tensor's first to its last, both included."""
    if 0 in view.shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))


def _named(contents: Any) -> dict[str, View]:
    """The tensors of a dictionary, or of the only dictionary in it with any: `{"state_dict": {...}, "step": 3}`."""
    if not isinstance(contents, dict):
        raise InputError("holds no dictionary of tensors")
    # Search each once: a crafted file may hold one dictionary under thousands of names.
    dictionaries = {id(value): value for value in contents.values() if isinstance(value, dict)}.values()
    inner = [value for value in dictionaries if _views(value)]
    found = _views(contents) or (_views(inner[0]) if len(inner) == 1 else {})
    if not all(isinstance(name, str) for name in found):
        raise InputError("has tensors whose names are numbers")
    if too_long := next((name for name in found if len(name) > MAX_NAME), None):
        raise InputError(f"has a tensor whose name is {len(too_long)} characters long: {too_long[:60]!r}...")
    return found


def _views(contents: dict) -> dict[str, View]:
    return {name: value for name, value in contents.items() if isinstance(value, View)}


# ---------------------------------------------------------------- the pickle


def _rebuild_tensor(storage, offset, shape, strides, _requires_grad=None, _hooks=None, marks=None) -> View:
    if marks:  # any object that the file's author chose, so the error does not show it
        raise InputError("has a tensor that is a conjugate or negative view, which is not supported; save a clone")
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    if max(len(shape), len(strides)) > MAX_RANK:
        raise ValueError(f"a tensor of {len(shape)} dimensions")
    shape, strides = tuple(shape), tuple(strides)
    if not all(type(n) is int for n in (offset, *shape, *strides)):
        raise ValueError("a tensor's layout does not consist of integers")
    return View(storage, offset, shape, strides)


def _rebuild_parameter(tensor, *_) -> View:
    return tensor


CALLABLES: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): lambda: {},  # SETITEMS fills it afterwards
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


class _Global(NamedTuple):
    """A name that a pickle may refer to: a callable, or a class of storages."""

    module: str
    name: str


def _allowed(module: str, name: str) -> _Global:
    if type(module) is not str or type(name) is not str:
        raise ValueError("a global whose name is not a string")
    is_storage = module in ("torch", "torch.storage") and name.endswith("Storage")
    if (module, name) not in CALLABLES and not is_storage:
        asked = shorten(f"{module}.{name}")
        raise InputError(f"refused: its pickle asks for {asked}, which a file of tensors does not need")
    return _Global(module, name)


_MARK = object()


class _Machine:
    """Runs the instructions that pickles of tensors consist of: a small subset of the `pickle` module's."""

    def __init__(self, program: bytes):
        self.program = program
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(self.program))):
            if len(self.stack) > MAX_STACK or number > MAX_INSTRUCTIONS:
                raise InputError("its pickle is too long for a file of tensors")
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name]())
            elif opcode.name in _LITERALS:
                self.stack.append(argument)
            elif run := getattr(self, f"_{opcode.name.lower()}", None):
                run(argument)
            else:
                raise InputError(f"its pickle has the instruction {opcode.name}, which files of tensors do not need")
        raise ValueError("the pickle has no end")

    def _marked(self) -> list[Any]:
        at = next((i for i in reversed(range(len(self.stack))) if self.stack[i] is _MARK), None)
        if at is None:
            raise ValueError("no mark on the stack")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _proto(self, _):
        pass

    _frame = _proto

    def _mark(self, _):
        self.stack.append(_MARK)

    def _pop(self, _):
        self.stack.pop()

    def _binput(self, number):
        self.memo[number] = self.stack[-1]

    _long_binput = _binput

    def _memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def _binget(self, number):
        self.stack.append(self.memo[number])

    _long_binget = _binget

    def _tuple(self, _):
        self.stack.append(tuple(self._marked()))

    def _tuple1(self, _, n=1):
        items = tuple(self.stack[-n:])
        del self.stack[-n:]
        self.stack.append(items)

    def _tuple2(self, _):
        self._tuple1(_, 2)

    def _tuple3(self, _):
        self._tuple1(_, 3)

    def _append(self, _):
        item = self.stack.pop()
        self._top_list().append(item)

    def _appends(self, _):
        items = self._marked()
        self._top_list().extend(items)

    def _top_list(self) -> list:
        if type(self.stack[-1]) is not list:
            raise ValueError("appends to something that is not a list")
        return self.stack[-1]

    def _setitem(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _setitems(self, _):
        self._set(self._marked())

    def _set(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise ValueError("sets an item of something that is not a dictionary")
        if not all(type(key) in (str, int) for key in items[::2]) or any(
            abs(k) > MAX_STACK for k in items[::2] if type(k) is int
        ):
            raise InputError("its pickle has a dictionary whose keys are neither strings nor small integers")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _global(self, names: str):
        module, name = names.split(" ", 1)
        self.stack.append(_allowed(module, name))

    def _stack_global(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_allowed(module, name))

    _inst = _global

    def _reduce(self, _):
        arguments, callee = self.stack.pop(), self.stack.pop()
        if not isinstance(callee, _Global) or callee not in CALLABLES or type(arguments) is not tuple:
            raise ValueError("calls something that is not callable")
        if len(arguments) > MAX_RANK:
            raise ValueError(f"calls {callee.name} with {len(arguments)} arguments")
        self.stack.append(CALLABLES[callee](*arguments))

    def _build(self, _):
        self.stack.pop()  # attributes of the dictionary, such as the state dictionary's `_metadata`

    def _binpersid(self, _):
        kind, storage, key, _device, size = self.stack.pop()
        if type(key) is not str:
            raise ValueError("a storage without a name")
        if kind != "storage" or not isinstance(storage, _Global) or storage.module not in ("torch", "torch.storage"):
            raise InputError("refused: it refers to an object that is not a tensor's storage")
        if storage.name not in STORAGES:
            raise InputError(f"has tensors of type {shorten(storage.name)}, which are not supported")
        if type(size) is not int or size < 0:
            raise ValueError("a storage without a size")
        self.stack.append(Storage(key, STORAGES[storage.name], size))


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict,
}  # fmt: skip
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BINSTRING", "SHORT_BINSTRING",
}  # fmt: skip
