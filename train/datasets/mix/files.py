"""Measure the rows of data files, for a mix and its report.

What is known of a row is a few numbers in arrays: memory is that of the rows' text, and some 60 bytes a row.
"""

import array
import collections
import dataclasses
import hashlib
import os
import re
from collections.abc import Container, Sequence
from typing import Any

import msgspec
import numpy as np

from llava_jax.console import InputError, Progress, shorten
from llava_jax.data.conversations import (
    METADATA_KEYS,
    ROW_KEYS,
    TURN_KEYS,
    TURN_METADATA_KEYS,
    UNSUPPORTED_KEYS,
    UNSUPPORTED_TURN_KEYS,
    Conversation,
    read_conversation,
)
from llava_jax.data.data_files import read_rows
from llava_jax.data.templates import IMAGE_TOKEN

GOOD, INVALID, DUPLICATE, BAD_IMAGE = range(4)  # why a row is left out, if it is
KINDS = {
    "text only": "no image",
    "several images": "two images or more",
    "short answers": "one image; no answer of more than 40 characters",
    "description": "one image and one question, which asks for a description or a caption",
    "one question": "one image and one question, of another kind",
    "conversation": "one image and several questions",
}
SHORT = 40  # characters of a short answer
MAX_REASONS = 100  # different ones that are counted
MAX_COUNT = 2**32 - 1

_COLUMNS = {
    "status": "B", "kind": "B", "questions": "I", "asked": "I", "answered": "I", "images": "I", "content": "Q",
    "ids": "Q", "names": "Q",
}  # of `MeasuredFile`, with their types in `array`  # fmt: skip
_ASKS_TO_DESCRIBE = re.compile(r"\b(descri(be|ption)|caption|summar(y|ize)|sum up|depict|what (do|can) you see)", re.I)
_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|[0-9][0-9,.]*")  # parts of a reason that differ from row to row


@dataclasses.dataclass
class MeasuredFile:
    """The rows of a data file, and what is known of each.

    status          uint8 [n]: `GOOD`, or why the row is left out
    kind            uint8 [n]: index into `KINDS`
    questions       uint32 [n]
    asked, answered uint32 [n]: characters of all questions and of all answers
    images          uint32 [n]
    content         uint64 [n]: a hash of images and conversation
    ids             uint64 [n]: a hash of the id as text; 0 without one
    names           uint64 [sum of images]: hashes of the images' names, row by row
    reasons         of invalid rows, with their number
    unread_keys     keys that are not read, with the number of rows that have them
    rows_with_unread_keys
    """

    path: str
    rows: Sequence[Any]
    status: np.ndarray
    kind: np.ndarray
    questions: np.ndarray
    asked: np.ndarray
    answered: np.ndarray
    images: np.ndarray
    content: np.ndarray
    ids: np.ndarray
    names: np.ndarray
    reasons: collections.Counter[str]
    unread_keys: collections.Counter[str]
    rows_with_unread_keys: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def good(self) -> np.ndarray:
        """The rows that are not left out, int64 [m]."""
        return np.flatnonzero(self.status == GOOD)


def measure_file(path: str) -> MeasuredFile:
    """Read a data file and measure its rows.

    Raises:
      InputError: the file cannot be read, or has no rows.
    """
    rows = read_rows(path)
    columns = {name: array.array(kind) for name, kind in _COLUMNS.items()}
    reasons: collections.Counter[str] = collections.Counter()
    keys: collections.Counter[str] = collections.Counter()
    rows_with_keys = 0
    with Progress(f"reading {shorten(os.path.basename(path), 40)}", len(rows), "rows") as bar:
        for row in rows:
            bar.advance()
            measured = dict.fromkeys(_COLUMNS, 0)
            if isinstance(row, dict):
                unread = unread_keys(row)
                rows_with_keys += bool(unread)
                keys.update(key if key in keys or len(keys) < MAX_REASONS else "other keys" for key in unread)
                measured["ids"] = hash_text(str(row["id"])) if has_id(row) else 0
            try:
                conversation = read_conversation(row)
                check_conversation(conversation)
                measured |= _measure(conversation)
                columns["names"].extend(map(hash_text, conversation.images))
            except InputError as error:
                measured["status"] = INVALID
                reason = _VARIABLE.sub("…", str(error))
                reasons[reason if reason in reasons or len(reasons) < MAX_REASONS else "other reasons"] += 1
            for name in _COLUMNS.keys() - {"names"}:
                columns[name].append(measured[name])
    arrays = {name: np.array(column) for name, column in columns.items()}
    return MeasuredFile(path, rows, reasons=reasons, unread_keys=keys, rows_with_unread_keys=rows_with_keys, **arrays)


