"""How much work the scheduler dispatches at a time, by how long it took before; and how much it did (host only)."""

import dataclasses
import math
import time

from infer.compiled import STEPS

MAX_CHUNKS = 4  # of prompts between two dispatches of decode steps


class Pace:
    """Measures dispatches by when their results are read: the device runs them one after the other.

    Attributes:
      dispatch_seconds: how long decode steps, and chunks of prompts beyond the first, should take between two readings
        of tokens; None for what gives the most tokens per second.
    """

    def __init__(self, dispatch_seconds: float | None):
        self.dispatch_seconds = dispatch_seconds
        self._step_seconds = self._chunk_seconds = math.inf  # as measured last
        self._last_read = 0.0

    def chunks(self, decoding: int, slots: int) -> int:
        """Chunks to prefill before the next decode steps, when `decoding` of the slots are waiting for those."""
        if not decoding:
            return MAX_CHUNKS
        if self.dispatch_seconds is None:
            return 1 + round((MAX_CHUNKS - 1) * (1 - decoding / slots))
        return self._that_fit(self._chunk_seconds, MAX_CHUNKS)

    def steps(self, copied: float = 0.0) -> int:
        """Decode steps of the next dispatch.

        Args:
          copied: bytes that it copies before them, per byte that a step reads: a quarter of the time at most.
        """
        fit = STEPS if self.dispatch_seconds is None else self._that_fit(self._step_seconds, STEPS)
        return min(STEPS, max(fit, math.ceil(3 * copied)))

    def has_read(self, steps: int) -> None:
        """The results of a dispatch were read: of a chunk of a prompt, or of `steps` decode steps."""
        now = time.perf_counter()
        if steps:
            self._step_seconds = (now - self._last_read) / steps
        else:
            self._chunk_seconds = now - self._last_read
        self._last_read = now

    def _that_fit(self, each: float, most: int) -> int:
        assert self.dispatch_seconds is not None
        return max(1, min(most, math.floor(self.dispatch_seconds / each))) if each > 0 else most


@dataclasses.dataclass
class Statistics:
    """Counts since the scheduler began."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    image_queries: int = 0  # images that had to be placed
    image_hits: int = 0  # those of them that were encoded already
    dispatches: int = 0
    decode_steps: int = 0
