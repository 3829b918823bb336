"""Survey the data before a run: measure a sample of its conversations, from which the shapes of batches follow.

`survey_data` measures up to `row_packing.WINDOW` conversations, spread over the data, and reads the images of a few.
"""

import dataclasses
from collections.abc import Callable, Iterable

from llava_jax.console import InputError, plural
from llava_jax.data.images import max_tiles
from train import row_packing
from train.bad_samples import BadSamples
from train.config import TrainConfig
from train.samples import BadSample, Sample, SampleSource, describe_first, split_bad

MAX_TRIALS = 8  # conversations whose images are read, until those of one are readable
FEW_WITH_IMAGES = 32  # if at most this many surveyed conversations have images, all images are read

Rows = list[list[Sample]]  # the conversations of each row


@dataclasses.dataclass(frozen=True)
class Survey:
    """The surveyed conversations.

    samples   all the data
    train     whether the data is for training, not only for evaluation
    looked_at number of surveyed conversations
    measured  those that can be trained on
    """

    config: TrainConfig
    samples: SampleSource
    train: bool
    looked_at: int
    measured: list[Sample]

    @property
    def is_complete(self) -> bool:
        """Whether all conversations were surveyed."""
        return self.looked_at == len(self.samples)

    def extrapolate(self, n: float) -> float:
        """Scale a count `n` of the surveyed conversations to all the data."""
        return n * len(self.samples) / self.looked_at

    @property
    def usable(self) -> int:
        """Number of conversations that can be trained on; an estimate, unless all were surveyed."""
        return len(self.measured) * len(self.samples) // self.looked_at

    @property
    def wanted(self) -> int:
        """The target number of conversations per batch: `global_batch_size`, or all if there are fewer."""
        return min(self.config.global_batch_size, self.usable)

    def check_parts(self) -> None:
        """Raises:
        InputError: `accumulate` exceeds the number of conversations per batch.
        """
        if self.train and self.config.accumulate > self.wanted:
            raise InputError(
                f"--accumulate {self.config.accumulate}: must be at most the {plural(self.wanted, 'conversation')} of "
                "a batch, as each part needs one"
            )

    @property
    def _max_whole_tiles(self) -> int:
        """Uncropped tiles that fill `max_length` positions. No conversation has more images: each image has at least
        one such tile, and images that begin later are truncated."""
        return -(-self.config.max_length // self.samples.model.vision.features_per_tile)

    @property
    def max_tiles(self) -> int:
        """An upper bound on the tiles of any conversation of the data, surveyed or not."""
        return min(self.samples.max_images, self._max_whole_tiles) * max_tiles(self.samples.model)

    @property
    def min_tiles(self) -> int:
        """The tiles of one image, or of the uncropped images of a conversation that fit `max_length`, if more.

        With one tile per image this equals `max_tiles`. With anyres that bound is several times the tiles of a row of
        images of usual shapes, and all rows would be padded to it.
        """
        one = min(self.samples.max_images, 1) * max_tiles(self.samples.model)
        return max(one, min(self.max_tiles, self._max_whole_tiles))


def survey_data(
    config: TrainConfig,
    samples: SampleSource,
    bad_samples: BadSamples,
    measure: Callable[[int], Sample | BadSample],
    map: Callable[..., Iterable] = map,
    *,
    train: bool,
) -> Survey:
    """Measure conversations spread over the data, and check that the images of at least one are readable.

    Conversations without images reveal nothing about the image folder. If only a few of the surveyed training
    conversations have images, all their images are read.

    Args:
      bad_samples: counts the bad ones.
      measure: maps the number of a conversation to its measured sample.
      map: like the built-in one, possibly threaded.

    Raises:
      InputError: no conversation can be trained on, no image is readable, or too many conversations are bad.
    """
    chosen = range(0, len(samples), -(-len(samples) // row_packing.WINDOW))
    good, bad = split_bad(map(measure, chosen))
    with_images = [one for one in good if one.layouts]
    broken = [one for one in bad if one.file]
    few, readable = train and len(with_images) <= FEW_WITH_IMAGES, False
    for one in with_images[:: 1 if few else -(-len(with_images) // MAX_TRIALS) or 1]:
        loaded = samples.load(one)
        if isinstance(loaded, BadSample):
            broken.append(loaded)
            bad.append(loaded)
            continue
        readable = True
        if not few:
            break
    if broken and not readable:
        raise InputError(f"none of its images can be read; the first ones: {describe_first(broken)}")
    if not good:
        raise InputError(f"nothing in it can be trained on; the first ones: {describe_first(bad)}")
    bad.sort(key=lambda one: one.number)
    bad_samples.add(bad, seen=len(chosen), known_to_all=True)
    bad_samples.begin()
    return Survey(config, samples, train, len(chosen), good)


def describe_multiple(config: TrainConfig) -> str:
    """What requires the number of rows to be a multiple, for messages."""
    if config.accumulate > 1:
        return f"the mesh, the number of processes and --accumulate {config.accumulate}"
    return "the mesh and the number of processes"


def estimate(survey: Survey, rows: Rows, positions: float, tiles: float, conversations: float) -> dict[str, float]:
    """Estimate averages of batches from the surveyed conversations.

    Args:
      rows: the rows of the surveyed conversations.
      positions, tiles: the total of the batches of these rows.
      conversations: per batch.

    Returns:
      The shares `padding` and `tile_padding`, and per batch `conversations` and `tokens` (positions in use).
    """
    used = sum(one.length for row in rows for one in row)
    return {
        "padding": unused_share(used, positions),
        "tile_padding": unused_share(sum(one.tiles for row in rows for one in row), tiles),
        "conversations": conversations,
        "tokens": conversations * used / len(survey.measured),
    }


def unused_share(used: int, room: float) -> float:
    """The share of `room` that is not used."""
    return float(1 - used / room) if room else 0.0
