"""Read captions and boxes of images: COCO's annotation files, or JSON lines.

COCO's captions and objects are two files (`captions_train2017.json`, `instances_train2017.json`). A line of JSON lines
has both, as in the reference's `caps_boxes_coco2014_val_80.jsonl`:

    {"id": "000000296284", "image": "000000296284.jpg", "captions": ["A rack with some doughnuts.", ...],
     "instances": [{"category": "donut", "bbox": [0.37, 0.584, 0.504, 0.709]}, ...]}
"""

import collections
import os
from collections.abc import Collection, Iterable
from pathlib import Path

import msgspec

from llava_jax.console import InputError, note, plural, shorten
from llava_jax.files import read_bytes
from llava_jax.json_files import decode_json

MAX_FILE_BYTES = 4 * 2**30  # instances_train2017.json has 450 MB
DECIMALS = 3  # of a box
NUL = "\0"


class Box(msgspec.Struct, frozen=True, gc=False):
    """An object: left, top, right and bottom as fractions of the image's sides, with three decimals."""

    category: str
    bbox: tuple[float, float, float, float]


class Record(msgspec.Struct, frozen=True):
    """What is known of an image. `image` is its file name."""

    id: str
    image: str
    captions: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()


def read_records(captions: str | os.PathLike, boxes: str | os.PathLike | None = None) -> list[Record]:
    """Read records, in the order of the file.

    Args:
      captions: COCO's file of captions, or JSON lines (`.jsonl`).
      boxes: COCO's file of objects, about the same images.

    Raises:
      InputError: a file cannot be read, or an entry is invalid; names the file and the entry.
    """
    if Path(captions).suffix == ".jsonl":
        if boxes is not None:
            raise InputError(f"--boxes {shorten(boxes)}: {shorten(captions)} has boxes itself; leave out --boxes")
        records = _read_lines(captions)
    else:
        records = _read_coco(captions, boxes)
    if not records:
        raise InputError(f"{shorten(captions)}: has no images")
    counts = collections.Counter(record.id for record in records)
    if repeated := next((name for name, number in counts.items() if number > 1), None):
        raise InputError(f"{shorten(captions)}: id {shorten(repeated)} is there {counts[repeated]} times")
    return records


# ---------------------------------------------------------------- JSON lines


class _Line(msgspec.Struct):
    id: str | int
    image: str
    captions: list[str] = []
    instances: list[Box] = []


def _read_lines(path: str | os.PathLike) -> list[Record]:
    records = []
    for number, line in enumerate(read_bytes(path, MAX_FILE_BYTES).split(b"\n"), 1):
        if line.strip():
            where = f"{shorten(path)} line {number}"
            found = decode_json(line, _Line, where)
            for box in found.instances:
                left, top, right, bottom = box.bbox
                if not (0 <= left <= right <= 1 and 0 <= top <= bottom <= 1):
                    raise InputError(
                        f"{where}: bbox {shorten(list(box.bbox))} must be left, top, right, bottom as fractions of the "
                        "image's sides"
                    )
            boxes = tuple(Box(_one_line(box.category), box.bbox) for box in found.instances)
            records.append(_record(str(found.id), found.image, found.captions, boxes, where))
    return records


def _record(name: str, image: str, captions: Iterable[str], boxes: tuple[Box, ...], where: str) -> Record:
    """A record whose texts are single lines."""
    if not image or NUL in image:
        raise InputError(f"{where}: image {shorten(repr(image))} is not a file name")
    return Record(name, image, tuple(filter(None, map(_one_line, captions))), boxes)


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ---------------------------------------------------------------- COCO


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    width: int = 0
    height: int = 0


class _Caption(msgspec.Struct, gc=False):
    image_id: int
    caption: str


class _Captions(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Caption]


class _Category(msgspec.Struct):
    id: int
    name: str


class _Object(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]  # left, top, width, height in pixels
    iscrowd: int = 0


class _Objects(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Object]
    categories: list[_Category]


def _read_coco(captions: str | os.PathLike, boxes: str | os.PathLike | None) -> list[Record]:
    found = decode_json(read_bytes(captions, MAX_FILE_BYTES), _Captions, shorten(captions))
    texts: dict[int, list[str]] = {image.id: [] for image in found.images}
    for i, annotation in enumerate(found.annotations):
        if annotation.image_id not in texts:
            raise InputError(f"{shorten(captions)}: annotations[{i}]: no image has id {annotation.image_id}")
        texts[annotation.image_id].append(annotation.caption)
    things = _read_objects(boxes, texts.keys()) if boxes is not None else {}
    records = []
    for i, image in enumerate(found.images):
        if texts[image.id]:
            where = f"{shorten(captions)}: images[{i}]"
            name = f"{image.id:012}"  # as in the original's data
            records.append(_record(name, image.file_name, texts[image.id], tuple(things.get(image.id, ())), where))
    if left := len(found.images) - len(records):
        note(f"{shorten(captions)}: {plural(left, 'image')} without captions left out")
    return records


def _read_objects(path: str | os.PathLike, wanted: Collection[int]) -> dict[int, list[Box]]:
    """The boxes of each wanted image, by its id. The box of a crowd is of a region, not of an object: it is left out,
    as are boxes outside their image."""
    name = shorten(path)
    found = decode_json(read_bytes(path, MAX_FILE_BYTES), _Objects, name)
    images = {image.id: image for image in found.images}
    categories = {category.id: _one_line(category.name) for category in found.categories}
    if not any(wanted_id in images for wanted_id in wanted):
        raise InputError(f"{name}: has none of the images with captions; are the files of the same split?")
    boxes: dict[int, list[Box]] = collections.defaultdict(list)
    crowds = outside = 0
    for i, thing in enumerate(found.annotations):
        if thing.image_id not in images:
            raise InputError(f"{name}: annotations[{i}]: no image has id {thing.image_id}")
        if thing.category_id not in categories:
            raise InputError(f"{name}: annotations[{i}]: no category has id {thing.category_id}")
        if thing.image_id in wanted:
            if thing.iscrowd:
                crowds += 1
            elif bbox := _normalise(thing.bbox, images[thing.image_id], f"{name}: annotations[{i}]"):
                boxes[thing.image_id].append(Box(categories[thing.category_id], bbox))
            else:
                outside += 1
    for number, what in ((crowds, "of crowds"), (outside, "without area in their image")):
        if number:
            note(f"{name}: boxes left out: {number:,} {what}")
    return boxes


def _normalise(bbox: tuple, image: _Image, where: str) -> tuple[float, float, float, float] | None:
    """Left, top, width and height in pixels as edges in fractions of the image's sides; None if nothing is left."""
    x, y, width, height = bbox
    if image.width < 1 or image.height < 1:
        raise InputError(f"{where}: its image has {image.width} x {image.height} pixels")
    if width < 0 or height < 0:
        raise InputError(f"{where}: bbox {shorten(list(bbox))} must be left, top, width and height in pixels")
    sides = (image.width, image.height, image.width, image.height)
    left, top, right, bottom = (
        round(min(max(side / whole, 0.0), 1.0), DECIMALS)
        for side, whole in zip((x, y, x + width, y + height), sides, strict=True)
    )
    return (left, top, right, bottom) if left < right and top < bottom else None
