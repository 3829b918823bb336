"""The rows of data files (`data_files.py`), which training and evaluation read: conversations.

The original's rows (llava/train/train.py `LazySupervisedDataset`) are

    {"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                    {"from": "gpt", "value": "A cat."}]}

where `image` may also be a list or absent. Chat messages are supported too:

    {"id": ..., "images": ["a.jpg"], "system": "Be brief.",
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}]}

`read_conversation` parses either into the same `Conversation`. No key is ignored silently: a row is rejected if it has
a key that would change what the model learns, and each unknown key causes one warning per file.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llava_jax.console import InputError, shorten
from llava_jax.data.templates import IMAGE_TOKEN

SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}

# Unsupported keys that would change what the model learns, with the reason for which a row that has one is rejected.
_VIDEO, _AUDIO, _TOOLS = "video is not supported", "audio is not supported", "tool calls are not supported"
_PREFERENCES = "preference training is not supported"
_IMAGE = "not a supported key for images; use image or images"
UNSUPPORTED_KEYS = {
    "video": _VIDEO, "videos": _VIDEO, "audio": _AUDIO, "audios": _AUDIO, "tools": _TOOLS, "functions": _TOOLS,
    "chosen": _PREFERENCES, "rejected": _PREFERENCES, "kto_tag": _PREFERENCES,
    **dict.fromkeys(
        ("image_url", "image_urls", "image_path", "image_paths", "image_file", "image_files", "img", "imgs"), _IMAGE
    ),
}  # fmt: skip
_NAME_BESIDE_TURNS = "not supported in a turn; list the files of all turns in images, beside conversations"
UNSUPPORTED_TURN_KEYS = {
    "tool_calls": _TOOLS, "function_call": _TOOLS, "tool_call_id": _TOOLS, "video": _VIDEO, "videos": _VIDEO,
    "audio": _AUDIO, "audios": _AUDIO, "image": _NAME_BESIDE_TURNS, "images": _NAME_BESIDE_TURNS,
    "weight": "turn weights are not supported",
}  # fmt: skip

MEANINGFUL_WHEN_FALSE = {"kto_tag", "weight"}  # unlike `"video": false`, which means that there is none

# Keys that are read, and keys that only describe a row and are ignored.
ROW_KEYS = {"id", "conversations", "messages", "image", "images", "system", "kinds"}
METADATA_KEYS = {
    *("model", "source", "dataset", "dataset_name", "data_source", "split", "task", "type", "category", "capability"),
    *("question_id", "question_type", "image_id", "width", "height", "size", "language", "lang", "license", "tags"),
    *("metadata", "meta", "url", "date", "timestamp", "hash"),
}
TURN_KEYS = {"from", "value", "role", "content"}
TURN_METADATA_KEYS = {"id", "name", "kind", "model"}
PART_KEYS = {"type", "text", "image", "image_url", "path", "url", "index"}
IMAGE_PARTS = ("image", "image_url")
MAX_ROW_IMAGES = 2**16 - 1


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A row of a data file in either format.

    Attributes:
      turns: `[{"from": "human" | "gpt", "value": text}, ...]`, with an `<image>` token for each image.
      images: image names in the order of the tokens: files in the image folder, or `data:` and `file:` URLs.
      system: a system message instead of the template's; None for the template's own.
    """

    turns: list[dict[str, str]]
    images: tuple[str, ...] = ()
    system: str | None = None


def read_conversation(row: Any) -> Conversation:
    """Parse a row of a data file. Speakers must be known; that they take turns is checked later.

    Raises:
      InputError: the row is not a conversation, or has an unsupported key.
    """
    if isinstance(row, InputError):
        raise InputError(str(row))
    if not isinstance(row, dict):
        raise InputError("not a JSON object")
    if not isinstance(row.get("id"), str | int | float | None):
        raise InputError("id must be text or a number")
    names = image_names(row)
    key = _pick_key(row, "conversations", "messages")
    given = row.get(key)
    if not isinstance(given, list) or not given:
        raise InputError(
            f"{key} must be a list of turns" + ("" if key in row else "; the row has neither it nor messages")
        )
    parts = _ImageParts(names)
    turns = [_read_turn(turn, key, parts) for turn in given]
    system = row.get("system") or None
    if system is not None and not isinstance(system, str):
        raise InputError("system must be text")
    if turns[0]["from"] == "system":
        if system:
            raise InputError(f"both system and {key} have a system message; give one")
        system = turns.pop(0)["value"] or None
    if any(turn["from"] == "system" for turn in turns):
        raise InputError("the system message must be the first turn")
    if system and IMAGE_TOKEN in system:
        raise InputError(f"the system message has an {IMAGE_TOKEN} token; images belong in questions")
    images = parts.images()
    if len(images) > MAX_ROW_IMAGES:
        raise InputError(f"{len(images):,} images; a row may have at most {MAX_ROW_IMAGES:,}")
    for text in (system or "", *images, str(row.get("id")), *(turn["value"] for turn in turns)):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # an unpaired \\u surrogate
            raise InputError(f"text is not valid Unicode ({error.reason})") from None
    return Conversation(turns, images, system)


def image_names(row: dict[str, Any]) -> list[str]:
    """The image names in `image` or `images` of a row: a string, a list of strings, or absent.

    Raises:
      InputError: they are something else, or the row has an unsupported key.
    """
    _check_supported(row, UNSUPPORTED_KEYS)
    key = _pick_key(row, "image", "images")
    names = row.get(key)
    names = [] if names is None else names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{key} must be a file name or a list of file names")
    return names


