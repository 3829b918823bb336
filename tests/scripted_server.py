"""An engine and a scheduler that answer by a script, at a pace of their own, and a server that runs them.

What an answer says depends on the prompt, the seed and the number of the choice; how long it takes, on `pace`.
"""

import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import threading
import time
from types import SimpleNamespace

import httpx
import numpy as np

from infer.prompt import Request
from infer.sampling import Sampling
from infer.scheduler import Statistics
from infer.serve.server import serve
from infer.serve.service import Service
from infer.serve.settings import Settings
from llava_jax.console import InputError
from llava_jax.data.images import image_size
from llava_jax.data.splice import TEXT
from llava_jax.data.templates import IMAGE_PART, Template

WORDS = ("red", " blue", " circle", " square", " small", " große", " 日本", " 🙂", ".", "\n")
VOCABULARY = 100
END = 2
IMAGE_POSITIONS = 16


class Tokenizer:
    """Token i is `WORDS[i % 10]`."""

    bos_id = None

    def token_bytes(self, id: int) -> bytes:
        return WORDS[id % len(WORDS)].encode()

    def decode(self, ids) -> str:
        return "".join(WORDS[id % len(WORDS)] for id in ids)


def text_of(turn) -> str:
    return "".join(turn)


@dataclasses.dataclass
class Prompt:
    request: Request
    ids: np.ndarray  # a word is a token
    places: np.ndarray

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def image_tokens(self) -> int:
        return int((self.places != TEXT).sum())


@dataclasses.dataclass
class Token:
    id: int
    text: str
    logprob: float | None = None
    top: list = dataclasses.field(default_factory=list)


class Engine:
    """Prepares prompts: a token is a word, an image is read."""

    def __init__(self, context: int):
        self.context, self.tokenizer = context, Tokenizer()
        self.config = SimpleNamespace(text=SimpleNamespace(vocab_size=VOCABULARY))
        self.prepared: list[Request] = []

    def prepare(self, request: Request, *, template: Template | None = None) -> Prompt:
        for image in request.images:
            image_size(image)
        if "crash" in text_of(request.turns[-1]):
            raise ZeroDivisionError(f"in {request.turns}")
        text = " ".join(text_of(turn).replace(IMAGE_PART, "") for turn in request.turns)
        ids = np.array([0] * IMAGE_POSITIONS * len(request.images) + [len(word) for word in text.split()], np.int32)
        places = np.arange(len(ids)) // IMAGE_POSITIONS
        places[len(request.images) * IMAGE_POSITIONS :] = TEXT
        if len(ids) >= self.context:
            raise InputError(f"the prompt takes {len(ids)} positions; at most {self.context - 1} fit")
        self.prepared.append(request)
        return Prompt(request, ids, places)


class Generation:
    def __init__(self, prompt: Prompt, sampling: Sampling, on_update):
        self.prompt, self.sampling, self.on_update = prompt, sampling, on_update
        self.tokens: list[Token] = []
        self.text, self.stopped_by, self.stop_reason, self.error, self.done = "", "", None, None, False
        self.cached_tokens, self.queued_at = 0, time.perf_counter()
        self.started_at = self.first_token_at = self.finished_at = None
        self.is_cancelled, self.script = False, script(prompt, sampling)

    def cancel(self) -> None:
        self.is_cancelled = True

    def end(self, by: str) -> None:
        self.stopped_by, self.done, self.finished_at = by, True, time.perf_counter()


def script(prompt: Prompt, sampling: Sampling) -> list[int]:
    """The ids of an answer of 12 tokens; "long" ones have 1000."""
    asked = prompt.request
    seed = (sampling.seed, asked.number) if sampling.temperature else ()
    digest = hashlib.sha512(repr((asked.turns, asked.system, *seed)).encode()).digest()
    return [3 + byte % 90 for byte in digest[:12]] * (84 if "long" in text_of(asked.turns[-1]) else 1)


