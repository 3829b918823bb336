"""Write the shards of conversations of a prepared dataset, JSON lines, and its index."""

import array
import contextlib
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llava_jax.console import InputError, Progress, shorten
from llava_jax.data.conversations import Conversation, has_system, read_conversation
from train.datasets.prepare.image_shards import ImagePart, member_name
from train.datasets.prepare.plan import Plan
from train.prepared import MAX_ROW, Description, Index, Shard, conversations_name
from train.row_sources import row_id
from train.stores import Store, naming

REPLACED = ("image", "images", "system", "conversations", "messages")  # keys of a row that names no files in the folder


def write_conversations(
    plan: Plan, parts: Sequence[ImagePart], store: Store, folder: Path, max_bytes: int
) -> tuple[Index, Description]:
    """Write the rows that are not left out. The index and its description are returned, not written.

    Args:
      parts: the shards of images.
      folder: a local directory, as in `image_shards.Job`.

    Raises:
      OSError: a shard cannot be written.
    """
    images = _Images(plan, parts)
    start, size, crc, counts = array.array("Q"), array.array("I"), array.array("I"), array.array("H")
    ends, ids, image_of, system = array.array("Q"), bytearray(), array.array("I"), False
    left_out = plan.is_left_out()
    with Progress("writing conversations", len(plan), "rows") as bar, _Shards(store, folder, max_bytes) as shards:
        for source_number, index, is_out in zip(plan.source_of, plan.rows.tolist(), left_out, strict=True):
            bar.advance()
            if is_out:
                continue
            source = plan.sources[source_number]
            row, numbers = source.file.row(index), source.images_of(index)
            try:
                line = make_line(row, read_conversation(row), [images.name(i) for i in numbers])
            except InputError as error:
                raise InputError(f"{shorten(source.file.path)} row {index}: {error}") from None
            at, length = shards.add(line)
            start.append(at)
            size.append(length)
            crc.append(zlib.crc32(line[:length]))
            counts.append(len(numbers))
            image_of.extend(images.number[numbers].tolist())
            ids += json.dumps(row_id(row, index)).encode()
            ends.append(len(ids))
            system = system or has_system(row)
    index = Index(
        row_start=np.array(start, np.uint64),
        row_bytes=np.array(size, np.uint32),
        row_crc=np.array(crc, np.uint32),
        row_images=np.array(counts, np.uint16),
        id_end=np.array(ends, np.uint64),
        ids=np.frombuffer(bytes(ids), np.uint8),
        image_of=np.array(image_of, np.uint32),
        image_start=_joined([part.start for part in parts], np.uint64),
        image_bytes=_joined([part.size for part in parts], np.uint32),
        image_crc=_joined([part.crc for part in parts], np.uint32),
        image_size=_joined([part.pixels for part in parts], np.int32, 2),
    )
    digest = hashlib.sha256(index.save()).hexdigest()
    image_shards = [part.shard for part in parts]
    return index, Description(format=1, index=digest, system=system, conversations=shards.written, images=image_shards)


def make_line(row: dict[str, Any], conversation: Conversation, names: Sequence[str]) -> bytes:
    """A row as a line of a shard: unchanged, unless it names images by `data:` or `file:` URLs or absolute paths.

    Such a row is written in the original's format, with the `names` of its images in the tar files.

    Raises:
      InputError: the line would be too long, or cannot be written as JSON.
    """
    if any(_is_foreign(name) for name in conversation.images):
        kept = {key: value for key, value in row.items() if key not in REPLACED}
        system = {"system": conversation.system} if conversation.system else {}
        row = kept | {"images": list(names)} | system | {"conversations": conversation.turns}
    try:
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()
    except RecursionError:
        raise InputError("nested too deeply") from None
    except UnicodeEncodeError:  # an unpaired surrogate under a key that is not read
        line = json.dumps(row, separators=(",", ":")).encode()
    if len(line) > MAX_ROW:
        raise InputError(f"has {len(line):,} bytes; a row may have at most {MAX_ROW:,}")
    return line + b"\n"


def _is_foreign(name: str) -> bool:
    return name.startswith("/") or name[:5].lower() in ("data:", "file:")


def _joined(arrays: list[np.ndarray], dtype: Any, columns: int = 0) -> np.ndarray:
    return np.concatenate([np.zeros((0, columns) if columns else 0, dtype), *arrays])


class _Images:
    """The images that were written.

    number  int64 [m], the number in the index of each image of the plan
    """

    def __init__(self, plan: Plan, parts: Sequence[ImagePart]):
        written = _joined([part.image for part in parts], np.uint32)
        self.number = np.zeros(len(plan.sizes), np.int64)
        self.number[written] = np.arange(len(written))
        self._suffix = np.zeros(len(plan.sizes), np.uint8)
        self._suffix[written] = _joined([part.suffix for part in parts], np.uint8)

    def name(self, image: int) -> str:
        return member_name(image, int(self._suffix[image]))


class _Shards(contextlib.AbstractContextManager):
    """Writes lines into shards, each of which appears as a whole.

    written  the shards
    """

    def __init__(self, store: Store, folder: Path, max_bytes: int):
        self._store, self._folder, self._max = store, folder, max_bytes
        self.written: list[Shard] = []
        self._file: BinaryIO | None = None
        self._name, self._size, self._count = "", 0, 0

    def add(self, line: bytes) -> tuple[int, int]:
        """Write a line; returns its first byte in its shard, and its bytes without the newline."""
        if self._file and self._size + len(line) > self._max:
            self._publish()
        if not self._file:
            self._name = conversations_name(len(self.written))
            self._staged = self._folder / f"{self._name}.incomplete"
            self._file = self._staged.open("wb")
            self._size, self._count, self._digest = 0, 0, hashlib.sha256()
        with naming(self._staged):
            self._file.write(line)
        self._digest.update(line)
        self._size, self._count = self._size + len(line), self._count + 1
        return self._size - len(line), len(line) - 1

    def _publish(self) -> None:
        assert self._file
        with naming(self._staged):
            self._file.close()
        self._file = None
        self._store.publish(self._staged, self._name)
        shard = Shard(name=self._name, bytes=self._size, sha256=self._digest.hexdigest(), count=self._count)
        self.written.append(shard)

    def __exit__(self, kind, *_) -> None:
        if self._file and kind is None:
            self._publish()
        elif self._file:
            self._file.close()
            self._staged.unlink(missing_ok=True)
