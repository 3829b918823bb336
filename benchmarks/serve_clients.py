"""What the random clients of `serve_soak.py` do, each function a behaviour, and what answers they accept."""

import asyncio
import contextlib
import dataclasses
import io
import json
import random
import struct
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import serve_load as load
from PIL import Image
from serve_load import CHAT, Connection, Question

REFUSED = (400, 404, 405, 408, 413, 415, 422, 429, 501)


class Wrong(Exception):
    """Something that the server must not do."""


@dataclasses.dataclass(frozen=True)
class Known:
    """A question, options, and the answer."""

    question: Question
    options: dict[str, Any]
    answer: str = ""


@dataclasses.dataclass
class Client:
    """What a behaviour needs: the server's port, random choices, questions with known answers, and images."""

    port: int
    pick: random.Random
    known: list[Known]
    images: dict[str, bytes]

    def body(self, text: str = "How many red objects are there?", image: bytes | None = None, **fields: Any) -> bytes:
        """The body of a request with a short greedy answer."""
        messages = Question("", (text,), 0, image).messages
        return json.dumps({"messages": messages, "temperature": 0, "max_tokens": 8} | fields).encode()


# ---------------------------------------------------------------- images


def hostile_images() -> dict[str, bytes]:
    """Files that are not what an image should be, and unusual ones that are."""
    whole = load.noise(60, 0)
    jpeg = saved(Image.new("RGB", (300, 200), "red"), "JPEG")
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "green", "blue") * 30]
    return {
        "bomb": zeros_png(40_000),
        "truncated png": whole[: len(whole) // 2],
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "header only": whole[:33],
        "empty": b"",
        "text": b"not an image",
        "1 pixel": saved(Image.new("RGB", (1, 1))),  # the model takes no side of 1 pixel
        "4 pixels": saved(Image.new("RGB", (2, 2))),
        "1 bit": saved(Image.new("1", (7, 3))),
        "a line": saved(Image.new("RGB", (5000, 1))),
        "alpha": saved(Image.new("RGBA", (50, 70), (1, 2, 3, 4))),
        "animated": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def zeros_png(side: int) -> bytes:
    """A black PNG, side x side, in a few hundred kilobytes."""
    row, packer = bytes(1 + side // 8), zlib.compressobj(9)
    data = b"".join([*(packer.compress(row * 1000) for _ in range(side // 1000)), packer.flush()])

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


# ---------------------------------------------------------------- what clients do


async def ask_known(client: Client) -> str:
    """A question with a known answer, whole or streamed, once or several times."""
    known, pick = client.pick.choice(client.known), client.pick
    fields = known.options | {"messages": known.question.messages, "max_tokens": known.question.tokens}
    fields["n"] = pick.choice([1, 1, 1, 3]) if known.options["temperature"] == 0 else 1
    fields |= pick.choice([{}, {"logprobs": True, "top_logprobs": pick.choice([0, 5, 20])}])
    texts = [""] * fields["n"]
    if pick.random() < 0.5:
        status, headers, data = await load.fetch(client.port, CHAT, json.dumps(fields).encode())
        if refused(status, headers, data, may=(429,)):
            return str(status)
        texts = [choice["message"]["content"] for choice in json.loads(data)["choices"]]
    else:
        async with await Connection.open(client.port, limit=2**20) as connection:
            await connection.send(CHAT, json.dumps(fields | {"stream": True}).encode())
            status, headers = await connection.head()
            if status != 200:
                data = b"".join([part async for part in connection.parts(headers)])
                refused(status, headers, data, may=(429,))
                return str(status)
            last = ""
            async for last in connection.events(headers):
                for choice in json.loads(last).get("choices", []) if last != "[DONE]" else []:
                    texts[choice["index"]] += choice["delta"].get("content") or ""
            if last != "[DONE]":
                raise Wrong(f"a stream ended with {last[:200]}")
    if any(text != known.answer for text in texts):
        raise Wrong(f"{known.question.turns} {fields}: answered {texts}, not {known.answer!r}")
    return "known"


async def read_slowly(client: Client) -> str:
    """Read a long answer with many log probabilities slowly, or stop reading."""
    body = client.body(max_tokens=300, ignore_eos=True, stream=True, logprobs=True, top_logprobs=20, n=2)
    stops = client.pick.random() < 0.5
    async with await Connection.open(client.port, limit=1024) as connection:
        await connection.send(CHAT, body)
        with contextlib.suppress(ConnectionError):
            while await connection.reader.read(4096 if not stops else 1024):
                await asyncio.sleep(20 if stops else 0.05)
                if stops:
                    break
    return "stopped reading" if stops else "read slowly"


async def leave_while_answered(client: Client) -> str:
    """Leave in the middle of an answer."""
    body = client.body(max_tokens=500, ignore_eos=True, stream=client.pick.random() < 0.7, n=client.pick.choice([1, 2]))
    async with await Connection.open(client.port) as connection:
        await connection.send(CHAT, body)
        await asyncio.sleep(client.pick.random() * 0.3)
        if client.pick.random() < 0.5:
            connection.writer.transport.abort()
    return "left"


async def leave_while_sending(client: Client) -> str:
    """Leave, or just stop, in the middle of a request."""
    data = load.request_bytes(CHAT, client.body(image=client.images["alpha"]))
    async with await Connection.open(client.port) as connection:
        connection.writer.write(data[: client.pick.randrange(len(data))])
        await connection.writer.drain()
        if client.pick.random() < 0.2:  # the server gives up
            with contextlib.suppress(ConnectionError):
                status, headers, answer = await connection.response()
                refused(status, headers, answer, may=(400, 408, 429))
                return str(status)
    return "left"


async def send_bad_json(client: Client) -> str:
    """A body that is broken at random."""
    pick, data = client.pick, bytearray(client.body())
    way = pick.randrange(5)
    if way == 0:
        del data[pick.randrange(len(data)) :]
    elif way == 1:
        for _ in range(3):
            data[pick.randrange(len(data))] = pick.randrange(256)
    elif way == 2:
        data = bytearray(b"[" * 100_000)
    elif way == 3:
        data = bytearray(pick.randbytes(pick.randrange(300)))
    else:
        name = pick.choice(["messages", "max_tokens", "temperature", "stop", "n", "logit_bias", "stream", "seed"])
        value = pick.choice([None, -1, 1e400, "x", [], {}, [[]], {"a": 1}, 10**30, True, "\u0000", [None] * 1000])
        data = bytearray(client.body(**{name: value}))
    return outcome(*await load.fetch(client.port, CHAT, bytes(data)))


async def send_giant(client: Client) -> str:
    """A body that is too large: by its headers, or only when it has come; or many values in a small one."""
    way = client.pick.randrange(3)
    if way == 0:
        return outcome(*await load.fetch(client.port, CHAT, client.body("[" + "0," * 1_500_000)))
    async with await Connection.open(client.port) as connection:
        try:
            length = {"Content-Length": str(10**10)} if way == 1 else {"Transfer-Encoding": "chunked"}
            head = load.request_bytes(CHAT, None, **length, **{"Content-Type": "application/json"})
            connection.writer.write(head.replace(b"GET", b"POST", 1))
            for _ in range(200 if way == 2 else 1):
                connection.writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n" if way == 2 else b" " * 1000)
                await connection.writer.drain()
            status, _, _ = await connection.response()
        except ConnectionError:  # it was closed while we sent
            return "closed"
    if status not in (413, 429):
        raise Wrong(f"a giant body got {status}")
    return str(status)


async def send_image(client: Client) -> str:
    """An unusual image."""
    name = client.pick.choice(list(client.images))
    status, headers, data = await load.fetch(client.port, CHAT, client.body(image=client.images[name]))
    is_image = name in ("4 pixels", "1 bit", "alpha", "animated")
    if status != 429 and (status == 200) != is_image:
        raise Wrong(f"the image {name!r} got {status} {data[:300]!r}")
    return f"image {outcome(status, headers, data)}"


async def send_bad_url(client: Client) -> str:
    """An image that is none by its URL."""
    url = client.pick.choice(
        [
            "",
            "data:",
            "data:,x",
            "data:image/png;base64,!!!",
            "file:///etc/passwd",
            "x" * 100_000,
            "http://127.0.0.1/x.png",
            "http://169.254.169.254/",
            "ftp://x/y",
            "data:image/png;base64," + "A" * 1_000_000,
        ]
    )
    content = [{"type": "image_url", "image_url": {"url": url}}]
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    status, headers, data = await load.fetch(client.port, CHAT, body)
    if not refused(status, headers, data, REFUSED):
        raise Wrong(f"the URL {url[:50]} got {status}")
    return str(status)


async def send_unicode(client: Client) -> str:
    """Text of any characters."""
    ranges = ((0, 32), (32, 127), (0x80, 0x800), (0xD800, 0xE000), (0x5D0, 0x6FF), (0x1F300, 0x1F700), (0, 0x10FFFF))
    text = "".join(chr(client.pick.randint(*client.pick.choice(ranges))) for _ in range(client.pick.randrange(1, 200)))
    text = client.pick.choice([text, f"{text}</s>[INST]<image>", "\u202e" + text, "e" + "\u0301" * 300])
    raw = json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 4})
    return outcome(*await load.fetch(client.port, CHAT, raw.encode()))


async def send_options(client: Client) -> str:
    """Options of all kinds."""
    pick = client.pick
    options = {
        "max_tokens": pick.choice([1, 40, 2**31 - 1]), "n": pick.choice([1, 2, 8]), "top_k": pick.choice([-1, 1, 50]),
        "temperature": pick.choice([0, 1, 2]), "stop": pick.choice([None, "a", ["red", "1", "\n"]]),
        "top_p": pick.choice([0, 0.5, 1]), "min_p": pick.choice([0, 0.1]), "presence_penalty": pick.choice([-2, 0, 2]),
        "repetition_penalty": pick.choice([0.5, 1, 1.5]), "logit_bias": pick.choice([None, {"300": 100, "5": -100}]),
        "logprobs": pick.random() < 0.3, "min_tokens": pick.choice([0, 1]), "ignore_eos": pick.random() < 0.1,
    }  # fmt: skip
    status, headers, data = await load.fetch(client.port, CHAT, client.body(**options))
    if not refused(status, headers, data, may=(429,)):
        choices = json.loads(data)["choices"]
        stops = [options["stop"]] if isinstance(options["stop"], str) else options["stop"] or []
        texts = [choice["message"]["content"] for choice in choices]
        if len(choices) != options["n"] or any(stop in text for stop in stops for text in texts):
            raise Wrong(f"{options} got {data[:500]!r}")
        if any(bool(choice["logprobs"]) != options["logprobs"] for choice in choices):
            raise Wrong(f"{options} got log probabilities {data[:500]!r}")
    return f"options {status}"


async def overflow(client: Client) -> str:
    """More requests than there are places."""
    replies = await asyncio.gather(*(load.fetch(client.port, CHAT, client.body(n=4)) for _ in range(12)))
    for reply in replies:
        refused(*reply, may=(429,))
    return "overflow" if any(reply[0] == 429 for reply in replies) else "no overflow"


async def keep_alive(client: Client) -> str:
    """Many requests on one connection, and one that is kept without a request."""
    paths = ("/health", "/metrics", "/v1/models", "/version", "/", "/nothing", "/v1/models/shapes", "/openapi.json")
    async with await Connection.open(client.port, limit=2**20) as connection:
        for _ in range(client.pick.randrange(1, 20)):
            path = client.pick.choice([*paths, CHAT])
            await connection.send(path, client.body() if path == CHAT else None)
            status, headers, data = await connection.response()
            if status >= 500:
                raise Wrong(f"{path} got {status} {data[:300]!r}")
            if headers.get("connection") == "close":
                return "closed"
        await asyncio.sleep(client.pick.random() * 3)
    return "kept"


async def send_garbage(client: Client) -> str:
    """Bytes that are not HTTP."""
    async with await Connection.open(client.port) as connection:
        connection.writer.write(
            client.pick.choice([client.pick.randbytes(200), b"\r\n" * 100, b"GET " + b"x" * 70_000])
        )
        connection.writer.write_eof()
        with contextlib.suppress(ConnectionError):
            await connection.reader.read(1000)
    return "garbage"


def refused(status: int, headers: dict[str, str], data: bytes, may: tuple[int, ...]) -> bool:
    """Whether a request was refused, as it `may` be, with a proper error."""
    if status == 200:
        return False
    if status not in may:
        raise Wrong(f"status {status}: {data[:300]!r}")
    if not json.loads(data)["error"]["message"] or (status == 429 and "retry-after" not in headers):
        raise Wrong(f"{status} with {headers}: {data[:300]!r}")
    return True


def outcome(status: int, headers: dict[str, str], data: bytes) -> str:
    """The status, of an answer, whole or streamed, or of a proper error."""
    if not refused(status, headers, data, REFUSED):
        if not headers["content-type"].startswith("text/event-stream"):
            json.loads(data)["choices"][0]["message"]["content"].encode()
        elif not data.endswith(b"data: [DONE]\n\n"):
            raise Wrong(f"a stream without its end: {data[-300:]!r}")
    return str(status)


BEHAVIOURS: dict[Callable[[Client], Awaitable[str]], int] = {
    ask_known: 10, read_slowly: 1, leave_while_answered: 3, leave_while_sending: 2, send_bad_json: 4, send_giant: 1,
    send_image: 3, send_bad_url: 1, send_unicode: 3, send_options: 3, overflow: 1, keep_alive: 2, send_garbage: 1,
}  # fmt: skip
