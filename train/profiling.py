"""`--profile-steps`: trace some steps of a run for TensorBoard's profiler or Perfetto."""

import re
from collections.abc import Callable
from pathlib import Path

import jax

from llava_jax.console import InputError, shorten


def parse_profile_steps(text: str | None) -> range:
    """Parse `"A:B"` as the steps A to B, counted from 1.

    Raises:
      InputError: the text is malformed.
    """
    if text is None:
        return range(0)
    numbers = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    first, last = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= first <= last:
        raise InputError(
            f"--profile-steps {shorten(text)}: write A:B, the first and the last step to trace, counted from 1"
        )
    return range(first, last + 1)


class Trace:
    """Traces the given steps into `directory`; a run that resumes among them traces the rest."""

    def __init__(self, steps: range, directory: Path):
        self.steps, self.directory, self.running = steps, directory, False

    def start(self, step: int) -> None:
        """Called before `step`: start the trace if `step` is the first to trace."""
        if step in self.steps and not self.running:
            jax.profiler.start_trace(str(self.directory))
            self.running = True

    def stop(self, step: int, wait: Callable[[], None], *, last: bool) -> None:
        """Called after `step` is dispatched: stop the trace if `step` is the last to trace, or the process's `last`.

        Args:
          wait: waits until the devices have finished the step.
        """
        if self.running and (last or step + 1 not in self.steps):
            wait()
            jax.profiler.stop_trace()
            self.running = False
