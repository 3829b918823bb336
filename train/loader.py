"""Batches of conversations: ordered, measured, packed or bucketed, their images read, prefetched.

    order      windows of indices, shuffled by seed and epoch               grain
    plan       tokenize a window, distribute it over rows; no pixels yet    threads
    batch      as many rows as a global batch has
    load       read the images of this process's rows, splice               threads
    prefetch   a few batches ahead

Everything before `load` is computed alike on all processes, from seed, epoch and index alone. So batches do not depend
on the number of workers or processes, all processes agree on shapes and on the number of batches without communicating,
and a place in the data (a window, and a row of it) means the same to any number of them. What is repeated is cheap
compared with reading images: about a millisecond for a conversation.
"""

import bisect
import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, plural, ranges
from llava_jax.data.images import most_tiles
from llava_jax.data.splice import Batch, Row, pack
from llava_jax.data.templates import explain_template
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.files import memory_bytes
from llava_jax.sharding.mesh import format_mesh, row_multiple
from train.config import TrainConfig
from train.packing import NEAR, PIECE, enough_tiles, fill_rows, good_length, rows_of_batch, spread
from train.samples import BadSample, BadSamples, Sample, Samples

TRIALS = 8  # conversations whose images are tried beforehand, until those of one can be read
FEW = 32  # if the data has at most so many with images, those of all are read beforehand
WINDOW = 1024  # conversations that are distributed over packed rows together, and that are looked at beforehand
SPARE = 0.05  # rows more than estimated for a batch of all the data, where not all of it has been looked at
# What the longest row and the most tiles of a bucketed batch are rounded up to.
LENGTHS = (
    *(128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768),
    *(49152, 65536, 98304, 131072),
)  # fmt: skip
TILES = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)
NUMBERS = 5  # int32 for each position of a batch, beside its tiles

Planned = list[list[Sample]]  # rows of conversations
Info = dict[str, Any]


