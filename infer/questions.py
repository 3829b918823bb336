"""Many questions from a file, answers to a file, in the format of the reference (llava/eval/model_vqa_loader.py).

    {"question_id": 1, "image": "a.jpg", "text": "What is this?"}            one of the questions
    {"question_id": 1, "prompt": "What is this?", "text": "A cat.", "answer_id": ..., "model_id": ..., "metadata": {}}

`image` (or `images`) may be a list, or missing. Answers are written as they come; a second run skips what is answered.
"""

import argparse
import collections
import dataclasses
import json
import uuid
from pathlib import Path
from typing import Any

from llava_jax.console import InputError, Progress, note, shorten
from llava_jax.conversations import image_names
from llava_jax.images import ImageFolder

TOLD = 10  # broken questions that are named; the rest are counted


@dataclasses.dataclass(frozen=True)
class Questions:
    """What a questions file holds, and what was wrong with it. `image` of a row is a list of paths and bytes."""

    rows: list[dict[str, Any]]
    line_numbers: list[int]
    errors: list[str]
    answered: int


def read_questions(args: argparse.Namespace) -> Questions:
    """Read the questions that `args.answers` does not answer yet.

    Raises:
      InputError: a file cannot be read, or there is no question in it.
    """
    path, folder = Path(args.questions), ImageFolder(args.image_folder, follow_links=True)
    name = shorten(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or shorten(error)})") from None
    done = _answered(Path(args.answers))
    rows, numbers, errors, skipped = [], [], [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _question(line, folder)
        except InputError as error:
            errors.append(f"{name} line {number}: {error}")
            continue
        key = _key(row["question_id"], row["text"])
        if done[key]:
            done[key] -= 1
            skipped += 1
            continue
        rows.append(row)
        numbers.append(number)
    if not (rows or errors or skipped):
        raise InputError(f"{name}: no questions in it")
    try:
        with open(args.answers, "a"):
            pass
    except OSError as error:
        raise InputError(f"--answers {shorten(args.answers)}: cannot be written ({error.strerror})") from None
    return Questions(rows, numbers, errors, skipped)


def _question(line: str, folder: ImageFolder) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({shorten(error)})") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or "question_id" not in row:
        raise InputError("a question needs question_id and text")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError("its text is not Unicode: half a character in it") from None
    return row | {"image": list(map(folder.find, image_names(row)))}


def _key(question_id, prompt: str) -> str:
    """What an answer belongs to. Some benchmarks (MME) ask several questions under one id."""
    return json.dumps([question_id, prompt], sort_keys=True)


def _answered(path: Path) -> collections.Counter[str]:
    """The questions that an answers file answers. A last line that was cut off while being written is taken away."""
    if not path.exists():
        return collections.Counter()
    try:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            path.write_bytes(whole)
        answers = [json.loads(line) for line in whole.split(b"\n") if line.strip()]
        return collections.Counter(_key(answer["question_id"], answer["prompt"]) for answer in answers)
    except OSError as error:
        raise InputError(f"{shorten(path)}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{shorten(path)}: is there already, and is no answers file") from None


def answer_questions(engine, questions: Questions, sampling, args: argparse.Namespace) -> int:
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
    model = str(args.checkpoint).rstrip("/").rsplit("/", 1)[-1]
    with Progress("answering", len(requests), "questions") as bar, open(args.answers, "a", encoding="utf-8") as out:
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
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
            out.flush()
            if args.json:
                print(json.dumps({"question_id": row["question_id"]} | dataclasses.asdict(answer), ensure_ascii=False))
    if failed:
        what = "1 question was" if failed == 1 else f"{failed} questions were"
        note(f"error: {what} not answered" + (f"; the first {TOLD} are named above" * (failed > TOLD)))
    return 1 if failed else 0
