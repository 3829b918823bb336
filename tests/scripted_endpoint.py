"""A local OpenAI-compatible endpoint that answers requests of `train.datasets.instruct` as a language model would,
badly at times.

    with ScriptedEndpoint(lost=0.1, bad=0.2) as endpoint:
        endpoint.url, endpoint.log

What a reply says depends on the request alone; whether it arrives also on how often the request came before. So whoever
asks until there is a reply gets the same ones, whatever happens on the way.
"""

import collections
import contextlib
import hashlib
import json
import random
import re
import socket
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

# How a reply may be lost, what may be wrong with one, and forms of replies that can be used.
LOSSES = ("429", "429 with a date", "500", "503", "slow", "broken", "closed", "not JSON", "no choices")
FAULTS = ("truncated", "refused", "wrong form", "captions", "boxes", "empty", "copied", "German", "marker")
FORMS = ("plain", "bold", "fenced", "JSON", "numbered", "chatty", "CRLF", "thoughts")
BOX = re.compile(r"(.+): \[([\d., ]+)\]")
RETRY = "This cannot be used"  # begins the message with which instruct asks again
PLACES = (("top", "middle", "bottom"), ("left", "center", "right"))


class Asked(NamedTuple):
    """A request: the image in words and the kind that it asks for, which attempt it is, and how it was answered ("ok",
    one of `LOSSES`, or a status)."""

    record: str
    kind: str
    attempt: int
    arrival: str


class ScriptedEndpoint:
    """Serves while a `with` block lasts.

    Attributes:
      log: the requests, in the order in which they were answered.
      first, last: when the first and the last request came (`time.monotonic`).
      status, error: if set, all requests are answered with this status and this message.
    """

    def __init__(self, *, lost=0.0, bad=0.0, stubborn=0.0, delay=0.0, slow=0.2, retry_after=0.05, seed=0):
        """
        Args:
          lost: the share of requests whose reply is lost, the first two times.
          bad: the share of replies that cannot be used.
          stubborn: the share of images and kinds to which no reply can be used.
          delay, slow: seconds that a reply takes, and those that a slow one takes beyond.
          retry_after: seconds that 429 asks for.
        """
        self.lost, self.bad, self.stubborn, self.seed = lost, bad, stubborn, seed
        self.delay, self.slow, self.retry_after = delay, slow, retry_after
        self.log: list[Asked] = []
        self.status, self.error, self.first, self.last = 200, "", 0.0, 0.0
        self._times: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.script = self
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "ScriptedEndpoint":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def random(self, *key) -> random.Random:
        return random.Random(hashlib.sha256(repr((self.seed, *key)).encode()).digest())

    def arrival(self, request: str) -> str:
        with self._lock:
            self._times[request] += 1
            times = self._times[request]
        rng = self.random(request, times)
        return rng.choice(LOSSES) if times < 3 and rng.random() < self.lost else "ok"

    def reply(self, messages: list[dict], record: str, kind: str) -> tuple[str, str]:
        """Text and finish reason."""
        rng = self.random(json.dumps(messages))
        good = write_turns(kind, record, rng)
        if rng.random() < self.bad or self.random(record, kind).random() < self.stubborn:
            return spoil(rng.choice(FAULTS), good, messages, kind)
        return dress("plain" if kind == "detail" else rng.choice(FORMS), good, kind), "stop"


# ---------------------------------------------------------------- a request and what follows from it


