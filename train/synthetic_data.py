"""Random conversations for a plan without a data file.

Their lengths are distributed like those of LLaVA's training data. The same code as in training then packs them into
rows and batches.
"""

from typing import Any

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.data.images import tile_layout
from llava_jax.data.splice import Row, count_features
from train.bad_samples import BadSamples
from train.config import TrainConfig
from train.loader import Data
from train.row_packing import WINDOW
from train.samples import Sample

MIX665K, CAPTIONS = 665_298, 558_128  # rows of llava_v1_5_mix665k.json and of blip_laion_cc_sbu_558k.json
IMAGE = (640, 480)  # most of COCO's


def draw_lengths(n: int, seed: int, features: int | np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the spliced lengths of n conversations like mix665k's, and whether each has an image: 40 % are short answers
    about an image, 6 % text only, the rest conversations about an image.

    Args:
      features: of the image, in all conversations or each.
    """
    random = np.random.default_rng(seed)
    kind = random.choice(3, n, p=[0.40, 0.54, 0.06])
    short = features + 45 + random.integers(8, 60, n)
    long = features + 45 + np.maximum(random.lognormal(5.5, 0.6, n), 30)
    text = 45 + np.maximum(random.lognormal(6.8, 0.8, n), 20)
    return np.minimum(np.choose(kind, [short, long, text]), max_length).astype(int), kind < 2


def draw_captions(n: int, seed: int, features: int, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """`draw_lengths` for stage 1: an image and a sentence about it."""
    lengths = features + np.random.default_rng(seed).integers(8, 60, n)
    return np.minimum(lengths, max_length), np.ones(n, bool)


class DrawnSamples:
    """A `SampleSource` of random conversations."""

    repeats = 1

    def __init__(self, config: TrainConfig, model: LlavaConfig, n: int | None = None):
        captions = config.template == "plain"
        self.model = model
        self.path, self.template = "lengths like the captions of stage 1" if captions else "lengths like mix665k's", ""
        self._number = n or (CAPTIONS if captions else MIX665K)
        self._place = tile_layout(IMAGE, model)
        draw = draw_captions if captions else draw_lengths
        drawn = draw(WINDOW, config.seed, count_features(self._place, model), config.max_length)
        each = np.arange(self._number) * WINDOW // self._number  # repeats one window's lengths over the whole file
        self._lengths, self.has_image = (values[each] for values in drawn)
        self.max_images = int(self.has_image.any())

    def __len__(self) -> int:
        return self._number

    def measure(self, index: int, epoch: int = 0) -> Sample:
        layouts = (self._place,) * bool(self.has_image[index])
        return Sample(index, self.path, index, index, epoch, int(self._lengths[index]), 0, 0, layouts)

    def load(self, sample: Sample) -> Row:
        return Row(np.zeros(0, int), sample.layouts)


def drawn_data(config: TrainConfig, model: LlavaConfig, rows_multiple: int, n: int | None = None) -> Data:
    """As `train.loader.open_data`, for n random conversations; None: as many as the stage's data has."""
    config = config.replace(workers=0)
    samples: Any = DrawnSamples(config, model, n)  # in place of `Samples`
    return Data(config, samples, BadSamples(config, samples, None), rows_multiple, 0, 1, True)
