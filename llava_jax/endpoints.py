"""Ask a language model behind an OpenAI-compatible endpoint: many requests at a time, each answered once.

    endpoint = Endpoint("http://localhost:8000/v1", "NAME", concurrency=32)
    with Replies("replies.jsonl") as replies:
        outcome = endpoint.ask(requests, replies, total=len(questions))

Replies are kept as they arrive. Requests that the file has replies to are the caller's to leave out.

The openai package sends the requests. Its retries are off: they do not tell an endpoint that is down from one that is
busy, give up after two tries by default, and cannot be interrupted.
"""

import asyncio
import contextlib
import dataclasses
import email.utils
import functools
import os
import random
import re
import signal
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, NamedTuple

from llava_jax.console import InputError, Progress, first_line, note, plural, shorten
from llava_jax.json_files import decode_json
from llava_jax.replies import Completion, Prices, Replies, Reply

Messages = list[dict[str, Any]]
WAITS = (0.5, 1, 2, 4, 8, 16, 32)  # seconds before each retry, unless the endpoint asks for more
MAX_WAIT = 60.0  # even if the endpoint asks for more
UNREACHED_TRIES = 3  # of an endpoint to which no connection succeeds
BUSY = (408, 409, 425, 429)  # statuses that are worth a retry, as are all from 500 up
OWN_FAULT = (400, 413, 422)  # statuses of a request that the endpoint refuses, while others may succeed
FAILED_AT_START = 8  # requests that fail before one succeeds: then the settings are at fault
CONNECT_SECONDS = 10.0
MAX_REPLY = 2**24  # bytes
KEY = "OPENAI_API_KEY"


class Request(NamedTuple):
    """A request; `messages` is called in a thread when its turn comes, and may raise `InputError`."""

    id: str
    messages: Callable[[], Messages]


@dataclasses.dataclass
class Outcome:
    """What became of the requests.

    Attributes:
      failed: the reason for each request without a reply, by id.
      signal: the signal that stopped asking, if any.
    """

    answered: int = 0
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    signal: int | None = None


class _Transient(Exception):
    """A failure that may pass."""

    def __init__(self, reason: str, wait: float = 0.0, *, reached: bool = True, busy: bool = False):
        super().__init__(reason)
        self.wait, self.reached, self.busy = wait, reached, busy


class _Refused(Exception):
    """A failure of this request alone."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint, and how to ask it.

    Attributes:
      url: to which `/chat/completions` is appended.
      concurrency: requests in flight.
      timeout: seconds for a reply.
      body: fields of each request other than model and messages (`max_tokens`, `temperature`, ...).
      prices: for the cost in the progress bar.
    """

    url: str
    model: str
    concurrency: int = 16
    timeout: float = 600.0
    body: dict[str, Any] = dataclasses.field(default_factory=dict)
    prices: Prices | None = None

    def ask(
        self,
        requests: Iterable[Request],
        replies: Replies,
        *,
        total: int,
        follow_up: Callable[[Reply], Request | None] = lambda reply: None,
    ) -> Outcome:
        """Send requests, and append the replies. SIGINT and SIGTERM stop asking: those in flight are waited for, unless
        the signal is repeated.

        Args:
          total: the number of requests, for the progress bar.
          follow_up: the next request of a conversation, which counts as part of the first; None if it has ended.

        Raises:
          InputError: openai is not installed, the URL is not one, nothing can be answered (no connection, wrong key,
            unknown model), or the replies cannot be written.
        """
        return asyncio.run(_Asking(self, replies, follow_up).run(requests, total))


def request_body(endpoint: Endpoint, messages: Messages) -> dict[str, Any]:
    """The body of a request. Fields that are None are left out."""
    body = {"model": endpoint.model, "messages": messages} | endpoint.body
    return {name: value for name, value in body.items() if value is not None}


@functools.cache
def _openai():
    try:
        import openai
    except ImportError:
        raise InputError("asking an endpoint needs openai: pip install 'llava-jax[data]'") from None
    return openai


