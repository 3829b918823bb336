"""What the benchmarks of the server share: servers in processes of their own, an HTTP client over plain sockets that
notes when each token arrives, and questions of mixed lengths.
"""

import asyncio
import base64
import dataclasses
import io
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 1800.0  # for a server to compile
CHAT = "/v1/chat/completions"

# The lengths of questions and answers.
LONG = 0.25  # of the questions without an image
WORDS = {"short": (8, 64), "long": (128, 512), "image": (8, 64)}  # uniform
ANSWER = {"median": 32, "sigma": 1.0, "least": 4, "most": 256}  # tokens, log-normal
MIX = (
    "a share of the questions is about an image of its own, in 8 to 64 words; a quarter of the others is long (128 to "
    "512 words), the rest short (8 to 64 words); answers are log-normal, median 32 tokens, sigma 1, from 4 to 256"
)
VOCABULARY = "red blue green small large circle square triangle object left right the of and how many is there".split()


# ---------------------------------------------------------------- servers


class Server:
    """A server in a process of its own, with its output in a file. A context manager, which ends it.

    Attributes:
      port: where it listens, on the loopback interface.
      log: the file.
    """

    def __init__(self, command: Sequence[str], log: Path, port: int | None = None):
        """Start a server, and wait until it answers.

        Args:
          port: that the command names; None if the server says it: "ready at http://127.0.0.1:PORT".
        """
        self.log = log
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with open(log, "wb") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            self.port = self._wait(port)
        except BaseException:
            self.process.kill()
            raise

    def _wait(self, port: int | None) -> int:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            if found := re.search(r"ready at http://[^ ]*:(\d+)", self.text()):
                port = int(found[1])
            if port and _answers(port):
                return port
            time.sleep(0.2)
        raise SystemExit(f"{' '.join(self.process.args)} did not start:\n{self.text()[-2000:]}")

    def text(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace")

    def memory(self) -> int:
        """Bytes of its resident memory."""
        kib = subprocess.run(["ps", "-o", "rss=", "-p", str(self.process.pid)], capture_output=True, text=True).stdout
        return int(kib or 0) * 1024

    def stop(self, seconds: float = 60.0) -> int:
        """Ask it to end; its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.stop()


def our_server(log: Path, *flags: str) -> Server:
    """`python -m infer.serve` on any free port."""
    return Server([sys.executable, "-m", "infer.serve", "--port", "0", *flags], log)


ALL_SLOTS = """
import infer.scheduler
class Scheduler(infer.scheduler.Scheduler):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.decodes_some = False
infer.scheduler.Scheduler = Scheduler
from infer.serve.__main__ import run
run()
"""


def all_slots_server(log: Path, *flags: str) -> Server:
    """Our server, but each decode step computes all slots, as on accelerators; on CPUs it leaves out unused ones."""
    return Server([sys.executable, "-c", ALL_SLOTS, "--port", "0", *flags], log)


def their_server(log: Path, *flags: str) -> Server:
    """`transformers serve` on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = "from transformers.cli.transformers import main; main()"
    return Server(
        [sys.executable, "-c", command, "serve", *flags, "--host", "127.0.0.1", "--port", str(port)], log, port
    )


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return b" 200 " in client.recv(100)
    except OSError:
        return False


# ---------------------------------------------------------------- client


class Connection:
    """An HTTP/1.1 connection, which may be kept for several requests."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int, **options) -> "Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port, **options))

    async def send(self, path: str, body: bytes | None = None, **headers: str) -> None:
        """Send a request: GET without a body."""
        self.writer.write(request_bytes(path, body, **headers))
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        """The status and the headers of the response.

        Raises:
          ConnectionError: there is none.
        """
        line = await self.reader.readline()
        if not line:
            raise ConnectionError("the connection was closed without a response")
        headers = {}
        while field := (await self.reader.readline()).strip():
            name, _, value = field.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        return int(line.split()[1]), headers

    async def parts(self, headers: dict[str, str]) -> AsyncIterator[bytes]:
        """The body of the response, as it arrives.

        Raises:
          ConnectionError: it is incomplete.
        """
        try:
            if headers.get("transfer-encoding") == "chunked":
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    yield (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readexactly(2)
            else:
                yield await self.reader.readexactly(int(headers["content-length"]))
        except asyncio.IncompleteReadError:
            raise ConnectionError("the connection was closed in the middle of a response") from None

    async def response(self) -> tuple[int, dict[str, str], bytes]:
        """The status, the headers and the whole body of the response.

        Raises:
          ConnectionError: it is incomplete.
        """
        status, headers = await self.head()
        return status, headers, b"".join([part async for part in self.parts(headers)])

    async def events(self, headers: dict[str, str]) -> AsyncIterator[str]:
        """The events of a stream: the text after "data: "."""
        rest = b""
        async for part in self.parts(headers):
            *events, rest = (rest + part).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: "):
                    yield event[len(b"data: ") :].decode()

    def close(self) -> None:
        self.writer.close()

    async def __aenter__(self) -> "Connection":
        return self

    async def __aexit__(self, *_) -> None:
        self.close()


def request_bytes(path: str, body: bytes | None = None, **headers: str) -> bytes:
    """The bytes of a request."""
    fields = {"Host": "127.0.0.1"}
    if body is not None:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in (fields | headers).items())
    return f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\n{lines}\r\n".encode() + (body or b"")


async def fetch(port: int, path: str, body: bytes | None = None) -> tuple[int, dict[str, str], bytes]:
    """The status, the headers and the body of a response."""
    async with await Connection.open(port, limit=2**20) as connection:
        await connection.send(path, body)
        return await connection.response()


async def metric(port: int, name: str) -> float:
    """A number of `/metrics`, by its name after "vllm:"."""
    _, _, text = await fetch(port, "/metrics")
    found = re.search(rf"^vllm:{name}(?:{{[^}}]*}})? (\S+)$", text.decode(), re.MULTILINE)
    assert found, f"no metric vllm:{name}"
    return float(found[1])


@dataclasses.dataclass
class Reply:
    """A streamed answer. Times are seconds of `time.perf_counter`; `arrived` has one for each piece of text."""

    sent: float
    text: str = ""
    arrived: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    cached: int = 0

    @property
    def to_first(self) -> float:
        return self.arrived[0] - self.sent

    @property
    def per_token(self) -> float:
        """Seconds per token after the first."""
        return (self.arrived[-1] - self.arrived[0]) / (self.tokens - 1)


async def ask(port: int, body: dict) -> Reply:
    """Ask for a streamed answer.

    Raises:
      ConnectionError: it is not complete.
    """
    reply = Reply(time.perf_counter())
    async with await Connection.open(port, limit=2**20) as connection:
        await connection.send(CHAT, json.dumps(body).encode(), Connection="close")
        status, headers = await connection.head()
        if status != 200:
            text = b"".join([part async for part in connection.parts(headers)])
            raise ConnectionError(f"{status} {text[:500].decode(errors='replace')}")
        async for event in connection.events(headers):
            if event == "[DONE]":
                continue
            value = json.loads(event)
            if "error" in value:
                raise ConnectionError(f"a stream ended with {event[:500]}")
            delta = value["choices"][0]["delta"] if value["choices"] else {}
            if "content" in delta and not delta.get("role"):
                reply.arrived.append(time.perf_counter())
                reply.text += delta["content"]
            if usage := value.get("usage"):
                reply.tokens = usage["completion_tokens"]
                reply.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reply.arrived = reply.arrived or [time.perf_counter()]  # of an answer without text
    return reply


# ---------------------------------------------------------------- questions


@dataclasses.dataclass(frozen=True)
class Question:
    """A conversation that ends with a question, with an image in its first turn.

    Attributes:
      kind: of `WORDS`.
      turns: question, answer, ..., question.
      tokens: of the answer.
    """

    kind: str
    turns: tuple[str, ...]
    tokens: int
    image: bytes | None = None

    @property
    def messages(self) -> list[dict]:
        """The conversation as clients send it."""
        roles = itertools.cycle(["user", "assistant"])
        messages = [{"role": role, "content": [text_part(turn)]} for role, turn in zip(roles, self.turns, strict=False)]
        if self.image is not None:
            messages[0]["content"].insert(0, image_part(self.image))
        return messages


def mixed(count: int, seed: int, words: str, image_side: int, images: float = 0.2) -> list[Question]:
    """Questions as `MIX`. The seed decides the lengths; `words` what is said and shown.

    Args:
      images: the share of questions about an image.
    """
    lengths, pick = random.Random(seed), random.Random(words)
    questions = []
    for _ in range(count):
        at = lengths.random()
        kind = "image" if at < images else "long" if at < images + LONG * (1 - images) else "short"
        text = sentence(lengths.randint(*WORDS[kind]), pick)
        tokens = round(ANSWER["median"] * np.exp(lengths.gauss(0, ANSWER["sigma"])))
        tokens = min(max(tokens, ANSWER["least"]), ANSWER["most"])
        image = noise(image_side, pick.randrange(2**32)) if kind == "image" else None
        questions.append(Question(kind, (text,), tokens, image))
    return questions


def sentence(count: int, pick: random.Random) -> str:
    return " ".join(pick.choices(VOCABULARY, k=count))


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def image_part(image: bytes) -> dict:
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def noise(side: int, seed: int) -> bytes:
    """A PNG of noise, side x side."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()


# ---------------------------------------------------------------- loads

Send = Callable[[Question], Awaitable[Reply]]


async def closed_loop(send: Send, questions: Iterable[Question], clients: int) -> list[Reply]:
    """As many clients, each of which asks the next question when it has its answer."""
    remaining, replies = iter(questions), list[Reply]()

    async def client() -> None:
        for each in remaining:
            replies.append(await send(each))

    await asyncio.gather(*(client() for _ in range(clients)))
    return replies


async def batches(send: Send, questions: Sequence[Question], size: int) -> list[Reply]:
    """As many questions at once, which all wait for the longest answer."""
    replies = []
    for i in range(0, len(questions), size):
        replies += await asyncio.gather(*map(send, questions[i : i + size]))
    return replies


async def open_loop(send: Send, questions: Sequence[Question], rate: float, seed: int = 0) -> list[Reply]:
    """Questions at `rate` a second, at times that do not depend on answers (Poisson)."""
    pick, tasks = random.Random(seed), []
    for each in questions:
        tasks.append(asyncio.ensure_future(send(each)))
        await asyncio.sleep(pick.expovariate(rate))
    return list(await asyncio.gather(*tasks))


def figures(replies: Sequence[Reply]) -> dict[str, float]:
    """What clients saw, in requests and tokens a second, and in seconds."""
    seconds = max(reply.arrived[-1] for reply in replies) - min(reply.sent for reply in replies)
    first = [reply.to_first for reply in replies]
    between = np.concatenate([np.diff(reply.arrived) for reply in replies])
    return {
        "requests": len(replies),
        "requests_per_second": len(replies) / seconds,
        "tokens_per_second": sum(reply.tokens for reply in replies) / seconds,
        **{f"first_token_p{p}": float(np.percentile(first, p)) for p in (50, 99)},
        **{f"between_tokens_p{p}": float(np.percentile(between, p)) for p in (50, 99)},
        "per_token": float(np.median([reply.per_token for reply in replies if reply.tokens > 1])),
    }