def text_of(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


def read_request(messages: list[dict]) -> tuple[str, str, int]:
    """The image in words, the kind that is asked for, and which attempt it is."""
    asked = [text_of(message) for message in messages if message["role"] == "user"]
    attempt = sum(text.startswith(RETRY) for text in asked) + 1
    system = text_of(messages[0])
    kind = "detail" if "You describe" in system else "reasoning" if "questions that make" in system else "conversation"
    return asked[-attempt], kind, attempt


def read_record(record: str) -> tuple[list[str], dict[str, list[list[float]]]]:
    """Captions, and boxes by category."""
    captions, boxes = [], collections.defaultdict(list)
    for line in record.splitlines():
        if found := BOX.fullmatch(line):
            boxes[found[1]].append([float(edge) for edge in found[2].split(",")])
        elif line.strip():
            captions.append(line.strip())
    return captions, boxes


def place(box: list[float]) -> str:
    left, top, right, bottom = box
    down, across = (min(int(3 * (low + high) / 2), 2) for low, high in ((top, bottom), (left, right)))
    return f"{PLACES[0][down]} {PLACES[1][across]}"


def write_turns(kind: str, record: str, rng: random.Random) -> list[tuple[str, str]]:
    """True questions and answers about an image."""
    captions, boxes = read_record(record)
    counted = {category: f"{len(found)} {category}{'s' * (len(found) > 1)}" for category, found in boxes.items()}
    where = {category: " and ".join(sorted({place(box) for box in found})) for category, found in boxes.items()}
    first = captions[0] if captions else "There are several objects."
    if kind == "detail":
        parts = [*captions, *(f"There is {counted[c]} at the {where[c]}." for c in boxes)]
        return [("", " ".join(parts) + " This is all that there is to be seen in the scene, as far as one can tell.")]
    if kind == "reasoning":
        if len(boxes) < 2:
            turn = (
                "What may happen next in this scene?",
                f"{first} Nothing hints at a change, so it will likely go on.",
            )
        else:
            a, b = rng.sample(sorted(boxes), 2)
            more = "more" if len(boxes[a]) > len(boxes[b]) else "not more"
            turn = (
                f"Is there more of the {a} than of the {b}? Explain.",
                f"There is {counted[a]} at the {where[a]}, and there is {counted[b]} at the {where[b]}, so there is "
                f"{more} of the {a} than of the {b}.",
            )
        return [turn]
    pairs = [("What does the image show?", first)]
    pairs += [(f"How many of the {c} are there?", f"There is {counted[c]} in the image.") for c in boxes]
    pairs += [(f"Where is the {c}?", f"It is at the {where[c]}.") for c in boxes if len(boxes[c]) == 1]
    pairs += zip(
        ("What else is to be seen?", "What is it about?", "How would you put it in words?"), captions[1:], strict=False
    )
    return [pairs[0], *rng.sample(pairs[1:], min(len(pairs) - 1, 4))]


def dress(form: str, turns: list[tuple[str, str]], kind: str = "conversation") -> str:
    """Questions and answers as text, in one of `FORMS`."""
    if kind == "detail":
        return turns[0][1]
    text = "".join(f"Question:\n{q}\n===\nAnswer:\n{a}\n===\n" for q, a in turns)
    match form:
        case "bold":
            return "\n\n".join(f"**Question:** {q}\n\n**Answer:** {a}" for q, a in turns)
        case "fenced":
            return f"```text\n{text}```"
        case "JSON":
            return json.dumps([{"question": q, "answer": a} for q, a in turns])
        case "numbered":
            return "\n".join(f"{i}. Question: {q}\nAnswer {i}: {a}\n---" for i, (q, a) in enumerate(turns, 1))
        case "chatty":
            return f"Sure! Here is the conversation:\n\n{text}\nLet me know if I can help with anything else."
        case "CRLF":
            return text.replace("\n", "\r\n")
        case "thoughts":
            return f"<think>\nQuestion: what to ask?\n</think>\n\n{text}"
    return text


def spoil(fault: str, turns: list[tuple[str, str]], messages: list[dict], kind: str) -> tuple[str, str]:
    """A reply with a fault, and its finish reason."""
    text = dress("plain", turns, kind)
    question, answer = turns[-1]
    match fault:
        case "truncated":
            return text[: len(text) // 2], "length"
        case "refused":
            return "I'm sorry, but I can't assist with that.", "stop"
        case "wrong form":
            return ("" if kind == "detail" else "What a nice image! ") + "Nice.", "stop"
        case "empty":
            return "", "stop"
        case "copied":
            return next(text_of(message) for message in messages if message["role"] == "assistant"), "stop"
    add = {
        "captions": "The first caption says so.",
        "boxes": "It is at [0.12, 0.3, 0.5, 0.612].",
        "German": "Das Bild zeigt außerdem einen Hund, der neben einem alten Mann auf der Wiese liegt und schläft. "
        * 9,
        "marker": "<image>",
    }[fault]
    return dress("plain", [*turns[:-1], (question, f"{answer} {add}")], kind), "stop"


# ---------------------------------------------------------------- HTTP


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 512
    script: ScriptedEndpoint

    def handle_error(self, *_) -> None:
        pass  # a client that was killed


class _Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: _Server

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        script = self.server.script
        script.last = time.monotonic()
        script.first = script.first or script.last
        body = self.rfile.read(int(self.headers["Content-Length"]))
        messages = json.loads(body)["messages"]
        record, kind, attempt = read_request(messages)
        arrival = script.arrival(hashlib.sha256(body).hexdigest())
        text, finish_reason = script.reply(messages, record, kind)
        time.sleep(script.delay)
        arrival = arrival if script.status == 200 else str(script.status)
        script.log.append(Asked(record, kind, attempt, arrival))  # before whoever asked knows
        if script.status == 200:
            self.answer(arrival, text, finish_reason, len(body))
        else:
            self.send(script.status, {"error": {"message": script.error}})

    def answer(self, arrival: str, text: str, finish_reason: str, size: int) -> None:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
        usage = {"prompt_tokens": size // 4, "completion_tokens": len(text) // 4}
        completion = {
            "id": "x",
            "object": "chat.completion",
            "model": "scripted-1",
            "choices": [choice],
            "usage": usage,
        }
        match arrival:
            case "429":
                self.send(
                    429, {"error": {"message": "slow down"}}, {"Retry-After": str(self.server.script.retry_after)}
                )
            case "429 with a date":
                self.send(429, {"error": {"message": "slow down"}}, {"Retry-After": self.date_time_string()})
            case "500" | "503":
                self.send(int(arrival), {"detail": "overloaded"})
            case "broken":
                self.send(200, completion, {"Content-Length": "100000"})
                self.close_connection = True
            case "closed":
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
            case "not JSON":
                self.send(200, '{"choices": [')
            case "endless 200" | "endless 500":
                self.send(int(arrival[-3:]), "", {"Transfer-Encoding": "chunked", "Content-Encoding": "gzip"})
                block = zlib.compressobj(1, wbits=31).compress(bytes(2**26))
                with contextlib.suppress(OSError):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
                    while True:
                        self.wfile.write(b"1\r\n\0\r\n")
            case "no choices":
                self.send(200, completion | {"choices": []})
            case _:
                time.sleep(self.server.script.slow if arrival == "slow" else 0)
                self.send(200, completion)

    def send(self, status: int, body, headers: dict[str, str] | None = None) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        fields = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        for name, value in fields.items():
            self.send_header(name, value)
        self._headers_buffer.append(b"\r\n" + data)  # headers and body in one packet
        self.flush_headers()
