"""What benchmarks share: their files are read, answers are matched with questions, and accuracies are taken."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infer.benchmarks.benchmark import Answer, Mark, Score
from llava_jax.console import InputError, shorten
from llava_jax.data.image_folder import ImageFolder
from llava_jax.files import read_bytes
from llava_jax.json_files import parse_lines, read_json

MAX_BYTES = 2**30  # of a file
CHOOSE = "Answer with the option's letter from the given choices directly."


def read_document(path: Path, schema: Any) -> Any:
    """Read a JSON file of a type.

    Raises:
      InputError: the file is missing, empty, not JSON, or has another type.
    """
    contents = read_json(path, schema, max_bytes=MAX_BYTES)
    if contents is None:
        raise InputError(f"{shorten(path)}: no such file; --list says where it is published")
    if not contents:
        raise InputError(f"{shorten(path)}: is empty")
    return contents


def read_rows(path: Path, schema: Any) -> list[Any]:
    """Read JSON lines of a type.

    Raises:
      InputError: the file is missing or empty, or a line is not JSON or has another type.
    """
    if not path.exists():
        raise InputError(f"{shorten(path)}: no such file; --list says where it is published")
    rows = parse_lines(read_bytes(path, MAX_BYTES), schema, shorten(path))
    if not rows:
        raise InputError(f"{shorten(path)}: is empty")
    return rows


def check_unique(ids: Iterable[Any], path: Path) -> None:
    """Raises:
    InputError: an id appears twice.
    """
    seen = set()
    for one in map(str, ids):
        if one in seen:
            raise InputError(f"{shorten(path)}: question {shorten(one)} appears twice")
        seen.add(one)


def image_folder(folder: Path) -> ImageFolder:
    """A folder of images.

    Raises:
      InputError: there is no such directory.
    """
    if not folder.is_dir():
        raise InputError(f"{shorten(folder)}: no such directory; --list says where its images are published")
    return ImageFolder(folder, follow_links=True)


def find_image(folder: ImageFolder, name: str, row: str) -> tuple[tuple[Any, ...], str]:
    """The image of a question, and its `problem` if the name cannot be one."""
    try:
        return (folder.find(name),), ""
    except InputError as error:
        return (), f"{row}: {error}"


def match_answers(answers: Sequence[Answer], ids: Collection[str], title: str) -> dict[str, Answer]:
    """The answers by the id of their question, as a string.

    Raises:
      InputError: an answer belongs to none of the questions, or to one that has an answer.
    """
    found: dict[str, Answer] = {}
    for answer in answers:
        key = str(answer.id)
        if key not in ids:
            raise InputError(f"answers line {answer.line}: {title} has no question {shorten(key)}")
        if key in found:
            raise InputError(
                f"answers line {answer.line}: question {shorten(key)} has an answer already, in line {found[key].line}"
            )
        found[key] = answer
    return found


def accuracy(marks: Collection[Mark]) -> dict[str, float]:
    """The mean score of marks, and their number."""
    return {"accuracy": mean([mark.score for mark in marks]), "questions": len(marks)}


def accuracy_by_kind(marks: Sequence[Mark]) -> dict[str, dict[str, float]]:
    return {kind: accuracy([mark for mark in marks if mark.kind == kind]) for kind in kinds_of(marks)}


def kinds_of(marks: Iterable[Mark]) -> list[str]:
    """The kinds, in the order in which they first come."""
    return list(dict.fromkeys(mark.kind for mark in marks))


def accuracy_score(
    marks: Sequence[Mark],
    protocol: str,
    unanswered: int,
    *,
    parts: Mapping[str, Mapping[str, float]] | None = None,
    more: Mapping[str, float] | None = None,
) -> Score:
    """A score whose main number is the mean of marks that are right or wrong, each by itself.

    Args:
      parts: default: by kind.
      more: further totals.
    """
    share = accuracy(marks)["accuracy"]
    return Score(
        metric="accuracy",
        value=share,
        scale=100.0,
        protocol=protocol,
        totals={"accuracy": share} | dict(more or {}),
        parts=accuracy_by_kind(marks) if parts is None else parts,
        marks=marks,
        unanswered=unanswered,
        stderr=binomial_error(share, len(marks)),
    )


def mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else 0.0


def binomial_error(share: float, n: int) -> float:
    """The standard error of a share of `n` independent questions."""
    return math.sqrt(share * (1 - share) / n) if n else 0.0
