"""Packed batches: several conversations per row, in rows of one shape (`--batching packed`).

`choose_filling` decides before a run how many rows of a batch hold conversations, and how full they are. The `Filling`
is saved with the run's states and is the same on every mesh, so that a batch holds the same conversations on all.
"""

import dataclasses
import math
from collections.abc import Sequence

import grain
import numpy as np

from llava_jax.console import plural
from train import row_packing
from train.row_packing import (
    BATCH_TOLERANCE,
    LENGTH_MULTIPLE,
    choose_length,
    choose_tiles,
    fill_rows,
    rows_of_batch,
    split_rows,
)
from train.samples import BadSample, Sample, split_bad
from train.survey import Rows, Survey, describe_multiple, estimate

SPARE = 0.05  # extra rows for a batch of all the data, if only a part of the data was surveyed


@dataclasses.dataclass(frozen=True)
class RowLimits:
    """The size of a row, and the average number of conversations in a full one."""

    length: int
    tiles: int
    conversations: float


@dataclasses.dataclass(frozen=True)
class Filling:
    """How full batches are.

    rows     number of rows of a batch that hold conversations
    per_row  average conversations per row, if rows are not full; None if they are
    whole    whether a batch holds all the data
    """

    rows: int
    per_row: float | None = None
    whole: bool = False


# ---------------------------------------------------------------- before a run


def row_limits(survey: Survey) -> RowLimits:
    """The row size that suits the data, unless --positions-per-row and --tiles-per-row set it."""
    config, model = survey.config, survey.samples.model
    sizes = [(one.length, one.tiles) for one in survey.measured]
    length = config.positions_per_row or choose_length(sizes, config.max_length, model.text.width)
    tiles = config.tiles_per_row
    if tiles is None:
        tiles = choose_tiles(sizes, length, survey.min_tiles)
    return RowLimits(length, tiles, len(sizes) / len(fill_windows(survey.measured, length, tiles)))


