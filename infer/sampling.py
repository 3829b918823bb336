"""Sampling options. `infer.next_token` implements them; this module does not import JAX, so that flags load fast."""

import dataclasses
from typing import Any

import numpy as np

from llava_jax.console import MAX_INT32, SEED, Range, check_ranges, integer, number


def _(default: float, allowed: Range) -> Any:
    return dataclasses.field(default=default, metadata={"range": allowed})


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling options.

    temperature     0 is greedy; otherwise logits are divided by it
    top_k           sample from this many most likely tokens; 0 for all
    top_p           sample from the fewest tokens whose probabilities sum to this (Holtzman et al. 2020)
    seed            random seed; an answer depends on it and on the question, not on its position in a batch
    max_new_tokens  truncate the answer after this many tokens; it also ends with the context

    Raises:
      InputError: an option is out of range.
    """

    temperature: float = _(0.0, number(0, 1000))
    top_k: int = _(0, integer(0, MAX_INT32))
    top_p: float = _(1.0, number(0, 1, above=True))
    seed: int = _(0, SEED)
    max_new_tokens: int = _(512, integer(1, MAX_INT32))

    def __post_init__(self):
        check_ranges(self)

    def params(self) -> dict[str, np.generic]:
        """The options that `next_token.choose` takes: arrays, so that changing one does not recompile."""
        return {
            "temperature": np.float32(self.temperature),
            "top_k": np.int32(self.top_k),
            "top_p": np.float32(self.top_p),
        }
