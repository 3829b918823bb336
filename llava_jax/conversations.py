"""The format of data files, which training and evaluation read: rows of conversations.

It is the reference's (llava/train/train.py `LazySupervisedDataset`): a JSON list, or one object a line, of

    {"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                    {"from": "gpt", "value": "A cat."}]}

`image` may be a list, or be missing.
"""

import json
import os
from pathlib import Path
from typing import Any

from llava_jax.console import InputError


def read_rows(path: str | os.PathLike) -> list[Any]:
    """The rows of a JSON list, or of JSON lines. A line that is no JSON becomes the `InputError` that says so.

    Raises:
      InputError: there is no such file, it is empty, or the list is broken.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if data[:4096].lstrip().startswith((b"[", b"\xef\xbb\xbf[")):
        try:
            rows = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON ({error})") from None
    else:
        rows = [_read_line(line) for line in data.splitlines() if line.strip()]
    if not rows:
        raise InputError(f"{path}: no conversations in it; it should be a JSON list or JSON lines")
    return rows


def _read_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return InputError(f"not JSON ({error})")


def check_row(row: Any) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    """The turns and the image names of a row of the data file.

    Raises:
      InputError: it is no conversation.
    """
    if isinstance(row, InputError):
        raise InputError(str(row))
    if not isinstance(row, dict):
        raise InputError("not a JSON object")
    images = row.get("image")
    images = [] if images is None else images if isinstance(images, list) else [images]
    if not all(isinstance(image, str) and image for image in images):
        raise InputError("image must be a file name or a list of them")
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise InputError("conversations must be a list of turns")
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            raise InputError("each turn of conversations must have from and value, both text")
        try:
            turn["value"].encode()
        except UnicodeEncodeError as error:  # half of a pair of \\u escapes
            raise InputError(f"text that is no Unicode ({error.reason})") from None
    return turns, tuple(images)
