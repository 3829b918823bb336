"""Read all of a prepared dataset back: checksums of files and images, every image decoded, every row parsed."""

import dataclasses
import fnmatch
import hashlib
import json
import zlib
from collections.abc import Iterator

import numpy as np

from llava_jax.console import InputError, Progress, note, plural, shorten
from llava_jax.data.conversations import read_conversation
from llava_jax.data.images import open_image
from llava_jax.data.urls import NamedBytes
from llava_jax.json_files import parse_json
from train.datasets.worker_processes import Report, run_jobs
from train.lengths import lengths_name, read_lengths
from train.prepared import INDEX, PreparedDataset, Shard
from train.stores import Store

BLOCK = 2**25  # bytes that are read at a time
MAX_NOTED = 10


@dataclasses.dataclass(frozen=True)
class Job:
    """A shard, and the arrays of its items: bytes `start` to `start + size` of each.

    crc           of each
    pixels        of images, as in the index
    images, ids   of rows: the number of images, the id as JSON
    """

    output: str
    shard: Shard
    start: np.ndarray
    size: np.ndarray
    crc: np.ndarray
    pixels: np.ndarray | None = None
    images: np.ndarray | None = None
    ids: list[bytes] | None = None


def verify(output: str, workers: int) -> int:
    """Check a dataset, and print what is damaged; returns the exit status.

    Raises:
      InputError: files are missing or have another size, or the index is damaged.
      OSError: the dataset cannot be read.
    """
    dataset = PreparedDataset(output)
    problems = _check_lengths(dataset)
    jobs = jobs_of(dataset)
    total = sum(job.shard["bytes"] for job in jobs)
    with Progress("verifying", total, "B") as bar:
        for found in run_jobs(verify_shard, jobs, min(workers, len(jobs)), lambda _, size: bar.advance(size)):
            problems += found
    for problem in sorted(problems)[:MAX_NOTED]:
        note(f"error: {problem}")
    if len(problems) > MAX_NOTED:
        note(f"and {plural(len(problems) - MAX_NOTED, 'more error')}")
    if not problems:
        rows, images = plural(len(dataset), "conversation"), plural(len(dataset.index.image_bytes), "image")
        note(f"{shorten(output)}: {rows} and {images} in {plural(len(jobs), 'shard')} are intact")
    return 1 if problems else 0


def jobs_of(dataset: PreparedDataset) -> list[Job]:
    """A job for each shard."""
    return [*_image_jobs(dataset), *_row_jobs(dataset)]


def _check_lengths(dataset: PreparedDataset) -> list[str]:
    """The problems of the files of lengths."""
    problems = []
    for name in fnmatch.filter(dataset.store.sizes(), lengths_name("*")):
        found = []
        for orders in (1, 2):
            try:
                read_lengths(dataset, name, orders)
            except InputError as error:
                found.append(str(error))
        if len(found) == 2:
            problems.append(found[0])
    return problems


def _image_jobs(dataset: PreparedDataset) -> Iterator[Job]:
    index, first = dataset.index, 0
    for shard in dataset.described["images"]:
        part = slice(first, first := first + shard["count"])
        yield Job(
            dataset.path,
            shard,
            index.image_start[part],
            index.image_bytes[part],
            index.image_crc[part],
            pixels=index.image_size[part],
        )


def _row_jobs(dataset: PreparedDataset) -> Iterator[Job]:
    index, first = dataset.index, 0
    for shard in dataset.described["conversations"]:
        part = slice(first, first := first + shard["count"])
        ends = index.id_end[part].tolist()
        begins = [int(index.id_end[part.start - 1]) if part.start else 0, *ends[:-1]]
        ids = [index.ids[a:b].tobytes() for a, b in zip(begins, ends, strict=True)]
        yield Job(
            dataset.path,
            shard,
            index.row_start[part],
            index.row_bytes[part],
            index.row_crc[part],
            images=index.row_images[part],
            ids=ids,
        )


def verify_shard(job: Job, report: Report) -> list[str]:
    """The problems of a shard.

    Raises:
      OSError: it cannot be read.
    """
    store, name = Store(job.output), job.shard["name"]
    where, problems = shorten(store.name_of(name)), []
    file, noun = _Stream(store, job.shard, report), "row" if job.images is not None else "image"
    for item, (start, size) in enumerate(zip(job.start.tolist(), job.size.tolist(), strict=True)):
        data = NamedBytes(file.read(start, size))
        data.name = noun
        if zlib.crc32(data) != job.crc[item]:
            reason: str | None = f"damaged (another checksum than in {INDEX})"
        else:
            reason = _row_problem(job, item, data) if noun == "row" else _image_problem(job, item, data)
        if reason:
            problems.append(f"{where}: {noun} {item} (byte {start:,}): {reason}")
    if file.digest() != job.shard["sha256"]:
        problems.append(f"{where}: damaged (another SHA-256 than in dataset.json)")
    return problems


def _image_problem(job: Job, item: int, data: bytes) -> str | None:
    assert job.pixels is not None
    try:
        size = open_image(data).size
    except InputError as error:
        return str(error)
    width, height = job.pixels[item].tolist()
    return None if size == (width, height) else f"has {size[0]}x{size[1]} pixels; {INDEX} says {width}x{height}"


def _row_problem(job: Job, item: int, data: bytes) -> str | None:
    assert job.images is not None and job.ids is not None
    try:
        row = parse_json(data, bounded=False)
        images = len(read_conversation(row).images)
    except InputError as error:
        return str(error)
    if images != job.images[item]:
        return f"has {plural(images, 'image')}; {INDEX} says {job.images[item]}"
    if "id" in row and isinstance(row["id"], str | int | float) and json.dumps(row["id"]).encode() != job.ids[item]:
        return f"has another id than {INDEX}"
    return None


class _Stream:
    """Reads a file once, from its start to its end."""

    def __init__(self, store: Store, shard: Shard, report: Report):
        self._store, self._shard, self._report = store, shard, report
        self._digest, self._begin, self._data = hashlib.sha256(), 0, b""

    def read(self, start: int, size: int) -> bytes:
        """Bytes of the file; `start` is not before that of the last call."""
        while self._begin + len(self._data) < start + size:
            self._advance(start)
        return self._data[start - self._begin : start - self._begin + size]

    def digest(self) -> str:
        """The SHA-256 of the whole file."""
        while (end := self._begin + len(self._data)) < self._shard["bytes"]:
            self._advance(end)
        return self._digest.hexdigest()

    def _advance(self, keep: int) -> None:
        """Read the next block, and forget what is before byte `keep`."""
        end = self._begin + len(self._data)
        block = self._store.read_range(self._shard["name"], end, min(BLOCK, self._shard["bytes"] - end))
        self._digest.update(block)
        self._report(0, len(block))
        dropped = min(max(keep - self._begin, 0), len(self._data))
        self._begin, self._data = self._begin + dropped, self._data[dropped:] + block
