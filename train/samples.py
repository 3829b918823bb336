"""Conversations of a data file, one at a time: read, checked, tokenized, laid out; then their images.

The format is that of `llava_jax.data.conversations`; several files make one list (`train.mixture`). What a conversation
takes of a row (positions, tiles) is known without its pixels: `Samples.measure` is cheap, `Samples.load` reads the
images. Either returns a `BadSample` instead of raising an error.
"""

import collections
import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, note, shorten
from llava_jax.data.buckets import TILES
from llava_jax.data.conversations import count_images, has_system, read_conversation, read_rows, warn_unknown_keys
from llava_jax.data.images import ImageFolder, TileLayout, image_size, read_tiles, tile_layout
from llava_jax.data.prompts import encode_conversation, prepare_tokenizer
from llava_jax.data.splice import IGNORE, IMAGE, Row, positions_per_id
from llava_jax.data.templates import choose_template, get_template, is_jinja
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.data.urls import display_name
from train import mixture

MOST_NAMED = 3  # those that an error names
MOST_TILES = TILES[-1]  # of a conversation, where --tiles-per-row does not say


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation measured: its row has everything but pixels."""

    number: int  # among all that a run has; another for each time that its row is repeated
    data: str  # the data file
    index: int  # of its row there
    id: Any  # what the data file calls it; its index where it does not
    epoch: int
    row: Row
    images: tuple[str, ...]  # as the data file names them
    length: int  # positions after splicing, as truncated
    truncated: int  # positions beyond that

    @property
    def tiles(self) -> int:
        return self.row.tile_count

    def bad(self, reason: str, file: str | None = None) -> "BadSample":
        """The same as one that cannot be trained on."""
        return BadSample(self.number, self.data, self.index, self.id, file, reason)


@dataclasses.dataclass(frozen=True)
class BadSample:
    """A conversation that cannot be trained on."""

    number: int
    data: str
    index: int
    id: Any
    file: str | None  # the image at fault, if one is
    reason: str

    def describe(self, *, path: bool = True) -> str:
        """Where it is and what is wrong, as an error names it; without the data file's `path` if that is known."""
        name = "" if self.id == self.index else f" (id {shorten(self.id, 40)})"
        return f"{shorten(self.data) + ' ' if path else ''}row {self.index}{name}: {self.reason}"


def describe_first(bad: Sequence[BadSample], total: int = 0, *, path: str = "") -> str:
    """The first few bad samples in a line, and how many more there are.

    Args:
      total: all there are; 0 for those of `bad`.
      path: the data file that the line has named before them, which is not named again.
    """
    named = []
    for one in bad[:MOST_NAMED]:
        named.append(one.describe(path=shorten(one.data) != path))
        path = shorten(one.data)
    more = max(total, len(bad)) - len(named)
    return "; ".join([*named, *[f"and {more} more"] * bool(more)])


class SampleSource(Protocol):
    """What batches are made of: `Samples`, or what a plan assumes (`train.drawn`)."""

    path: str
    model: LlavaConfig
    has_image: np.ndarray
    most_images: int
    repeats: int
    template: str

    def __len__(self) -> int: ...
    def measure(self, index: int, epoch: int = 0) -> Sample | BadSample: ...
    def load(self, sample: Sample) -> Row | BadSample: ...


