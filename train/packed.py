"""Packed batches: several conversations a row, in rows of one shape (`--batching packed`).

How many rows of a batch hold conversations, and how full they are (`Filling`), is decided before a run, saved with its
states, and then the same on every mesh, so that a batch holds the same conversations on all of them.
"""

import dataclasses
import math
from collections.abc import Sequence

import grain
import numpy as np

from llava_jax.console import plural
from train import packing
from train.packing import NEAR, PIECE, enough_tiles, fill_rows, good_length, rows_of_batch, spread
from train.samples import BadSample, Sample, split_bad
from train.survey import Rows, Survey, describe_multiple, estimate

SPARE = 0.05  # rows more than estimated for a batch of all the data, where not all of it has been looked at


@dataclasses.dataclass(frozen=True)
class RowLimits:
    """The most that a row has room for, and how many conversations that is on average."""

    length: int
    tiles: int
    conversations: float


@dataclasses.dataclass(frozen=True)
class Filling:
    """How full batches are.

    rows     of a batch that hold conversations
    per_row  conversations of a row on average, where rows are not to be full; None where they are
    whole    whether a batch is all the data
    """

    rows: int
    per_row: float | None = None
    whole: bool = False


# ---------------------------------------------------------------- before a run


def row_limits(survey: Survey) -> RowLimits:
    """Rows that suit the data; --positions-per-row and --tiles-per-row decide where they are given."""
    config, model = survey.config, survey.samples.model
    sizes = [(one.length, one.tiles) for one in survey.measured]
    length = config.positions_per_row or good_length(sizes, config.max_length, model.text.width)
    tiles = config.tiles_per_row
    if tiles is None:
        tiles = enough_tiles(sizes, length, survey.least_tiles)
    return RowLimits(length, tiles, len(sizes) / len(fill_windows(survey.measured, length, tiles)))


