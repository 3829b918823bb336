"""Plan a prepared dataset before anything is written: its rows, the images that they name, and which shard has which.

An image is stored once, however many rows name it: images are the same if their paths are, with links resolved, or, for
`data:` URLs, their bytes. They are numbered in the order of first use. Five million rows have to fit into memory, so
that what there is of each is in arrays.
"""

import array
import dataclasses
import errno
import functools
import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_jax.console import InputError, Progress, first_line, shorten
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.urls import NamedBytes, display_name
from llava_jax.files import kind_of
from train import mixture
from train.prepared import MAX_IMAGE, first_images
from train.row_sources import DataFile
from train.samples import BadSample
from train.stores import naming

MAX_DIRECTORIES = 2**16  # whose resolved paths are kept
NO_IMAGE = 2**32 - 1  # instead of the number of an image, in rows that are left out or not used
TAR_BLOCK = 512
TAR_END = 2 * TAR_BLOCK
# Errors for which an image is left out. After another one, such as that of a disk, the command stops.
LEFT_OUT = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL,
}  # fmt: skip


def image_error(path: str, error: OSError | ValueError) -> InputError:
    """Why an image is left out; re-raises an error that says nothing about the image itself."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{shorten(path)}: no such image")
    if isinstance(error, OSError) and error.errno not in LEFT_OUT:
        with naming(path):
            raise error
    return InputError(f"{shorten(path)}: cannot be read ({first_line(error)})")


class Source:
    """A data file, and the images of its rows.

    images    uint32 [r], the images that its rows name, row by row
    left_out  the rows that are left out, by their index
    """

    def __init__(self, file: DataFile):
        self.file = file
        self._first = first_images(file.image_counts)
        self.images = np.full(self._first[-1], NO_IMAGE, np.uint32)
        self.left_out: dict[int, BadSample] = {}

    def images_of(self, row: int) -> np.ndarray:
        """The images of a row, uint32 [k]."""
        return self.images[self._first[row] : self._first[row + 1]]

    def leave_out(self, row: int, file: str | None, reason: InputError | str) -> None:
        self.left_out[row] = BadSample(row, self.file.path, row, self.file.id(row), file, str(reason))

    def leave_out_broken(self, broken: dict[int, str]) -> None:
        """Leave out the rows that name a broken image. `broken`: reasons by number of the image."""
        for place in np.flatnonzero(np.isin(self.images, np.fromiter(broken, np.uint32, len(broken)))).tolist():
            row = int(np.searchsorted(self._first, place, side="right")) - 1
            if row not in self.left_out:
                name = self.file.conversation(row).images[place - int(self._first[row])]
                self.leave_out(row, display_name(name), broken[int(self.images[place])])


@dataclasses.dataclass(frozen=True)
class Located:
    """An image that a row names: its identity, its resolved path ("" for a `data:` URL), its size in bytes."""

    key: bytes
    path: str
    size: int


class Plan:
    """The rows and the images of a prepared dataset.

    sources     the data files
    source_of   int32 [n], of each row the number of its source
    rows        int64 [n], its index there
    repeats     the maximum number of times that a row of a source occurs
    sizes       int64 [m], bytes of each image
    """

    def __init__(self, parts: Sequence[mixture.Part], folder: ImageFolder, seed: int):
        """
        Raises:
          InputError: a data file cannot be read.
          OSError: an image cannot be looked up, for another reason than that it is missing.
        """
        paths = list(dict.fromkeys(part.path for part in parts))
        self._folder = folder
        self._real_directory = functools.lru_cache(MAX_DIRECTORIES)(os.path.realpath)
        self.sources = [Source(DataFile(path, folder)) for path in paths]
        used = [paths.index(part.path) for part in parts]
        chosen = mixture.choose(parts, [len(self.sources[i].file) for i in used], seed)
        self.repeats = mixture.repeats(parts, chosen)
        self.source_of = np.repeat(np.array(used, np.int32), list(map(len, chosen)))
        self.rows = np.concatenate(chosen)
        self._numbers: dict[bytes, int] = {}
        self._paths, self._ends, self._sizes = bytearray(), array.array("Q"), array.array("q")
        self._embedded: dict[int, tuple[int, int, int]] = {}  # source, row and place of the first use of `data:` URLs
        self._find_images()
        self._numbers.clear()  # the largest part of a plan, and not needed any more
        self.sizes = np.array(self._sizes, np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def _find_images(self) -> None:
        seen = [np.zeros(len(source.file), bool) for source in self.sources]
        with Progress("finding the images", len(self), "rows") as bar:
            for number, row in zip(map(int, self.source_of), map(int, self.rows), strict=True):
                if not seen[number][row]:
                    seen[number][row] = True
                    self._add(number, row)
                bar.advance()

    def _add(self, number: int, row: int) -> None:
        source, name, found = self.sources[number], None, []
        try:
            conversation = source.file.conversation(row)
            for name in conversation.images:
                found.append(self._locate(name))
        except InputError as error:
            source.leave_out(row, name and display_name(name), error)
            return
        for place, one in enumerate(found):
            image = self._numbers.setdefault(one.key, len(self._sizes))
            if image == len(self._sizes):
                self._paths += os.fsencode(one.path)
                self._ends.append(len(self._paths))
                self._sizes.append(one.size)
                if not one.path:
                    self._embedded[image] = number, row, place
            source.images_of(row)[place] = image

    def _locate(self, name: str) -> Located:
        found = self._folder.find(name)
        if isinstance(found, NamedBytes):
            return Located(hashlib.blake2b(b"data:" + found, digest_size=16).digest(), "", len(found))
        try:
            directory, base = os.path.split(found)
            path = os.path.join(self._real_directory(directory), base)
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                path = os.path.realpath(path)
                status = os.stat(path)
        except (OSError, ValueError) as error:
            raise image_error(found, error) from None
        if kind := kind_of(status):
            raise InputError(f"{shorten(found)}: {kind}, not a file")
        if status.st_size > MAX_IMAGE:
            raise InputError(f"{shorten(found)}: has {status.st_size:,} bytes; an image may have at most {MAX_IMAGE:,}")
        return Located(hashlib.blake2b(b"file:" + os.fsencode(path), digest_size=16).digest(), path, status.st_size)

    def file_of(self, image: int, folder: Path) -> str:
        """The path of an image. That of a `data:` URL is written to a file in `folder` first."""
        if image in self._embedded:
            number, row, place = self._embedded[image]
            data = self._folder.find(self.sources[number].file.conversation(row).images[place])
            assert isinstance(data, NamedBytes)
            path = folder / f"embedded-{image:09}.incomplete"
            path.write_bytes(data)
            return os.fspath(path)
        return os.fsdecode(bytes(self._paths[self._ends[image - 1] if image else 0 : self._ends[image]]))

    def shards(self, max_bytes: int) -> list[range]:
        """The images of each shard, whose tar has at most `max_bytes`, or one image."""
        stored = -(-self.sizes // TAR_BLOCK) * TAR_BLOCK + TAR_BLOCK
        ends, shards, start = np.cumsum(stored), [], 0
        while start < len(ends):
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + max_bytes - TAR_END, side="right"))
            shards.append(range(start, max(stop, start + 1)))
            start = shards[-1].stop
        return shards

    def digest(self) -> str:
        """Identifies the images, their sizes and the rows that name them, but not their folder."""
        digest = hashlib.sha256(self.sizes.tobytes())
        for source in self.sources:
            digest.update(source.images.tobytes())
        return digest.hexdigest()

    def left_out(self) -> list[BadSample]:
        """The rows that are left out, each once."""
        return [one for source in self.sources for _, one in sorted(source.left_out.items())]

    def is_left_out(self) -> np.ndarray:
        """Whether a row is left out, bool [n]."""
        result = np.zeros(len(self), bool)
        for number, source in enumerate(self.sources):
            mine = self.source_of == number
            result[mine] = np.isin(self.rows[mine], np.fromiter(source.left_out, np.int64, len(source.left_out)))
        return result