class Samples:
    """The conversations of a data file, or of several: a `SampleSource`.

    Attributes:
      path: the file, or in a few words the files.
      model: whose image tiles and tokens they become.
      has_image: bool [n].
      most_images: that a row names.
      repeats: times that a row occurs among them, at most.
      template: the name of the conversation template.
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
          data: as `--data` has it (`train.mixture`).
          template: None for the model's own.
          max_length: positions after splicing at which a conversation is truncated, on the right.
          image_first: "as_is" puts the mark of a single image in front of its turn, as the reference does; "random"
            there or after it, as the paper does (LLaVA, Liu et al. 2023, 4.2), drawn again for each epoch.
          follow_links: also those in the image folder that lead out of it.

        Raises:
          InputError: a file, the folder or the template cannot be used.
        """
        self.template = template or choose_template(model)
        if is_jinja(self.template):
            raise InputError(
                f"the checkpoint has a chat template of its own ({model.template_from}), which does not say what is "
                f"trained: name one with --template ({choose_template(model.replace(template=None))} suits its decoder)"
            )
        self._template = get_template(self.template)
        self._check_template(tokenizer)
        self._folder = ImageFolder(image_folder, follow_links=follow_links)
        self.model, self._tokenizer, self._max_length = model, tokenizer, max_length
        self._random_order, self._seed = image_first == "random", seed
        self._read_files(mixture.read_parts(data))
        prepare_tokenizer(tokenizer, model)

    def _read_files(self, parts: Sequence[mixture.Part]) -> None:
        """Read the rows of all files, and choose those that are taken of each."""
        self.path = mixture.describe(parts)
        self._rows = {path: read_rows(path) for path in dict.fromkeys(part.path for part in parts)}
        for path, contents in self._rows.items():
            warn_unknown_keys(path, contents)
            if self._template.style == "plain" and any(map(has_system, contents)):
                note(f"warning: {shorten(path)}: the template {self.template} has no place for its system messages")
        self._paths = [part.path for part in parts]
        chosen = [part.choose(len(self._rows[part.path]), (self._seed, i)) for i, part in enumerate(parts)]
        chosen_of = collections.defaultdict(list)  # of a file, which several parts may name
        for path, indices in zip(self._paths, chosen, strict=True):
            chosen_of[os.path.realpath(path)].append(indices)
        self.repeats = max(int(np.bincount(np.concatenate(indices)).max()) for indices in chosen_of.values())
        self._part, self._index = np.repeat(np.arange(len(parts)), list(map(len, chosen))), np.concatenate(chosen)
        counts = {path: np.array(list(map(count_images, rows))) for path, rows in self._rows.items()}
        images = np.concatenate([counts[path][indices] for path, indices in zip(self._paths, chosen, strict=True)])
        self.has_image, self.most_images = images > 0, int(images.max())

    def __len__(self) -> int:
        return len(self._index)

    def measure(self, index: int, epoch: int = 0) -> Sample | BadSample:
        """Tokenize a conversation and lay out its images.

        The result depends on the arguments and the seed alone.
        """
        number, data, index = index, self._paths[self._part[index]], int(self._index[index])
        row = self._rows[data][index]
        name = row.get("id", index) if isinstance(row, dict) else index
        name = name if isinstance(name, str | int | float) else index
        image = None
        try:
            conversation = read_conversation(row)
            images = conversation.images
            ids, labels = encode_conversation(
                conversation.turns,
                self._template,
                self._tokenizer,
                self.model,
                system=conversation.system,
                images=len(images),
                image_last=self._random_order and np.random.default_rng((self._seed, epoch, number)).random() < 0.5,
            )
            if len(ids) and ids.max() >= self.model.text.vocab_size:
                raise InputError(f"token {ids.max()} is beyond the model's vocabulary of {self.model.text.vocab_size}")
            layouts = []
            for image in images:
                layouts.append(self._layout(image))
            image = None
            whole = Row(ids, tuple(layouts), labels=labels)
            row, length = self._truncate(whole)
            assert row.labels is not None
            if not (row.labels[1:] != IGNORE).any():
                asked = (labels[1:] != IGNORE).any()
                raise InputError(f"no answer within {self._max_length} positions" if asked else "no answer")
            room = length if self._max_length is None else min(length, self._max_length)
            return Sample(number, data, index, name, epoch, row, images[: len(row.layouts)], room, length - room)
        except InputError as error:
            return BadSample(number, data, index, name, image and display_name(image), str(error))

    def load(self, sample: Sample) -> Row | BadSample:
        """The conversation with its tiles."""
        loaded = []
        for name, place in zip(sample.images, sample.row.layouts, strict=True):
            try:
                loaded.append(read_tiles(self._folder.find(name), place, self.model))
            except InputError as error:
                return sample.bad(str(error), display_name(name))
        return dataclasses.replace(sample.row, tiles=tuple(loaded))

    def _check_template(self, tokenizer: Tokenizer) -> None:
        stop = self._template.stop or ""
        if stop.startswith("<") and tokenizer.token_id(stop) is None:
            raise InputError(
                f"--template {self.template}: its answers end in {stop}, which is no token of this checkpoint's "
                "tokenizer; choose a template that fits the model"
            )

    def _truncate(self, row: Row) -> tuple[Row, int]:
        """The row truncated after `max_length` positions, and how many it had before.

        Images of which nothing is left are not read, and take no room.
        """
        taken = positions_per_id(row, self.model)
        length = int(taken.sum())
        if self._max_length is None or length <= self._max_length:
            return row, length
        assert row.labels is not None
        kept = np.cumsum(taken) - taken < self._max_length
        ids, labels = row.ids[kept], row.labels[kept]
        return Row(ids, row.layouts[: int((ids == IMAGE).sum())], labels=labels), length

    def _layout(self, image: str) -> TileLayout:
        """Only anyres needs an image's size. Other images are not opened before their batch is loaded, so that each
        process opens only its own."""
        found = self._folder.find(image)
        side = self.model.vision.image_size
        size = image_size(found) if self.model.aspect_ratio == "anyres" else (side, side)
        return tile_layout(size, self.model)


def measure_within(samples: SampleSource, max_tiles: int, index: int, epoch: int = 0) -> Sample | BadSample:
    """`samples.measure`, where a conversation of more tiles than `max_tiles`, which fit a row, is bad."""
    one = samples.measure(index, epoch)
    if isinstance(one, Sample) and one.tiles > max_tiles:
        return one.bad(f"{one.tiles} tiles, and a row has room for {max_tiles} (--tiles-per-row)")
    return one


def split_bad(found: Iterable[Sample | BadSample]) -> tuple[list[Sample], list[BadSample]]:
    """Good and bad ones, each in their order."""
    found = list(found)
    return [one for one in found if isinstance(one, Sample)], [one for one in found if isinstance(one, BadSample)]
