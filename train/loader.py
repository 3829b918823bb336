"""The data pipeline: order, measure, pack or bucket conversations, read their images, prefetch batches.

    order       windows of indices, shuffled by seed and epoch               grain
    distribute  tokenize a window, distribute it over rows; no pixels yet    threads
    batch       collect the rows of a global batch
    load        read the images of this process's rows, splice               threads
    prefetch    a few batches ahead

All processes compute everything before `load` identically, from seed, epoch and index alone. So batches do not depend
on the number of workers or processes, all processes agree on shapes and on the number of batches without communicating,
and a position in the data (a window, and a row of it) is valid for any number of processes. The repeated work is cheap
compared with reading images: about a millisecond per conversation.
"""

import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
from jax.sharding import Mesh

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, note, plural, ranges
from llava_jax.data.splice import Batch, Row, pack
from llava_jax.data.templates import explain_template
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.files import memory_bytes
from llava_jax.sharding.mesh import format_mesh, row_multiple
from train import row_packing
from train.bad_samples import BadSamples
from train.bucketed_batches import BucketedBatches
from train.config import TrainConfig
from train.packed_batches import Filling, PackedBatches, RowLimits, choose_filling
from train.row_packing import WINDOW
from train.samples import MAX_TILES, BadSample, Samples, SampleSource, measure_within
from train.survey import Rows, survey_data, unused_share

