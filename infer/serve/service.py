"""What all requests share: the engine, its worker, threads that prepare prompts, and how much may be in progress."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.types import Receive

from infer.prompt import Prompt
from infer.prompt import Request as PromptRequest
from infer.serve.content import Conversation
from infer.serve.errors import CLOSE, RETRY_AFTER, ApiError
from infer.serve.media import NotFetched, fetch_image, media_guard
from infer.serve.metrics import Metrics
from infer.serve.settings import Settings
from infer.serve.worker import Answering, Worker
from llava_jax.console import InputError
from llava_jax.data.templates import Template
from llava_jax.data.urls import NamedBytes, is_url

RAW = Template("plain")  # of prompts that are text alone
DOWNLOADS = 16  # at a time
CHARACTERS = 32  # that a position of the context may have; more are not tokenized: that takes 600 bytes for each


class Service:
    """A model that answers requests.

    Attributes:
      draining: whether new requests are refused, since the server is about to end.
      end: set to end the server.
      dead: set if the scheduler fails.
      answering: the requests that wait or are being answered.
    """

    def __init__(self, engine: Any, scheduler: Any, settings: Settings):
        self.engine, self.scheduler, self.settings = engine, scheduler, settings
        self.context = min(scheduler.context, engine.context)
        self.metrics = Metrics(settings.models[0], scheduler, self.context)
        self.worker = Worker(scheduler, self.metrics, self._on_death)
        self.draining, self.end, self.dead = False, asyncio.Event(), asyncio.Event()
        self.answering: set[Answering] = set()
        self._closed: ApiError | None = None
        self._guard = None
        if settings.media_domains:
            self._guard = media_guard(settings.media_domains, settings.max_media_mb << 20, settings.media_seconds)
        self._preparing = concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1), "prepare")
        self._fetching = concurrent.futures.ThreadPoolExecutor(DOWNLOADS, "fetch")
        self._places, self._bytes = 0, 0  # taken, of answers and of bodies

    def start(self) -> None:
        """Start the scheduler's thread. Called on the event loop."""
        self._loop = asyncio.get_running_loop()
        self.worker.start()

    def _on_death(self) -> None:
        self._loop.call_soon_threadsafe(self._close, ApiError(503, "the engine has stopped"))
        self._loop.call_soon_threadsafe(self.dead.set)

    def _close(self, reason: ApiError) -> None:
        """End all requests, those too that are still being prepared."""
        self._closed = reason
        for answering in self.answering:
            answering.cancel(reason)

    @property
    def is_healthy(self) -> bool:
        return self.worker.error is None and not self.draining

    def stop(self, seconds: float) -> bool:
        """Stop all threads; whether the scheduler's ended in time."""
        for pool in (self._preparing, self._fetching):
            pool.shutdown(wait=False, cancel_futures=True)
        return self.worker.stop(seconds)

    # ------------------------------------------------------------ limits

    @contextlib.contextmanager
    def place(self) -> Iterator["Place"]:
        """A place for a request in the slots or in the queue.

        Raises:
          ApiError: there is none.
        """
        place = Place(self)
        try:
            place.grow(1)
            yield place
        finally:
            self._places -= place.answers
            self._bytes -= place.bytes

    async def read(self, request: Request, place: "Place") -> bytes:
        """Receive the body of a request, within the limits on its size and time.

        Raises:
          ApiError: it exceeds them, or is not JSON by its headers.
          starlette.requests.ClientDisconnect: the client left.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "send the body as Content-Type: application/json, without Content-Encoding")
        limit, data = self.settings.max_body, bytearray()
        too_large = ApiError(413, f"the request is larger than {self.settings.max_body_mb} MiB")
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large
        try:
            async with asyncio.timeout(self.settings.receive_seconds):
                async for part in request.stream():
                    place.hold(len(part))
                    data += part
                    if len(data) > limit:
                        raise too_large
        except TimeoutError:
            seconds = f"{self.settings.receive_seconds:g} seconds"
            raise ApiError(408, f"the request did not arrive within {seconds}", headers=CLOSE) from None
        return bytes(data)

    # ------------------------------------------------------------ work

    async def prepare(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in one of the few threads that prepare prompts."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, function, *args)

    async def prompt(self, conversation: Conversation, place: "Place", template: Template | None = None) -> Prompt:
        """Fetch the images of a conversation, and prepare it.

        Args:
          place: of the request, which holds what is downloaded.
          template: instead of the model's own.

        Raises:
          ApiError: an image cannot be had, the prompt is too long, or all requests together have too many bytes.
        """
        field, characters = "prompt" if template else "messages", CHARACTERS * self.context
        if conversation.characters > characters:
            raise ApiError(
                400, f"the texts have {conversation.characters:,} characters; at most {characters:,} may be asked of a "
                f"context of {self.context} positions", field,
            )  # fmt: skip
        tasks = [asyncio.create_task(self._fetch(url, name, place)) for url, name in conversation.images]
        try:
            fetched = await asyncio.gather(*tasks)
            request = PromptRequest(
                conversation.turns, tuple(fetched), conversation.system,
                trust_special_tokens=self.settings.trust_special_tokens,
            )  # fmt: skip
            prompt = await self.prepare(lambda: self.engine.prepare(request, template=template))
            if not prompt.length:
                raise InputError("the prompt is empty")
            return prompt
        except NotFetched as error:
            raise ApiError(422, str(error), field) from None
        except InputError as error:
            raise ApiError(400, str(error), field) from None
        finally:
            for task in tasks:  # after an error, those that have not begun
                task.cancel()

    async def _fetch(self, url: str, name: str, place: "Place") -> NamedBytes:
        """Fetch an image. Only downloads wait for the threads that download."""
        if not is_url(url):
            return await self.prepare(fetch_image, url, name, self._guard)
        loop = asyncio.get_running_loop()
        data = await loop.run_in_executor(self._fetching, fetch_image, url, name, self._guard)
        place.hold(len(data))
        return data

    @contextlib.asynccontextmanager
    async def answers(
        self, prompts: Sequence[Any], sampling: Any, arrived: float, receive: Receive
    ) -> AsyncIterator[Answering]:
        """Submit the prompts of a request; they are cancelled when the client leaves, or at the end of the block.

        Args:
          receive: of a request whose body has been read.

        Raises:
          ApiError: the service is closed, or a prompt leaves no room for an answer.
        """
        if self._closed:
            raise self._closed
        try:
            answering = Answering(self.worker, prompts, sampling, arrived)
        except InputError as error:
            raise ApiError(400, str(error)) from None
        self.answering.add(answering)
        watching = asyncio.create_task(_until_left(receive))
        watching.add_done_callback(lambda _: answering.cancel())
        try:
            yield answering
        finally:
            watching.cancel()
            self.answering.discard(answering)

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, and wait for the others; cancel those that take longer."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._places:
                    await asyncio.sleep(0.02)
        self._close(ApiError(503, "the server is shutting down"))


@dataclasses.dataclass
class Place:
    """What a request takes of the server: how many answers, and how many bytes, since what was sent is in memory until
    it is answered."""

    service: Service
    answers: int = 0
    bytes: int = 0

    def grow(self, answers: int) -> None:
        """Count for so many answers.

        Raises:
          ApiError: there is no place for them, now or ever.
        """
        service = self.service
        places = service.scheduler.requested_slots + service.settings.queue
        if answers > places:
            raise ApiError(400, f"n: at most {places} answers are generated at a time", "n")
        if service._places + answers - self.answers > places:
            raise ApiError(429, "the queue is full; try again later", headers=RETRY_AFTER)
        service._places += answers - self.answers
        self.answers = answers

    def hold(self, count: int) -> None:
        """Count for `count` more bytes.

        Raises:
          ApiError: all requests together have too many.
        """
        self.service._bytes += count
        self.bytes += count
        if self.service._bytes > self.service.settings.max_bodies:
            raise ApiError(429, "too many large requests at a time; try again later", headers=RETRY_AFTER)


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