def count_images(row: Any) -> int:
    """The number of images that a row names or has parts for: for a valid row, that of its `Conversation`."""
    if not isinstance(row, dict):
        return 0
    names = row.get("image") or row.get("images")
    named = len(names) if isinstance(names, list) else int(bool(names))
    placed = 0
    for turn in turns_of(row):
        content = isinstance(turn, dict) and (turn.get("content") or turn.get("value"))
        if isinstance(content, list):  # rare: most rows need no more than the check
            placed += sum(isinstance(part, dict) and part.get("type") in IMAGE_PARTS for part in content)
    return max(named, placed)


def has_system(row: Any) -> bool:
    """Whether a row has its own system message."""
    if not isinstance(row, dict):
        return False
    first = next(iter(turns_of(row)), None)
    in_turns = isinstance(first, dict) and str(first.get("from", first.get("role"))).lower() == "system"
    return bool(row.get("system")) or in_turns


class _ImageParts:
    """The images of a row: message parts either name them, or refer to entries of `images`."""

    def __init__(self, names: list[str]):
        self.given = names
        self.found: list[str] = []
        self._referenced: list[int] = []  # indices into `given` that parts refer to
        self._indexed: bool | None = None  # whether the parts have an index

    def add(self, part: dict[str, Any]) -> None:
        for key in ("image", "image_url", "path", "url"):
            if (name := part.get(key)) is not None:
                break
        else:
            at = part.get("index")
            if self._indexed not in (None, at is not None):
                raise InputError("some image parts have an index and some do not; give one to all of them or to none")
            self._indexed = at is not None
            at = len(self._referenced) if at is None else at
            if type(at) is not int or not 0 <= at < len(self.given):
                raise InputError(
                    f"an image part refers to image {shorten(at)}, but images has {len(self.given)} entries"
                )
            self._referenced.append(at)
            self.found.append(self.given[at])
            return
        name = name.get("url") if isinstance(name, dict) else name
        if not isinstance(name, str) or not name:
            raise InputError("an image part must name a file, or have no name if images lists the files")
        if self.given:
            raise InputError("both message parts and images name files; name them in one place")
        self.found.append(name)

    def images(self) -> tuple[str, ...]:
        """The images of the parts; without image parts, all that the row names."""
        missing = sorted({*range(len(self.given))} - {*self._referenced})
        if self.found and missing:
            raise InputError(
                f"{len(self.found)} image parts for {len(self.given)} images: no part refers to image {missing[0]} "
                "(counted from 0)"
            )
        return tuple(self.found or self.given)


def _read_turn(turn: Any, key: str, parts: _ImageParts) -> dict[str, str]:
    wanted = "from and value" if key == "conversations" else "role and content"
    if not isinstance(turn, dict):
        raise InputError(f"each turn of {key} must have {wanted}, both text")
    _check_supported(turn, UNSUPPORTED_TURN_KEYS)
    speaker, value = turn.get(_pick_key(turn, "from", "role")), turn.get(_pick_key(turn, "value", "content"))
    if isinstance(value, list):
        value = _join_parts(value, parts)
    if not isinstance(speaker, str) or not isinstance(value, str):
        raise InputError(f"each turn of {key} must have {wanted}, both text")
    if speaker.lower() not in SPEAKERS:
        raise InputError(f"unknown speaker {shorten(speaker, 40)!r}; supported: {', '.join(SPEAKERS)}")
    return {"from": SPEAKERS[speaker.lower()], "value": value}


def _join_parts(content: list[Any], parts: _ImageParts) -> str:
    """Join the parts of a message. An image becomes an `<image>` token on a line of its own; texts are unchanged."""
    text = ""
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise InputError("a message part of type text has no text")
            text += ("\n" if part["text"] and text.endswith(IMAGE_TOKEN) else "") + part["text"]
        elif kind in IMAGE_PARTS:
            parts.add(part)
            text += ("\n" if text and not text.endswith("\n") else "") + IMAGE_TOKEN
        else:
            kind = shorten(kind, 40) if isinstance(kind, str) else "unknown"
            raise InputError(f"a message part has type {kind}; only text and image are supported")
    return text


def turns_of(row: dict[str, Any]) -> Sequence[Any]:
    """The turns of a row in either format, unread."""
    turns = row.get("conversations") or row.get("messages")
    return turns if isinstance(turns, list) else ()


def parts_of(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a turn's content, if it is a list."""
    content = turn.get("content") or turn.get("value")
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _check_supported(mapping: dict[str, Any], unsupported: dict[str, str]) -> None:
    for key in sorted(mapping.keys() & unsupported.keys()):
        value = mapping[key]
        absent = value in (None, "", [], {}) or (value in (False, 0) and key not in MEANINGFUL_WHEN_FALSE)
        if not absent and not (key == "weight" and value == 1):
            raise InputError(f"{key}: {unsupported[key]}")


def _pick_key(mapping: dict[str, Any], first: str, second: str) -> str:
    """The one of two synonymous keys that is present."""
    empty: tuple[Any, ...] = (None, "", [])
    if second not in mapping or mapping[second] in empty:
        return second if first not in mapping and second in mapping else first
    if first in mapping and mapping[first] not in empty:
        raise InputError(f"has both {first} and {second}; give one of them")
    return second
