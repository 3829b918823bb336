"""The conversations of data files, one at a time: read, check, tokenize and lay them out, then read their images.

`llava_jax.data.conversations` reads the format; several files form one list (`train.mixture`). The size of a
conversation (positions, tiles) does not depend on its pixels: `Samples.measure` is cheap, `Samples.load` reads the
images. Both return a `BadSample` instead of raising an error.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, note, shorten
from llava_jax.data.buckets import TILES
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.images import TileLayout, read_tiles, tile_layout
from llava_jax.data.splice import Row, count_features
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.data.urls import display_name
from train import mixture
from train.encoding import Encoded, Encoder
from train.lengths import Length, Lengths, read_lengths
from train.row_sources import PreparedRows, RowSource, open_source

MAX_NAMED = 3  # bad samples that an error names
MAX_SIZES = 2**16  # sizes of images whose layouts are remembered
MAX_TILES = TILES[-1]  # of a conversation, without --tiles-per-row


@dataclasses.dataclass(frozen=True)
class Sample:
    """A measured conversation: its size, from which rows are planned."""

    number: int  # among all of a run; each repetition of a row has its own
    data: str  # the data file or prepared dataset
    index: int  # of its row there
    id: Any  # of the row; without one, the index
    epoch: int
    length: int  # positions after splicing and truncation
    truncated: int  # positions that truncation removed
    ids: int  # number of ids that are left
    layouts: tuple[TileLayout, ...]  # of the images that are left
    encoded: Encoded | None = None  # if it has just been tokenized, and its length was not known before

    @property
    def tiles(self) -> int:
        return sum(layout.tiles for layout in self.layouts)

    def bad(self, reason: str, file: str | None = None) -> "BadSample":
        """This conversation as a bad sample."""
        return BadSample(self.number, self.data, self.index, self.id, file, reason)


@dataclasses.dataclass(frozen=True)
class BadSample:
    """A conversation that cannot be trained on."""

    number: int
    data: str
    index: int
    id: Any
    file: str | None  # the broken image, if any
    reason: str

    def describe(self, *, path: bool = True) -> str:
        """Location and reason, for an error; without the data file's `path` if the error already names it."""
        name = "" if self.id == self.index else f" (id {shorten(self.id, 40)})"
        return f"{shorten(self.data) + ' ' if path else ''}row {self.index}{name}: {self.reason}"


def describe_first(bad: Sequence[BadSample], total: int = 0, *, path: str = "") -> str:
    """The first few bad samples in a line, and the number of further ones.

    Args:
      total: number of bad samples; 0 for those in `bad`.
      path: the data file that the line already names, which is not repeated.
    """
    descriptions = []
    for one in bad[:MAX_NAMED]:
        descriptions.append(one.describe(path=shorten(one.data) != path))
        path = shorten(one.data)
    more = max(total, len(bad)) - len(descriptions)
    return "; ".join([*descriptions, *[f"and {more} more"] * bool(more)])


class SampleSource(Protocol):
    """A source of conversations: `Samples`, or the assumption of a plan (`train.synthetic_data`)."""

    path: str
    model: LlavaConfig
    has_image: np.ndarray
    max_images: int
    repeats: int
    template: str

    def __len__(self) -> int: ...
    def measure(self, index: int, epoch: int = 0) -> Sample | BadSample: ...
    def load(self, sample: Sample) -> Row | BadSample: ...