def _measure(conversation: Conversation) -> dict[str, int]:
    asked = [turn["value"] for turn in conversation.turns if turn["from"] == "human"]
    answered = [turn["value"] for turn in conversation.turns if turn["from"] == "gpt"]
    speech = [[turn["from"], turn["value"]] for turn in conversation.turns]
    return {
        "kind": list(KINDS).index(kind_of(conversation)),
        "questions": len(asked),
        "asked": min(sum(map(len, asked)), MAX_COUNT),
        "answered": min(sum(map(len, answered)), MAX_COUNT),
        "images": len(conversation.images),
        "content": hash_text(msgspec.json.encode([conversation.images, conversation.system, speech])),
    }


def has_id(row: dict[str, Any]) -> bool:
    return isinstance(row.get("id"), str | int | float) and row["id"] != ""


def kind_of(conversation: Conversation) -> str:
    """One of `KINDS`."""
    if len(conversation.images) != 1:
        return "several images" if conversation.images else "text only"
    asked = [turn["value"] for turn in conversation.turns if turn["from"] == "human"]
    if len(asked) == 1 and _ASKS_TO_DESCRIBE.search(asked[0]):
        return "description"
    if all(len(turn["value"]) <= SHORT for turn in conversation.turns if turn["from"] == "gpt"):
        return "short answers"
    return "one question" if len(asked) == 1 else "conversation"


def check_conversation(conversation: Conversation) -> None:
    """Check what training checks of a conversation besides its format.

    Raises:
      InputError: speakers do not take turns, there is no answer, or there is not one `<image>` token per image.
    """
    speakers = [turn["from"] for turn in conversation.turns]
    later = speakers[1:] if speakers[0] == "gpt" else speakers
    if later != (["human", "gpt"] * len(later))[: len(later)]:
        raise InputError("speakers must take turns, human first")
    if not any(turn["from"] == "gpt" and turn["value"].strip() for turn in conversation.turns[1:]):
        raise InputError("no answer")
    count = [turn["value"].count(IMAGE_TOKEN) for turn in conversation.turns]
    images = len(conversation.images)
    tokens = sum(map(bool, count)) if images == 1 else sum(count)  # training joins those of a turn about one image
    if tokens != images:
        raise InputError(f"{tokens} {IMAGE_TOKEN} tokens for {images} images")


def unread_keys(row: dict[str, Any]) -> set[str]:
    """The keys of a row and its turns that are not read, unless they only describe it; unsupported ones are marked."""
    found = {_marked(key, UNSUPPORTED_KEYS) for key in row.keys() - ROW_KEYS - METADATA_KEYS}
    turns = row.get("conversations") or row.get("messages")
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and not turn.keys() <= TURN_KEYS:
            unread = turn.keys() - TURN_KEYS - TURN_METADATA_KEYS
            found.update(f"{_marked(key, UNSUPPORTED_TURN_KEYS)} of a turn" for key in unread)
    return found


def _marked(key: str, unsupported: Container[str]) -> str:
    return shorten(key, 40) + " (unsupported)" * (key in unsupported)


def hash_text(text: str | bytes) -> int:
    """A hash of 64 bits, for ids, the names of images and conversations."""
    data = text.encode(errors="backslashreplace") if isinstance(text, str) else text
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


# ---------------------------------------------------------------- duplicates


def mark_duplicates(files: Sequence[MeasuredFile]) -> list[np.ndarray]:
    """Mark rows whose images, conversation and system message equal those of an earlier row of any file.

    Ids do not matter. Equal are hashes of 64 bits: of ten million rows, that takes two others for the same with a
    probability of 3 in a million.

    Returns:
      For each file int64 [n]: the earlier row, counted through all files; -1 for other rows.
    """
    content = np.concatenate([file.content for file in files])
    good = np.flatnonzero(np.concatenate([file.status for file in files]) == GOOD)
    _, first, inverse = np.unique(content[good], return_index=True, return_inverse=True)
    earlier = np.full(len(content), -1)
    earlier[good] = good[first][inverse]
    earlier[earlier == np.arange(len(content))] = -1
    found = np.split(earlier, np.cumsum([len(file) for file in files])[:-1])
    for file, of_file in zip(files, found, strict=True):
        file.status[of_file >= 0] = DUPLICATE
    return found