def _open_client(endpoint: Endpoint) -> Any:
    openai, key = _openai(), os.environ.get(KEY) or "none"  # local servers need no key, the client one
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{KEY}: is not a key: it has characters other than printable ASCII")
    if any("\ud800" <= character <= "\udfff" for character in endpoint.model):  # bytes of an argument
        raise InputError(f"{shorten(endpoint.model)}: is not the name of a model: it is not UTF-8")
    timeout = openai.Timeout(endpoint.timeout, connect=min(endpoint.timeout, CONNECT_SECONDS))
    try:
        url = urllib.parse.urlsplit(endpoint.url)
        if url.scheme not in ("http", "https") or not url.hostname or url.port == 0:  # a port above 65535 raises
            raise ValueError
        base_url = endpoint.url.removesuffix("/chat/completions")
        http = openai.DefaultAsyncHttpxClient(timeout=timeout, event_hooks={"response": [_bound]})
        return openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=timeout, http_client=http)
    except Exception:  # each HTTP client has its own for an invalid URL
        raise InputError(
            f"{shorten(endpoint.url)}: is not the URL of an endpoint, such as http://host:8000/v1"
        ) from None


async def _bound(response: Any) -> None:
    """Stop reading a response of the HTTP client after `MAX_REPLY` decompressed bytes."""
    read = response.aiter_bytes

    async def aiter_bytes(*args: Any) -> AsyncIterator[bytes]:
        size = 0
        async for part in read(*args):
            if (size := size + len(part)) > MAX_REPLY:
                raise _Refused(f"the reply has more than {MAX_REPLY:,} bytes")
            yield part

    response.aiter_bytes = aiter_bytes


