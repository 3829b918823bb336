"""A scripted server for `benchmarks/page.py`: the page, and an OpenAI-compatible endpoint that streams what a question
asks for, errors included.

    with PageServer() as server:
        server.url, server.requests, server.cancelled
"""

import base64
import hashlib
import io
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

PAGE = Path(__file__).parents[1] / "infer" / "serve" / "page.html"
MODEL = "llava-v1.6-mistral-7b"
HOSTILE = "<img src=x onerror=alert(1)> <script>alert(2)</script> [a](javascript:alert(3)) &amp; **<b>bold</b>**"
MARKDOWN = """\
### What the image shows

There are **five shapes** on a `#84918a` background:

1. a **circle** in blue, the largest one
2. two triangles
   - a green one, in the middle
   - a yellow one, at the left
3. a white square

The same as `JSON`:

```json
{"circles": 2, "triangles": 2, "squares": 1, "background": "gray-green", "note": "a line longer than a phone is wide"}
```

Nothing else is in the image."""
LONG = "\n\n".join(f"Paragraph {i}. " + "The shapes do not overlap, and none touches an edge. " * 4 for i in range(12))
ANSWERS = {
    "hostile": HOSTILE,
    "markdown": MARKDOWN,
    "long": LONG,
    "describe the image.": "At the top left a large blue circle, at the middle center a small green triangle, at the "
    "middle right a large white square, at the bottom left a small yellow triangle and at the bottom center a small "
    "white circle.",
    "which colours do the circles have?": "blue and white",
    "are there more circles than triangles? explain.": "circles: 2, triangles: 2, so no",
    "what is in this image?": "The image shows five shapes on a gray-green background: a large blue circle, a smaller "
    "white circle, a green triangle, a yellow triangle and a white square.",
    "which shapes are white?": "Two of them:\n\n- a **circle**, at the bottom\n- a **square**, at the right",
}


def content_security_policy(page: bytes) -> str:
    """A policy that allows a page's own script and style, by their hashes, and requests to its own server."""
    hashes = {}
    for tag in (b"script", b"style"):
        (content,) = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(content).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes[b'script']}'; style-src 'sha256-{hashes[b'style']}'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


class PageServer:
    """Serves while a `with` block lasts.

    Attributes:
      requests: the bodies of the questions, in the order in which they came, and their headers under "headers".
      cancelled: how many answers their clients left before the end.
      key: the API key that is asked for, if any. model: the only one that may be asked for.
      delay: seconds between tokens.
    """

    def __init__(self, delay=0.01):
        self.requests, self.cancelled, self.key, self.delay, self.model = [], 0, "", delay, MODEL
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads, self._server.script = True, self
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def images_of(message: dict) -> list[Image.Image]:
    """The images of a message, decoded."""
    parts = [] if isinstance(message["content"], str) else message["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def text_of(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/":
            page = PAGE.read_bytes()
            self.send(200, page, "text/html; charset=utf-8", {"Content-Security-Policy": content_security_policy(page)})
        elif self.path == "/v1/models" and self.allowed():
            self.send_json(200, {"object": "list", "data": [{"id": self.server.script.model, "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        script = self.server.script
        script.requests.append(body | {"headers": dict(self.headers)})
        if body["model"] != script.model:
            self.send_json(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
            return
        question = text_of(body["messages"][-1]).lower()
        if found := re.match(r"status (\d+)", question):
            headers = {"Retry-After": "7"} if found[1] in ("429", "503") else {}
            self.send_json(int(found[1]), {"error": {"message": f"The server said {found[1]}."}}, headers)
            return
        turns = sum(message["role"] == "user" for message in body["messages"])
        default = f"This is answer {turns}, number {len(script.requests)} of all."
        try:
            self.stream(question, ANSWERS.get(question, default), script)
        except OSError:
            script.cancelled += 1

    def stream(self, question: str, answer: str, script: PageServer) -> None:
        """One chunk a token; the question may ask for a slow or late stream, an error in it, or its sudden end."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self.send_event(delta={"role": "assistant", "content": ""})
        tokens = re.findall(r"\s*\S{1,6}|\s+", "word " * 500 if question.startswith("slow") else answer)
        if question.startswith("garbage"):
            self.wfile.write(b"data: <html>\n\n")
        if question.startswith("late"):
            time.sleep(1)
        if question.startswith(("nothing", "broken at once")):
            tokens = []
        for i, token in enumerate(tokens):
            if i == 4 and question.startswith("error"):
                self.write({"error": {"message": "out of memory", "type": "InternalServerError", "code": 500}})
                return
            if i == 4 and question.startswith("broken"):
                return
            self.send_event(delta={"content": token})
            self.wfile.write(b": keep-alive\n\n" if i % 5 == 0 else b"")
            time.sleep(0.02 if question.startswith("slow") else script.delay)
        if question.startswith("broken"):
            return
        self.send_event(delta={}, finish_reason="length" if question.startswith("short") else "stop")
        prompt = sum(
            len(text_of(m)) // 4 + 576 * len(images_of(m)) for m in self.server.script.requests[-1]["messages"]
        )
        self.write(
            {
                "choices": [],
                "usage": {
                    "prompt_tokens": prompt,
                    "completion_tokens": len(tokens),
                    "total_tokens": prompt + len(tokens),
                    "prompt_tokens_details": {"cached_tokens": prompt * 9 // 10 if question.startswith("w") else 0},
                },
            }
        )
        self.wfile.write(b"data: [DONE]\n\n")

    def send_event(self, *, delta: dict, finish_reason: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        self.write({"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": MODEL, "choices": [choice]})

    def write(self, event: dict) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def allowed(self) -> bool:
        key = self.server.script.key
        allowed = not key or self.headers["Authorization"] == f"Bearer {key}"
        if not allowed:
            self.send_json(401, {"error": "Unauthorized"})
        return allowed

    def send_json(self, status: int, body: dict, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(body).encode(), "application/json", headers or {})

    def send(self, status: int, body: bytes, content_type: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
