"""What the event loop sees of generations that the scheduler's thread writes."""

import asyncio
from types import SimpleNamespace

import pytest

from infer.serve.errors import ApiError
from infer.serve.worker import Answering


class Scheduler:
    """Queues generations and does nothing else; `wake` is the worker's."""

    metrics = SimpleNamespace(update=lambda progress, generation: None)

    def submit(self, prompt, sampling, choice):
        choice.generation = SimpleNamespace(cancel=lambda: None)

    def wake(self):
        pass


def test_an_update_does_not_undo_what_ended_an_answer():
    async def run():
        answering = Answering(Scheduler(), [None], None, 0.0)
        reason = ApiError(503, "the server is shutting down")

        class Generation:
            tokens, done = (), False

            @property
            def error(self):  # in the middle of the update, the event loop ends the answer
                answering.cancel(reason)

        Generation.cancel = lambda self: None
        answering.choices[0].update(Generation())
        assert answering.done
        with pytest.raises(ApiError, match="shutting down"):
            answering.check()

    asyncio.run(run())
