"""What the benchmarks' modules share: their files, found and read; answers, matched to questions; mean accuracies."""

import collections
import json
import os
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from infer.benchmarks.benchmark import Answer, File, Id, Mark, Question, Score
from llava_jax.console import InputError, note, plural, shorten
from llava_jax.files import read_bytes
from llava_jax.json_files import decode_json

MAX_BYTES = 4 * 2**30
EVAL_ZIP = "eval.zip, https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy/view"  # the reference's
COCO_VAL2014 = "http://images.cocodataset.org/zips/val2014.zip"
IMAGE_LINE = "<image>\n"  # the reference puts it before each question (llava/eval/model_vqa_loader.py)
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
_MODELS = (
    "v1.5-7B", "v1.5-13B", "v1.5-7B LoRA", "v1.5-13B LoRA",
    "v1.6-vicuna-7B", "v1.6-mistral-7B", "v1.6-vicuna-13B", "v1.6-34B",
)  # fmt: skip


def published_numbers(*numbers: float) -> dict[str, float]:
    """The numbers of the reference's docs/MODEL_ZOO.md, in its order of models."""
    return dict(zip(_MODELS, numbers, strict=True))


# ---------------------------------------------------------------- files


class QuestionLine(msgspec.Struct):
    """A line of the reference's question files."""

    question_id: Id
    image: str
    text: str
    category: str | int = "default"


def find(directory: Path, file: File) -> Path:
    """The path of a benchmark's file.

    Raises:
      InputError: it is missing. Says where it is published.
    """
    path = directory / file.path
    if not os.path.lexists(path):
        raise InputError(f"{shorten(path)}: not found ({file.size}; it is in {file.source})")
    return path


def read_object(path: Path, schema: Any) -> Any:
    """Read a JSON file of a declared type.

    Raises:
      InputError: the file cannot be read, is not JSON, has another type, or is empty. Names the key.
    """
    found = decode_json(read_bytes(path, MAX_BYTES), schema, shorten(path))
    if isinstance(found, list | dict) and not found:
        raise InputError(f"{shorten(path)}: is empty")
    return found


def read_lines(path: Path, schema: Any) -> list[tuple[int, Any]]:
    """Read JSON lines of a declared type, with their numbers. Blank lines are skipped.

    Raises:
      InputError: the file cannot be read or is empty, or a line is not JSON or has another type. Names the line.
    """
    name = shorten(path)
    lines = enumerate(read_bytes(path, MAX_BYTES).split(b"\n"), 1)
    found = [(n, decode_json(line, schema, f"{name} line {n}")) for n, line in lines if line.strip()]
    if not found:
        raise InputError(f"{name}: is empty")
    return found


def read_unique_lines(path: Path, schema: Any) -> dict[str, Any]:
    """Read JSON lines of a declared type, by their `question_id` as a string.

    Raises:
      InputError: as `read_lines`, or a question is there twice.
    """
    found: dict[str, tuple[int, Any]] = {}
    for number, row in read_lines(path, schema):
        key = str(row.question_id)
        if key in found:
            raise InputError(
                f"{shorten(path)} line {number}: question {_shown(row.question_id)} is already on line {found[key][0]}"
            )
        found[key] = number, row
    return {key: row for key, (_, row) in found.items()}


def read_question_lines(path: Path, *, ids_repeat: bool = False) -> list[tuple[str, QuestionLine]]:
    """Read one of the reference's question files: each line's name, for errors, and itself.

    Args:
      ids_repeat: several questions may have the same id; of those that have the same text, the first is asked.

    Raises:
      InputError: as `read_lines`, or a question is there twice.
    """
    found = []
    first: dict[Hashable, int] = {}
    for number, row in read_lines(path, QuestionLine):
        name = f"{shorten(path)} line {number}"
        key = (row.question_id, row.text) if ids_repeat else row.question_id
        if first.setdefault(key, number) == number:
            found.append((name, row))
        elif ids_repeat:
            note(f"warning: {name}: asks what line {first[key]} asks; asked once")
        else:
            raise InputError(f"{name}: question {_shown(row.question_id)} is already on line {first[key]}")
    return found


