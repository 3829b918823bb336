"""The answers file: a JSON line for each answer, in the format of the reference (llava/eval/model_vqa_loader.py).

    {"question_id": 1, "prompt": "What is this?", "text": "A cat.", "answer_id": ..., "model_id": ..., "metadata": {}}

One command holds it at a time, and appends to it. Nothing but an answers file is ever touched.
"""

import codecs
import collections
import json
import os
from typing import Any, TypedDict

from llava_jax.console import InputError, first_line, shorten
from llava_jax.json_files import check_json, parse_json
from llava_jax.locks import LockedFile

Id = str | int | float | None
MAX_ANSWERS = 4 * 2**30  # bytes
START, NEXT = '{"question_id": ', ', "prompt": "'  # how each line begins


class Answer(TypedDict):
    """A line, as far as it is read."""

    question_id: Id
    prompt: str
    text: str


class AnswersFile:
    """An answers file, held until the block ends; made if it is not there, and removed if nothing was written to it.

    Attributes:
      answered: how often it answers each question, by `key_of`.
    """

    def __init__(self, path: str | os.PathLike, questions: str | os.PathLike):
        """
        Args:
          questions: the file that must not be it.

        Raises:
          InputError: it is something else, is in use, or cannot be written.
        """
        self.name = shorten(f"--answers {path}")
        if os.path.exists(path) and os.path.exists(questions) and os.path.samefile(path, questions):
            raise InputError(f"{self.name}: is the file of the questions; name another one")
        try:
            self.file = LockedFile(path, self.name)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise InputError(f"{self.name}: cannot be written ({first_line(error)})") from None
        try:
            if (size := os.fstat(self.file.file.fileno()).st_size) > MAX_ANSWERS:
                raise InputError(f"{self.name}: has {size:,} bytes; an answers file has at most {MAX_ANSWERS:,}")
            self._read(self.file.read())
        except BaseException:
            self.file.close()
            raise
        self.written = False

    def _read(self, data: bytes) -> None:
        """Count what is answered. A last line that was cut off while being written is told by how it begins."""
        *lines, last = data.split(b"\n")
        self.answered = collections.Counter()
        self.end, self.gap = len(data), b"\n" if last else b""  # where the first answer goes, and what precedes it
        for number, line in enumerate((*lines, last), 1):
            if not line.strip():
                continue
            try:
                answer = parse_json(line)
                check_json(answer, Answer, "no answer")
                self.answered[key_of(answer["question_id"], answer["prompt"])] += 1
            except InputError as error:
                if number <= len(lines) or not _is_cut(last, known=self.answered.total() > 0):
                    raise InputError(
                        f"{self.name}: is there already, and is no answers file (line {number}: {error})"
                    ) from None
                self.end, self.gap = len(data) - len(last), b""

    def append(self, answer: dict[str, Any]) -> None:
        """
        Raises:
          InputError: it cannot be written, and is as before.
        """
        line = json.dumps(answer, ensure_ascii=False).encode() + b"\n"
        try:
            if not self.written:
                self.file.file.truncate(self.end)
            self.file.append(self.gap + line)
        except OSError as error:  # a full disk
            raise InputError(f"{self.name}: cannot be written ({first_line(error)})") from None
        self.written, self.gap = True, b""

    def __enter__(self) -> "AnswersFile":
        return self

    def __exit__(self, *_) -> None:
        if self.file.is_new and not self.written:
            self.file.path.unlink(missing_ok=True)
        self.file.close()


def key_of(question_id: Any, prompt: str) -> str:
    """What an answer belongs to. Some benchmarks (MME) ask several questions under one id."""
    return json.dumps([question_id, prompt], sort_keys=True)


def _is_cut(line: bytes, known: bool) -> bool:
    """Whether it can be the beginning of an answer.

    Args:
      known: there are answers in the file; else it has to be the beginning of one of ours, not of a question.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(line)  # which may end within a character
    except UnicodeDecodeError:
        return False
    if not text.startswith(START):
        return START.startswith(text)
    try:
        json.JSONDecoder().raw_decode(text)
        return False  # whole, whatever follows it
    except RecursionError:
        return False
    except ValueError:
        if known:
            return True
    try:
        _, end = json.JSONDecoder().raw_decode(text, len(START))
    except (ValueError, RecursionError):
        return True  # within the id
    return text.startswith(NEXT, end) or NEXT.startswith(text[end:])
