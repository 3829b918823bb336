"""The format of a prepared dataset, and its reader: a few large files that processes read at random.

    dataset.json               what is here, with sizes and checksums; written last, so that it marks a complete dataset
    index.safetensors          arrays: where each row and each image is, and the sizes of all images
    conversations-00000.jsonl  rows as in a data file, one per line
    images-00000.tar           image files, each once, however many rows name it
    lengths-KEY.safetensors    numbers of tokens for one tokenizer and template (`train.lengths`), if measured

Any tool opens the files: the index only makes them fast, with one range read per row or image. ArrayRecord, grain's own
format, has offsets in the footers of its files: reading at random was as fast (1,100 MB/s on 4 threads, both), took
0.4 to 5 % more bytes, and planning could not read the text of a record without its images.

A run reads the index when it starts, and after that the rows and the images of its own shard of each batch.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.numpy import load, save

from llava_jax.console import InputError, first_line, shorten
from llava_jax.data.urls import NamedBytes
from llava_jax.json_files import check_json, parse_json
from train.stores import Store

FORMAT = 1
DATASET, INDEX = "dataset.json", "index.safetensors"
UNFINISHED = "prepare.json"  # the settings of a preparation that is not complete
MAX_DATASET = 2**24  # bytes of dataset.json
MAX_INDEX = 2**36
MAX_ROW = 256 * 2**20  # bytes of a row
MAX_IMAGE = 2**30

Count = Annotated[int, Meta(ge=0, le=2**50)]


class Shard(TypedDict):
    """A file of rows or of images.

    name     of the file
    bytes    of the file
    sha256   of the file
    count    of rows or images
    """

    name: str
    bytes: Count
    sha256: str
    count: Count


class Description(TypedDict):
    """The contents of `dataset.json`, as far as a reader needs them.

    format   `FORMAT`
    index    the sha256 of the index
    system   whether a row has its own system message
    conversations, images   the shards, in order
    """

    format: Literal[1]
    index: str
    system: bool
    conversations: list[Shard]
    images: list[Shard]


def conversations_name(number: int) -> str:
    return f"conversations-{number:05}.jsonl"


def images_name(number: int) -> str:
    return f"images-{number:05}.tar"


def is_prepared(path: str) -> bool:
    """Whether `path` is a prepared dataset rather than a data file: a directory, or a location in an object store."""
    return "://" in path or os.path.isdir(path)


def first_images(counts: np.ndarray) -> np.ndarray:
    """int64 [n + 1], the first of each row's references to images, if rows have `counts` [n] of them."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def read_description(store: Store) -> Description:
    """Read `dataset.json`, and check that all shards are there.

    Raises:
      InputError: the directory holds no complete prepared dataset.
      OSError: it cannot be read.
    """
    name = shorten(store.path)
    where = f"{name}/{DATASET}"
    files = store.sizes()
    data = store.read(DATASET, MAX_DATASET) if DATASET in files else None
    if data is None:
        if UNFINISHED in files:
            raise InputError(f"{name}: its preparation is not complete; repeat the command that prepares it")
        raise InputError(
            f"{name}: {'' if store.local is None else 'a directory, but '}not a prepared dataset: it has no {DATASET} "
            "(python -m train.datasets.prepare writes one)"
        )
    try:
        described = check_json(parse_json(data), Description, "not a prepared dataset's")
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    for shard in (*described["conversations"], *described["images"]):
        if files.get(shard["name"]) != shard["bytes"]:
            size = "is missing" if shard["name"] not in files else f"has {files[shard['name']]:,} bytes"
            raise InputError(f"{name}/{shorten(shard['name'])}: {size}; {DATASET} says {shard['bytes']:,} bytes")
    return described


@dataclasses.dataclass(frozen=True)
class Index:
    """Where the rows and the images of a dataset are; n rows refer r times to m images.

    row_start     uint64 [n]   byte of a row in its shard; the shards' counts tell which one
    row_bytes     uint32 [n]
    row_crc       uint32 [n]   CRC-32 of those bytes
    row_images    uint16 [n]   number of images of a row
    id_end        uint64 [n]   end of a row's id in `ids`
    ids           uint8 [...]  the ids as JSON, one after the other
    image_of      uint32 [r]   images that rows refer to, row by row
    image_start   uint64 [m]   byte of an image in its shard
    image_bytes   uint32 [m]
    image_crc     uint32 [m]   CRC-32 of the image's bytes
    image_size    int32 [m, 2] width and height of the image as `llava_jax.data.images.open_image` returns it
    """

    row_start: np.ndarray
    row_bytes: np.ndarray
    row_crc: np.ndarray
    row_images: np.ndarray
    id_end: np.ndarray
    ids: np.ndarray
    image_of: np.ndarray
    image_start: np.ndarray
    image_bytes: np.ndarray
    image_crc: np.ndarray
    image_size: np.ndarray

    def save(self) -> bytes:
        return save({name: np.ascontiguousarray(value) for name, value in vars(self).items()})


_ARRAYS = {  # dtype and shape of each array
    "row_start": ("uint64", "n"),
    "row_bytes": ("uint32", "n"),
    "row_crc": ("uint32", "n"),
    "row_images": ("uint16", "n"),
    "id_end": ("uint64", "n"),
    "ids": ("uint8", "i"),
    "image_of": ("uint32", "r"),
    "image_start": ("uint64", "m"),
    "image_bytes": ("uint32", "m"),
    "image_crc": ("uint32", "m"),
    "image_size": ("int32", "m2"),
}


