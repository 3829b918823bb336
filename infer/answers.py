"""The answers file: one JSON line per answer, in the reference's format (llava/eval/model_vqa_loader.py).

    {"question_id": 1, "prompt": "What is this?", "text": "A cat.", "answer_id": ..., "model_id": ..., "metadata": {}}

One command locks it at a time and appends to it. Files of any other format are never modified.
"""

import codecs
import collections
import json
import os
import uuid
from collections.abc import Mapping
from typing import Any, TypedDict

from llava_jax.console import InputError, first_line, shorten
from llava_jax.json_files import check_json, parse_json
from llava_jax.locks import LockedFile

Id = str | int | float | None
MAX_ANSWERS = 4 * 2**30  # bytes
LINE_START, AFTER_ID = '{"question_id": ', ', "prompt": "'  # the beginning of each line


class Answer(TypedDict):
    """The keys of a line that are read."""

    question_id: Id
    prompt: str
    text: str


class AnswersFile:
    """An answers file, locked until the `with` block ends; created if missing, and removed if nothing was written.

    Attributes:
      answered: the number of answers to each question, by `key_of`.
    """

    def __init__(self, path: str | os.PathLike, questions: str | os.PathLike | None = None, *, flag: str = "--answers"):
        """
        Args:
          questions: the questions file, if any, which must be a different file.
          flag: that named the file, for errors.

        Raises:
          InputError: the file has another format, is in use, or cannot be written.
        """
        self.name = shorten(f"{flag} {path}")
        if questions and os.path.exists(path) and os.path.exists(questions) and os.path.samefile(path, questions):
            raise InputError(f"{self.name}: is the questions file; give another file")
        try:
            self.file = LockedFile(path, self.name)
        except (OSError, ValueError) as error:  # ValueError: an invalid file name
            raise InputError(f"{self.name}: cannot be written ({first_line(error)})") from None
        try:
            if (size := os.fstat(self.file.file.fileno()).st_size) > MAX_ANSWERS:
                raise InputError(f"{self.name}: has {size:,} bytes; an answers file may have at most {MAX_ANSWERS:,}")
            self._read(self.file.read())
        except BaseException:
            self.file.close()
            raise
        self.written = False

    def _read(self, data: bytes) -> None:
        """Count the answers. An incomplete last line, left by a killed process, is recognized by its beginning."""
        *lines, last = data.split(b"\n")
        self.answered: collections.Counter[str] = collections.Counter()
        self.end, self.gap = (
            len(data),
            b"\n" if last else b"",
        )  # where the first new answer goes, and the separator before it
        for number, line in enumerate((*lines, last), 1):
            if not line.strip():
                continue
            try:
                answer = parse_json(line)
                check_json(answer, Answer, "not an answer")
                self.answered[key_of(answer["question_id"], answer["prompt"])] += 1
            except InputError as error:
                if number <= len(lines) or not _is_truncated(last, has_answers=self.answered.total() > 0):
                    raise InputError(
                        f"{self.name}: exists and is not an answers file (line {number}: {error})"
                    ) from None
                self.end, self.gap = len(data) - len(last), b""

    def append(self, answer: dict[str, Any]) -> None:
        """Append an answer.

        Raises:
          InputError: the file cannot be written; it is left unchanged.
        """
        line = json.dumps(answer, ensure_ascii=False).encode() + b"\n"
        try:
            if not self.written:
                self.file.file.truncate(self.end)
            self.file.append(self.gap + line)
        except OSError as error:  # for example a full disk
            raise InputError(f"{self.name}: cannot be written ({first_line(error)})") from None
        self.written, self.gap = True, b""

    def __enter__(self) -> "AnswersFile":
        return self

    def __exit__(self, *_) -> None:
        if self.file.is_new and not self.written:
            self.file.path.unlink(missing_ok=True)
        self.file.close()


def answer_line(
    question_id: Any, prompt: str, text: str, model: str, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A line of the file.

    Args:
      model: the name of the model.
      extra: further keys.
    """
    line = {"question_id": question_id, "prompt": prompt, "text": text, **(extra or {})}
    return line | {"answer_id": uuid.uuid4().hex, "model_id": model, "metadata": {}}


def model_name(checkpoint: str | os.PathLike) -> str:
    """The name of a model in answers: the last part of its path or hub name."""
    return path_text(checkpoint).rstrip("/").rsplit("/", 1)[-1]


def path_text(path: str | os.PathLike) -> str:
    """A path as text that a file in UTF-8 can hold, which not every name of a file is."""
    return os.fsencode(path).decode(errors="replace")


def key_of(question_id: Any, prompt: str) -> str:
    """The key of a question: its id and prompt, since some benchmarks (MME) ask several questions under one id."""
    return json.dumps([question_id, prompt], sort_keys=True)


def _is_truncated(line: bytes, has_answers: bool) -> bool:
    """Whether a line can be the beginning of an answer.

    Args:
      has_answers: the file has answers. Otherwise the line must begin as our answers do, unlike a question.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(line)  # the line may end within a character
    except UnicodeDecodeError:
        return False
    if not text.startswith(LINE_START):
        return LINE_START.startswith(text)
    try:
        json.JSONDecoder().raw_decode(text)
        return False  # complete
    except RecursionError:
        return False
    except ValueError:
        if has_answers:
            return True
    try:
        _, end = json.JSONDecoder().raw_decode(text, len(LINE_START))
    except (ValueError, RecursionError):
        return True  # truncated within the id
    return text.startswith(AFTER_ID, end) or AFTER_ID.startswith(text[end:])
