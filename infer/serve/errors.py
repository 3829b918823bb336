"""Errors as OpenAI's API and vLLM return them: `{"error": {"message", "type", "param", "code"}}`."""

import re
import traceback
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from llava_jax.console import note, printable, shorten

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}
CLOSE = {"Connection": "close"}
RETRY_AFTER = {"Retry-After": "2"}  # seconds; clients wait longer by themselves if it happens again
FILE = re.compile(r"(?<![\w:/.~-])/(?:[\w.~+-]+/)+[\w.~+-]*")  # the absolute path of a file


class ApiError(Exception):
    """What a client is told instead of an answer.

    Attributes:
      status: of HTTP.
      param: the field of the request that is at fault.
      headers: of the response.
    """

    def __init__(self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.param, self.headers = status, param, headers or {}

    def body(self) -> dict[str, Any]:
        """The error as an object of JSON. Its message is one line without paths of files."""
        message = shorten(FILE.sub("...", printable(str(self))), 1000)
        return {"error": {"message": message, "type": TYPES[self.status], "param": self.param, "code": self.status}}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def not_implemented(name: str, what: str | None = None) -> ApiError:
    """The error for a field or a value that the server does not implement."""
    return ApiError(501, f"{what or name} is not implemented by this server", name)


def as_api_error(error: Exception, request_id: str, *, with_message: bool) -> ApiError:
    """What a client is told of any error. An error that is ours, not the client's, is logged.

    Args:
      with_message: log the message of an error too, which may contain a prompt.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail.lower(), headers=dict(error.headers or {}))
    message = f": {error}" if with_message else ""
    note(f"error: {request_id}: {type(error).__name__}{message}")
    for line in traceback.format_tb(error.__traceback__):
        note(line.rstrip())
    return ApiError(500, f"an error of the server; its log has more about {request_id}")


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with a value as JSON."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")
