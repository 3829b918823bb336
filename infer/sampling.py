"""Sampling options. `infer.next_token` implements them; this module does not import JAX, so that flags load fast."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from llava_jax.console import MAX_INT32, SEED, InputError, Range, check_ranges, integer, number, plural, show_value

MAX_LOGPROBS = 20  # alternatives per token, as OpenAI's
MAX_BIASES = 300  # as OpenAI's
MAX_STOPS, MAX_STOP_LENGTH = 16, 1000
TOKEN_ID, BIAS = integer(0, MAX_INT32), number(-100, 100)


def _(default: Any, allowed: Range) -> Any:
    return dataclasses.field(default=default, metadata={"range": allowed})


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling options.

    temperature         0 is greedy; otherwise logits are divided by it
    top_k               sample from this many most likely tokens; 0 for all
    top_p               sample from the fewest tokens whose probabilities sum to this (Holtzman et al. 2020)
    seed                random seed; an answer depends on it and on the question, not on its position in a batch
    max_new_tokens      truncate the answer after this many tokens; it also ends with the context
    min_p               sample from tokens at least this many times as likely as the most likely one
    min_new_tokens      nothing but the context ends the answer before this many tokens: end tokens are not chosen, stop
                        strings and `stop_token_ids` not looked for
    repetition_penalty  divide positive logits of tokens that are in the prompt or the answer, and multiply negative
                        ones, by this (Keskar et al. 2019); 1 is off
    presence_penalty    subtract this from the logits of tokens that are in the answer
    frequency_penalty   subtract this for each time that they are in it
    logit_bias          (token id, number to add to its logit) pairs, or a mapping
    stop                strings that end the answer, beside the template's; not part of it
    stop_token_ids      tokens that end the answer, beside the model's end tokens
    ignore_eos          do not end the answer at the model's end tokens
    top_logprobs        return log probabilities: of each token, and of this many most likely ones; None for none

    Penalties, bias and the minimum length also apply to greedy choice.

    Raises:
      InputError: an option is out of range.
    """

    temperature: float = _(0.0, number(0, 1000))
    top_k: int = _(0, integer(0, MAX_INT32))
    top_p: float = _(1.0, number(0, 1, above=True))
    seed: int = _(0, SEED)
    max_new_tokens: int = _(512, integer(1, MAX_INT32))
    min_p: float = _(0.0, number(0, 1))
    min_new_tokens: int = _(0, integer(0, MAX_INT32))
    repetition_penalty: float = _(1.0, number(0, 1000, above=True))
    presence_penalty: float = _(0.0, number(-2, 2))
    frequency_penalty: float = _(0.0, number(-2, 2))
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = _(None, integer(0, MAX_LOGPROBS))

    def __post_init__(self):
        check_ranges(self)
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"--min-new-tokens {self.min_new_tokens}: must be at most --max-new-tokens, {self.max_new_tokens}"
            )
        if not isinstance(self.ignore_eos, bool):
            raise InputError(f"--ignore-eos {show_value(self.ignore_eos)}: must be true or false")
        for name, checked in (
            ("logit_bias", _logit_bias(self.logit_bias)),
            ("stop", _stop(self.stop)),
            ("stop_token_ids", _stop_token_ids(self.stop_token_ids)),
        ):
            object.__setattr__(self, name, checked)  # lists and mappings become tuples

    def params(self) -> dict[str, np.generic]:
        """The options that `next_token.choose` takes, by the names of its `Controls`: arrays, so that changing one does
        not recompile."""
        return {
            "temperature": np.float32(self.temperature),
            "top_k": np.int32(self.top_k),
            "top_p": np.float32(self.top_p),
            "min_p": np.float32(self.min_p),
            "repetition_penalty": np.float32(self.repetition_penalty),
            "presence_penalty": np.float32(self.presence_penalty),
            "frequency_penalty": np.float32(self.frequency_penalty),
            "min_new_tokens": np.int32(self.min_new_tokens),
        }

    def bias_row(self, vocab_size: int) -> np.ndarray:
        """`logit_bias` for each token, float32 [V].

        Raises:
          InputError: a token id is not in the vocabulary.
        """
        bias_V = np.zeros(vocab_size, np.float32)
        for token, bias in self.logit_bias:
            integer(0, vocab_size - 1).check("--logit-bias: the token id", token)
            bias_V[token] = bias
        return bias_V


def _logit_bias(given: Any) -> tuple[tuple[int, float], ...]:
    """Check `logit_bias`."""
    pairs = _items("--logit-bias", given.items() if isinstance(given, Mapping) else given, MAX_BIASES, "pair")
    checked: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(f"--logit-bias {show_value(pair)}: must be a token id and a number")
        token, bias = pair
        TOKEN_ID.check("--logit-bias: the token id", token)
        BIAS.check(f"--logit-bias: the bias of token {token},", bias)
        if token in checked:
            raise InputError(f"--logit-bias: token {token} is given twice")
        checked[int(token)] = float(bias)
    return tuple(checked.items())


def _stop(given: Any) -> tuple[str, ...]:
    """Check `stop`; a single string is accepted."""
    stops = (given,) if isinstance(given, str) else _items("--stop", given, MAX_STOPS, "string")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise InputError(f"--stop {show_value(stop)}: must be a string of 1 to {MAX_STOP_LENGTH:,} characters")
    return stops


def _stop_token_ids(given: Any) -> tuple[int, ...]:
    tokens = _items("--stop-token-ids", given, MAX_BIASES, "token id")
    for token in tokens:
        TOKEN_ID.check("--stop-token-ids: the token id", token)
    return tuple(map(int, tokens))


def _items(name: str, given: Any, limit: int, noun: str) -> tuple:
    """The items of a list, a tuple or the like, at most `limit` of them."""
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
        raise InputError(f"{name} {show_value(given)}: must be a list")
    items = tuple(given)
    if len(items) > limit:
        raise InputError(f"{name}: has {plural(len(items), noun)}; at most {limit} are supported")
    return items
