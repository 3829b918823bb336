"""Check the images that data files name: missing, broken, sizes."""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llava_jax.console import InputError, Progress
from llava_jax.data.conversations import read_conversation
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.images import image_size, open_image
from llava_jax.data.urls import display_name
from train.datasets.mix.files import BAD_IMAGE, GOOD, MeasuredFile

AT_ONCE = 4096  # images that threads are given at once
MAX_REASONS = 10_000  # bad images whose reason is kept

MISSING = "no such image"

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Images:
    """The unique images of the rows that are not left out for another reason.

    names    uint64 [n]: hashes of their names, ascending
    sizes    uint32 [n, 2]: width, height; 0 for a bad image
    missing  the number of images that do not exist
    reasons  of bad images, by the hash of their name; of the first `MAX_REASONS`
    """

    names: np.ndarray
    sizes: np.ndarray
    missing: int
    reasons: dict[int, str]

    @property
    def good(self) -> np.ndarray:
        """bool [n]"""
        return self.sizes[:, 0] > 0

    def size_of(self, names: np.ndarray) -> np.ndarray:
        """The sizes, uint32 [m, 2], of images by the hashes of their names."""
        return self.sizes[np.searchsorted(self.names, names)]


def check_images(files: Sequence[MeasuredFile], folder: ImageFolder, *, decode: bool) -> Images:
    """Check each image once, in threads, and mark the rows of bad ones.

    Args:
      decode: decode the whole image, not only its header.
    """
    used = [file.names[np.repeat(file.status == GOOD, file.images)] for file in files]
    names, first = np.unique(np.concatenate(used), return_index=True)
    sizes, missing = np.zeros((len(names), 2), np.uint32), 0
    reasons: dict[int, str] = {}

    def check(name: str) -> Size | str:
        """The size of an image, the reason for which it is bad, or `MISSING`."""
        try:
            found = folder.find(name)
            if isinstance(found, str) and not os.path.lexists(found):
                return MISSING
            return open_image(found).size if decode else image_size(found)
        except InputError as error:
            return str(error)

    order = np.argsort(first)
    pool = ThreadPoolExecutor(os.cpu_count())
    pairs = _batches(order, _names(files, np.sort(first)))
    with Progress("decoding images" if decode else "reading headers of images", len(names), "images") as bar:
        try:
            for numbers, batch in pairs:
                for number, name, found in zip(numbers, batch, pool.map(check, batch), strict=True):
                    bar.advance()
                    if isinstance(found, tuple):
                        sizes[number] = found
                        continue
                    missing += found == MISSING
                    if len(reasons) < MAX_REASONS:
                        reasons[int(names[number])] = f"{display_name(name)}: {found}"
        finally:
            pool.shutdown(cancel_futures=True)
    images = Images(names, sizes, missing, reasons)
    _mark(files, images)
    return images


def _names(files: Sequence[MeasuredFile], wanted: np.ndarray) -> Iterator[str]:
    """The names of images, by their numbers among all images of good rows, ascending."""
    at = end = 0
    for file in files:
        for row in file.good[file.images[file.good] > 0]:
            end, begin = end + int(file.images[row]), end
            if at < len(wanted) and wanted[at] < end:
                images = read_conversation(file.rows[row]).images
                while at < len(wanted) and wanted[at] < end:
                    yield images[wanted[at] - begin]
                    at += 1


def _batches(order: np.ndarray, names: Iterator[str]) -> Iterator[tuple[np.ndarray, list[str]]]:
    for start in range(0, len(order), AT_ONCE):
        numbers = order[start : start + AT_ONCE]
        yield numbers, list(itertools.islice(names, len(numbers)))


def _mark(files: Sequence[MeasuredFile], images: Images) -> None:
    for file in files:
        row_of = np.repeat(np.arange(len(file)), file.images)
        used = file.status[row_of] == GOOD
        bad = images.size_of(file.names[used])[:, 0] == 0
        file.status[row_of[used][bad]] = BAD_IMAGE


def reason_of(images: Images, names: Sequence[str], hashes: Sequence[int]) -> str:
    """The reason for which a row is left out: its first bad image."""
    for name, number in zip(names, hashes, strict=True):
        if not images.size_of(np.array([number], np.uint64))[0, 0]:
            return images.reasons.get(number, f"{display_name(name)}: cannot be used")
    raise AssertionError("no bad image")


def most_frequent_sizes(sizes: np.ndarray, n: int) -> list[tuple[Size, int]]:
    """The most frequent sizes of images, uint32 [images, 2], and their numbers."""
    unique, counts = np.unique(sizes[:, 0].astype(np.uint64) << 32 | sizes[:, 1], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:n]
    return [((int(unique[i]) >> 32, int(unique[i]) & 0xFFFFFFFF), int(counts[i])) for i in order]