def open_data(
    config: TrainConfig,
    model: LlavaConfig,
    tokenizer: Tokenizer,
    *,
    rows_multiple: int = 1,
    process: int = 0,
    processes: int = 1,
    path: str | Sequence[str] | None = None,
    train: bool = True,
    folder: Path | None = None,
) -> "Data":
    """Open a data file or several, and look at some of their conversations.

    Args:
      model: the checkpoint's; `config.aspect_ratio` replaces its own.
      rows_multiple: the rows of a global batch must be a multiple of this, for the mesh.
      process, processes: which part of each global batch to yield.
      path: None for `config.data`.
      train: shuffle, and repeat without end; otherwise one pass in the file's order, each time that it is iterated.
      folder: where bad samples are listed; None for `config.output`.

    Raises:
      InputError: the file has no conversation to train on, too many of those looked at are broken, or the batch does
        not suit the mesh.
    """
    model = model.replace(aspect_ratio=config.aspect_ratio) if config.aspect_ratio else model
    samples = Samples(
        path or config.data,
        config.image_folder,
        model,
        tokenizer,
        template=config.template,
        max_length=config.max_length,
        image_first=config.image_first if train else "as_is",
        seed=config.seed,
        follow_links=config.follow_links,
    )
    folder = folder or (Path(config.output) if config.output else None)
    bad = BadSamples(config, samples, folder, process, processes)
    return Data(config, samples, bad, math.lcm(rows_multiple, processes), process, processes, train)


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raises:
    InputError: the mesh does not divide the batch.
    """
    if config.global_batch_size % row_multiple(mesh):
        raise InputError(
            f"--global-batch-size {config.global_batch_size}: the mesh ({format_mesh(mesh.shape)}) splits a batch into "
            f"{row_multiple(mesh)} parts; give it a multiple of that, or another --mesh"
        )


class Data:
    """Batches of a data file; see `open_data`. Iteration yields `(Batch, info)`.

    The batch holds this process's rows; `info` is about the whole of it:

        conversations, images, tokens    how many; tokens are positions in use
        padding, tile_padding            shares of positions and of tiles that are not
        epoch                            pass over the data, from 0, that its last conversation belongs to
        bad                              bad samples met so far
        ids                              of the conversations, as the data file has them

    Attributes:
      rows: of a global batch, for the devices.
      rows_in_use: those that it fills; the others are empty, and only make `rows` a multiple of what the mesh needs.
      length, tiles: of a row; where batching is bucketed, the most that they can be.
      steps_per_epoch: global batches of one pass; of packed ones an estimate, unless the file has at most `WINDOW`
        conversations.
      bad: its bad samples.
    """

    def __init__(
        self,
        config: TrainConfig,
        samples: Samples,
        bad: BadSamples,
        multiple: int,
        process: int,
        processes: int,
        train: bool,
    ):
        self.config, self.samples, self.train = config, samples, train
        self.bad, self._multiple, self._process, self._processes = bad, multiple, process, processes
        self.packed = config.batching == "packed"
        self.length = config.max_length
        self.tiles = TILES[-1] if config.tiles_per_row is None else config.tiles_per_row
        # Two pools, so that no batch waits for its images while a window is tokenized.
        self._pools = [concurrent.futures.ThreadPoolExecutor(config.workers) for _ in range(2 * bool(config.workers))]
        self._map_measure, self._map_load = (pool.map for pool in self._pools) if self._pools else (map, map)
        self._looked_at = range(0, len(samples), -(-len(samples) // WINDOW))
        sample = self._look()
        if self.packed:
            sizes = [(one.length, one.tiles) for one in sample]
            self.length = config.positions_per_row or good_length(sizes, self.length, samples.model.text.width)
            if config.tiles_per_row is None:
                self.tiles = enough_tiles(sizes, self.length, self._least_tiles())
        self._measured, self._per_row, self._whole = sample, None, False
        self._longest, self._most_tiles = self.length, self.tiles  # of a row, unless rows turn out to need less
        self._full_rows = len(self._fill(sample)) if self.packed else len(sample)
        self._full = len(sample) / self._full_rows  # conversations of a full row
        self._set_rows(*self._wanted_rows())

    # ------------------------------------------------------------ beforehand

    def _look(self) -> list[Sample]:
        """Measure some conversations, spread over the file, and check that the images of at least one can be read; of a
        few those of all.

        Text alone can always be read, and shows nothing about the image folder.
        """
        good, bad = _part(self._map_measure(self._measure, self._looked_at))
        with_images = [one for one in good if one.images]
        broken = [one for one in bad if one.file]
        few, readable = self.train and len(with_images) <= FEW, False
        for one in with_images[:: 1 if few else -(-len(with_images) // TRIALS) or 1]:
            loaded = self.samples.load(one)
            if isinstance(loaded, BadSample):
                broken.append(loaded)
                bad.append(loaded)
                continue
            readable = True
            if not few:
                break
        if broken and not readable:
            raise InputError(f"none of its images can be read; first of all, {self.samples.names(broken)}")
        if not good:
            raise InputError(f"nothing in it can be trained on; first of all, {self.samples.names(bad)}")
        bad.sort(key=lambda one: one.number)
        self.bad.add(bad, seen=len(self._looked_at), known_to_all=True)
        self.bad.begin()
        return good

    def _room(self) -> int:
        """Uncropped tiles that fill `max_length` positions. No conversation has more images: each has at least one such
        tile, and those that begin later are truncated."""
        return -(-self.config.max_length // self.samples.model.vision.features_per_tile)

    def _needed_tiles(self) -> int:
        """Tiles that no conversation of the data exceeds, whether it has been looked at or not."""
        return min(self.samples.most_images, self._room()) * most_tiles(self.samples.model)

    def _least_tiles(self) -> int:
        """Tiles of one image, and of as many others that a conversation names as fill `max_length` positions uncropped.

        With one tile an image this is `_needed_tiles`. With anyres that bound is several times what any row of images
        of usual shapes has, and all rows would be padded to it.
        """
        one = min(self.samples.most_images, 1) * most_tiles(self.samples.model)
        return max(one, min(self._needed_tiles(), self._room()))

    @property
    def _usable(self) -> int:
        """Conversations that can be trained on; an estimate, unless all have been looked at."""
        return len(self._measured) * len(self.samples) // len(self._looked_at)

    @property
    def wanted(self) -> int:
        """Conversations that a batch is to hold: as many as asked for, or all there are."""
        return min(self.config.global_batch_size, self._usable)

    def _wanted_rows(self) -> tuple[int, float | None, bool]:
        """The rows that a batch fills, the conversations of a row where it is not to be full, and whether a batch is
        the whole data."""
        wanted, multiple = self.config.global_batch_size, self._multiple
        if self.train and self.config.accumulate > self.wanted:
            raise InputError(
                f"--accumulate {self.config.accumulate}: at most the {plural(self.wanted, 'conversation')} of a batch: "
                "each part needs one"
            )
        if self.packed:
            rows, per_row = rows_of_batch(self.wanted, self._full, multiple)
            held = rows * (per_row or self._full)
            if max(self.wanted, held) < self._usable * (1 - 1e-9):
                return rows, per_row, False
            rows = self._full_rows
            if len(self._looked_at) < len(self.samples):
                rows = math.ceil((1 + SPARE) * rows * len(self.samples) / len(self._looked_at))
            return -(-rows // multiple) * multiple, None, True
        if wanted % multiple:
            raise InputError(
                f"--global-batch-size {wanted}: with one conversation a row, {self._causes()} need a multiple of "
                f"{multiple}"
            )
        return -(-self.wanted // multiple) * multiple, None, False

    @property
    def total_steps(self) -> int:
        """Steps of the whole run.

        Raises:
          InputError: `epochs` makes more than can be counted.
        """
        steps = self.config.steps or math.ceil(self.config.epochs * self.steps_per_epoch)
        if steps > (most := ranges(TrainConfig)["steps"].most):
            raise InputError(f"--epochs {self.config.epochs:g}: makes {steps} steps, more than {most}")
        return steps

    def check_memory(self) -> None:
        """Raises:
        InputError: this machine has less memory than the batches that are made ahead take.
        """
        length, tiles = self.largest_shape()
        pixels = tiles * self.samples.model.vision.image_size**2 * 3
        batch = self.rows // self._processes * (length * NUMBERS * 4 + pixels)
        ahead = self.config.prefetch + 2  # one is made, and one on its way to the devices
        memory = memory_bytes()
        if batch * ahead > memory:
            raise InputError(
                f"{ahead} batches made ahead, {plural(self.rows, 'row')} and {batch / 1e9:.3g} GB each, need more than "
                f"the {memory / 1e9:.0f} GB of this machine: give less --global-batch-size, --accumulate or --prefetch"
            )

    def resize(self, rows_multiple: int) -> None:
        """Make the batches of a mesh that needs this multiple, from the beginning."""
        self._batches.close()
        self._multiple = math.lcm(rows_multiple, self._processes)
        self._set_rows(*self._wanted_rows())

    def _causes(self) -> str:
        """What the multiple comes from."""
        if self.config.accumulate > 1:
            return f"the mesh, the number of processes and --accumulate {self.config.accumulate}"
        return "the mesh and the number of processes"

    @property
    def _conversations_per_row(self) -> float:
        return sum(map(len, self._sample)) / len(self._sample)

    @property
    def _all_rows(self) -> float:
        """Rows that one pass over the data fills."""
        return len(self._sample) * len(self.samples) / len(self._looked_at)

    def _set_rows(self, rows_in_use: int, per_row: float | None, whole: bool) -> None:
        """Fill this many rows of a batch (`_wanted_rows`), and start at the beginning."""
        self.rows = -(-rows_in_use // self._multiple) * self._multiple
        self.rows_in_use, self._per_row, self._whole = rows_in_use, per_row, whole
        if self.packed:
            self._fit_rows()
        else:
            self._sample = [[one] for one in sorted(self._measured, key=lambda one: bool(one.images))]
        self._order = self._make_order()
        self.steps_per_epoch = len(self._order)
        if self.packed:
            self.steps_per_epoch = 1 if whole else math.ceil(self._all_rows / rows_in_use)
        self._batches = iter(self._make_batches())
        self._start = self._batches.get_state()

    def _fit_rows(self) -> None:
        """Make rows no larger than they need to be: those that are not full have fewer tiles, and those of a small
        file, all of whose conversations are known, fewer positions.

        The conversations for which there is room are the same as in full rows, so that they do not depend on the mesh.
        """
        self.length, self.tiles = self._longest, self._most_tiles
        self._sample = self._fill(self._measured)
        if (self._per_row or self._whole) and self.config.tiles_per_row is None:
            fullest = max(sum(one.tiles for one in row) for row in self._sample)
            self.tiles = min(self._most_tiles, max(self._needed_tiles(), fullest))
            self._sample = self._fill(self._measured)
        all_known = len(self._looked_at) == len(self.samples) and self.config.image_first == "as_is"
        if all_known and self.config.positions_per_row is None:
            fullest = max(sum(one.length for one in row) for row in self._sample)
            self.length = min(-(-fullest // PIECE) * PIECE, self._longest)

    def largest_shape(self) -> tuple[int, int]:
        """Positions and tiles of a row of the largest batch, as far as the conversations looked at show."""
        return self._shape(self._sample)

    def estimate(self) -> dict[str, float]:
        """From the conversations looked at beforehand: `padding` and `tile_padding`, and of a batch `conversations` and
        `tokens`, positions in use."""
        used = sum(one.length for row in self._sample for one in row)
        if self.packed:
            filled = self._all_rows if self._whole else self.rows_in_use
            positions, tiles = np.multiply(len(self._sample) * self.rows / filled, (self.length, self.tiles))
            held = filled * self._conversations_per_row
        else:
            batches = [self._sample[i : i + self.rows] for i in range(0, len(self._sample), self.rows)]
            positions, tiles = np.sum([np.multiply(len(batch), self._shape(batch)) for batch in batches], axis=0)
            held = min(self.rows, self.wanted)
        return {
            "padding": _unused(used, positions),
            "tile_padding": _unused(sum(one.tiles for row in self._sample for one in row), tiles),
            "conversations": held,
            "tokens": held * used / len(self._measured),
        }

    def describe(self) -> str:
        """A line about the data and its batches, and one more for each way in which they are not what was asked for."""
        found, asked, wanted = self.estimate(), self.config.global_batch_size, self.wanted
        template = explain_template(self.samples.model, self.config.template)
        if self.config.template and self.config.preset and "template" not in self.config.given:
            template = f"{self.config.template} (by the preset)"
        held = found["conversations"]
        if self.packed:
            shape = f"{self.length} positions and {plural(self.tiles, 'tile')}"
        else:
            shape = f"up to {self.length} positions, one conversation each"
        lines = [
            f"{plural(len(self.samples), 'conversation')}, template {template}, "
            f"{plural(self.steps_per_epoch, 'step')} an epoch; a batch is {plural(self.rows, 'row')} of {shape}, "
            f"about {plural(round(held), 'conversation')} (--global-batch-size {asked}); "
            f"padding: {found['padding']:.1%} of positions, {found['tile_padding']:.1%} of tiles"
        ]
        if wanted < asked:
            lines.append(
                f"warning: --global-batch-size {asked} is more than the {plural(wanted, 'conversation')} that can be "
                f"trained on: batches of {wanted} are made instead"
            )
        if abs(held - wanted) > NEAR * wanted:
            lines.append(
                f"warning: a batch holds about {held:.0f} conversations instead of {wanted}: {self._causes()} need "
                f"{plural(self._multiple, 'row')} at least, and a row has at least one"
            )
        elif self._per_row:
            lines.append(
                f"rows are not as full as they could be, so that a batch holds {wanted} conversations: "
                f"--global-batch-size {self.rows * self._full:.0f} would fill them"
            )
        return "\n".join(lines)

    # ------------------------------------------------------------ order

    def _make_order(self) -> grain.MapDataset:
        """One epoch as windows, lists of indices; when it is repeated, grain shuffles each epoch differently.

        Bucketed windows are batches. As in the reference (llava_trainer.py `get_modality_length_grouped_indices`)
        each has images throughout or nowhere, in random order; what is left over of both kinds makes the last ones.
        (The lengths that the reference sorts by within a batch only balance its processes.)
        """

        def shuffled(dataset: grain.MapDataset) -> grain.MapDataset:
            return dataset.shuffle() if self.train else dataset

        def indices(chosen: np.ndarray) -> grain.MapDataset:
            return shuffled(grain.MapDataset.source(chosen.tolist()).seed(self.config.seed))

        has_image, B = self.samples.has_image, self.rows
        if self.packed:
            window = len(has_image) if self._whole else WINDOW
            return indices(np.arange(len(has_image))).batch(window, batch_fn=list)
        kinds = [indices(np.flatnonzero(kind)) for kind in (has_image, ~has_image) if kind.any()]
        whole = [kind[: len(kind) // B * B].batch(B, batch_fn=list) for kind in kinds if len(kind) >= B]
        rest = [kind[len(kind) // B * B :] for kind in kinds if len(kind) % B]
        order = [shuffled(grain.MapDataset.concatenate(whole))] if whole else []
        order += [grain.MapDataset.concatenate(rest).batch(B, batch_fn=list)] if rest else []
        return grain.MapDataset.concatenate(order)

    def _make_batches(self) -> grain.IterDataset:
        order = self._order.repeat() if self.train else self._order
        windows = order.map_with_index(self._plan)
        windows = windows.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        rows = grain.experimental.FlatMapIterDataset(windows, _Rows(self.bad))
        batches = rows.batch(self.rows_in_use, batch_fn=list).map(self._load)
        return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=self.config.prefetch)

    # ------------------------------------------------------------ plan

    def _measure(self, index: int, epoch: int = 0) -> Sample | BadSample:
        one = self.samples.measure(index, epoch)
        if isinstance(one, Sample) and one.tiles > self.tiles:
            return one.bad(f"{one.tiles} tiles, and a row has room for {self.tiles} (--tiles-per-row)")
        return one

    def _plan(self, number: int, indices: Sequence[int]) -> "_Window":
        """Measure a window of the endless order, and distribute it over rows."""
        epoch = number // len(self._order)
        found = list(self._map_measure(functools.partial(self._measure, epoch=epoch), indices))
        good, bad = _part(found)
        if self.packed:
            rows = self._fill(good)
            np.random.default_rng((self.config.seed, number)).shuffle(rows)
            if self._whole:  # the next pass begins with the next batch
                rows += [[] for _ in range(-len(rows) % self.rows_in_use)]
        else:  # a bad sample leaves its row empty
            rows = [[one] if isinstance(one, Sample) else [] for one in found]
            rows += [[] for _ in range(self.rows - len(rows))]
        return _Window(rows, bad, len(indices))

    def _fill(self, samples: list[Sample]) -> Planned:
        rows = []
        for start in range(0, len(samples), WINDOW):
            sizes = [(one.length, one.tiles) for one in samples[start : start + WINDOW]]
            rows += [[start + i for i in row] for row in fill_rows(sizes, self._longest, self.tiles)]
        if self._whole:
            rows = spread(rows, min(self.rows_in_use, self.rows_in_use * len(samples) // self._usable))
        elif self._per_row:
            rows = spread(rows, math.ceil(len(samples) / self._per_row))
        return [[samples[i] for i in row] for row in rows]

    def _shape(self, rows: Planned) -> tuple[int, int]:
        """Positions and tiles of a batch's rows: of all of them, not only this process's."""
        if self.packed:
            return self.length, self.tiles
        longest = max(sum(one.length for one in row) for row in rows)
        most = max(sum(one.tiles for one in row) for row in rows)
        return min(_up(LENGTHS, longest), self.length), min(_up(TILES, most), self.tiles)

    # ------------------------------------------------------------ load

    def _load(self, rows: Planned) -> tuple[Batch, Info]:
        length, tiles = self._shape(rows)
        share = self.rows // self._processes
        mine = rows[self._process * share : (self._process + 1) * share]
        loaded = iter(self._map_load(self.samples.load, [one for row in mine for one in row]))
        spliced = [[next(loaded) for _ in row] for row in mine]
        batch = pack(
            [[one for one in row if isinstance(one, Row)] for row in spliced],
            self.samples.model,
            length=length,
            tiles=tiles,
            batch=share,
            max_length=self.config.max_length,
        )
        bad = [one for row in spliced for one in row if isinstance(one, BadSample)]
        self.bad.add(bad)
        lost = {one.number for one in bad}
        kept = [one for row in rows for one in row if one.number not in lost]
        tokens = sum(one.length for one in kept)
        return batch, {
            "conversations": len(kept),
            "images": sum(len(one.images) for one in kept),
            "tokens": tokens,
            "padding": _unused(tokens, self.rows * length),
            "tile_padding": _unused(sum(one.tiles for one in kept), self.rows * tiles),
            "epoch": max((one.epoch for one in kept), default=0),
            "bad": self.bad.total,
            "ids": [one.id for one in kept],
        }

    # ------------------------------------------------------------ iteration

    def __iter__(self) -> Iterator[tuple[Batch, Info]]:
        if not self.train:
            self._batches.set_state(self._start)
        return self

    def __next__(self) -> tuple[Batch, Info]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """Where the data stands after the last batch yielded: JSON-able, and the same on all processes."""
        return {
            "conversations": len(self.samples),
            "rows": self.rows_in_use,
            "per_row": self._per_row,
            "whole": self._whole,
            "place": self._batches.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from there, bit for bit, with any number of workers and processes, on any mesh.

        Packed batches hold the conversations that they would have held, and `steps_per_epoch` is as it was. If the mesh
        does not divide their rows, empty ones are added.

        Raises:
          InputError: the data has changed, or the state is none of these.
        """
        if state["conversations"] != len(self.samples):
            raise InputError(
                f"{self.samples.path} has {len(self.samples)} conversations; the run to resume had "
                f"{state['conversations']}"
            )
        before = state["rows"], state.get("per_row"), state.get("whole", False)
        if self.packed and before != (self.rows_in_use, self._per_row, self._whole):
            self._batches.close()
            self._set_rows(*before)
        if not _alike(state["place"], self._batches.get_state()):
            raise InputError(
                "the latest checkpoint's place in the data (progress/metadata, data.place) is none; remove the "
                "directory to resume from the checkpoint before it"
            )
        self._batches.set_state(state["place"])

    def close(self) -> None:
        """Stop the threads."""
        self._batches.close()
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)