class PreparedDataset:
    """A prepared dataset, opened: its index in memory, its rows and images read when asked for.

    Attributes:
      path: the directory.
      index: where rows and images are.
      digest: identifies the contents.
      image_counts: uint16 [n], the number of images of each row.
      first_image: int64 [n + 1], the first of a row's references to images.
      sizes: int32 [r, 2], width and height of each image referred to.
    """

    def __init__(self, path: str):
        """
        Raises:
          InputError: the directory holds no complete prepared dataset, or a damaged one.
          OSError: it cannot be read.
        """
        self.path, self._name, self.store = path, shorten(path), Store(path)
        self.described = read_description(self.store)
        self.index = index = self._read_index()
        self.digest = self.described["index"]
        self.image_counts = index.row_images
        self.first_image = first_images(index.row_images)
        self.sizes = index.image_size[index.image_of]
        self._row_shards = np.cumsum([0, *(shard["count"] for shard in self.described["conversations"])])
        self._image_shards = np.cumsum([0, *(shard["count"] for shard in self.described["images"])])

    def __len__(self) -> int:
        return len(self.image_counts)

    def id(self, row: int) -> Any:
        """The id of a row."""
        ids, end = self.index.ids, self.index.id_end
        return json.loads(ids[int(end[row - 1]) if row else 0 : int(end[row])].tobytes())

    def row(self, row: int) -> Any:
        """A row, parsed; a damaged one is an `InputError`.

        Raises:
          OSError: it cannot be read.
        """
        shard, number = self._shard(self._row_shards, row)
        start, size = int(self.index.row_start[row]), int(self.index.row_bytes[row])
        name = self.described["conversations"][shard]["name"]
        data = self.store.read_range(name, start, size)
        if zlib.crc32(data) != self.index.row_crc[row]:
            where = f"{shorten(self.store.name_of(name))} row {number}"
            return InputError(f"{where}: damaged (another checksum than in {INDEX})")
        try:
            return parse_json(data, bounded=False)
        except InputError as error:
            return error

    def image(self, row: int, place: int) -> NamedBytes:
        """The file of the image at a `place` among those of a row.

        Raises:
          InputError: it is damaged.
          OSError: it cannot be read.
        """
        image = self._image(row, place)
        shard, number = self._shard(self._image_shards, image)
        start, size = int(self.index.image_start[image]), self.image_bytes(row, place)
        name = self.described["images"][shard]["name"]
        data = NamedBytes(self.store.read_range(name, start, size))
        data.name = f"{shorten(self.store.name_of(name))} image {number}"
        if zlib.crc32(data) != self.index.image_crc[image]:
            raise InputError(f"{data.name}: damaged (another checksum than in {INDEX})")
        return data

    def image_bytes(self, row: int, place: int) -> int:
        """The size of that image's file."""
        return int(self.index.image_bytes[self._image(row, place)])

    def _image(self, row: int, place: int) -> int:
        return int(self.index.image_of[self.first_image[row] + place])

    @staticmethod
    def _shard(starts: np.ndarray, number: int) -> tuple[int, int]:
        """The shard of a row or image, and its number in that shard."""
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        return shard, number - int(starts[shard])

    def _read_index(self) -> Index:
        where = f"{self._name}/{INDEX}"
        data = self.store.read(INDEX, MAX_INDEX)
        if data is None:
            raise InputError(f"{where}: no such file")
        if hashlib.sha256(data).hexdigest() != self.described["index"]:
            raise InputError(f"{where}: damaged (another checksum than in {DATASET})")
        try:
            index = Index(**load(data))
        except (SafetensorError, TypeError, ValueError) as error:
            raise InputError(f"{where}: not the index of a prepared dataset ({first_line(error)})") from None
        if problem := _problem_of(index, self.described):
            raise InputError(f"{where}: damaged ({problem})")
        return index


def _problem_of(index: Index, described: Description) -> str | None:
    """Why the arrays of an index do not fit together or do not fit the shards; None if they do."""
    n, m, r, i = (len(np.atleast_1d(one)) for one in (index.row_start, index.image_start, index.image_of, index.ids))
    shapes = {"n": (n,), "m": (m,), "r": (r,), "i": (i,), "m2": (m, 2)}
    for name, (dtype, letters) in _ARRAYS.items():
        array = getattr(index, name)
        if array.dtype != dtype or array.shape != shapes[letters]:
            return f"{name} is {array.dtype} {list(array.shape)}"
    if int(index.row_images.sum(dtype=np.int64)) != r or (r and int(index.image_of.max()) >= m):
        return "rows refer to images that it does not have"
    ends = index.id_end
    if n and (int(ends[-1]) != i or (ends[1:] < ends[:-1]).any()):
        return "ids"
    if m and int(index.image_size.min()) < 1:
        return "image_size"
    for kind, starts, sizes in (
        ("conversations", index.row_start, index.row_bytes),
        ("images", index.image_start, index.image_bytes),
    ):
        at = 0
        for shard in described[kind]:  # type: ignore[literal-required]
            stop = at + shard["count"]
            ends = starts[at:stop].astype(np.int64) + sizes[at:stop]
            if stop > len(starts) or (len(ends) and not 0 <= int(ends.min()) <= int(ends.max()) <= shard["bytes"]):
                return f"{shard['name']} is shorter"
            at = stop
        if at != len(starts):
            return f"{len(starts)} {kind}, and the shards have {at}"
    return None if n else "no rows"
