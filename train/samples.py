"""Conversations of a data file, one at a time: read, checked, tokenized, laid out; then their images.

The format is that of `llava_jax.data.conversations`; several files make one list (`train.mixture`). What a conversation
takes of a row (positions, tiles) is known without its pixels: `Samples.measure` is cheap, `Samples.load` reads the
images. Either returns a `BadSample` instead of raising an error.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from llava_jax.checkpoints.outputs import write_file
from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, note, shorten
from llava_jax.data.conversations import count_images, has_system, note_unread_keys, read_conversation, read_rows
from llava_jax.data.images import ImageFolder, TileLayout, image_size, layout, read_tiles
from llava_jax.data.prompts import encode_conversation, prepare_tokenizer
from llava_jax.data.splice import IGNORE, IMAGE, Row, widths
from llava_jax.data.templates import choose_template, get_template, is_program
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.data.urls import label
from llava_jax.files import read_bytes
from llava_jax.json_files import parse_appended
from train import mixture
from train.config import TrainConfig

MAX_LIST = 2**30  # bytes of a list of bad samples
START = '{"data": '  # how each line of it starts
MOST_NOTED = 10  # bad samples that are named as they are met; the rest are only listed in a file
MOST_NAMED = 3  # those that an error names
ENOUGH = 1000  # conversations that a share of bad ones is counted against, at least


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
    cut: int  # positions truncated

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


class Samples:
    """The conversations of a data file, or of several.

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
        if is_program(self.template):
            raise InputError(
                f"the checkpoint has a chat template of its own ({model.template_from}), which does not say what is "
                f"trained: name one with --template ({choose_template(model.replace(template=None))} suits its decoder)"
            )
        self._template = get_template(self.template)
        self._check_template(tokenizer)
        self._folder = ImageFolder(image_folder, follow_links=follow_links)
        parts = mixture.read_parts(data)
        self.path = mixture.describe(parts)
        self._rows = {path: read_rows(path) for path in dict.fromkeys(part.path for part in parts)}
        for path, rows in self._rows.items():
            note_unread_keys(path, rows)
            if self._template.style == "plain" and any(map(has_system, rows)):
                note(f"warning: {shorten(path)}: the template {self.template} has no place for its system messages")
        self._paths = [part.path for part in parts]
        chosen = [part.choose(len(self._rows[part.path]), (seed, i)) for i, part in enumerate(parts)]
        rows_of = collections.defaultdict(list)  # of a file, which several parts may name
        for path, rows in zip(self._paths, chosen, strict=True):
            rows_of[os.path.realpath(path)].append(rows)
        self.repeats = max(int(np.bincount(np.concatenate(rows)).max()) for rows in rows_of.values())
        self._part, self._index = np.repeat(np.arange(len(parts)), list(map(len, chosen))), np.concatenate(chosen)
        counts = {path: np.array(list(map(count_images, rows))) for path, rows in self._rows.items()}
        images = np.concatenate([counts[path][rows] for path, rows in zip(self._paths, chosen, strict=True)])
        self.has_image, self.most_images = images > 0, int(images.max())
        prepare_tokenizer(tokenizer, model)
        self.model, self._tokenizer, self._max_length = model, tokenizer, max_length
        self._random_order, self._seed = image_first == "random", seed

    def __len__(self) -> int:
        return len(self._index)

    def name(self, bad: BadSample, *, path: bool = True) -> str:
        """What is wrong and where, as an error has it."""
        called = "" if bad.id == bad.index else f" (id {shorten(bad.id, 40)})"
        return f"{shorten(bad.data) + ' ' if path else ''}row {bad.index}{called}: {bad.reason}"

    def names(self, bad: Sequence[BadSample], total: int = 0, *, path: str = "") -> str:
        """The first few in a line, and how many more there are of `total`; `path` is the file that the line has named
        before them, and is not named again."""
        named = []
        for one in bad[:MOST_NAMED]:
            named.append(self.name(one, path=shorten(one.data) != path))
            path = shorten(one.data)
        more = max(total, len(bad)) - len(named)
        return "; ".join([*named, *[f"and {more} more"] * bool(more)])

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
            if not (row.labels[1:] != IGNORE).any():
                asked = (labels[1:] != IGNORE).any()
                raise InputError(f"no answer within {self._max_length} positions" if asked else "no answer")
            room = length if self._max_length is None else min(length, self._max_length)
            return Sample(number, data, index, name, epoch, row, images[: len(row.layouts)], room, length - room)
        except InputError as error:
            return BadSample(number, data, index, name, image and label(image), str(error))

    def load(self, sample: Sample) -> Row | BadSample:
        """The conversation with its tiles."""
        loaded = []
        for name, place in zip(sample.images, sample.row.layouts, strict=True):
            try:
                loaded.append(read_tiles(self._folder.find(name), place, self.model))
            except InputError as error:
                return sample.bad(str(error), label(name))
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
        taken = widths(row, self.model)
        length = int(taken.sum())
        if self._max_length is None or length <= self._max_length:
            return row, length
        kept = np.cumsum(taken) - taken < self._max_length
        ids, labels = row.ids[kept], row.labels[kept]
        return Row(ids, row.layouts[: int((ids == IMAGE).sum())], labels=labels), length

    def _layout(self, image: str) -> TileLayout:
        """Only anyres needs an image's size. Other images are not opened before their batch is loaded, so that each
        process opens only its own."""
        found = self._folder.find(image)
        side = self.model.vision.image_size
        size = image_size(found) if self.model.aspect_ratio == "anyres" else (side, side)
        return layout(size, self.model)


