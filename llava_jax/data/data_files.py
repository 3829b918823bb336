"""Data files: rows of conversations in a JSON list or in JSON lines, kept as bytes and parsed one by one."""

import codecs
import dataclasses
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from llava_jax.console import InputError, Progress, first_line, note, shorten
from llava_jax.data.conversations import (
    MAX_ROW_IMAGES,
    METADATA_KEYS,
    PART_KEYS,
    ROW_KEYS,
    TURN_KEYS,
    TURN_METADATA_KEYS,
    UNSUPPORTED_KEYS,
    UNSUPPORTED_TURN_KEYS,
    count_images,
    has_system,
    parts_of,
    turns_of,
)
from llava_jax.files import memory_bytes, open_regular
from llava_jax.json_files import BYTE_ORDER_MARK, parse_json

MAX_LINE = 256 * 2**20  # bytes, since images may be `data:` URLs
ROW_BYTES = 160  # memory for each row while a file is split, apart from its text
MAX_NAMED_KEYS = 10  # unknown keys that warnings name per file

_LINE, _VISIBLE = re.compile(rb"[^\r\n]+"), re.compile(rb"\S")


class Rows(Sequence[Any]):
    """The rows of a data file: its bytes in memory, each row parsed when it is read. An invalid row is an
    `InputError`."""

    def __init__(self, data: bytes, starts: np.ndarray, ends: np.ndarray):
        """`starts`, `ends`: int64 [n], the bytes of each row."""
        self._data, self._starts, self._ends = data, starts, ends

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        row = self._data[self._starts[index] : self._ends[index]]
        try:
            return parse_json(row, bounded=False)
        except InputError as error:
            return error


def read_rows(path: str | os.PathLike) -> Rows:
    """Read the rows of a JSON list or of JSON lines.

    Raises:
      InputError: the file is missing, empty or larger than memory, or the list is not valid JSON.
    """
    name = shorten(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > memory_bytes():
                raise InputError(f"{name}: has {size:,} bytes, more than this machine's memory ({memory_bytes():,})")
            data = file.read(size).removeprefix(BYTE_ORDER_MARK)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be read ({first_line(error)})") from None
    first = _VISIBLE.search(data)
    is_list = first is not None and first[0] == b"["
    needed = len(data) + ROW_BYTES * data.count(b"," if is_list else b"\n")
    if needed > memory_bytes():
        raise InputError(
            f"{name}: its values may take {needed:,} bytes, more than this machine's memory ({memory_bytes():,}); "
            "split it and pass each part with --data"
        )
    rows = _split_list(data, name) if is_list else _split_lines(data, name)
    if not rows:
        raise InputError(f"{name}: has no conversations; it should be a JSON list or JSON lines")
    return rows


def _split_list(data: bytes, name: str) -> Rows:
    try:
        decoder = codecs.getincrementaldecoder("utf-8")()
        for at in range(0, len(data), 2**20):
            decoder.decode(data[at : at + 2**20])
        decoder.decode(b"", final=True)
        values = msgspec.json.decode(data, type=list[msgspec.Raw])
    except (UnicodeDecodeError, ValueError, RecursionError):
        return _parse_list(data, name)
    first = _address(data)
    starts = np.fromiter((_address(value) for value in values), np.int64, len(values)) - first
    return Rows(data, starts, starts + np.array([len(memoryview(value)) for value in values], np.int64))


def _address(data: Any) -> int:
    """The address of a buffer in memory."""
    return np.frombuffer(data, np.uint8).__array_interface__["data"][0]


def _parse_list(data: bytes, name: str) -> Rows:
    """The rows of a list that msgspec rejects: it is not JSON, or a row has an unpaired surrogate, which makes that row
    invalid."""
    try:
        values = parse_json(data, bounded=False)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    lines = [json.dumps(value).encode() for value in values]
    ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
    return Rows(b"".join(lines), ends - [len(line) for line in lines], ends)


def _split_lines(data: bytes, name: str) -> Rows:
    spans = []
    for line in _LINE.finditer(data):
        start, end = line.span()
        if end - start > MAX_LINE:
            number = data.count(b"\n", 0, start) + 1
            raise InputError(f"{name}: line {number} has more than {MAX_LINE:,} bytes")
        if not data[start:end].isspace():
            spans.append((start, end))
    starts, ends = np.array(spans, np.int64).reshape(-1, 2).T
    return Rows(data, starts, ends)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run needs to know of all rows of a file before it reads them.

    image_counts   uint16 [n], the number of images of each row
    system         whether a row has its own system message
    """

    image_counts: np.ndarray
    system: bool


def summarize(path: str | os.PathLike, rows: Sequence[Any]) -> Summary:
    """Read all rows once, and warn once about each unknown key in them and in their turns."""
    unknown = _UnknownKeys()
    counts, system = np.zeros(len(rows), np.uint16), False
    with Progress(f"reading {shorten(path, 40)}", len(rows), "rows") as bar:
        for number, row in enumerate(rows):
            counts[number] = min(count_images(row), MAX_ROW_IMAGES)
            system = system or has_system(row)
            unknown.collect(number, row)
            bar.advance()
    unknown.warn(shorten(path))
    return Summary(counts, system)


class _UnknownKeys:
    """The keys of rows, turns and message parts that are neither read nor rejected, with the first row of each."""

    _known = frozenset({*ROW_KEYS, *METADATA_KEYS, *UNSUPPORTED_KEYS})
    _known_in_turns = frozenset({*TURN_KEYS, *TURN_METADATA_KEYS, *UNSUPPORTED_TURN_KEYS})

    def __init__(self) -> None:
        self._found: dict[str, int] = {}

    def collect(self, number: int, row: Any) -> None:
        if not isinstance(row, dict):
            return
        self._collect(number, row, self._known, "")
        for turn in turns_of(row):
            if isinstance(turn, dict):
                self._collect(number, turn, self._known_in_turns, " of a turn")
                for part in parts_of(turn):
                    self._collect(number, part, PART_KEYS, " of a part")

    def _collect(self, number: int, mapping: dict[str, Any], known: frozenset[str] | set[str], where: str) -> None:
        if not mapping.keys() <= known:
            for key in mapping.keys() - known:
                self._found.setdefault(f"key {shorten(key, 40)!r}{where}", number)

    def warn(self, name: str) -> None:
        for what, number in sorted(self._found.items(), key=lambda item: (item[1], item[0]))[:MAX_NAMED_KEYS]:
            note(f"warning: {name}: {what} is ignored (first in row {number})")
        if len(self._found) > MAX_NAMED_KEYS:
            note(f"warning: {name}: {len(self._found) - MAX_NAMED_KEYS} other keys are ignored too")
