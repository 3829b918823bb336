"""Read answers files, whoever wrote them, to score them."""

import os
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from infer.answers import MAX_ANSWERS
from infer.benchmarks.benchmark import Answer, Id
from llava_jax.console import InputError, note, shorten
from llava_jax.files import read_bytes
from llava_jax.json_files import check_json, parse_json

Key = tuple[str, str, str]  # of a question: id, prompt, round


class Line(TypedDict):
    """The keys of a line that are read. Only some benchmarks need the prompt."""

    question_id: str | int
    text: str
    prompt: NotRequired[str]


def read_answers(path: str | os.PathLike, *, growing: bool = False) -> list[Answer]:
    """Read an answers file in the reference's format (llava/eval/model_vqa_loader.py).

    Args:
      growing: one that a command is writing, or was when it was killed: it may be empty; an incomplete last line is
        left out, and so are second answers.

    Raises:
      InputError: the file cannot be read, has no answers, a line is not an answer, or a question has two that differ.
        Names the line.
    """
    name, data = shorten(path), read_bytes(path, MAX_ANSWERS)
    answers: list[Answer] = []
    repeated: list[int] = []  # lines
    found: dict[Key, Answer] = {}
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            answer = _answer(line, number)
        except InputError as error:
            if growing and number == len(lines):
                break
            raise InputError(f"{name} line {number}: {error}") from None
        key = answer_key(answer.id, answer.prompt, answer.extra)
        if (first := found.setdefault(key, answer)) is answer:
            answers.append(answer)
        elif not growing and answer.prompt and first.text == answer.text:
            repeated.append(number)
        elif not growing:
            asked = f"question {shorten(answer.id, 40)} {'with this' if answer.prompt else 'without a'} prompt"
            raise InputError(f"{name} line {number}: {asked} already has an answer, on line {first.line}")
    if repeated:
        note(f"warning: {name} line {repeated[0]}: repeats an answer, left out; lines that do: {len(repeated):,}")
    if not answers and not growing:
        raise InputError(f"{name}: has no answers")
    return answers


def answer_key(question: Id, prompt: str, extra: Mapping[str, Any]) -> Key:
    """The key of a question: its id and prompt, since some benchmarks (MME) ask several questions under one id, and its
    round, since a rotation of MMBench's options has the prompt of another one if options are equal.

    Args:
      extra: further keys of its line, or all of them.
    """
    return str(question), prompt, repr(extra["round_id"]) if "round_id" in extra else ""


def _answer(line: bytes, number: int) -> Answer:
    value = parse_json(line)
    check_json(value, Line, "not an answer")
    texts = (str(value["question_id"]), value.get("prompt", ""), value["text"])
    if b"\\u" in line and not all(map(_is_unicode, texts)):
        raise InputError("text with an unpaired Unicode surrogate")
    extra = {key: value[key] for key in value if key not in ("question_id", "prompt", "text")}
    return Answer(value["question_id"], texts[1], texts[2], extra, number)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False