class Listed(TypedDict):
    """A line of `bad_samples.jsonl`, as far as it is read."""

    data: str
    index: int


class BadSamples:
    """Bad samples of a run: named, listed, counted, and a reason to stop when they are too many.

    `bad_samples.jsonl` has each of them once, over epochs and restarts. Of several processes each finds out for itself
    about the images of its own rows; it lists them in a file of its own, and does not stop before `agree`, which all
    call at the same step: one that stopped alone would leave the others waiting for it.

    Attributes:
      count, seen: bad samples that all processes know of, among so many conversations; those met again count again.
      begun: whether the run has begun. One that is refused before writes no list; the error names the first bad ones.
      own, others: the images that this process found broken; that the others did, as of the last `agree`.
    """

    def __init__(
        self, config: TrainConfig, samples: Samples, folder: Path | None, process: int = 0, processes: int = 1
    ):
        """`folder` is where the list goes; None for nowhere."""
        self._config, self._samples, self._process, self._alone = config, samples, process, processes == 1
        self.count = self.seen = self.own = self.others = self._noted = 0
        self._failed = ""  # what is to stop all processes
        self._first: list[BadSample] = []  # to name in an error
        self.begun = False
        name = f"bad_samples.{process}.jsonl" if process else "bad_samples.jsonl"
        self._file = folder and folder / name
        self._listed = self._read()

    @property
    def total(self) -> int:
        """Bad samples met, as far as this process knows."""
        return self.count + self.own + self.others

    def add(self, bad: Sequence[BadSample], seen: int = 0, *, known_to_all: bool = False) -> None:
        """Count `bad` of `seen` more conversations.

        Raises:
          InputError: the run is to stop at a bad sample, or has met too many. If not all processes know of these, only
            `agree` raises it.
        """
        self.seen += seen
        if known_to_all:
            self.count += len(bad)
        else:
            self.own += len(bad)
        for one in bad:
            if len(self._first) < MOST_NAMED and (one.data, one.index) not in {(a.data, a.index) for a in self._first}:
                self._first.append(one)
        problem = self._samples.name(bad[0]) if bad and self._config.on_bad_sample == "fail" else ""
        try:
            if known_to_all or self._alone:
                if problem:
                    raise InputError(problem)
                self._check(self.count + (self.own if self._alone else 0), self.seen)
        except InputError:
            if self.begun:
                self._list(bad, known_to_all)
            raise
        self._list(bad, known_to_all)
        self._failed = self._failed or problem

    def agree(self, share: Callable[[str], list[str]]) -> None:
        """Exchange with the other processes what only one of them knows. All call it at the same step.

        Args:
          share: a text of this process -> those of all.

        Raises:
          InputError: on all of them, for the reasons of `add`.
        """
        own = self.own  # threads continue to count
        reports = [
            json.loads(text) for text in share(json.dumps([self._process, own, self.count, self.seen, self._failed]))
        ]
        parts, owns, counts, seens, failures = zip(*reports, strict=True)
        of_all = sum(dict(zip(parts, owns, strict=True)).values())  # processes may have the same part of the rows
        self.others = of_all - own
        if any(failures):
            raise InputError(next(filter(None, failures)))
        self._check(max(counts) + of_all, max(seens))

    def begin(self) -> None:
        """Count from zero: the conversations looked at beforehand will be met again."""
        self.set_state((0, 0))
        self._first, self.begun = [], True

    def get_state(self) -> list[int]:
        """What a resumed run counts from."""
        return [self.total, self.seen]

    def set_state(self, state: Sequence[int]) -> None:
        self.count, self.seen = state

    def _check(self, count: int, seen: int) -> None:
        # A share is counted against a thousand conversations at least, or all there are. One row of a few is a large
        # share: one, as often as it comes in each pass over the data, is never too many, unless none is allowed.
        share, n = self._config.max_bad_share, len(self._samples)
        allowed = max(share * max(seen, min(n, ENOUGH)), -(-seen // n) * self._samples.repeats if share else 0)
        if count > allowed:
            where = f"; {self._file} lists them" if self._file and self.begun else ""
            named = f"; {self._samples.names(self._first, count, path=self._samples.path)}" if self._first else ""
            raise InputError(
                f"{self._samples.path}: bad samples: {count} among the first {max(seen, count)}, more "
                f"than --max-bad-share {share:g} allows{named}{where}"
            )

    def _list(self, bad: Sequence[BadSample], known_to_all: bool) -> None:
        if not known_to_all or self._process == 0:
            for one in bad:
                self._list_one(one)

    def _list_one(self, bad: BadSample) -> None:
        if (bad.data, bad.index) in self._listed:
            return
        self._listed.add((bad.data, bad.index))
        self._noted += 1
        if self._noted <= MOST_NOTED:
            note(f"bad sample: {self._samples.name(bad)}")
        if self._noted == MOST_NOTED:
            note("more bad samples are " + (f"listed in {self._file}" if self._file else "not named"))
        if self._file is None:
            return
        line = json.dumps(
            {name: getattr(bad, name) for name in ("data", "index", "id", "file", "reason")}, ensure_ascii=False
        )
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8", errors="backslashreplace") as file:  # half a character
                file.write(line + "\n")
        except OSError as error:  # a full disk, perhaps for a while
            note(f"warning: {self._file}: cannot be written ({error.strerror or error}); the run continues without it")
            self._file = None

    def _read(self) -> set[tuple[str, int]]:
        """What is listed already. A last line that was not written to its end is removed."""
        if self._file is None or not self._file.exists():
            return set()
        data = read_bytes(self._file, MAX_LIST)
        try:
            rows, whole = parse_appended(data, Listed, shorten(self._file), START)
        except InputError as error:
            raise InputError(f"{error}; it lists something else than bad samples: move it away") from None
        try:
            if whole != data:
                write_file(self._file, whole)
        except OSError as error:
            raise InputError(f"{self._file}: cannot be written ({error.strerror or error})") from None
        return {(row["data"], row["index"]) for row in rows}
