"""The format of data files, which training and evaluation read: rows of conversations.

A file is a JSON list, or one object a line. The original's rows (llava/train/train.py `LazySupervisedDataset`) are

    {"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                    {"from": "gpt", "value": "A cat."}]}

where `image` may be a list, or be missing; others are

    {"id": ..., "images": ["a.jpg"], "system": "Be brief.",
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}]}

`read_conversation` reads either into the same `Conversation`. Nothing that a row has is ignored silently: keys that
would change what is learnt make the row a bad one, unknown keys are named once a file.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from llava_jax.console import InputError, first_line, note, shorten
from llava_jax.data.templates import MARK
from llava_jax.files import memory_bytes, open_regular
from llava_jax.json_files import parse_json

SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}

# Keys that would change what is learnt, and that are not supported: a row with one of them is bad, for this reason.
_VIDEO, _AUDIO, _TOOLS = "video is not supported", "audio is not supported", "tool calls are not supported"
_PREFERENCES = "training on preferences is not supported"
_IMAGE = "not a key for images; name them in image or images"
NOT_READ = {
    "video": _VIDEO, "videos": _VIDEO, "audio": _AUDIO, "audios": _AUDIO, "tools": _TOOLS, "functions": _TOOLS,
    "chosen": _PREFERENCES, "rejected": _PREFERENCES, "kto_tag": _PREFERENCES,
    **dict.fromkeys(
        ("image_url", "image_urls", "image_path", "image_paths", "image_file", "image_files", "img", "imgs"), _IMAGE
    ),
}  # fmt: skip
_WHOLE_ROW = "not read in a turn; the files of all turns belong in images beside them"
NOT_READ_IN_TURNS = {
    "tool_calls": _TOOLS, "function_call": _TOOLS, "tool_call_id": _TOOLS, "video": _VIDEO, "videos": _VIDEO,
    "audio": _AUDIO, "audios": _AUDIO, "image": _WHOLE_ROW, "images": _WHOLE_ROW,
    "weight": "weights of turns are not supported",
}  # fmt: skip

MEAN_SOMETHING_WHEN_FALSE = {"kto_tag", "weight"}  # of those above; `"video": false` only says that there is none

# Keys that are read, and keys that describe a row and change nothing.
READ = {"id", "conversations", "messages", "image", "images", "system", "kinds"}
DESCRIBE = {
    *("model", "source", "dataset", "dataset_name", "data_source", "split", "task", "type", "category", "capability"),
    *("question_id", "question_type", "image_id", "width", "height", "size", "language", "lang", "license", "tags"),
    *("metadata", "meta", "url", "date", "timestamp", "hash"),
}
READ_IN_TURNS = {"from", "value", "role", "content"}
DESCRIBE_IN_TURNS = {"id", "name", "kind", "model"}
READ_IN_PARTS = {"type", "text", "image", "image_url", "path", "url", "index"}
IMAGE_PARTS = ("image", "image_url")
MAX_ROW = 256 * 2**20  # bytes of a line: with images in `data:` URLs
LARGEST_GROWTH = 40  # times a file's bytes its values may take in memory: `[],` and the like
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MOST_NAMED = 10  # unknown keys of a file that are named


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A row of a data file, whatever its format.

    Attributes:
      turns: `[{"from": "human" | "gpt", "value": text}, ...]`, with an `<image>` mark where an image stands.
      images: their names, in the order of the marks: files of the image folder, or `data:` and `file:` URLs.
      system: a system message instead of the template's; None for the template's own.
    """

    turns: list[dict[str, str]]
    images: tuple[str, ...] = ()
    system: str | None = None


# ---------------------------------------------------------------- the file