def choose_filling(survey: Survey, limits: RowLimits, multiple: int) -> Filling:
    """Batches of about as many conversations as are wanted, on a mesh that needs a `multiple` of rows."""
    rows, per_row = rows_of_batch(survey.wanted, limits.conversations, multiple)
    held = rows * (per_row or limits.conversations)
    if max(survey.wanted, held) < survey.usable * (1 - 1e-9):
        return Filling(rows, per_row)
    rows = len(fill_windows(survey.measured, limits.length, limits.tiles))
    if not survey.is_complete:
        rows = math.ceil(survey.of_all((1 + SPARE) * rows))
    return Filling(-(-rows // multiple) * multiple, whole=True)


def fill_windows(samples: list[Sample], length: int, tiles: int) -> list[list[int]]:
    """Rows of conversations, by their indices: full ones, window after window."""
    rows = []
    for start in range(0, len(samples), packing.WINDOW):
        sizes = [(one.length, one.tiles) for one in samples[start : start + packing.WINDOW]]
        rows += [[start + i for i in row] for row in fill_rows(sizes, length, tiles)]
    return rows


# ---------------------------------------------------------------- the batches


class PackedBatches:
    """What batches look like, and which conversations are in them.

    Attributes:
      rows: of a global batch, for the devices.
      rows_in_use: those that hold conversations (`Filling`); the others only make `rows` a multiple of what the mesh
        needs.
      length, tiles: of a row.
      steps_per_epoch: batches of one pass over the data; an estimate, unless all of it has been looked at.
    """

    def __init__(self, survey: Survey, limits: RowLimits, filling: Filling, multiple: int):
        """`multiple`: the mesh needs a multiple of so many rows."""
        self._survey, self._limits, self.filling, self._multiple = survey, limits, filling, multiple
        self.rows_in_use = filling.rows
        self.rows = -(-filling.rows // multiple) * multiple
        self._fit_rows()
        self.steps_per_epoch = 1 if filling.whole else math.ceil(self._all_rows / filling.rows)

    def _fit_rows(self) -> None:
        """Make rows no larger than they need to be: those that are not full have fewer tiles, and those of a small
        file, all of whose conversations are known, fewer positions.

        The conversations for which there is room are the same as in full rows, so that they do not depend on the mesh.
        """
        survey, limits, config = self._survey, self._limits, self._survey.config
        self.length, self.tiles = limits.length, limits.tiles
        self._rows = self._fill(survey.measured)  # the conversations looked at
        if (self.filling.per_row or self.filling.whole) and config.tiles_per_row is None:
            fullest = max(sum(one.tiles for one in row) for row in self._rows)
            self.tiles = min(limits.tiles, max(survey.max_tiles, fullest))
            self._rows = self._fill(survey.measured)
        if survey.is_complete and config.image_first == "as_is" and config.positions_per_row is None:
            fullest = max(sum(one.length for one in row) for row in self._rows)
            self.length = min(-(-fullest // PIECE) * PIECE, limits.length)

    def _fill(self, samples: list[Sample]) -> Rows:
        rows = fill_windows(samples, self._limits.length, self.tiles)
        if self.filling.whole:
            n = self.filling.rows
            rows = spread(rows, min(n, n * len(samples) // self._survey.usable))
        elif self.filling.per_row:
            rows = spread(rows, math.ceil(len(samples) / self.filling.per_row))
        return [[samples[i] for i in row] for row in rows]

    @property
    def _all_rows(self) -> float:
        """Rows that one pass over the data fills."""
        return self._survey.of_all(len(self._rows))

    def order(self) -> grain.MapDataset:
        """One epoch as windows, lists of indices; when it is repeated, grain shuffles each epoch differently."""
        n = len(self._survey.samples)
        indices = grain.MapDataset.source(list(range(n))).seed(self._survey.config.seed)
        indices = indices.shuffle() if self._survey.train else indices
        return indices.batch(n if self.filling.whole else packing.WINDOW, batch_fn=list)

    def distribute(self, number: int, window: Sequence[Sample | BadSample]) -> Rows:
        """The conversations of a window, the `number`th of the endless order, on rows; bad ones are left out."""
        rows = self._fill(split_bad(window)[0])
        np.random.default_rng((self._survey.config.seed, number)).shuffle(rows)
        if self.filling.whole:  # the next pass begins with the next batch
            rows += [[] for _ in range(-len(rows) % self.rows_in_use)]
        return rows

    def shape(self, rows: Rows) -> tuple[int, int]:
        """Positions and tiles of a row, of a batch of `rows`."""
        return self.length, self.tiles

    # ------------------------------------------------------------ described

    def largest_shape(self) -> tuple[int, int]:
        """Positions and tiles of a row of the largest batch."""
        return self.length, self.tiles

    def estimate(self) -> dict[str, float]:
        """What batches are like; see `survey.estimate`."""
        filled = self._all_rows if self.filling.whole else self.rows_in_use
        positions, tiles = np.multiply(len(self._rows) * self.rows / filled, (self.length, self.tiles))
        per_row = sum(map(len, self._rows)) / len(self._rows)
        return estimate(self._survey, self._rows, positions, tiles, filled * per_row)

    def describe_rows(self) -> str:
        """What a row is, in a few words."""
        return f"{self.length} positions and {plural(self.tiles, 'tile')}"

    def warnings(self) -> list[str]:
        """Ways in which batches are not what was asked for."""
        held, wanted = self.estimate()["conversations"], self._survey.wanted
        if abs(held - wanted) > NEAR * wanted:
            return [
                f"warning: a batch holds about {held:.0f} conversations instead of {wanted}: "
                f"{describe_multiple(self._survey.config)} need {plural(self._multiple, 'row')} at least, and a row "
                "has at least one"
            ]
        if self.filling.per_row:
            return [
                f"rows are not as full as they could be, so that a batch holds {wanted} conversations: "
                f"--global-batch-size {self.rows * self._limits.conversations:.0f} would fill them"
            ]
        return []
