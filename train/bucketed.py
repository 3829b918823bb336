"""Bucketed batches: one conversation a row, those with images apart from those without (`--batching bucketed`).

A batch is as long, and has as many tiles a row, as its largest conversation needs, rounded up to one of a few sizes.
"""

from collections.abc import Sequence

import grain
import numpy as np

from llava_jax.console import InputError
from llava_jax.data.buckets import LENGTHS, TILES, round_up
from train.samples import MOST_TILES, BadSample, Sample
from train.survey import Rows, Survey, describe_multiple, estimate


class BucketedBatches:
    """What batches look like, and which conversations are in them.

    Attributes:
      rows, rows_in_use: of a global batch.
      length, tiles: the most that a row can have.
      steps_per_epoch: batches of one pass over the data.
    """

    def __init__(self, survey: Survey, multiple: int):
        """`multiple`: the mesh needs a multiple of so many rows.

        Raises:
          InputError: the batch is none.
        """
        config = survey.config
        if config.global_batch_size % multiple:
            raise InputError(
                f"--global-batch-size {config.global_batch_size}: with one conversation a row, "
                f"{describe_multiple(config)} need a multiple of {multiple}"
            )
        self._survey = survey
        self.rows = self.rows_in_use = -(-survey.wanted // multiple) * multiple
        self.length = config.max_length
        self.tiles = MOST_TILES if config.tiles_per_row is None else config.tiles_per_row
        self._rows = [[one] for one in sorted(survey.measured, key=lambda one: bool(one.images))]
        self.steps_per_epoch = len(self.order())

    def order(self) -> grain.MapDataset:
        """One epoch as windows, lists of indices; each is a batch.

        As in the reference (llava_trainer.py `get_modality_length_grouped_indices`) each has images throughout or
        nowhere, in random order; what is left over of both kinds makes the last ones. (The lengths that the reference
        sorts by within a batch only balance its processes.)
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
        """Each conversation of a window on a row of its own, which a bad one leaves empty."""
        rows = [[one] if isinstance(one, Sample) else [] for one in window]
        return rows + [[] for _ in range(self.rows - len(rows))]

    def shape(self, rows: Rows) -> tuple[int, int]:
        """Positions and tiles of a row, of a batch of `rows`."""
        longest = max(sum(one.length for one in row) for row in rows)
        most = max(sum(one.tiles for one in row) for row in rows)
        return min(round_up(LENGTHS, longest), self.length), min(round_up(TILES, most), self.tiles)

    # ------------------------------------------------------------ described

    def largest_shape(self) -> tuple[int, int]:
        """Positions and tiles of a row of the largest batch, as far as the conversations looked at show."""
        return self.shape(self._rows)

    def estimate(self) -> dict[str, float]:
        """What batches are like; see `survey.estimate`."""
        batches = [self._rows[i : i + self.rows] for i in range(0, len(self._rows), self.rows)]
        positions, tiles = np.sum([np.multiply(len(batch), self.shape(batch)) for batch in batches], axis=0)
        return estimate(self._survey, self._rows, positions, tiles, min(self.rows, self._survey.wanted))

    def describe_rows(self) -> str:
        """What a row is, in a few words."""
        return f"up to {self.length} positions, one conversation each"

    def warnings(self) -> list[str]:
        """Ways in which batches are not what was asked for: none."""
        return []