def _alike(there: Any, here: Any) -> bool:
    """Whether a state of grain's has the keys of another, and counts where that has them: grain does not look."""
    if isinstance(here, dict):
        same = isinstance(there, dict) and there.keys() == here.keys()
        return same and all(_alike(there[key], here[key]) for key in here)
    return type(there) is type(here) and (type(here) is not int or 0 <= there < 2**62)


@dataclasses.dataclass(frozen=True)
class _Window:
    rows: Planned
    bad: list[BadSample]
    seen: int


@dataclasses.dataclass(frozen=True)
class _Rows(grain.experimental.FlatMapTransform):
    """A window's rows, one after the other. They pass here in order, so here bad samples are counted."""

    counted: BadSamples
    max_fan_out: int = WINDOW

    def flat_map(self, window: _Window) -> Planned:
        self.counted.add(window.bad, window.seen, known_to_all=True)
        return window.rows


def _part(found) -> tuple[list[Sample], list[BadSample]]:
    found = list(found)
    return [one for one in found if isinstance(one, Sample)], [one for one in found if isinstance(one, BadSample)]


def _unused(used: int, room: int) -> float:
    return float(1 - used / room) if room else 0.0


def _up(ladder: tuple[int, ...], n: int) -> int:
    """`n` rounded up to a rung; the top one if it is above."""
    return ladder[min(bisect.bisect_left(ladder, n), len(ladder) - 1)]