def read_questions(path: Path, folder: Path, *, ids_repeat: bool = False) -> list[Question]:
    """Read the questions of one of the reference's question files.

    Args:
      folder: of the images.
      ids_repeat: as `read_question_lines`.

    Raises:
      InputError: as `read_question_lines`, or an image is outside the folder.
    """
    return [
        image_question(
            row.question_id, row.text, image_path(folder, row.image, name), name,
            kind="all" if row.category == "default" else str(row.category),
        )
        for name, row in read_question_lines(path, ids_repeat=ids_repeat)
    ]  # fmt: skip


def image_question(id: Id, prompt: str, image: str, name: str, *, kind: str = "all", answer: str = "") -> Question:
    """A question about one image, asked as the reference does: the image first."""
    return Question(id, (IMAGE_LINE + prompt,), prompt, (image,), kind, answer, name=name)


def image_path(folder: Path, image: str, name: str) -> str:
    """The path of an image that a file names.

    Raises:
      InputError: it is outside the folder. Begins with `name`.
    """
    if os.path.isabs(image) or ".." in image.split("/"):
        raise InputError(f"{name}: image {shorten(image)} is outside the image folder")
    return os.path.join(folder, image)


# ---------------------------------------------------------------- answers


def match(
    answers: Iterable[Answer], keys: Collection[Hashable], key: Callable[[Answer], Hashable] | None = None
) -> dict[Hashable, Answer]:
    """Match answers to questions.

    Args:
      keys: of the questions.
      key: of the question that an answer belongs to; None if keys are ids, of which one may be a string where the other
        is an integer.

    Returns:
      key -> answer, for the questions that have one.

    Raises:
      InputError: an answer belongs to no question, or a question has two. Names the line of the answers file.
    """
    found: dict[Hashable, Answer] = {}
    by_text = {} if key else {str(id): id for id in keys}
    for answer in answers:
        which = key(answer) if key else answer.id if answer.id in keys else by_text.get(str(answer.id))
        if which not in keys:
            what = f"{_shown(answer.id)} ({json.dumps(shorten(answer.prompt), ensure_ascii=False)})"
            raise InputError(f"answers line {answer.line}: the benchmark has no question {what}")
        if which in found:
            raise InputError(
                f"answers line {answer.line}: a second answer to question {_shown(answer.id)}, which line "
                f"{found[which].line} answers"
            )
        found[which] = answer
    return found


def note_unanswered(missing: int, asked: int) -> None:
    """Warn that a submission has empty answers."""
    if missing:
        note(f"warning: {missing:,} of {plural(asked, 'question')} have no answer; submitted as empty answers")


def _shown(id: Id) -> str:
    return shorten(json.dumps(id, ensure_ascii=False))


# ---------------------------------------------------------------- scores


def by_kind(marks: Iterable[Mark]) -> dict[str, list[Mark]]:
    """Marks by the category of their question."""
    found = collections.defaultdict(list)
    for mark in marks:
        found[mark.kind].append(mark)
    return dict(found)


def accuracy(marks: Iterable[Mark]) -> float:
    """The mean score; 0 of no marks."""
    scores = [mark.score for mark in marks]
    return sum(scores) / max(len(scores), 1)


def accuracy_score(
    marks: Sequence[Mark],
    protocol: str,
    *,
    unanswered: int,
    parts: Mapping[str, Sequence[Mark]] | None = None,
    totals: Mapping[str, float] | None = None,
) -> Score:
    """The score of a benchmark whose metric is the mean over its questions.

    Args:
      parts: category -> its marks.
      totals: further numbers of the whole.
    """
    value = accuracy(marks)
    return Score(
        "accuracy", value, 100, protocol,
        totals={"accuracy": value, **(totals or {})},
        parts={kind: {"accuracy": accuracy(some), "questions": len(some)} for kind, some in (parts or {}).items()},
        marks=marks,
        unanswered=unanswered,
    )  # fmt: skip
