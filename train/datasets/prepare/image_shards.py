"""Write the shards of images of a prepared dataset: tar files, each written by one process as a whole.

A shard is complete if the file with its arrays (`images-00007.part.safetensors`) is there too. It is written last, and
removed when the index has the arrays of all shards.
"""

import dataclasses
import hashlib
import io
import json
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load, save

from llava_jax.console import InputError, shorten
from llava_jax.data.images import FORMATS, MAX_ASPECT, MAX_FILE, open_image
from llava_jax.data.urls import NamedBytes
from llava_jax.files import open_regular
from llava_jax.json_files import parse_json
from train.datasets.prepare.plan import TAR_BLOCK, TAR_END, image_error
from train.datasets.worker_processes import Report
from train.prepared import Shard, images_name
from train.stores import Store, naming

QUALITY = 90  # of images that are scaled down, without --quality
MAX_JPEG_SIDE = 65500
MAX_PART = 2**32
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
SUFFIXES = tuple(dict.fromkeys(EXTENSIONS.values()))


def part_name(number: int) -> str:
    return images_name(number).replace(".tar", ".part.safetensors")


def member_name(image: int, suffix: int) -> str:
    """The name of an image in its tar."""
    return f"{image:09}.{SUFFIXES[suffix]}"


@dataclasses.dataclass(frozen=True)
class Job:
    """A shard to write.

    output    the dataset
    folder    a local directory for files that are not complete, on the same file system if the dataset is local
    number    of the shard
    first     the number of its first image
    paths     of its images; those in `folder` are removed afterwards
    """

    output: str
    folder: str
    number: int
    first: int
    paths: list[str]
    max_side: int | None
    quality: int | None


@dataclasses.dataclass(frozen=True)
class ImagePart:
    """What the index needs to know of a shard with k images.

    image    uint32 [k], their numbers
    start, size, crc, pixels   as `image_start`, `image_bytes`, `image_crc` and `image_size` of the index
    suffix   uint8 [k], of their names (`SUFFIXES`)
    shard    the file
    broken   the images that are left out, by their number, and why
    """

    image: np.ndarray
    start: np.ndarray
    size: np.ndarray
    crc: np.ndarray
    pixels: np.ndarray
    suffix: np.ndarray
    shard: Shard
    broken: dict[int, str]

    def save(self) -> bytes:
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return save(arrays, {"shard": json.dumps(self.shard), "broken": json.dumps(list(self.broken.items()))})

    @classmethod
    def load(cls, data: bytes, where: str) -> "ImagePart":
        """
        Raises:
          InputError: the file is damaged.
        """
        try:
            described = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            return cls(**load(data), shard=json.loads(described["shard"]), broken=dict(json.loads(described["broken"])))
        except (SafetensorError, InputError, KeyError, TypeError, ValueError):
            raise InputError(f"{where}: damaged; remove it, and repeat the command") from None


def write_shard(job: Job, report: Report) -> None:
    """Write a shard, and then its part file.

    Raises:
      OSError: it cannot be written, or an image cannot be read for another reason than that it is missing or broken.
    """
    store, name = Store(job.output), images_name(job.number)
    staged = Path(job.folder) / f"{name}.incomplete"
    try:
        with naming(staged), open(staged, "wb") as file:
            part = _write_images(job, _Tar(file), report)
        store.publish(staged, name)
    finally:
        staged.unlink(missing_ok=True)
    store.write(part_name(job.number), part.save())
    for path in job.paths:
        if os.path.dirname(path) == job.folder:
            os.unlink(path)


def _write_images(job: Job, tar: "_Tar", report: Report) -> ImagePart:
    rows: list[tuple[int, ...]] = []
    broken = {}
    for image, path in enumerate(job.paths, job.first):
        try:
            file = _read(path, is_url=os.path.dirname(path) == job.folder)
            data, (width, height), suffix = encode_image(file, job.max_side, job.quality)
        except InputError as error:
            broken[image] = str(error)
            report(1, 0)
            continue
        start = tar.add(member_name(image, suffix), data)
        rows.append((image, start, len(data), zlib.crc32(data), width, height, suffix))
        report(1, len(file))
    size, digest = tar.end()
    table = np.array(rows, np.int64).reshape(-1, 7)
    return ImagePart(
        image=table[:, 0].astype(np.uint32),
        start=table[:, 1].astype(np.uint64),
        size=table[:, 2].astype(np.uint32),
        crc=table[:, 3].astype(np.uint32),
        pixels=table[:, 4:6].astype(np.int32),
        suffix=table[:, 6].astype(np.uint8),
        shard=Shard(name=images_name(job.number), bytes=size, sha256=digest, count=len(rows)),
        broken=broken,
    )


def _read(path: str, is_url: bool) -> NamedBytes:
    try:
        with open_regular(path) as file:
            data = NamedBytes(file.read(MAX_FILE + 1))
    except (OSError, ValueError) as error:
        raise image_error(path, error) from None
    data.name = "a data: URL" if is_url else shorten(path)
    if len(data) > MAX_FILE:
        raise InputError(f"{data.name}: an image file may have at most {MAX_FILE:,} bytes")
    return data


def encode_image(data: bytes, max_side: int | None, quality: int | None) -> tuple[bytes, tuple[int, int], int]:
    """Decode an image; unless it is larger than `max_side`, or a `quality` is given, its file stays as it is.

    It also stays as it is if it is no larger than `max_side`, and a JPEG of this quality would not be smaller.

    Returns:
      The file, width and height of the image as `open_image` returns it, and the number of its suffix.

    Raises:
      InputError: as `open_image`.
    """
    image = open_image(data)
    size = _scaled(image.size, max_side)
    if size != image.size or (quality and max(size) <= MAX_JPEG_SIDE):
        smaller = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        smaller.save(file, "JPEG", quality=quality or QUALITY)
        if size != image.size or file.tell() < len(data):
            return file.getvalue(), size, SUFFIXES.index("jpg")
    with Image.open(io.BytesIO(data), formats=list(FORMATS)) as header:
        return data, image.size, SUFFIXES.index(EXTENSIONS[header.format or ""])


def _scaled(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    long = max(size)
    if max_side is None or long <= max_side:
        return size
    least = max(2, -(-max_side // MAX_ASPECT))  # what `open_image` supports
    width, height = (max(round(side * max_side / long), least) for side in size)
    return width, height


class _Tar:
    """Writes a tar file whose bytes depend on nothing but names and contents."""

    def __init__(self, file):
        self._file, self._digest, self._at = file, hashlib.sha256(), 0

    def add(self, name: str, data: bytes) -> int:
        """Write a file; returns the byte at which its contents begin."""
        header = tarfile.TarInfo(name)
        header.size = len(data)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        start = self._at
        self._write(data)
        self._write(bytes(-len(data) % TAR_BLOCK))
        return start

    def end(self) -> tuple[int, str]:
        """Write the end; returns the number of bytes and the SHA-256 of the whole file."""
        self._write(bytes(TAR_END))
        return self._at, self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._at += len(data)
