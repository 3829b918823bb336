"""Image features on the devices, kept by the hash of the image: an image that was seen is not encoded again. And the
images that are to be encoded, read ahead in threads."""

import collections
import concurrent.futures
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from infer import compiled
from infer.prompt import PromptImage
from llava_jax.data.buckets import Buckets
from llava_jax.data.images import image_tile_counts
from llava_jax.models import llava
from llava_jax.sharding.partition import Partition, put_tiles

MAX_BYTES = 2**29  # of features kept, on each device
MAX_TILES = 8  # encoded at once, unless one image has more
READERS = 4  # threads that read images
WAIT_SECONDS = 0.02  # until what was submitted or cancelled meanwhile is seen


class ImageFeatures:
    """Encodes images, and keeps the features of the last ones."""

    def __init__(self, params: llava.Params, partition: Partition, buckets: Buckets, max_bytes: int = MAX_BYTES):
        self.params, self.partition, self.buckets, self.max_bytes = params, partition, buckets, max_bytes
        self._tables: collections.OrderedDict[bytes, jax.Array] = collections.OrderedDict()  # oldest first
        self._bytes = 0

    def __contains__(self, image: PromptImage) -> bool:
        return image.key in self._tables

    def find(self, image: PromptImage) -> jax.Array | None:
        """The feature table [R, D] of an image that was encoded."""
        if image.key in self._tables:
            self._tables.move_to_end(image.key)
        return self._tables.get(image.key)

    def table(self, image: PromptImage) -> jax.Array:
        """The feature table of an image, which is read and encoded if it has to be."""
        table = self.find(image)
        return self.encode([image], [image.read()])[0] if table is None else table

    def encode(self, images: Sequence[PromptImage], tiles: Sequence[np.ndarray]) -> list[jax.Array]:
        """Encode images at once, and keep their feature tables [R, D].

        Args:
          tiles: uint8 [T, H, W, 3] of each image.
        """
        count = sum(len(part) for part in tiles)
        padding = np.zeros((self._bucket(count) - count, *tiles[0].shape[1:]), np.uint8)
        features_TPD = self._features(np.concatenate([*tiles, padding]))
        tables, first = [], 0
        for image, part in zip(images, tiles, strict=True):
            table_RD = compiled.image_table(
                self.params, features_TPD, np.int32(first), tiles=len(part), partition=self.partition
            )
            tables.append(table_RD)
            first += len(part)
            self._keep(image.key, table_RD)
        return tables

    def _features(self, tiles_THW3: np.ndarray) -> jax.Array:
        assert self.partition.mesh is not None
        return compiled.encode(self.params, put_tiles(tiles_THW3, self.partition.mesh), partition=self.partition)

    def _bucket(self, tiles: int) -> int:
        """The number of tiles that is encoded for so many: every device has as many."""
        devices = self.partition.device_count
        return self.buckets.up("tiles", -(-tiles // devices)) * devices

    def warm_up(self) -> list[jax.Array]:
        """Compile for every number of tiles. Returns a feature table of each size that an image may have."""
        counts, config = image_tile_counts(self.partition.config), self.partition.config
        side, tables = config.vision.image_size, {}
        for bucket in sorted({self._bucket(n) for n in range(1, max(MAX_TILES, *counts) + 1)}):
            tiles = np.zeros((bucket, side, side, 3), np.uint8)
            features_TPD = self._features(tiles)
            for n in counts:
                if n <= bucket:
                    tables[n] = compiled.image_table(
                        self.params, features_TPD, np.int32(0), tiles=n, partition=self.partition
                    )
        return list(tables.values())

    def clear(self) -> None:
        """Forget all features."""
        self._tables.clear()
        self._bytes = 0

    def _keep(self, key: bytes, table: jax.Array) -> None:
        if key in self._tables or table.nbytes > self.max_bytes:
            return
        self._tables[key] = table
        self._bytes += table.nbytes
        while self._bytes > self.max_bytes:
            _, oldest = self._tables.popitem(last=False)
            self._bytes -= oldest.nbytes


class ImageReader:
    """Reads the tiles of images in threads, before they are needed."""

    def __init__(self):
        self._reads: dict[bytes, concurrent.futures.Future] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(READERS, "image")

    def want(self, images: Iterable[PromptImage]) -> None:
        """Read these images, and forget all others."""
        wanted: dict[bytes, PromptImage] = {}
        for image in images:
            wanted.setdefault(image.key, image)  # an error names the first to need it
        for key in [key for key in self._reads if key not in wanted]:
            self._reads.pop(key).cancel()
        for key, image in wanted.items():
            if key not in self._reads:
                self._reads[key] = self._pool.submit(image.read)

    def is_ready(self, image: PromptImage) -> bool:
        """Whether `take` would not wait."""
        return image.key in self._reads and self._reads[image.key].done()

    def take(self, image: PromptImage) -> np.ndarray:
        """The tiles of an image that is wanted.

        Raises:
          InputError: it cannot be read.
        """
        return self._reads.pop(image.key).result()

    def take_good(self, images: Iterable[PromptImage], most: int) -> dict[PromptImage, np.ndarray]:
        """The tiles of those of the images that are read by now, at most so many."""
        taken: dict[PromptImage, np.ndarray] = {}
        for image in images:
            is_good = self.is_ready(image) and not self._reads[image.key].exception()
            if is_good and image.layout.tiles <= most:
                taken[image] = self.take(image)
                most -= image.layout.tiles
        return taken

    def wait(self, images: Iterable[PromptImage]) -> None:
        """Wait until one of the images is read, of those that are wanted, or for `WAIT_SECONDS`."""
        reads = [self._reads[image.key] for image in images if image.key in self._reads]
        concurrent.futures.wait(reads, WAIT_SECONDS, concurrent.futures.FIRST_COMPLETED)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
