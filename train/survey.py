"""What the data is like, from some of its conversations that are looked at before a run: what its batches follow from.

Up to `packing.WINDOW` conversations, spread over the data, are measured; of a few of them the images are read.
"""

import dataclasses
from collections.abc import Callable, Iterable

from llava_jax.console import InputError, plural
from llava_jax.data.images import max_tiles
from train import packing
from train.bad_samples import BadSamples
from train.config import TrainConfig
from train.samples import BadSample, Sample, SampleSource, describe_first, split_bad

TRIALS = 8  # conversations whose images are tried, until those of one can be read
FEW = 32  # if at most so many of those looked at have images, those of all are read

Rows = list[list[Sample]]  # the conversations of each row


@dataclasses.dataclass(frozen=True)
class Survey:
    """The conversations looked at.

    samples   all of the data
    train     whether it is trained on, not only evaluated on
    looked_at how many were looked at
    measured  those of them that can be trained on
    """

    config: TrainConfig
    samples: SampleSource
    train: bool
    looked_at: int
    measured: list[Sample]

    @property
    def is_complete(self) -> bool:
        """Whether all conversations were looked at."""
        return self.looked_at == len(self.samples)

    def of_all(self, n: float) -> float:
        """What there is of something in all the data, if there is `n` of it in what was looked at."""
        return n * len(self.samples) / self.looked_at

    @property
    def usable(self) -> int:
        """Conversations that can be trained on; an estimate, unless all have been looked at."""
        return len(self.measured) * len(self.samples) // self.looked_at

    @property
    def wanted(self) -> int:
        """Conversations that a batch is to hold: as many as asked for, or all there are."""
        return min(self.config.global_batch_size, self.usable)

    def check_parts(self) -> None:
        """Raises:
        InputError: a batch has fewer conversations than accumulated parts.
        """
        if self.train and self.config.accumulate > self.wanted:
            raise InputError(
                f"--accumulate {self.config.accumulate}: at most the {plural(self.wanted, 'conversation')} of a batch: "
                "each part needs one"
            )

    @property
    def _room(self) -> int:
        """Uncropped tiles that fill `max_length` positions. No conversation has more images: each has at least one such
        tile, and those that begin later are truncated."""
        return -(-self.config.max_length // self.samples.model.vision.features_per_tile)

    @property
    def max_tiles(self) -> int:
        """Tiles that no conversation of the data exceeds, whether it has been looked at or not."""
        return min(self.samples.most_images, self._room) * max_tiles(self.samples.model)

    @property
    def least_tiles(self) -> int:
        """Tiles of one image, and of as many others that a conversation names as fill `max_length` positions uncropped.

        With one tile an image this is `max_tiles`. With anyres that bound is several times what any row of images of
        usual shapes has, and all rows would be padded to it.
        """
        one = min(self.samples.most_images, 1) * max_tiles(self.samples.model)
        return max(one, min(self.max_tiles, self._room))


def look(
    config: TrainConfig,
    samples: SampleSource,
    bad_samples: BadSamples,
    measure: Callable[[int], Sample | BadSample],
    map: Callable[..., Iterable] = map,
    *,
    train: bool,
) -> Survey:
    """Measure some conversations, spread over the data, and check that the images of at least one can be read.

    Text alone can always be read, and shows nothing about the image folder. Where few of those looked at have
    images, and they are to be trained on, all images are read.

    Args:
      bad_samples: counts those that are bad.
      measure: number of a conversation -> what it takes of a row.
      map: as the built-in one, perhaps in threads.

    Raises:
      InputError: none can be trained on, no image can be read, or too many conversations are bad.
    """
    chosen = range(0, len(samples), -(-len(samples) // packing.WINDOW))
    good, bad = split_bad(map(measure, chosen))
    with_images = [one for one in good if one.images]
    broken = [one for one in bad if one.file]
    few, readable = train and len(with_images) <= FEW, False
    for one in with_images[:: 1 if few else -(-len(with_images) // TRIALS) or 1]:
        loaded = samples.load(one)
        if isinstance(loaded, BadSample):
            broken.append(loaded)
            bad.append(loaded)
            continue
        readable = True
        if not few:
            break
    if broken and not readable:
        raise InputError(f"none of its images can be read; first of all, {describe_first(broken)}")
    if not good:
        raise InputError(f"nothing in it can be trained on; first of all, {describe_first(bad)}")
    bad.sort(key=lambda one: one.number)
    bad_samples.add(bad, seen=len(chosen), known_to_all=True)
    bad_samples.begin()
    return Survey(config, samples, train, len(chosen), good)


def describe_multiple(config: TrainConfig) -> str:
    """What the number of a batch's rows must be a multiple for."""
    if config.accumulate > 1:
        return f"the mesh, the number of processes and --accumulate {config.accumulate}"
    return "the mesh and the number of processes"


def estimate(survey: Survey, rows: Rows, positions: float, tiles: float, conversations: float) -> dict[str, float]:
    """What batches are like on average, if those looked at are like all.

    Args:
      rows: in which the conversations looked at are.
      positions, tiles: of the batches that these rows make.
      conversations: of a batch.

    Returns:
      `padding` and `tile_padding`, shares, and of a batch `conversations` and `tokens`, which are positions in use.
    """
    used = sum(one.length for row in rows for one in row)
    return {
        "padding": unused(used, positions),
        "tile_padding": unused(sum(one.tiles for row in rows for one in row), tiles),
        "conversations": conversations,
        "tokens": conversations * used / len(survey.measured),
    }


def unused(used: int, room: float) -> float:
    """The share of room that is not used."""
    return float(1 - used / room) if room else 0.0
