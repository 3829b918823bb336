"""The numbers of tokens of conversations: what rows are planned from, without the text.

A conversation's text is tokenized once; what remains of it is three numbers, from which its positions in any image mode
and at any `max_length` follow. A prepared dataset has them on disk (`train.datasets.prepare --checkpoint`), so that
planning needs neither its text nor a tokenizer; for other data each process keeps those that it has measured.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.numpy import load, save

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, first_line, shorten
from llava_jax.data.splice import IGNORE, IMAGE
from llava_jax.data.templates import Template
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.json_files import check_json, parse_json
from train.prepared import MAX_INDEX, PreparedDataset, first_images

VERSION = 1  # of the rules that make tokens of a conversation
UNKNOWN, BAD = 0, -1  # instead of a number of tokens
ARRAYS = ("tokens", "label", "images")
METADATA = "checksum and reasons"  # one key: safetensors writes several in any order
MAX_REASON = 200  # characters

Reason = tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)], str]  # placement, row, why it is bad


def lengths_name(key: str) -> str:
    """The file of lengths in a prepared dataset."""
    return f"lengths-{key}.safetensors"


def lengths_key(template: Template, tokenizer: Tokenizer, model: LlavaConfig, orders: int) -> str:
    """Identifies everything that the tokens of a conversation depend on.

    Args:
      orders: the number of placements of the image: 1, or 2 if it may come after the text.
    """
    files = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(tokenizer.files.items())}
    flags = [model.use_im_start_end, model.use_im_patch, model.text.vocab_size]
    described = [VERSION, dataclasses.asdict(template), files, flags, orders]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Length:
    """The tokens of a conversation.

    tokens   number of ids, of which an image token is one
    label    index of the first id that is trained, after the first one; -1 if there is none
    images   int32 [k], indices of the image tokens
    """

    tokens: int
    label: int
    images: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray, labels: np.ndarray) -> "Length":
        """Of ids and labels [n]."""
        trained = np.flatnonzero(labels[1:] != IGNORE)
        return cls(len(ids), int(trained[0]) + 1 if len(trained) else -1, np.flatnonzero(ids == IMAGE))

    def spliced(self, features: Sequence[int]) -> int:
        """The positions after splicing, if each image has so many features."""
        return self.tokens - len(self.images) + sum(features)

    def ids_within(self, positions: int, features: Sequence[int]) -> int:
        """The number of ids that begin within so many positions, if each image has so many features."""
        first = at = 0  # id after the last image, and its position
        for image, count in zip(self.images.tolist(), features, strict=True):
            if at + image - first >= positions:
                break
            first, at = image + 1, at + image - first + count
        return min(self.tokens, first + max(positions - at, 0))


class Lengths:
    """The measured lengths of n rows with r images, for each of V placements of the image.

    tokens   int32 [V, n]; `UNKNOWN` or `BAD` without a length
    label    int32 [V, n]
    images   int32 [V, r], row by row
    reasons  why a row is bad, by placement and row
    """

    def __init__(self, image_counts: np.ndarray, orders: int):
        self._first = first_images(image_counts)
        self.tokens = np.zeros((orders, len(image_counts)), np.int32)
        self.label = np.zeros((orders, len(image_counts)), np.int32)
        self.images = np.zeros((orders, int(self._first[-1])), np.int32)
        self.reasons: dict[tuple[int, int], str] = {}

    def get(self, order: int, row: int) -> Length | None:
        """The length of a row; None if it is not known.

        Raises:
          InputError: the row is known to be bad.
        """
        tokens = int(self.tokens[order, row])
        if tokens == BAD:
            raise InputError(self.reasons[order, row])
        if tokens == UNKNOWN:
            return None
        images = self.images[order, self._first[row] : self._first[row + 1]]
        return Length(tokens, int(self.label[order, row]), images)

    def set(self, order: int, row: int, length: Length) -> None:
        """Remember a length. Threads may call this at the same time."""
        self.images[order, self._first[row] : self._first[row + 1]] = length.images
        self.label[order, row] = length.label
        self.tokens[order, row] = length.tokens  # last, as it makes the others known

    def set_bad(self, order: int, row: int, reason: str) -> None:
        """Remember that a row cannot be trained on."""
        self.reasons[order, row] = reason
        self.tokens[order, row] = BAD

    def insert(self, first: int, part: "Lengths") -> None:
        """Take the lengths of the rows from number `first` on."""
        end = first + part.tokens.shape[1]
        self.tokens[:, first:end], self.label[:, first:end] = part.tokens, part.label
        self.images[:, self._first[first] : self._first[end]] = part.images
        self.reasons |= {(order, first + row): reason for (order, row), reason in part.reasons.items()}

    def save(self, of: str) -> bytes:
        """The contents of a file of lengths, all of which must be known.

        Args:
          of: identifies the dataset and the tokens.
        """
        reasons = [[order, row, reason[:MAX_REASON]] for (order, row), reason in sorted(self.reasons.items())]
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS}
        text = json.dumps(reasons)
        return save(arrays, {METADATA: json.dumps([_checksum(of, arrays, text), text])})

    def load(self, data: bytes, where: str, of: str) -> None:
        """Take the lengths of a file.

        Args:
          of: as `save` got it.

        Raises:
          InputError: the file is damaged, or of other rows or tokens.
        """
        try:
            arrays = load(data)
            metadata = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            checksum, text = check_json(parse_json(metadata[METADATA]), tuple[str, str], where)
            reasons = check_json(parse_json(text), list[Reason], where)
            is_same = checksum == _checksum(of, {name: arrays[name] for name in ARRAYS}, text)
        except (SafetensorError, KeyError, TypeError, ValueError, InputError) as error:
            raise InputError(f"{where}: not a file of lengths ({first_line(error)}); remove it") from None
        mine = {name: getattr(self, name) for name in ARRAYS}
        if not is_same or any((arrays[n].dtype, arrays[n].shape) != (mine[n].dtype, mine[n].shape) for n in ARRAYS):
            raise InputError(f"{where}: damaged, or of another dataset, tokenizer or template; remove it")
        for name in ARRAYS:
            setattr(self, name, arrays[name])
        self.reasons = {(order, row): reason for order, row, reason in reasons}
        bad = {(int(order), int(row)) for order, row in zip(*np.nonzero(self.tokens == BAD), strict=True)}
        if int(self.tokens.min(initial=BAD)) < BAD or bad != self.reasons.keys():
            raise InputError(f"{where}: damaged (tokens)")


def _checksum(of: str, arrays: dict[str, np.ndarray], reasons: str) -> str:
    digest = hashlib.sha256(f"{of}\n{reasons}\n".encode())
    for name in ARRAYS:
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def read_lengths(dataset: PreparedDataset, name: str, orders: int) -> Lengths | None:
    """The lengths in a file of a prepared dataset; None without the file.

    Args:
      name: of the file (`lengths_name`).

    Raises:
      InputError: as `Lengths.load`.
      OSError: it cannot be read.
    """
    if (data := dataset.store.read(name, MAX_INDEX)) is None:
        return None
    lengths = Lengths(dataset.image_counts, orders)
    lengths.load(data, shorten(dataset.store.name_of(name)), contents_of(dataset.digest, name))
    return lengths


def contents_of(digest: str, name: str) -> str:
    """What the file of lengths `name` of a dataset is of: `of` of `Lengths`."""
    return f"{digest} {name}"
