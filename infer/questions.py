"""Answer a file of questions in the reference's format (llava/eval/model_vqa_loader.py).

    {"question_id": 1, "image": "a.jpg", "text": "What is this?"}

`image` (or `images`) may be a list, or absent. Answers are written as they are generated; a second run skips answered
questions.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, TypedDict

from infer.answers import AnswersFile, Id, answer_line, key_of, model_name
from llava_jax.console import InputError, Progress, note, print_json, shorten
from llava_jax.data.conversations import image_names
from llava_jax.data.image_folder import ImageFolder
from llava_jax.files import read_text
from llava_jax.json_files import check_json, parse_json

MAX_QUESTIONS = 4 * 2**30  # bytes, since images may be `data:` URLs
MAX_SHOWN = 10  # failed questions that are logged; the rest are counted


class Question(TypedDict):
    """A line of a questions file."""

    question_id: Id
    text: str


@dataclasses.dataclass(frozen=True)
class Questions:
    """The questions of a file, and its errors. `image` of a row is a list of paths and bytes."""

    rows: list[dict[str, Any]]
    line_numbers: list[int]
    errors: list[str]
    answered: int


def read_questions(args: argparse.Namespace, answers: AnswersFile) -> Questions:
    """Read the questions without an answer in `answers`.

    Raises:
      InputError: the file cannot be read, or has no questions.
    """
    path, folder = Path(args.questions), ImageFolder(args.image_folder, follow_links=True)
    name = shorten(path)
    lines = read_text(path, MAX_QUESTIONS).split("\n")
    done = answers.answered.copy()
    rows, numbers, errors, skipped = [], [], [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _question(line, folder)
        except InputError as error:
            errors.append(f"{name} line {number}: {error}")
            continue
        key = key_of(row["question_id"], row["text"])
        if done[key]:
            done[key] -= 1
            skipped += 1
            continue
        rows.append(row)
        numbers.append(number)
    if not (rows or errors or skipped):
        raise InputError(f"{name}: has no questions")
    return Questions(rows, numbers, errors, skipped)


def _question(line: str, folder: ImageFolder) -> dict[str, Any]:
    row = parse_json(line)
    check_json(row, Question, "a question needs question_id and text")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError("text with an unpaired Unicode surrogate") from None
    return row | {"image": list(map(folder.find, image_names(row)))}


def answer_questions(engine, questions: Questions, answers: AnswersFile, sampling, args: argparse.Namespace) -> int:
    """Generate, write and report the answers. Returns the exit status: 1 if any question failed."""
    from infer.engine import Request

    for error in questions.errors[:MAX_SHOWN]:
        note(f"error: {error}")
    if questions.answered:
        note(f"{questions.answered} of {questions.answered + len(questions.rows)} already have answers")
    requests = [
        Request(
            (row["text"],),
            tuple(row["image"]),
            args.system,
            f"{shorten(args.questions)} line {number}",
            number,
        )
        for row, number in zip(questions.rows, questions.line_numbers, strict=True)
    ]
    failed = len(questions.errors)
    model = model_name(args.checkpoint)
    with Progress("answering", len(requests), "questions") as bar:
        for i, answer in engine.generate(requests, sampling, rows=args.batch_size):
            bar.advance()
            if isinstance(answer, InputError):
                failed += 1
                if failed <= MAX_SHOWN:
                    note(f"error: {answer}")
                continue
            row = questions.rows[i]
            answers.append(answer_line(row["question_id"], row["text"], answer.text, model))
            if args.json:
                print_json({"question_id": row["question_id"]} | dataclasses.asdict(answer))
    if failed:
        what = "1 question was" if failed == 1 else f"{failed} questions were"
        note(f"error: {what} not answered" + (f"; the first {MAX_SHOWN} are named above" * (failed > MAX_SHOWN)))
    return 1 if failed else 0