def read_rows(path: str | os.PathLike) -> list[Any]:
    """The rows of a JSON list, or of JSON lines. A line that is no JSON becomes the `InputError` that says so.

    Raises:
      InputError: there is no such file, it is empty, or the list is broken.
    """
    name = shorten(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > memory_bytes():
                raise InputError(f"{name}: has {size:,} bytes, more than this machine has memory ({memory_bytes():,})")
            if size * LARGEST_GROWTH > memory_bytes() and (parsed := _parsed_bytes(file)) > memory_bytes():
                raise InputError(
                    f"{name}: its values may take {parsed:,} bytes, more than this machine has memory "
                    f"({memory_bytes():,}); split it and give each part with --data"
                )
            is_list = _first_byte(file) == b"["
            file.seek(0)
            rows = _read_list(file.read(size), name) if is_list else list(_read_lines(file, name))
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be read ({first_line(error)})") from None
    if not rows:
        raise InputError(f"{name}: no conversations in it; it should be a JSON list or JSON lines")
    return rows


def _parsed_bytes(file: BinaryIO) -> int:
    """What its values take in memory, at most: a list or an object in CPython has 88 bytes with its place in another, a
    string 60 beside its characters, a number 32."""
    size = 0
    while block := file.read(2**20):
        strings, numbers = block.count(b'"') // 2, block.count(b",")
        size += len(block) + 88 * (block.count(b"[") + block.count(b"{")) + 60 * strings + 32 * numbers
    file.seek(0)
    return size


def _first_byte(file: BinaryIO) -> bytes:
    """The first that is no blank, behind a byte order mark; empty if there is none."""
    block = file.read(2**16).removeprefix(BYTE_ORDER_MARK)
    while block and not block.strip():
        block = file.read(2**16)
    return block.lstrip()[:1]


def _read_list(data: bytes, name: str) -> list[Any]:
    try:
        return parse_json(data, bounded=False)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _read_lines(file: BinaryIO, name: str) -> Iterator[Any]:
    number = 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        if len(line) > MAX_ROW:
            raise InputError(f"{name}: line {number} has more than {MAX_ROW:,} bytes")
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        yield from (_read_line(part) for part in line.splitlines() if part.strip())


def _read_line(line: bytes) -> Any:
    try:
        return parse_json(line, bounded=False)
    except InputError as error:
        return error


def note_unread_keys(path: str | os.PathLike, rows: Sequence[Any]) -> None:
    """Warn once about each unknown key of a file's rows, and of their turns."""
    known = {*READ, *DESCRIBE, *NOT_READ}
    known_in_turns = {*READ_IN_TURNS, *DESCRIBE_IN_TURNS, *NOT_READ_IN_TURNS}
    found: dict[str, int] = {}

    def look(number: int, there: dict[str, Any], known: set[str], where: str) -> None:
        if not there.keys() <= known:
            for key in there.keys() - known:
                found.setdefault(f"key {shorten(key, 40)!r}{where}", number)

    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            continue
        look(number, row, known, "")
        for turn in _turns_of(row):
            if isinstance(turn, dict):
                look(number, turn, known_in_turns, " of a turn")
                for part in _parts_of(turn):
                    look(number, part, READ_IN_PARTS, " of a part")
    for what, number in sorted(found.items(), key=lambda item: (item[1], item[0]))[:MOST_NAMED]:
        note(f"warning: {shorten(path)}: {what} is not read (first in row {number})")
    if len(found) > MOST_NAMED:
        note(f"warning: {shorten(path)}: nor are {len(found) - MOST_NAMED} other keys")


# ---------------------------------------------------------------- a row


def read_conversation(row: Any) -> Conversation:
    """A row of a data file as a conversation.

    Speakers are checked to be known, not to take turns.

    Raises:
      InputError: it is no conversation, or has a key that would mean something and is not read.
    """
    if isinstance(row, InputError):
        raise InputError(str(row))
    if not isinstance(row, dict):
        raise InputError("not a JSON object")
    if not isinstance(row.get("id"), str | int | float | None):
        raise InputError("id must be text or a number")
    names = image_names(row)
    key = _one_of(row, "conversations", "messages")
    said = row.get(key)
    if not isinstance(said, list) or not said:
        raise InputError(
            f"{key} must be a list of turns" + ("" if key in row else "; there is neither it nor messages")
        )
    parts = _Parts(names)
    turns = [_read_turn(turn, key, parts) for turn in said]
    system = row.get("system") or None
    if system is not None and not isinstance(system, str):
        raise InputError("system must be text")
    if turns[0]["from"] == "system":
        if system:
            raise InputError(f"a system message both in system and in {key}; give one")
        system = turns.pop(0)["value"] or None
    if any(turn["from"] == "system" for turn in turns):
        raise InputError("a system message that is not the first turn")
    if system and MARK in system:
        raise InputError(f"the system message has an {MARK} mark; images belong to the questions")
    images = parts.images()
    for text in (system or "", *images, str(row.get("id")), *(turn["value"] for turn in turns)):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a pair of \\u escapes
            raise InputError(f"text that is no Unicode ({error.reason})") from None
    return Conversation(turns, images, system)


def image_names(row: dict[str, Any]) -> list[str]:
    """The names in `image` or `images` of a row: a text, a list of them, or nothing.

    Raises:
      InputError: they are something else, or the row has a key that would mean something and is not read.
    """
    _refuse(row, NOT_READ)
    key = _one_of(row, "image", "images")
    names = row.get(key)
    names = [] if names is None else names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{key} must be a file name or a list of them")
    return names


def count_images(row: Any) -> int:
    """Images that a row names, or has places for; of a row that can be read, those of its `Conversation`."""
    if not isinstance(row, dict):
        return 0
    names = row.get("image") or row.get("images")
    named = len(names) if isinstance(names, list) else int(bool(names))
    placed = 0
    for turn in _turns_of(row):
        content = isinstance(turn, dict) and (turn.get("content") or turn.get("value"))
        if isinstance(content, list):  # seldom: of most rows nothing else is done
            placed += sum(isinstance(part, dict) and part.get("type") in IMAGE_PARTS for part in content)
    return max(named, placed)


def has_system(row: Any) -> bool:
    """Whether a row has a system message of its own."""
    if not isinstance(row, dict):
        return False
    first = next(iter(_turns_of(row)), None)
    in_turns = isinstance(first, dict) and str(first.get("from", first.get("role"))).lower() == "system"
    return bool(row.get("system")) or in_turns


class _Parts:
    """The images of a row, as the parts of its messages name them or point at those in `images`."""

    def __init__(self, names: list[str]):
        self.given, self.found = names, []
        self._shown: list[int] = []  # places in `given` of those that parts point at
        self._indexed: bool | None = None  # whether these parts have an index

    def add(self, part: dict[str, Any]) -> None:
        for key in ("image", "image_url", "path", "url"):
            if (name := part.get(key)) is not None:
                break
        else:
            at = part.get("index")
            if self._indexed not in (None, at is not None):
                raise InputError("image parts with an index and without; give an index to each of them, or to none")
            self._indexed = at is not None
            at = len(self._shown) if at is None else at
            if type(at) is not int or not 0 <= at < len(self.given):
                raise InputError(f"an image part for image {shorten(at)}, and {len(self.given)} are named in images")
            self._shown.append(at)
            self.found.append(self.given[at])
            return
        name = name.get("url") if isinstance(name, dict) else name
        if not isinstance(name, str) or not name:
            raise InputError("an image part must name a file, or nothing where images does")
        if self.given:
            raise InputError("images named both in the parts of messages and beside them; name them in one place")
        self.found.append(name)

    def images(self) -> tuple[str, ...]:
        """Those that the parts show; without such parts, all that the row names."""
        missing = sorted({*range(len(self.given))} - {*self._shown})
        if self.found and missing:
            raise InputError(
                f"{len(self.found)} image parts for {len(self.given)} images: none shows image {missing[0]} of images, "
                "counted from 0"
            )
        return tuple(self.found or self.given)


def _read_turn(turn: Any, key: str, parts: _Parts) -> dict[str, str]:
    wanted = "from and value" if key == "conversations" else "role and content"
    if not isinstance(turn, dict):
        raise InputError(f"each turn of {key} must have {wanted}, both text")
    _refuse(turn, NOT_READ_IN_TURNS)
    speaker, value = turn.get(_one_of(turn, "from", "role")), turn.get(_one_of(turn, "value", "content"))
    if isinstance(value, list):
        value = _join(value, parts)
    if not isinstance(speaker, str) or not isinstance(value, str):
        raise InputError(f"each turn of {key} must have {wanted}, both text")
    if speaker.lower() not in SPEAKERS:
        raise InputError(f"a turn of {shorten(speaker, 40)!r}; known are {', '.join(SPEAKERS)}")
    return {"from": SPEAKERS[speaker.lower()], "value": value}


def _join(content: list[Any], parts: _Parts) -> str:
    """The parts of a message as one text. An image is a mark on a line of its own; texts are joined as they are."""
    text = ""
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise InputError("a message with a part of type text and no text")
            text += ("\n" if part["text"] and text.endswith(MARK) else "") + part["text"]
        elif kind in IMAGE_PARTS:
            parts.add(part)
            text += ("\n" if text and not text.endswith("\n") else "") + MARK
        else:
            shown = shorten(kind, 40) if isinstance(kind, str) else "unknown"
            raise InputError(f"a message with a part of type {shown}; only text and image are read")
    return text


def _turns_of(row: dict[str, Any]) -> Sequence[Any]:
    turns = row.get("conversations") or row.get("messages")
    return turns if isinstance(turns, list) else ()


def _parts_of(turn: dict[str, Any]) -> list[dict[str, Any]]:
    content = turn.get("content") or turn.get("value")
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _refuse(there: dict[str, Any], keys: dict[str, str]) -> None:
    for key in sorted(there.keys() & keys.keys()):
        value = there[key]
        absent = value in (None, "", [], {}) or (value in (False, 0) and key not in MEAN_SOMETHING_WHEN_FALSE)
        if not absent and not (key == "weight" and value == 1):
            raise InputError(f"{key}: {keys[key]}")


def _one_of(there: dict[str, Any], first: str, second: str) -> str:
    """Which of two keys for one thing there is."""
    empty = (None, "", [])
    if second not in there or there[second] in empty:
        return second if first not in there and second in there else first
    if first in there and there[first] not in empty:
        raise InputError(f"both {first} and {second}; give one of them")
    return second
