"""What every request passes: its id, the API key, errors as JSON, and one line of the log."""

import dataclasses
import re
import secrets
import time

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infer.serve.errors import CLOSE, RETRY_AFTER, ApiError, as_api_error
from infer.serve.service import Service
from llava_jax.console import note, shorten

REQUEST_ID = re.compile(r"[!-~]{1,128}")
ALWAYS_OPEN = ("/health", "/ping", "/metrics", "/version")  # answered while the server shuts down
WITHOUT_KEY = (*ALWAYS_OPEN, "/", "/openapi.json")
LEFT = 499  # nginx's status in logs for a client that left


@dataclasses.dataclass
class Record:
    """What the log says of a request."""

    id: str
    status: int = LEFT
    tokens: tuple[int, int] | None = None  # of the prompt and the answers
    start: float = dataclasses.field(default_factory=time.perf_counter)


class Gate:
    """The outermost ASGI application."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        given = request.headers.get("x-request-id", "")
        record = Record(given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16))
        request.state.record = record
        started = False

        async def send_on(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, record.status = True, message["status"]
                headers = [(b"x-request-id", record.id.encode()), (b"x-content-type-options", b"nosniff")]
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        try:
            try:
                self._check(request)
                await self.app(scope, receive, send_on)
            except ClientDisconnect:
                pass
            except Exception as error:
                failure = as_api_error(error, record.id, with_message=self.service.settings.log_prompts)
                if started:
                    return  # without an end of the response: the connection is closed
                await failure.response()(scope, receive, send_on)
        finally:
            self._log(request, record)

    def _check(self, request: Request) -> None:
        """Check that a request may pass.

        Raises:
          ApiError: it has no key, or the server is shutting down.
        """
        path, settings = request.scope["path"], self.service.settings  # not `request.url`, which has the Host header
        if self.service.draining and path not in ALWAYS_OPEN:
            raise ApiError(503, "the server is shutting down", headers=RETRY_AFTER | CLOSE)
        if settings.keys and path not in WITHOUT_KEY:
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not settings.accepts_key(key.strip()):
                message = "an API key is needed: Authorization: Bearer KEY" if not key else "the API key is invalid"
                raise ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})

    def _log(self, request: Request, record: Record) -> None:
        tokens = f" {record.tokens[0]}+{record.tokens[1]} tokens" if record.tokens else ""
        path, seconds = shorten(request.scope["path"]), time.perf_counter() - record.start
        note(f"{request.method} {path} {record.status}{tokens} {seconds:.3f} s {record.id}")
