"""How answers are drawn. What does so is in `infer.choosing`; this is without JAX, so that flags can wait for it."""

import dataclasses
from typing import Any

import numpy as np

from llava_jax.console import MAX_INT32, SEED, Range, check_ranges, integer, number


def _(default: float, allowed: Range) -> Any:
    return dataclasses.field(default=default, metadata={"range": allowed})


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    temperature     0 takes the likeliest token; else logits are divided by it
    top_k           draw from this many likeliest tokens only; 0 for all
    top_p           draw from the fewest tokens that have this much probability together (Holtzman et al. 2020)
    seed            of the randomness; an answer depends on it and on the question, not on its place in a batch
    max_new_tokens  an answer is cut after this many, and where the model has no position left

    Raises:
      InputError: one is out of its range.
    """

    temperature: float = _(0.0, number(0, 1000))
    top_k: int = _(0, integer(0, MAX_INT32))
    top_p: float = _(1.0, number(0, 1, above=True))
    seed: int = _(0, SEED)
    max_new_tokens: int = _(512, integer(1, MAX_INT32))

    def __post_init__(self):
        check_ranges(self)

    def knobs(self) -> dict[str, np.generic]:
        """What `choosing.choose` takes: numbers that programs are given, so that no setting compiles anything."""
        return {
            "temperature": np.float32(self.temperature),
            "top_k": np.int32(self.top_k),
            "top_p": np.float32(self.top_p),
        }
