"""The conversations of data files, one at a time: read, check, tokenize and lay them out, then read their images.

`llava_jax.data.conversations` reads the format; several files form one list (`train.mixture`). The size of a
conversation (positions, tiles) does not depend on its pixels: `Samples.measure` is cheap, `Samples.load` reads the
images. Both return a `BadSample` instead of raising an error.
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
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.images import TileLayout, image_size, read_tiles, tile_layout
from llava_jax.data.prompts import encode_conversation, prepare_tokenizer
from llava_jax.data.splice import IGNORE, IMAGE, Row, positions_per_id
from llava_jax.data.templates import choose_template, get_template, is_jinja
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.data.urls import display_name
from train import mixture

MAX_NAMED = 3  # bad samples that an error names
MAX_TILES = TILES[-1]  # of a conversation, without --tiles-per-row


@dataclasses.dataclass(frozen=True)
class Sample:
    """A measured conversation: its row has everything except pixels."""

    number: int  # among all of a run; each repetition of a row has its own
    data: str  # the data file
    index: int  # of its row in the file
    id: Any  # in the data file; without one, the index
    epoch: int
    row: Row
    images: tuple[str, ...]  # names in the data file
    length: int  # positions after splicing and truncation
    truncated: int  # positions that truncation removed

    @property
    def tiles(self) -> int:
        return self.row.tile_count

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
        self.template = template or choose_template(model)
        if is_jinja(self.template):
            raise InputError(
                f"the checkpoint has a chat template of its own ({model.template_from}), which does not mark "
                f"what is trained: choose one with --template ({choose_template(model.replace(template=None))} suits "
                f"its decoder)"
            )
        self._template = get_template(self.template)
        self._check_template(tokenizer)
        self._folder = ImageFolder(image_folder, follow_links=follow_links)
        self.model, self._tokenizer, self._max_length = model, tokenizer, max_length
        self._random_order, self._seed = image_first == "random", seed
        self._read_files(mixture.read_parts(data))
        prepare_tokenizer(tokenizer, model)

    def _read_files(self, parts: Sequence[mixture.Part]) -> None:
        """Read the rows of all files, and choose those to use from each."""
        self.path = mixture.describe(parts)
        self._rows = {path: read_rows(path) for path in dict.fromkeys(part.path for part in parts)}
        for path, contents in self._rows.items():
            warn_unknown_keys(path, contents)
            if self._template.style == "plain" and any(map(has_system, contents)):
                note(f"warning: {shorten(path)}: the template {self.template} has no place for its system messages")
        self._paths = [part.path for part in parts]
        chosen = [part.choose(len(self._rows[part.path]), (self._seed, i)) for i, part in enumerate(parts)]
        chosen_of = collections.defaultdict(list)  # per file, which several parts may name
        for path, indices in zip(self._paths, chosen, strict=True):
            chosen_of[os.path.realpath(path)].append(indices)
        self.repeats = max(int(np.bincount(np.concatenate(indices)).max()) for indices in chosen_of.values())
        self._part, self._index = np.repeat(np.arange(len(parts)), list(map(len, chosen))), np.concatenate(chosen)
        counts = {path: np.array(list(map(count_images, rows))) for path, rows in self._rows.items()}
        images = np.concatenate([counts[path][indices] for path, indices in zip(self._paths, chosen, strict=True)])
        self.has_image, self.max_images = images > 0, int(images.max())

    def __len__(self) -> int:
        return len(self._index)

    def measure(self, index: int, epoch: int = 0) -> Sample | BadSample:
        """Tokenize a conversation and lay out its images.

        The result depends only on the arguments and the seed.
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
                has_answer = (labels[1:] != IGNORE).any()
                raise InputError(f"no answer within {self._max_length} positions" if has_answer else "no answer")
            room = length if self._max_length is None else min(length, self._max_length)
            return Sample(number, data, index, name, epoch, row, images[: len(row.layouts)], room, length - room)
        except InputError as error:
            return BadSample(number, data, index, name, image and display_name(image), str(error))

    def load(self, sample: Sample) -> Row | BadSample:
        """Read a conversation's tiles."""
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
                f"--template {self.template}: its answers end in {stop}, which is not a token of this "
                "checkpoint's tokenizer; choose a template that fits the model"
            )

    def _truncate(self, row: Row) -> tuple[Row, int]:
        """The row truncated to `max_length` positions, and its length before.

        Images that are truncated entirely are dropped from the row.
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
        """The layout of an image. Only anyres needs its size; otherwise the image is not opened before its batch is
        loaded, so that each process opens only its own images."""
        found = self._folder.find(image)
        side = self.model.vision.image_size
        size = image_size(found) if self.model.aspect_ratio == "anyres" else (side, side)
        return tile_layout(size, self.model)


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
