"""Choose the rows of a mix, and write them, and those that are left out."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.console import InputError, Progress, note, shorten
from llava_jax.data.conversations import read_conversation
from train import mixture
from train.datasets.mix.files import DUPLICATE, MeasuredFile, check_conversation, has_id, hash_text
from train.datasets.mix.images import Images, reason_of


@dataclasses.dataclass(frozen=True)
class Mix:
    """The rows of a mix.

    parts    the sources
    files    the data files, each once
    file_of  for each part, the index of its file
    part     int64 [n]: index into `parts`
    file     int64 [n]: index into `files`
    row      int64 [n]: index into the rows of the file
    images   None if they were not checked
    """

    parts: Sequence[mixture.Part]
    files: Sequence[MeasuredFile]
    file_of: Sequence[int]
    part: np.ndarray
    file: np.ndarray
    row: np.ndarray
    images: Images | None

    def __len__(self) -> int:
        return len(self.row)

    def column(self, name: str) -> np.ndarray:
        """The values [n] of a column of `MeasuredFile`."""
        columns = [getattr(file, name) for file in self.files]
        starts = np.cumsum([0, *map(len, columns)])
        return np.concatenate(columns)[starts[self.file] + self.row]


def choose(parts: Sequence[mixture.Part], files: Sequence[MeasuredFile], images: Images | None, seed: int) -> Mix:
    """Choose the rows of each part, by its weight, from those of its file that are not left out.

    Raises:
      InputError: a weight makes too many.
    """
    number_of = {os.path.realpath(file.path): i for i, file in enumerate(files)}
    file_of = [number_of[os.path.realpath(part.path)] for part in parts]
    rows = []
    for i, (part, number) in enumerate(zip(parts, file_of, strict=True)):
        good = files[number].good
        if not len(good):
            note(f"warning: {shorten(part.path)}: all of its rows are left out")
        rows.append(good[part.choose(len(good), (seed, i))] if len(good) else good)
    counts = list(map(len, rows))
    part_of = np.repeat(np.arange(len(parts)), counts)
    return Mix(parts, files, file_of, part_of, np.array(file_of)[part_of], np.concatenate(rows), images)


# ---------------------------------------------------------------- writing


def write_mix(mix: Mix, path: Path) -> int:
    """Write the rows; returns the number of ids that were changed because an earlier row has them."""
    hashes = mix.column("ids")
    repeats, known, changed = count_earlier(hashes), np.unique(hashes), 0
    following: dict[int, int] = {}  # by the hash of an id: its next number, if some are ids of other rows

    def number_of(i: int, id: Any) -> int:
        hashed, usual = int(hashes[i]), int(repeats[i]) + 1
        number = max(usual, following.get(hashed, 0))
        while _contains(known, hash_text(f"{id}-{number}")):
            number += 1
        if number > usual:
            following[hashed] = number + 1
        return number

    with open(path, "wb") as out, Progress("writing the mix", len(mix), "rows") as bar:
        for i in range(len(mix)):
            row = mix.files[mix.file[i]].rows[mix.row[i]]
            if hashes[i] and repeats[i]:
                row, changed = row | {"id": f"{row['id']}-{number_of(i, row['id'])}"}, changed + 1
            out.write((b",\n" if i else b"[\n") + _encode(row))
            bar.advance()
        out.write(b"\n]\n")
    return changed


def _contains(ascending: np.ndarray, value: int) -> bool:
    at = int(np.searchsorted(ascending, np.uint64(value)))
    return at < len(ascending) and int(ascending[at]) == value


def count_earlier(values: np.ndarray) -> np.ndarray:
    """For each value [n], the number of equal ones before it."""
    order = np.argsort(values, kind="stable")
    is_first = np.concatenate([[True], values[order][1:] != values[order][:-1]])
    starts = np.flatnonzero(is_first)
    counts = np.empty(len(values), np.int64)
    counts[order] = np.arange(len(values)) - np.repeat(starts, np.diff([*starts, len(values)]))
    return counts


def _encode(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # an unpaired surrogate in a key that is not read
        return json.dumps(value).encode()


def left_out(
    files: Sequence[MeasuredFile], earlier: Sequence[np.ndarray], images: Images | None
) -> Iterator[dict[str, Any]]:
    """The rows that are left out, with the reason."""
    starts = np.cumsum([0, *map(len, files)])
    for file, same in zip(files, earlier, strict=True):
        for number in np.flatnonzero(file.status).tolist():
            row = file.rows[number]
            if file.status[number] == DUPLICATE:
                other = int(np.searchsorted(starts, same[number], "right")) - 1
                reason = f"the same as row {same[number] - starts[other]} of {files[other].path}"
            else:
                reason = _problem(row, images)
            id = row["id"] if isinstance(row, dict) and has_id(row) else None
            yield {"data": file.path, "row": number, "id": id, "reason": reason}


def _problem(row: Any, images: Images | None) -> str:
    """Why a row is invalid, or which of its images is bad."""
    try:
        conversation = read_conversation(row)
        check_conversation(conversation)
    except InputError as error:
        return str(error)
    assert images is not None
    return reason_of(images, conversation.images, list(map(hash_text, conversation.images)))