INTS_PER_POSITION = 5  # int32 values for each position of a batch, apart from its tiles

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
    """Open one or several data files, and survey a sample of their conversations.

    Args:
      model: the checkpoint's configuration; `config.aspect_ratio` replaces its image mode.
      rows_multiple: the mesh needs a multiple of this many rows in a global batch.
      process, processes: the shard of each global batch to yield, and the number of shards.
      path: None for `config.data`.
      train: shuffle, and repeat forever; otherwise each iteration is one pass in the file's order.
      folder: directory of the list of bad samples; None for `config.output`.

    Raises:
      InputError: the file has no conversation to train on, too many of the surveyed ones are bad, or the mesh does
        not divide the batch.
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
            f"--global-batch-size {config.global_batch_size}: the mesh ({format_mesh(mesh.shape)}) shards a batch "
            f"{row_multiple(mesh)} ways; use a multiple of that, or another --mesh"
        )


class Data:
    """Batches of a data file; see `open_data`. Iteration yields `(Batch, info)`.

    The batch holds this process's rows; `info` describes the global batch:

        conversations, images, tokens    counts; tokens are positions in use
        padding, tile_padding            shares of positions and of tiles that are padding
        epoch                            epoch of its last conversation, from 0
        bad                              bad samples so far
        ids                              ids of the conversations in the data file

    Attributes:
      bad: the bad samples.
      survey: the surveyed conversations.
      batches: the shapes of batches, and the order of their conversations.
      rows: of a global batch.
      rows_in_use: rows that hold conversations; the others are empty.
      length, tiles: of a row; for bucketed batches, the maximum.
      steps_per_epoch: global batches per epoch; for packed batches an estimate, unless the file has at most `WINDOW`
        conversations.
    """

    def __init__(
        self,
        config: TrainConfig,
        samples: SampleSource,
        bad: BadSamples,
        multiple: int,
        process: int,
        processes: int,
        train: bool,
    ):
        self.config, self.samples, self.train = config, samples, train
        self.bad, self._process, self._processes = bad, process, processes
        # Two pools, so that tokenizing a window does not delay reading images.
        self._pools = [concurrent.futures.ThreadPoolExecutor(config.workers) for _ in range(2 * bool(config.workers))]
        self._map_measure: Callable[..., Iterator] = self._pools[0].map if self._pools else map
        self._map_load: Callable[..., Iterator] = self._pools[1].map if self._pools else map
        max_tiles = MAX_TILES if config.tiles_per_row is None else config.tiles_per_row
        measure = functools.partial(measure_within, samples, max_tiles)
        self.survey = survey_data(config, samples, bad, measure, self._map_measure, train=train)
        self.survey.check_parts()
        self.batches: PackedBatches | BucketedBatches
        self._limits = RowLimits(self.survey) if config.batching == "packed" else None
        self._rebuild(multiple)

    def _rebuild(self, multiple: int, filling: Filling | None = None) -> None:
        """Restart the pipeline with a multiple of `multiple` rows; a resumed run passes its `filling`."""
        self._multiple = multiple
        if self._limits is None:
            self.batches = BucketedBatches(self.survey, multiple)
        else:
            filling = filling or choose_filling(self.survey, self._limits, multiple)
            self.batches = PackedBatches(self.survey, self._limits, filling, multiple)
        self.rows, self.rows_in_use = self.batches.rows, self.batches.rows_in_use
        self.length, self.tiles = self.batches.length, self.batches.tiles
        self.steps_per_epoch = self.batches.steps_per_epoch
        self._iterator = iter(self._make_dataset())
        self._start = self._iterator.get_state()

    def resize(self, rows_multiple: int) -> None:
        """Restart the pipeline for a mesh that needs a multiple of `rows_multiple` rows."""
        self._iterator.close()
        self._rebuild(math.lcm(rows_multiple, self._processes))

    # ------------------------------------------------------------ description

    @property
    def wanted(self) -> int:
        """The target number of conversations per batch: `global_batch_size`, or all if there are fewer."""
        return self.survey.wanted

    @property
    def total_steps(self) -> int:
        """Steps of the whole run.

        Raises:
          InputError: `epochs` needs more steps than `steps` allows.
        """
        steps = self.config.steps or math.ceil(self.config.epochs * self.steps_per_epoch)
        if steps > (maximum := ranges(TrainConfig)["steps"].maximum):
            raise InputError(f"--epochs {self.config.epochs:g}: makes {steps} steps, more than {maximum}")
        return steps

    def largest_shape(self) -> tuple[int, int]:
        """Positions and tiles per row of the largest batch among the surveyed conversations."""
        return self.batches.largest_shape()

    def estimate(self) -> dict[str, float]:
        """Estimates from the survey: `padding`, `tile_padding`, and per batch `conversations` and `tokens` (positions
        in use)."""
        return self.batches.estimate()

    def check_memory(self) -> None:
        """Raises:
        InputError: the batches prepared ahead exceed this machine's memory.
        """
        length, tiles = self.largest_shape()
        pixels = tiles * self.samples.model.vision.image_size**2 * 3
        batch = self.rows // self._processes * (length * INTS_PER_POSITION * 4 + pixels)
        ahead = self.config.prefetch + 2  # one in preparation, and one in transfer to the devices
        memory = memory_bytes()
        if batch * ahead > memory:
            raise InputError(
                f"{ahead} batches prepared ahead, {plural(self.rows, 'row')} and {batch / 1e9:.3g} GB each, exceed the "
                f"{memory / 1e9:.0f} GB of this machine: reduce --global-batch-size, --accumulate or --prefetch"
            )

    def describe(self) -> str:
        """Describe the data and its batches in a line, with another line for each deviation from the configuration."""
        found, requested, wanted = self.estimate(), self.config.global_batch_size, self.wanted
        template = explain_template(self.samples.model, self.config.template)
        if self.config.template and self.config.preset and "template" not in self.config.given:
            template = f"{self.config.template} (by the preset)"
        lines = [
            f"{plural(len(self.samples), 'conversation')}, template {template}, "
            f"{plural(self.steps_per_epoch, 'step')} an epoch; a batch is {plural(self.rows, 'row')} of "
            f"{self.batches.describe_rows()}, about {plural(round(found['conversations']), 'conversation')} "
            f"(--global-batch-size {requested}); "
            f"padding: {found['padding']:.1%} of positions, {found['tile_padding']:.1%} of tiles"
        ]
        if wanted < requested:
            lines.append(
                f"warning: --global-batch-size {requested} is more than the {plural(wanted, 'usable conversation')}: "
                f"batches have {wanted} instead"
            )
        return "\n".join([*lines, *self.batches.warnings()])

    # ------------------------------------------------------------ the pipeline

    def _make_dataset(self) -> grain.IterDataset:
        order = self.batches.order()
        windows = (order.repeat() if self.train else order).map_with_index(
            functools.partial(self._distribute, epoch_size=len(order))
        )
        windows = windows.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        rows = grain.experimental.FlatMapIterDataset(windows, _CountBad(self.bad))
        batches = rows.batch(self.rows_in_use, batch_fn=list).map(self._load)
        return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=self.config.prefetch)

    def _distribute(self, number: int, indices: Sequence[int], epoch_size: int) -> "_Window":
        """Measure window `number` of the repeated order, of `epoch_size` windows each, and distribute it over rows."""
        measure = functools.partial(measure_within, self.samples, self.tiles, epoch=number // epoch_size)
        found = list(self._map_measure(measure, indices))
        bad = [one for one in found if isinstance(one, BadSample)]
        return _Window(self.batches.distribute(number, found), bad, len(indices))

    def _load(self, rows: Rows) -> tuple[Batch, Info]:
        """Make a batch: read the images of this process's rows, and splice them."""
        length, tiles = self.batches.shape(rows)  # of all rows, not only those of this process
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
        return batch, self._describe_batch(rows, {one.number for one in bad}, length, tiles)

    def _describe_batch(self, rows: Rows, lost: set[int], length: int, tiles: int) -> Info:
        kept = [one for row in rows for one in row if one.number not in lost]
        tokens = sum(one.length for one in kept)
        return {
            "conversations": len(kept),
            "images": sum(len(one.layouts) for one in kept),
            "tokens": tokens,
            "padding": unused_share(tokens, self.rows * length),
            "tile_padding": unused_share(sum(one.tiles for one in kept), self.rows * tiles),
            "epoch": max((one.epoch for one in kept), default=0),
            "bad": self.bad.total,
            "ids": [one.id for one in kept],
        }

    # ------------------------------------------------------------ iteration

    def __iter__(self) -> Iterator[tuple[Batch, Info]]:
        if not self.train:
            self._iterator.set_state(self._start)
        return self

    def __next__(self) -> tuple[Batch, Info]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position in the data after the last batch yielded: JSON-able, and the same on all processes."""
        filling = self._filling()
        return {
            "conversations": len(self.samples),
            "rows": filling.rows,
            "per_row": filling.per_row,
            "whole": filling.whole,
            "packing": row_packing.VERSION,
            "place": self._iterator.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from a state, bit for bit, with any number of workers and processes, on any mesh.

        Packed batches hold the same conversations as without the interruption, and `steps_per_epoch` is unchanged. If
        the mesh does not divide their rows, empty rows are added.

        Raises:
          InputError: the data has changed, or the state is invalid.
        """
        if state["conversations"] != len(self.samples):
            raise InputError(
                f"{self.samples.path} has {len(self.samples)} conversations; the run to resume had "
                f"{state['conversations']}"
            )
        if self._limits is not None and state.get("packing", 1) != row_packing.VERSION:
            note(
                "warning: the run was begun by a version that packs conversations into other rows: some of a window of "
                f"{WINDOW:,} conversations may be used twice, and some not at all"
            )
        filling = Filling(state["rows"], state.get("per_row"), state.get("whole", False))
        if self._limits is not None and filling != self._filling():
            self._iterator.close()
            self._rebuild(self._multiple, filling)
        if not _same_structure(state["place"], self._iterator.get_state()):
            raise InputError(
                "the latest checkpoint's place in the data (progress/metadata, data.place) is invalid; remove the "
                "directory to resume from the previous checkpoint"
            )
        self._iterator.set_state(state["place"])

    def _filling(self) -> Filling:
        return self.batches.filling if isinstance(self.batches, PackedBatches) else Filling(self.rows_in_use)

    def close(self) -> None:
        """Stop the threads."""
        self._iterator.close()
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)


def _same_structure(there: Any, here: Any) -> bool:
    """Whether a state of grain's has the keys of `here` and valid counts, which grain does not check."""
    if isinstance(here, dict):
        same = isinstance(there, dict) and there.keys() == here.keys()
        return same and all(_same_structure(there[key], here[key]) for key in here)
    return type(there) is type(here) and (type(here) is not int or 0 <= there < 2**62)


@dataclasses.dataclass(frozen=True)
class _Window:
    rows: Rows
    bad: list[BadSample]
    seen: int


@dataclasses.dataclass(frozen=True)
class _CountBad(grain.experimental.FlatMapTransform):
    """Yields a window's rows one by one. Windows arrive in order, so this counts bad samples."""

    counted: BadSamples
    max_fan_out: int = WINDOW

    def flat_map(self, window: _Window) -> Rows:
        self.counted.add(window.bad, window.seen, known_to_all=True)
        return window.rows