class _Asking:
    """One call of `Endpoint.ask`."""

    def __init__(self, endpoint: Endpoint, replies: Replies, follow_up: Callable[[Reply], Request | None]):
        self.endpoint, self.replies, self.follow_up = endpoint, replies, follow_up
        self.where = shorten(endpoint.url)
        self.client = _open_client(endpoint)
        self.outcome = Outcome()
        self.error: InputError | None = None  # the first that stops the run
        self.asking: dict[str, float] = {}  # requests in flight or waiting for a retry, and since when
        self.failing: set[str] = set()  # those of them whose last try failed
        self.given_up = 0  # requests in a row; one may be at fault itself, two are the endpoint's fault
        self.start, self.tokens = time.monotonic(), 0

    async def run(self, requests: Iterable[Request], total: int) -> Outcome:
        self.stopping, self.source = asyncio.Event(), iter(requests)
        with Progress("asking", total, "answers") as self.bar:
            workers = [asyncio.create_task(self._work()) for _ in range(self.endpoint.concurrency)]
            with self._signals(workers):
                await asyncio.gather(*workers, return_exceptions=True)
        await self.client.close()
        for worker in workers:
            if not worker.cancelled() and (error := worker.exception()):
                raise error
        if self.error:
            raise self.error
        return self.outcome

    @contextlib.contextmanager
    def _signals(self, workers: list[asyncio.Task]) -> Iterator[None]:
        """Stop at the first signal, and abandon requests in flight at the next."""
        loop = asyncio.get_running_loop()

        def stop(number: int) -> None:
            if self.outcome.signal:
                for worker in workers:
                    worker.cancel()
            elif self.asking:
                waiting = plural(len(self.asking), "request")
                note(f"stopping: waiting for {waiting} in flight; repeat the signal to stop at once")
            self.outcome.signal = number
            self.stopping.set()

        handled = (signal.SIGINT, signal.SIGTERM)
        with contextlib.suppress(ValueError, RuntimeError):  # not the main thread
            for number in handled:
                loop.add_signal_handler(number, stop, number)
        try:
            yield
        finally:
            with contextlib.suppress(ValueError, RuntimeError):
                for number in handled:
                    loop.remove_signal_handler(number)

    async def _work(self) -> None:
        """Ask one request after the other, each with its follow-ups."""
        while not self.stopping.is_set() and (request := next(self.source, None)):
            following: Request | None = request
            try:
                while following and not self.stopping.is_set():
                    following = await self._ask(following)
            except InputError as error:
                self.error = self.error or error
                self.stopping.set()
                return
            if not following:
                self.bar.advance(1, self._rate())

    async def _ask(self, request: Request) -> Request | None:
        """Ask once. Returns the request that follows, or if asking was stopped the same one."""
        self.asking[request.id] = time.monotonic()
        try:
            reply = await self._try_often(request.id, await _messages_of(request))
        except _Refused as error:
            self.outcome.failed[request.id] = str(error)
            if not self.outcome.answered and len(self.outcome.failed) >= FAILED_AT_START:
                raise InputError(f"{self.where}: the first {FAILED_AT_START} requests failed: {error}") from None
            return None
        finally:
            del self.asking[request.id]
            self.failing.discard(request.id)
        if reply is None:
            return request
        self.replies.append(reply)
        self.outcome.answered, self.given_up = self.outcome.answered + 1, 0
        self.tokens += reply.completion_tokens
        return self.follow_up(reply)

    async def _try_often(self, name: str, messages: Messages) -> Reply | None:
        """The reply; None if asking was stopped.

        Raises:
          _Refused: there is none to this request.
          InputError: there is none to any.
        """
        answered, tries, first = self.outcome.answered, 0, 0.0
        while True:
            try:
                return await self._send(name, messages)
            except _Transient as error:
                failure = error
            first = first or time.monotonic()
            self.failing.add(name)
            if failure.busy and self.outcome.answered > answered:  # a limit on requests per minute
                answered, tries = self.outcome.answered, min(tries, len(WAITS) // 2)
            tries += 1
            is_unreached = not failure.reached and not self.outcome.answered and tries >= UNREACHED_TRIES
            if is_unreached or tries > len(WAITS):
                self.given_up += 1
                if is_unreached or (self.given_up > 1 and self._all_fail(first)):
                    raise InputError(f"{self.where}: {failure}, {tries} times; the same command resumes")
                raise _Refused(f"{failure}, {tries} times")
            wait = max(min(failure.wait, MAX_WAIT), WAITS[tries - 1]) * random.uniform(1.0, 1.25)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), wait)
                return None

    def _all_fail(self, since: float) -> bool:
        """Whether all requests fail that were sent before a time; others may only be slow."""
        return all(name in self.failing or start > since for name, start in self.asking.items())

    async def _send(self, name: str, messages: Messages) -> Reply:
        """Send a request once."""
        openai, body = _openai(), request_body(self.endpoint, messages)
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                # Not `chat.completions.create`, whose checks of the messages take most of the time.
                data = await self.client.post("/chat/completions", body=body, cast_to=bytes)
            return decode_json(data, Completion, "the reply").reply(name)
        except openai.APIConnectionError as error:
            if _is_unreached(error):
                raise _Transient(f"cannot be reached ({first_line(error.__cause__ or error)})", reached=False) from None
            if not isinstance(error, openai.APITimeoutError):
                raise _Transient(f"the connection broke ({first_line(error.__cause__ or error)})") from None
            raise _Transient(f"no reply in {self.endpoint.timeout:g} seconds") from None
        except TimeoutError:
            raise _Transient(f"no reply in {self.endpoint.timeout:g} seconds") from None
        except openai.APIStatusError as error:
            raise self._failure(error) from None
        except InputError as error:
            raise _Transient(str(error)) from None

    def _failure(self, error: Any) -> Exception:
        """What a response with an error status means."""
        status, message = error.status_code, _message(error)
        shown = f"{status} {message}" if message else f"status {status}"
        if "insufficient_quota" in str(error.body):
            return InputError(f"{self.where}: {shown}")
        if status in BUSY or status >= 500:
            return _Transient(shown, _retry_after(error.response.headers), busy=status in (429, 503))
        if status in OWN_FAULT:
            return _Refused(shown)
        hints = {401: f"; {KEY} sets the key", 404: f"; does it serve {shorten(self.endpoint.model)}, and end in /v1?"}
        return InputError(f"{self.where}: {shown}{hints.get(status, '')}")

    def _rate(self) -> str:
        """For the progress bar."""
        parts = [f"{self.tokens / max(time.monotonic() - self.start, 1e-3):,.0f} tokens/s"]
        if self.failing:
            parts.append(f"{len(self.failing)} retrying")
        if self.endpoint.prices:
            cost = self.endpoint.prices.cost(self.replies.prompt_tokens, self.replies.completion_tokens)
            parts.append(f"${cost:,.2f}")
        return ", ".join(parts)


async def _messages_of(request: Request) -> Messages:
    try:
        return await asyncio.to_thread(request.messages)
    except InputError as error:
        raise _Refused(str(error)) from None


def _is_unreached(error: BaseException | None) -> bool:
    """Whether no connection was made, by the name of the HTTP client's error (openai uses one of several clients)."""
    while error and type(error).__name__ not in ("ConnectError", "ConnectTimeout"):
        error = error.__cause__
    return error is not None


def _message(error: Any) -> str:
    """The message in the body of an error."""
    body = error.body
    for key in ("error", "message", "detail"):
        body = body.get(key, body) if isinstance(body, dict) else body
    return shorten(" ".join(re.sub("<[^>]*>", " ", str(body or "")).split()), 200)


def _retry_after(headers: Any) -> float:
    """The seconds of a `Retry-After` header, which is a number or a date; 0 without one."""
    text = headers.get("retry-after", "")
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?", text):
        return float(text)
    date = email.utils.parsedate_tz(text)
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0
