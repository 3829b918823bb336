"""Bucketed batches: one conversation per row, with and without images separated (`--batching bucketed`).

The largest conversation of a batch determines its length and its tiles per row, rounded up to one of a few sizes.
"""

from collections.abc import Sequence

import grain
import numpy as np

from llava_jax.console import InputError
from llava_jax.data.buckets import LENGTHS, TILES, round_up
from train.samples import MAX_TILES, BadSample, Sample
from train.survey import Rows, Survey, describe_multiple, estimate


class BucketedBatches:
    """The shapes of bucketed batches, and the conversations in them.

    Attributes:
      rows, rows_in_use: of a global batch.
      length, tiles: the maximum of a row.
      steps_per_epoch: batches of one pass over the data.
    """

    def __init__(self, survey: Survey, multiple: int):
        """`multiple`: the mesh needs a multiple of this many rows.

        Raises:
          InputError: the global batch size is not a multiple of `multiple`.
        """
        config = survey.config
        if config.global_batch_size % multiple:
            raise InputError(
                f"--global-batch-size {config.global_batch_size}: with one conversation per row, "
                f"{describe_multiple(config)} need a multiple of {multiple}"
            )
        self._survey = survey
        self.rows = self.rows_in_use = -(-survey.wanted // multiple) * multiple
        self.length = config.max_length
        self.tiles = MAX_TILES if config.tiles_per_row is None else config.tiles_per_row
        self._rows = [[one] for one in sorted(survey.measured, key=lambda one: bool(one.layouts))]
        self.steps_per_epoch = len(self.order())

    def order(self) -> grain.MapDataset:
        """One epoch as windows (lists of indices), each of which is a batch.

        As in the reference (llava_trainer.py `get_modality_length_grouped_indices`) either all
        conversations of a batch have images or none has; the order is random, and the remainders of both kinds form
        the last batches. (The reference also sorts by length within a batch, which only balances its processes.)
        """

        def shuffled(dataset: grain.MapDataset) -> grain.MapDataset:
            return dataset.shuffle() if self._survey.train else dataset

        def indices(chosen: np.ndarray) -> grain.MapDataset:
            return shuffled(grain.MapDataset.source(chosen.tolist()).seed(self._survey.config.seed))

        has_image, B = self._survey.samples.has_image, self.rows
        kinds = [indices(np.flatnonzero(kind)) for kind in (has_image, ~has_image) if kind.any()]
        whole = [kind[: len(kind) // B * B].batch(B, batch_fn=list) for kind in kinds if len(kind) >= B]
        rest = [kind[len(kind) // B * B :] for kind in kinds if len(kind) % B]
        order = [shuffled(grain.MapDataset.concatenate(whole))] if whole else []
        order += [grain.MapDataset.concatenate(rest).batch(B, batch_fn=list)] if rest else []
        return grain.MapDataset.concatenate(order)

    def distribute(self, number: int, window: Sequence[Sample | BadSample]) -> Rows:
        """Each conversation of a window in its own row; the row of a bad one is empty."""
        rows = [[one] if isinstance(one, Sample) else [] for one in window]
        return rows + [[] for _ in range(self.rows - len(rows))]

    def shape(self, rows: Rows) -> tuple[int, int]:
        """Positions and tiles per row of the batch of `rows`."""
        longest = max(sum(one.length for one in row) for row in rows)
        max_tiles = max(sum(one.tiles for one in row) for row in rows)
        return min(round_up(LENGTHS, longest), self.length), min(round_up(TILES, max_tiles), self.tiles)

    # ------------------------------------------------------------ description

    def largest_shape(self) -> tuple[int, int]:
        """Positions and tiles per row of the largest batch among the surveyed conversations."""
        return self.shape(self._rows)

    def estimate(self) -> dict[str, float]:
        """Averages of batches; see `survey.estimate`."""
        batches = [self._rows[i : i + self.rows] for i in range(0, len(self._rows), self.rows)]
        positions, tiles = np.sum([np.multiply(len(batch), self.shape(batch)) for batch in batches], axis=0)
        return estimate(self._survey, self._rows, positions, tiles, min(self.rows, self._survey.wanted))

    def describe_rows(self) -> str:
        """A short description of a row."""
        return f"up to {self.length} positions, one conversation each"

    def warnings(self) -> list[str]:
        """Deviations of batches from the configuration: none."""
        return []