class Samples:
    """The conversations of one or several data files: a `SampleSource`.

    Attributes:
      path: the file, or a short description of the files.
      model: the configuration that decides tiles and tokens.
      has_image: bool [n].
      max_images: the maximum number of images of a row.
      repeats: the maximum number of times that a row occurs.
      template: the name of the conversation template.
      sources: the data files and prepared datasets.
    """

    def __init__(
        self,
        data: str | Sequence[str],
        image_folder: str,
        model: LlavaConfig,
        tokenizer: Tokenizer,
        *,
        template: str | None = None,
        max_length: int | None = None,
        image_first: str = "as_is",
        seed: int = 0,
        follow_links: bool = False,
    ):
        """Read data files.

        Args:
          data: the values of `--data` (`train.mixture`).
          template: None for the model's own.
          max_length: positions after splicing at which a conversation is truncated, on the right.
          image_first: "as_is" puts the mark of a single image before its turn, as the reference does; "random" before
            or after it, as the paper does (LLaVA, Liu et al. 2023, 4.2), drawn anew for each epoch.
          follow_links: follow links that lead out of the image folder.

        Raises:
          InputError: a file, the folder or the template cannot be used.
        """
        self._encoder = Encoder(model, tokenizer, template)
        self.template = self._encoder.name
        self.model, self._max_length = model, max_length
        self._random_order, self._seed = image_first == "random", seed
        self._lay_out = functools.lru_cache(MAX_SIZES)(functools.partial(tile_layout, config=model))
        self._features = functools.lru_cache(MAX_SIZES)(functools.partial(count_features, config=model))
        self._open(mixture.read_parts(data), ImageFolder(image_folder, follow_links=follow_links))
        self._lengths = [self._known_lengths(source) for source in self.sources]

    def _open(self, parts: Sequence[mixture.Part], folder: ImageFolder) -> None:
        """Open all data, and choose the rows to use from each part."""
        self.path = mixture.describe(parts)
        paths = list(dict.fromkeys(part.path for part in parts))
        self.sources = [open_source(path, folder) for path in paths]
        for source in self.sources:
            if self._encoder.template.style == "plain" and source.system:
                name = shorten(source.path)
                note(f"warning: {name}: the template {self.template} has no place for its system messages")
        self._source_of = [paths.index(part.path) for part in parts]
        chosen = mixture.choose(parts, [len(self.sources[i]) for i in self._source_of], self._seed)
        self.repeats = mixture.repeats(parts, chosen)
        self._part = np.repeat(np.arange(len(parts), dtype=np.int32), list(map(len, chosen)))
        self._index = np.concatenate(chosen)
        counts = [self.sources[i].image_counts[rows] for i, rows in zip(self._source_of, chosen, strict=True)]
        self.has_image, self.max_images = np.concatenate(counts) > 0, max(int(count.max()) for count in counts)

    def _known_lengths(self, source: RowSource) -> Lengths:
        """The lengths of a source's rows that have been measured for this tokenizer and template, to be completed."""
        orders = 1 + self._random_order
        known = None
        if isinstance(source, PreparedRows):
            known = read_lengths(source.dataset, self._encoder.lengths_name(orders), orders)
        return known or Lengths(source.image_counts, orders)

    def __len__(self) -> int:
        return len(self._index)

    def measure(self, index: int, epoch: int = 0) -> Sample | BadSample:
        """Measure a conversation: tokenize it, unless its length is known, and lay out its images.

        The result depends only on the arguments and the seed.
        """
        number, part, row = int(index), self._source_of[self._part[index]], int(self._index[index])
        source, lengths, order = self.sources[part], self._lengths[part], self._order(number, epoch)
        encoded, image = None, None
        try:
            length = lengths.get(order, row)
            if length is None:
                conversation = source.conversation(row)
                for image in conversation.images:
                    source.check_image(image)
                image = None
                encoded = self._encoder.encode(conversation, order)
                length = Length.of(encoded.ids, encoded.labels)
            layouts = []
            for place in range(len(length.images)):
                image = encoded.names[place] if encoded else None
                layouts.append(self._layout(source, row, place, image))
            image = None
            if encoded:
                lengths.set(order, row, length)  # after the sizes of its images, which are then known as well
            features = [self._features(layout) for layout in layouts]
            positions = length.spliced(features)
            kept = length.tokens if self._max_length is None else length.ids_within(self._max_length, features)
            if not 0 < length.label < kept:
                raise InputError(f"no answer within {self._max_length} positions" if length.label > 0 else "no answer")
            images = sum(place < kept for place in length.images.tolist())
        except InputError as error:
            return BadSample(number, source.path, row, source.id(row), image and display_name(image), str(error))
        room = positions if self._max_length is None else min(positions, self._max_length)
        return Sample(
            number,
            source.path,
            row,
            source.id(row),
            epoch,
            room,
            positions - room,
            kept,
            tuple(layouts[:images]),
            encoded,
        )

    def encode(self, sample: Sample) -> Encoded:
        """The tokens of a measured conversation."""
        if sample.encoded:
            return sample.encoded
        source = self.sources[self._source_of[self._part[sample.number]]]
        return self._encoder.encode(source.conversation(sample.index), self._order(sample.number, sample.epoch))

    def load(self, sample: Sample) -> Row | BadSample:
        """Read a conversation's tiles."""
        source = self.sources[self._source_of[self._part[sample.number]]]
        tiles, image = [], None
        try:
            encoded = self.encode(sample)
            for place, layout in enumerate(sample.layouts):
                image = encoded.names[place]
                tiles.append(read_tiles(source.image(sample.index, place, image), layout, self.model))
        except InputError as error:
            return sample.bad(str(error), image and display_name(image))
        ids, labels = encoded.ids[: sample.ids], encoded.labels[: sample.ids]
        return Row(ids, sample.layouts, tuple(tiles), labels)

    def _order(self, number: int, epoch: int) -> int:
        """The place of a single image in its turn: 0 for in front of the text, 1 for after it."""
        return int(self._random_order and np.random.default_rng((self._seed, epoch, number)).random() < 0.5)

    def _layout(self, source: RowSource, row: int, place: int, name: str | None) -> TileLayout:
        """The layout of an image. Only anyres needs its size; otherwise the image is not opened before its batch is
        loaded, so that each process opens only its own images."""
        side = self.model.vision.image_size
        size = source.image_size(row, place, name) if self.model.aspect_ratio == "anyres" else (side, side)
        return self._lay_out(size)


def measure_within(samples: SampleSource, max_tiles: int, index: int, epoch: int = 0) -> Sample | BadSample:
    """`samples.measure`, but a conversation with more than `max_tiles` tiles, the room of a row, is bad."""
    one = samples.measure(index, epoch)
    if isinstance(one, Sample) and one.tiles > max_tiles:
        return one.bad(f"{one.tiles} tiles, and a row has room for {max_tiles} (--tiles-per-row)")
    return one


def split_bad(found: Iterable[Sample | BadSample]) -> tuple[list[Sample], list[BadSample]]:
    """Split into good and bad samples, each in order."""
    found = list(found)
    return [one for one in found if isinstance(one, Sample)], [one for one in found if isinstance(one, BadSample)]
