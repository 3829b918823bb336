"""An answer while it is generated: its tokens, its text so far, and why it ended (host only)."""

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from infer.prompt import Prompt
from infer.sampling import Sampling
from infer.text import AnswerText
from llava_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of an answer, with the text that became certain with it."""

    id: int
    text: str = ""
    logprob: float | None = None  # if log probabilities are wanted
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens in its place, and their log probabilities


class Generation:
    """An answer to a prompt. The scheduler's thread writes it, then calls `on_update`.

    Attributes:
      tokens: so far, the one that ended the answer included.
      text: of these, what later tokens cannot change; stripped, and without the stop string.
      stopped_by: "" while it runs, then "end" (a token), "stop" (a string), "length", "cancelled" or "error".
      stop_reason: the stop string or the stop token that ended it.
      error: what made it fail.
      limit: the most tokens that it may have.
      cached_tokens: positions of the prompt whose keys and values were there.
      queued_at, started_at, first_token_at, finished_at: seconds of `time.perf_counter`.
    """

    def __init__(
        self,
        prompt: Prompt,
        sampling: Sampling,
        tokenizer: Tokenizer,
        *,
        eos_ids: tuple[int, ...],
        stop: str | None,
        limit: int,
        on_update: Callable[["Generation"], object] = lambda generation: None,
    ):
        self.prompt, self.sampling, self.limit, self.on_update = prompt, sampling, limit, on_update
        self.tokens: list[Token] = []
        self.stopped_by = ""
        self.stop_reason: str | int | None = None
        self.error: Exception | None = None
        self.cached_tokens = 0
        self.is_cancelled = False
        self.queued_at = time.perf_counter()
        self.started_at = self.first_token_at = self.finished_at = None  # type: float | None
        self._text = AnswerText(tokenizer, (stop, *sampling.stop))
        self._ends = frozenset(() if sampling.ignore_eos else eos_ids)
        self._stop_ids = frozenset(sampling.stop_token_ids)

    @property
    def text(self) -> str:
        return self._text.text

    @property
    def done(self) -> bool:
        return bool(self.stopped_by)

    def cancel(self) -> None:
        """Stop, from any thread; what was generated stays."""
        self.is_cancelled = True

    def add(self, token: int, logprob: float | None = None, top: tuple[tuple[int, float], ...] = ()) -> None:
        """Append a token, which may end the answer."""
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        may_stop = len(self.tokens) + 1 > self.sampling.min_new_tokens
        text = "" if token in self._ends else self._text.add(token, may_stop=may_stop)
        if token in self._ends:
            self._end("end")
        elif token in self._stop_ids and may_stop:
            self._end("stop", token)
        elif self._text.stopped is not None:
            self._end("stop", self._text.stopped)
        elif len(self.tokens) + 1 >= self.limit:
            self._end("length")
        rest = self._text.finish() if self.done else ""
        self.tokens.append(Token(token, text + rest, logprob, top))

    def end(self, by: str, error: Exception | None = None) -> None:
        """End without another token."""
        self.error = error
        self._end(by)
        if not error and (rest := self._text.finish()) and self.tokens:
            self.tokens[-1] = dataclasses.replace(self.tokens[-1], text=self.tokens[-1].text + rest)

    def _end(self, by: str, reason: str | int | None = None) -> None:
        self.stopped_by, self.stop_reason, self.finished_at = by, reason, time.perf_counter()


def top_of(ids_T: np.ndarray, logprobs_T: np.ndarray, n: int) -> tuple[tuple[int, float], ...]:
    """The `n` most likely tokens, from arrays that have them in order."""
    return tuple(zip(ids_T[:n].tolist(), logprobs_T[:n].tolist(), strict=True))
