"""The thread that runs the scheduler, and the bridge between it and the event loop.

The scheduler's thread appends to a generation's tokens and calls `Choice.update`; the event loop reads them. Neither
waits for the other: what a slow client has not read yet is in the generation, which its number of tokens bounds.
"""

import asyncio
import contextlib
import dataclasses
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import ClientDisconnect

from infer.sampling import Sampling
from infer.serve.errors import ApiError
from infer.serve.metrics import Metrics, Progress
from llava_jax.console import InputError, note

Generation = Any  # `infer.scheduler.Generation`, or a scripted one in tests


class Worker(threading.Thread):
    """Runs `scheduler.step` while there is work.

    Attributes:
      error: what ended the thread before its time; nothing can be answered any more.
    """

    def __init__(self, scheduler: Any, metrics: Metrics, on_death: Callable[[], None]):
        """
        Args:
          on_death: called on this thread if it fails.
        """
        super().__init__(name="scheduler", daemon=True)
        self.scheduler, self.metrics, self.on_death = scheduler, metrics, on_death
        self.error: BaseException | None = None
        self._wake, self._stopping = threading.Event(), False

    def submit(self, prompt: Any, sampling: Sampling, choice: "Choice") -> None:
        """Queue a generation; `choice` follows it."""
        choice.generation = self.scheduler.submit(prompt, sampling, choice.update)
        self._wake.set()

    def wake(self) -> None:
        """Have the scheduler look at what was cancelled."""
        self._wake.set()

    def stop(self, seconds: float) -> bool:
        """Stop the thread; whether it ended in time."""
        self._stopping = True
        self._wake.set()
        self.join(seconds)
        return not self.is_alive()

    def run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                if not self.scheduler.step():
                    self._wake.wait()
        except BaseException as error:
            self.error = error
            for lines in traceback.format_exception(error):
                note(lines.rstrip())
            self.on_death()


@dataclasses.dataclass(eq=False)
class Choice:
    """A generation of a request, as the event loop sees it.

    Attributes:
      seen: the number of tokens that may be read, and whether they are all: one tuple, replaced at once.
      error: of the engine, that ended it.
    """

    index: int
    on_update: Callable[["Choice"], None]
    generation: Generation = None
    seen: tuple[int, bool] = (0, False)
    error: Exception | None = None

    def update(self, generation: Generation) -> None:
        """Called on the scheduler's thread."""
        self.generation = generation
        self.error = generation.error
        self.seen = (len(generation.tokens), generation.done)
        self.on_update(self)


class Answering:
    """The generations of a request. Used on the event loop."""

    def __init__(self, worker: Worker, prompts: Sequence[Any], sampling: Sampling, arrived: float):
        """Submit a prompt for each answer."""
        self._loop, self._changed, self._worker = asyncio.get_running_loop(), asyncio.Event(), worker
        self._is_waking = False  # a call of `_wake` is on its way
        self._reason: ApiError | None = None  # why the server ended it
        self._progress = [Progress(arrived, len(prompts)) for _ in prompts]
        self.choices = [Choice(i, self._update) for i in range(len(prompts))]
        for choice, prompt in zip(self.choices, prompts, strict=True):
            worker.submit(prompt, sampling, choice)

    def _update(self, choice: Choice) -> None:
        """Called on the scheduler's thread."""
        self._worker.metrics.update(self._progress[choice.index], choice.generation)
        if not self._is_waking:
            self._is_waking = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_waking = False
        self._changed.set()

    @property
    def done(self) -> bool:
        """Whether there will be no more, since all choices have ended or the server ended them."""
        return self._reason is not None or all(choice.seen[1] for choice in self.choices)

    def cancel(self, reason: ApiError | None = None) -> None:
        """Free the slots, or the places in the queue.

        Args:
          reason: that `check` raises then; None if the client left.
        """
        if not self.done:
            self._reason = reason
        for choice in self.choices:
            if not choice.seen[1]:
                choice.generation.cancel()
        self._worker.wake()
        self._changed.set()

    def check(self) -> None:
        """Check that all choices ended with an answer.

        Raises:
          ApiError: one did not, or the server ended them.
          ClientDisconnect: the client left.
          Exception: the error of the engine that ended one.
        """
        if self._reason:
            raise self._reason
        for choice in self.choices:
            if isinstance(choice.error, InputError):
                raise ApiError(400, str(choice.error))
            if choice.error:
                raise choice.error
            if choice.generation.stopped_by == "cancelled":
                raise ClientDisconnect

    async def changed(self, seconds: float | None = None) -> bool:
        """Wait until a choice has more tokens or ends; whether one does, in so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        return True

    async def wait(self) -> None:
        """Wait until all choices have ended."""
        while not self.done:
            await self.changed()
