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
    choose_tiles,
    fill_lengths,
    fill_rows,
    row_cost,
    rows_of_batch,
    split_rows,
)
from train.samples import BadSample, Sample, split_bad
from train.survey import Rows, Survey, describe_multiple, estimate

SPARE = 0.05  # extra rows for a batch of all the data, if only a part of the data was surveyed


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


class RowLimits:
    """The sizes of rows that suit the data, unless --positions-per-row and --tiles-per-row set them.

    The filling alone decides which one they get, so rows are the same on every mesh on which a run is resumed.

    Attributes:
      conversations: the average number of conversations in a full row, by its length.
      best: the length that costs least per conversation if rows are full.
    """

    def __init__(self, survey: Survey):
        self._survey, config, width = survey, survey.config, survey.samples.model.text.width
        self._sizes = [(one.length, one.tiles) for one in survey.measured]
        self._tiles: dict[int, int] = {}
        tiles = sum(t for _, t in self._sizes) if config.tiles_per_row is None else config.tiles_per_row
        minimum = config.positions_per_row or config.max_length
        # Where the tiles of a row decide which conversations are bad samples, all fillings get one length. It is not
        # much longer, as nothing shortens it for a mesh that cannot fill it.
        fixed = config.tiles_per_row is None and survey.max_tiles > survey.min_tiles
        maximum = minimum if config.positions_per_row else minimum + minimum // (2 if fixed else 1)
        self.conversations = fill_lengths(self._sizes, minimum, maximum, width, tiles)
        self._costs = {length: row_cost(length, width) for length in self.conversations}
        self.best = min(self.conversations, key=lambda length: self._costs[length] / self.conversations[length])
        if fixed:
            self.conversations = {self.best: self.conversations[self.best]}

    def tiles(self, length: int) -> int:
        """Tiles of a row of `length` positions that suit the data, unless --tiles-per-row sets them."""
        if length not in self._tiles:
            given, minimum = self._survey.config.tiles_per_row, self._survey.min_tiles
            self._tiles[length] = choose_tiles(self._sizes, length, minimum) if given is None else given
        return self._tiles[length]

    def filling(self, rows: int) -> Filling:
        """How `rows` rows hold about the target number of conversations: full, if that changes the batch by at most
        `BATCH_TOLERANCE`."""
        full = Filling(rows)
        return full if self._suitable(full) else Filling(rows, per_row=max(1.0, self._survey.wanted / rows))

    def length(self, filling: Filling) -> int:
        """The length with which a filling costs least."""
        return min(self._suitable(filling) or [self.best], key=lambda length: self._cost(length, filling))

    def cost(self, filling: Filling) -> float:
        """The computation per conversation, to compare fillings."""
        return self._cost(self.length(filling), filling)

    def _cost(self, length: int, filling: Filling) -> float:
        per_row = self._survey.usable / filling.rows if filling.whole else filling.per_row
        return self._costs[length] / (per_row or self.conversations[length])

    def _suitable(self, filling: Filling) -> list[int]:
        """The lengths that rows can have with this filling."""
        survey, rows = self._survey, filling.rows
        if filling.whole or filling.per_row:
            needed = filling.per_row or (1 + SPARE) * survey.usable / rows
            return [length for length, n in self.conversations.items() if n >= needed]
        return [
            length for length, n in self.conversations.items() if abs(rows * n / survey.wanted - 1) <= BATCH_TOLERANCE
        ]


def choose_filling(survey: Survey, limits: RowLimits, multiple: int) -> Filling:
    """The filling for batches of about the target size, on a mesh that needs a `multiple` of rows.

    Where full rows of the best length make batches of another size, shorter or less full ones cost less.
    """
    numbers = {rows_of_batch(survey.wanted, n, multiple) for n in limits.conversations.values()}
    filling = min(map(limits.filling, sorted(numbers)), key=limits.cost)
    held = filling.rows * (filling.per_row or limits.conversations[limits.length(filling)])
    if max(survey.wanted, held) < survey.usable * (1 - 1e-9):
        return filling
    rows = len(fill_windows(survey.measured, limits.best, limits.tiles(limits.best)))
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
        survey, config = self._survey, self._survey.config
        self.length = self._full_length = self._limits.length(self.filling)
        self.tiles = self._limits.tiles(self.length)
        self._rows = self._fill(survey.measured)  # the surveyed conversations
        if (self.filling.per_row or self.filling.whole) and config.tiles_per_row is None:
            fullest = max(sum(one.tiles for one in row) for row in self._rows)
            self.tiles = min(self.tiles, max(survey.max_tiles, fullest))
            self._rows = self._fill(survey.measured)
        if survey.is_complete and config.image_first == "as_is" and config.positions_per_row is None:
            fullest = max(sum(one.length for one in row) for row in self._rows)
            self.length = min(-(-fullest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, self._full_length)

    def _fill(self, samples: list[Sample]) -> Rows:
        rows = fill_windows(samples, self._full_length, self.tiles)
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
                f"--global-batch-size {self.rows * self._limits.conversations[self._full_length]:.0f} would fill them"
            ]
        return []
