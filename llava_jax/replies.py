"""Replies of language models: what is kept of a chat completion, and the file that collects them.

    {"id": "000000296284/detail/1", "text": "A glass case ...", "finish_reason": "stop", "prompt_tokens": 812, ...}

A reply is appended as soon as it arrives, so a killed command loses none, and its next run asks only for the rest.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from llava_jax.console import InputError, first_line, shorten
from llava_jax.json_files import decode_json
from llava_jax.locks import LockedFile

MAX_LINE = 64 * 2**20  # bytes
START = b'{"id":"'  # of each line


class Reply(msgspec.Struct, frozen=True):
    """A reply to a request. `model` is the endpoint's own name for what replied."""

    id: str
    text: str
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    model: str = ""


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Completion(msgspec.Struct):
    """The body of a chat completion, as OpenAI defines it and others serve it."""

    choices: list[_Choice]
    usage: _Usage | None = None
    model: str | None = None

    def reply(self, name: str) -> Reply:
        """The reply to the request `name`: the first choice, without spaces around it.

        Raises:
          InputError: the body has no choices.
        """
        if not self.choices:
            raise InputError("the reply has no choices")
        message, reason = self.choices[0].message, self.choices[0].finish_reason
        usage = self.usage or _Usage()
        text = (message.content or message.refusal or "").strip()
        return Reply(name, text, reason or "", usage.prompt_tokens, usage.completion_tokens, self.model or "")


class Prices(NamedTuple):
    """Dollars per million tokens of requests and of replies."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


def show_tokens(prompt_tokens: int, completion_tokens: int, prices: Prices | None) -> str:
    """Tokens and their cost, in words."""
    cost = f": ${prices.cost(prompt_tokens, completion_tokens):,.2f}" if prices else ""
    return f"{prompt_tokens:,} tokens read and {completion_tokens:,} written{cost}"


class Replies:
    """A file of replies, locked until it is closed; created if missing.

    In memory are only the ids and the places of the lines.

    Attributes:
      prompt_tokens, completion_tokens: those of all replies.
      models: the models that replied, in the order of their first replies.
    """

    def __init__(self, path: str | os.PathLike):
        """
        Raises:
          InputError: the file is in use, holds something else, or cannot be written.
        """
        self.name = shorten(path)
        self.prompt_tokens = self.completion_tokens = 0
        self.models: dict[str, None] = {}
        self._places: dict[str, tuple[int, int]] = {}  # offset and length of the line
        try:
            self._file = LockedFile(path)
        except (OSError, ValueError) as error:  # ValueError: an invalid file name
            raise InputError(f"{self.name}: cannot be written ({first_line(error)})") from None
        try:
            self._end = self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> int:
        """Read the file, drop the incomplete last line of a killed process, and return the size of the rest."""
        end = 0
        reader = io.BufferedReader(self._file.file, 2**20)
        try:
            for number, line in enumerate(iter(lambda: reader.readline(MAX_LINE), b""), 1):
                whole = line.endswith(b"\n")
                if not whole and len(line) < MAX_LINE and (line.startswith(START) or START.startswith(line)):
                    break
                self._add(decode_json(line, Reply, f"{self.name} line {number}"), end, len(line))
                end += len(line)
        finally:
            reader.detach()
        if end < os.fstat(self._file.file.fileno()).st_size:
            self._file.file.truncate(end)
        return end

    def _add(self, reply: Reply, offset: int, length: int) -> None:
        self._places.setdefault(reply.id, (offset, length))
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        self.models[reply.model] = None

    def append(self, reply: Reply) -> None:
        """Append a reply.

        Raises:
          InputError: the file cannot be written; it is left unchanged.
        """
        line = msgspec.json.encode(reply) + b"\n"
        try:
            self._file.append(line)
        except OSError as error:  # for example a full disk
            raise InputError(f"{self.name}: cannot be written ({first_line(error)})") from None
        self._add(reply, self._end, len(line))
        self._end += len(line)

    def get(self, name: str) -> Reply | None:
        """Read the reply to a request; None if there is none.

        Raises:
          InputError: the file was changed in the meantime.
        """
        if name not in self._places:
            return None
        offset, length = self._places[name]
        return decode_json(os.pread(self._file.file.fileno(), length, offset), Reply, self.name)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        """Close the file, and remove it if it is empty."""
        if self._file.is_new and not self._places:
            with contextlib.suppress(OSError):
                self._file.path.unlink(missing_ok=True)
        self._file.close()

    def __enter__(self) -> "Replies":
        return self

    def __exit__(self, *_) -> None:
        self.close()
