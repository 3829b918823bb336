"""Batch files: requests to a language model in files, for OpenAI's Batch API and for offline engines.

    {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {"model": ..., "messages": [...]}}

A file has at most 50,000 requests and 200 MB, the limits of the Batch API. vLLM's `run-batch` reads the same files.
Results are lines `{"custom_id": ..., "response": {"status_code": 200, "body": <a chat completion>}, "error": null}`.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from llava_jax.console import InputError, first_line, shorten
from llava_jax.files import new_file, open_regular
from llava_jax.json_files import decode_json
from llava_jax.replies import Completion, Reply

MAX_REQUESTS, MAX_BYTES = 50_000, 200 * 10**6  # of a file
MAX_LINE = 64 * 2**20  # bytes of a result
URL = "/v1/chat/completions"


class Failure(NamedTuple):
    """A request that the batch has no reply to."""

    id: str
    reason: str


def write_batches(path: Path, requests: Iterable[tuple[str, dict[str, Any]]]) -> list[Path]:
    """Write requests, given by id and body, to `path`, and what exceeds its limits to `NAME-2.jsonl`, `NAME-3.jsonl`
    and so on beside it. Returns the paths; all files appear at the end, or none.

    Raises:
      InputError: a file exists already or cannot be written, or a request is larger than a file may be.
    """
    with contextlib.ExitStack() as stack:
        first, paths, size, number = stack.enter_context(_new_batch(path)), [path], 0, 0
        file = first
        for name, body in requests:
            line = msgspec.json.encode({"custom_id": name, "method": "POST", "url": URL, "body": body}) + b"\n"
            if len(line) > MAX_BYTES:
                raise InputError(
                    f"{shorten(name)}: has {len(line):,} bytes; a batch file may have at most {MAX_BYTES:,}"
                )
            if number == MAX_REQUESTS or size + len(line) > MAX_BYTES:
                paths.append(path.with_name(f"{path.stem}-{len(paths) + 1}{path.suffix}"))
                file, size, number = stack.enter_context(_new_batch(paths[-1])), 0, 0
            file.write(line)
            size, number = size + len(line), number + 1
    return paths


@contextlib.contextmanager
def _new_batch(path: Path) -> Iterator[BinaryIO]:
    if os.path.lexists(path):
        raise InputError(f"{shorten(path)}: exists already; give another file")
    try:
        with new_file(path) as file:
            yield file
    except (OSError, ValueError) as error:  # ValueError: an invalid file name
        raise InputError(f"{shorten(path)}: cannot be written ({first_line(error)})") from None


class _Response(msgspec.Struct):
    status_code: int = 0
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Line(msgspec.Struct):
    custom_id: str
    response: _Response | None = None
    error: Any = None


def read_results(path: str | os.PathLike) -> Iterator[Reply | Failure]:
    """Read the results of a batch.

    Raises:
      InputError: the file cannot be read, or a line is not a result.
    """
    try:
        with open_regular(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
                if line.strip():
                    yield _result(line, f"{shorten(path)} line {number}")
    except (OSError, ValueError) as error:
        raise InputError(f"{shorten(path)}: cannot be read ({first_line(error)})") from None


def _result(line: bytes, where: str) -> Reply | Failure:
    found = decode_json(line, _Line, where)
    if found.error is None and found.response is None:
        raise InputError(f"{where}: has neither a response nor an error; is it a file of results?")
    if found.error is not None or found.response is None:
        return Failure(found.custom_id, shorten(found.error))
    if found.response.status_code != 200:
        body = bytes(found.response.body).decode(errors="replace")
        return Failure(found.custom_id, f"status {found.response.status_code}: {shorten(body)}")
    try:
        return decode_json(found.response.body, Completion, where).reply(found.custom_id)
    except InputError as error:
        return Failure(found.custom_id, str(error))