def choose_filling(survey: Survey, limits: RowLimits, multiple: int) -> Filling:
    """The filling for batches of about the target size, on a mesh that needs a `multiple` of rows."""
    rows, per_row = rows_of_batch(survey.wanted, limits.conversations, multiple)
    held = rows * (per_row or limits.conversations)
    if max(survey.wanted, held) < survey.usable * (1 - 1e-9):
        return Filling(rows, per_row)
    rows = len(fill_windows(survey.measured, limits.length, limits.tiles))
    if not survey.is_complete:
        rows = math.ceil(survey.extrapolate((1 + SPARE) * rows))
    return Filling(-(-rows // multiple) * multiple, whole=True)


def fill_windows(samples: list[Sample], length: int, tiles: int) -> list[list[int]]:
    """Fill rows window by window; a row is a list of indices of conversations."""
    rows = []
    for start in range(0, len(samples), row_packing.WINDOW):
        sizes = [(one.length, one.tiles) for one in samples[start : start + row_packing.WINDOW]]
        rows += [[start + i for i in row] for row in fill_rows(sizes, length, tiles)]
    return rows


# ---------------------------------------------------------------- the batches


class PackedBatches:
    """The shapes of packed batches, and the conversations in them.

    Attributes:
      rows: of a global batch.
      rows_in_use: rows that hold conversations (`Filling`); the others make `rows` a multiple that the mesh divides.
      length, tiles: of a row.
      steps_per_epoch: batches per epoch; an estimate, unless all the data was surveyed.
    """

    def __init__(self, survey: Survey, limits: RowLimits, filling: Filling, multiple: int):
        """`multiple`: the mesh needs a multiple of this many rows."""
        self._survey, self._limits, self.filling, self._multiple = survey, limits, filling, multiple
        self.rows_in_use = filling.rows
        self.rows = -(-filling.rows // multiple) * multiple
        self._fit_rows()
        self.steps_per_epoch = 1 if filling.whole else math.ceil(self._all_rows / filling.rows)

    def _fit_rows(self) -> None:
        """Shrink rows that are larger than necessary: rows that are not full get fewer tiles, and rows of a small file,
        whose conversations are all known, fewer positions.

        Full and shrunken rows have room for the same conversations, so that these do not depend on the mesh.
        """
        survey, limits, config = self._survey, self._limits, self._survey.config
        self.length, self.tiles = limits.length, limits.tiles
        self._rows = self._fill(survey.measured)  # the surveyed conversations
        if (self.filling.per_row or self.filling.whole) and config.tiles_per_row is None:
            fullest = max(sum(one.tiles for one in row) for row in self._rows)
            self.tiles = min(limits.tiles, max(survey.max_tiles, fullest))
            self._rows = self._fill(survey.measured)
        if survey.is_complete and config.image_first == "as_is" and config.positions_per_row is None:
            fullest = max(sum(one.length for one in row) for row in self._rows)
            self.length = min(-(-fullest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, limits.length)

    def _fill(self, samples: list[Sample]) -> Rows:
        rows = fill_windows(samples, self._limits.length, self.tiles)
        if self.filling.whole:
            n = self.filling.rows
            rows = split_rows(rows, min(n, n * len(samples) // self._survey.usable))
        elif self.filling.per_row:
            rows = split_rows(rows, math.ceil(len(samples) / self.filling.per_row))
        return [[samples[i] for i in row] for row in rows]

    @property
    def _all_rows(self) -> float:
        """Rows that one pass over the data fills."""
        return self._survey.extrapolate(len(self._rows))

    def order(self) -> grain.MapDataset:
        """One epoch as windows, lists of indices; when it is repeated, grain shuffles each epoch differently."""
        n = len(self._survey.samples)
        indices = grain.MapDataset.source(range(n)).seed(self._survey.config.seed)
        indices = indices.shuffle() if self._survey.train else indices
        return indices.batch(n if self.filling.whole else row_packing.WINDOW, batch_fn=list)

    def distribute(self, number: int, window: Sequence[Sample | BadSample]) -> Rows:
        """Distribute window `number` of the repeated order over rows, without bad samples."""
        rows = self._fill(split_bad(window)[0])
        np.random.default_rng((self._survey.config.seed, number)).shuffle(rows)
        if self.filling.whole:  # so that the next epoch begins with a new batch
            rows += [[] for _ in range(-len(rows) % self.rows_in_use)]
        return rows

    def shape(self, rows: Rows) -> tuple[int, int]:
        """Positions and tiles per row of the batch of `rows`."""
        return self.length, self.tiles

    # ------------------------------------------------------------ description

    def largest_shape(self) -> tuple[int, int]:
        """Positions and tiles per row of the largest batch."""
        return self.length, self.tiles

    def estimate(self) -> dict[str, float]:
        """Averages of batches; see `survey.estimate`."""
        filled = self._all_rows if self.filling.whole else self.rows_in_use
        positions, tiles = np.multiply(len(self._rows) * self.rows / filled, (self.length, self.tiles))
        per_row = sum(map(len, self._rows)) / len(self._rows)
        return estimate(self._survey, self._rows, positions, tiles, filled * per_row)

    def describe_rows(self) -> str:
        """A short description of a row."""
        return f"{self.length} positions and {plural(self.tiles, 'tile')}"

    def warnings(self) -> list[str]:
        """Deviations of batches from the configuration."""
        held, wanted = self.estimate()["conversations"], self._survey.wanted
        if abs(held - wanted) > BATCH_TOLERANCE * wanted:
            return [
                f"warning: a batch holds about {held:.0f} conversations instead of {wanted}: "
                f"{describe_multiple(self._survey.config)} need at least {plural(self._multiple, 'row')} of at "
                "least one conversation"
            ]
        if self.filling.per_row:
            return [
                f"rows are only partly filled, so that a batch holds {wanted} conversations: "
                f"--global-batch-size {self.rows * self._limits.conversations:.0f} would fill them"
            ]
        return []