class Scheduler:
    """Gives each running generation a token per step.

    Attributes:
      pace: seconds of a step.
      dies: raises an error in the next step.
    """

    def __init__(self, slots: int, context: int, pace: float):
        self.requested_slots, self.context, self.pace, self.dies = slots, context, pace, False
        self.queue: collections.deque[Generation] = collections.deque()
        self.active: list[Generation] = []
        self.statistics = Statistics()
        self.ended: collections.Counter[str] = collections.Counter()

    @property
    def waiting(self) -> int:
        return len(self.queue)

    @property
    def running(self) -> int:
        return len(self.active)

    @property
    def cache_usage(self) -> float:
        return len(self.active) / self.requested_slots

    def submit(self, prompt: Prompt, sampling: Sampling, on_update) -> Generation:
        self.queue.append(generation := Generation(prompt, sampling, on_update))
        return generation

    def step(self) -> bool:
        if self.dies:
            raise RuntimeError("the device is gone")
        for generation in [g for g in self.queue if g.is_cancelled]:
            self.queue.remove(generation)
            self._end(generation, "cancelled")
        while self.queue and len(self.active) < self.requested_slots:
            self.active.append(generation := self.queue.popleft())
            generation.started_at = time.perf_counter()
            self.statistics.prompt_tokens += generation.prompt.length
        if not self.active:
            return False
        if self.pace:
            time.sleep(self.pace)
        for generation in list(self.active):
            if generation.is_cancelled:
                self._end(generation, "cancelled")
            else:
                self._generate(generation)
        return True

    def _generate(self, generation: Generation) -> None:
        prompt, sampling, tokens = generation.prompt, generation.sampling, generation.tokens
        if "fail" in text_of(prompt.request.turns[-1]) and len(tokens) == 3:
            generation.error = ValueError("a failure of this generation")
            return self._end(generation, "error")
        is_end = len(tokens) == len(generation.script)
        id = END if is_end else generation.script[len(tokens)]
        token = Token(id, "" if is_end else WORDS[id % len(WORDS)])
        if sampling.top_logprobs is not None:
            token.logprob, token.top = -0.5, [(id, -0.5), (id + 1, float("-inf"))][: sampling.top_logprobs]
        generation.first_token_at = generation.first_token_at or time.perf_counter()
        tokens.append(token)
        generation.text += token.text
        found = [stop for stop in sampling.stop if stop in generation.text]
        if found:
            generation.stop_reason, generation.text = found[0], generation.text.partition(found[0])[0]
        limit = min(sampling.max_new_tokens, self.context - prompt.length)
        if found or is_end or len(tokens) == limit:
            return self._end(generation, "stop" if found else "end" if is_end else "length")
        generation.on_update(generation)

    def _end(self, generation: Generation, by: str) -> None:
        if generation in self.active:
            self.active.remove(generation)
        self.ended["error" if generation.error else by] += 1
        generation.end(by)
        generation.on_update(generation)


def answer_of(turns: tuple[str, ...], *, system=None, number=0, **sampling) -> str:
    """The text that the script answers."""
    prompt = Prompt(Request(turns, (), system, number=number), np.zeros(0), np.zeros(0))
    return Tokenizer().decode(script(prompt, Sampling(**sampling)))


class Server:
    """A server in a thread, on a port of this machine, while a `with` block lasts.

    Attributes:
      url: of the server.
      ended: what `serve` returned.
    """

    def __init__(
        self, *, slots: int = 4, context: int = 64, pace: float = 0.001, engine=None, scheduler=None, **settings
    ):
        self.engine = engine or Engine(context)
        self.scheduler = scheduler or Scheduler(slots, context, pace)
        self.settings = Settings(**({"models": ("scripted", "alias")} | settings))
        self.ended: bool | None = None

    def __enter__(self) -> "Server":
        from infer.serve.__main__ import listen

        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.thread.start()
        for _ in range(500):
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{self.url}/version")
                return self
            time.sleep(0.01)
        raise TimeoutError("the server does not start")

    def __exit__(self, *_) -> None:
        if self.ended is None:
            self.end()
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert self.service.stop(5) or self.scheduler.dies

    def end(self) -> None:
        """What a signal does."""
        self.loop.call_soon_threadsafe(self.service.end.set)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.service = Service(self.engine, self.scheduler, self.settings)
        self.ended = await serve(self.service, self.listener)
