"""Many questions from a file, in the format of the reference (llava/eval/model_vqa_loader.py), answered into another.

    {"question_id": 1, "image": "a.jpg", "text": "What is this?"}

`image` (or `images`) may be a list, or missing. Answers are written as they come; a second run skips what is answered.
"""

import argparse
import dataclasses
import json
import os
import uuid
from pathlib import Path
from typing import Any, TypedDict

from infer.answers import AnswersFile, Id, key_of
from llava_jax.console import InputError, Progress, note, print_json, shorten
from llava_jax.data.conversations import image_names
from llava_jax.data.images import ImageFolder
from llava_jax.files import read_text
from llava_jax.json_files import check_json, parse_json

MAX_QUESTIONS = 4 * 2**30  # bytes: with images in `data:` URLs
TOLD = 10  # broken questions that are named; the rest are counted


class Question(TypedDict):
    """A line of a questions file."""

    question_id: Id
    text: str


@dataclasses.dataclass(frozen=True)
class Questions:
    """What a questions file holds, and what was wrong with it. `image` of a row is a list of paths and bytes."""

    rows: list[dict[str, Any]]
    line_numbers: list[int]
    errors: list[str]
    answered: int


def read_questions(args: argparse.Namespace, answers: AnswersFile) -> Questions:
    """Read the questions that `answers` does not answer yet.

    Raises:
      InputError: the file cannot be read, or there is no question in it.
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
        raise InputError(f"{name}: no questions in it")
    return Questions(rows, numbers, errors, skipped)


def _question(line: str, folder: ImageFolder) -> dict[str, Any]:
    row = parse_json(line)
    check_json(row, Question, "a question needs question_id and text")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError("its text is not Unicode: half a character in it") from None
    return row | {"image": list(map(folder.find, image_names(row)))}


def answer_questions(engine, questions: Questions, answers: AnswersFile, sampling, args: argparse.Namespace) -> int:
    """Answer, write, and report. Returns the exit status: 1 if any question could not be answered."""
    from infer.engine import Request

    for error in questions.errors[:TOLD]:
        note(f"error: {error}")
    if questions.answered:
        note(f"{questions.answered} of {questions.answered + len(questions.rows)} are answered already")
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
    model = os.fsencode(args.checkpoint).decode(errors="replace").rstrip("/").rsplit("/", 1)[-1]
    with Progress("answering", len(requests), "questions") as bar:
        for i, answer in engine.generate(requests, sampling, rows=args.batch_size):
            bar.advance()
            if isinstance(answer, InputError):
                failed += 1
                if failed <= TOLD:
                    note(f"error: {answer}")
                continue
            row = questions.rows[i]
            line = {
                "question_id": row["question_id"],
                "prompt": row["text"],
                "text": answer.text,
                "answer_id": uuid.uuid4().hex,
                "model_id": model,
                "metadata": {},
            }
            answers.append(line)
            if args.json:
                print_json({"question_id": row["question_id"]} | dataclasses.asdict(answer))
    if failed:
        what = "1 question was" if failed == 1 else f"{failed} questions were"
        note(f"error: {what} not answered" + (f"; the first {TOLD} are named above" * (failed > TOLD)))
    return 1 if failed else 0
