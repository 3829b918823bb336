"""MM-Vet: 218 questions, whose answers a judge compares with the right ones, from 0.0 to 1.0.

Asked as by llava/eval/model_vqa.py. The judge is given a table in the published layout (mm-vet_evaluator.py of
github.com/yuweihao/MM-Vet) with examples of our own, so its scores resemble those of the official evaluator without
being the same. What that one reads is the file to submit (scripts/convert_mmvet_for_eval.py).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from infer.benchmarks.benchmark import REFERENCE, Answer, File, Id, Mark, Question, Score, Submission
from infer.benchmarks.judge import JudgedBenchmark, Review
from infer.benchmarks.shared import (
    check_unique,
    find_image,
    image_folder,
    match_answers,
    mean,
    read_document,
    read_rows,
)
from llava_jax.console import InputError, shorten
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.endpoints import Messages
from llava_jax.json_files import check_json

ANNOTATIONS, QUESTIONS = "mm-vet.json", "llava-mm-vet.jsonl"
PREFIX = "v1_"  # of the ids in mm-vet.json
ARCHIVE = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")

INSTRUCTIONS = """\
Score how correct the predictions of AI models are, given the ground truth. Where the ground truth joins parts with \
<AND>, a prediction is entirely correct only if it has all of them; where it joins them with <OR>, any one of them is \
enough. The score is one of 0.0 (entirely wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0 (entirely correct). \
Fill in the score that the last row lacks, and write nothing else.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
"""
ROLES = (
    "A cat sits in an armchair and reads a newspaper, while its owner drinks from a bowl on the floor: the two have "
    "changed places, so that the human is the pet."
)
EXAMPLES = (
    ("Which two numbers solve the equation?", "2 <AND> -7", "x = 4", "0.0"),
    ("Which two numbers solve the equation?", "2 <AND> -7", "x = 2", "0.5"),
    ("Which two numbers solve the equation?", "2 <AND> -7", "x is 7 or -7", "0.5"),
    ("Which two numbers solve the equation?", "2 <AND> -7", "Either x = -7 or x = 2.", "1.0"),
    ("What animal is on the sign?", "moose <OR> elk", "It is an elk.", "1.0"),
    (
        "Why is this drawing funny?",
        ROLES,
        "The cat reads a newspaper, which cats do not do.",
        "0.4",
    ),
    (
        "Why is this drawing funny?",
        ROLES,
        "It swaps the roles of a cat and its owner. The cat reads the newspaper in the armchair like a person, and the "
        "person laps from a bowl on the floor like a pet.",
        "1.0",
    ),
)


class Annotation(TypedDict):
    """An entry of `mm-vet.json`."""

    imagename: str
    question: str
    answer: str
    capability: Annotated[list[str], Meta(min_length=1)]


class Row(TypedDict):
    """A line of `llava-mm-vet.jsonl`."""

    question_id: Id
    image: str
    text: str


class MMVet(JudgedBenchmark):
    name = "mm-vet"
    title = "MM-Vet"
    files = (
        File(ANNOTATIONS, ARCHIVE, "about 0.1 MB"),
        File("images", ARCHIVE, "about 70 MB", "images"),
        File(QUESTIONS, "eval.zip of the reference's docs/Evaluation.md; without it the same is built", "40 kB", ""),
    )
    max_new_tokens = 1024
    published: Mapping[str, float] = {
        "v1.5-7B": 31.1, "v1.5-13B": 36.1, "v1.5-7B LoRA": 30.2, "v1.5-13B LoRA": 38.3, "v1.6-vicuna-7B": 43.9,
        "v1.6-mistral-7B": 47.3, "v1.6-vicuna-13B": 48.4, "v1.6-34B": 57.4,
    }  # fmt: skip
    request_fields: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 16}
    reminder = "Write the score of the last row, a number from 0.0 to 1.0, and nothing else."
    review_tokens = 4

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        annotations, rows = read_annotations(directory), self._rows(directory)
        images = image_folder(directory / "images")
        questions = []
        for number, row in enumerate(rows, 1):
            annotation = annotations[str(row["question_id"])]
            name = f"{self.title} question {number}"
            found, error = find_image(images, row["image"], name)
            questions.append(
                Question(
                    row["question_id"],
                    (f"{IMAGE_TOKEN}\n{row['text']}",),
                    row["text"],
                    found,
                    combination(annotation["capability"]),
                    annotation["answer"],
                    name=name,
                    problem=error,
                )
            )
        return questions

    def _rows(self, directory: Path) -> list[Any]:
        """The rows of the reference's question file, or the same built from the annotations."""
        annotations, path = read_annotations(directory), directory / QUESTIONS
        if not path.exists():
            return [
                {
                    "question_id": int(name) if name.isdecimal() else name,
                    "image": one["imagename"],
                    "text": one["question"],
                }
                for name, one in annotations.items()
            ]
        rows = read_rows(path, Row)
        check_unique((row["question_id"] for row in rows), path)
        for row in rows:
            if str(row["question_id"]) not in annotations:
                raise InputError(f"{shorten(path)}: question {shorten(row['question_id'])} is not in {ANNOTATIONS}")
        return rows

    def judge_messages(self, directory: Path, answers: Sequence[Answer]) -> dict[Id, Messages]:
        annotations = read_annotations(directory)
        given = match_answers(answers, annotations, self.title)
        return {
            name: [{"role": "user", "content": _content(one, given[name].text)}]
            for name, one in annotations.items()
            if name in given
        }

    def read_review(self, text: str) -> tuple[float, ...] | None:
        """The number that begins a review."""
        try:
            score = float(text.split()[0])
        except (ValueError, IndexError):
            return None
        return (score,) if 0.0 <= score <= 1.0 else None

    def score_reviews(self, directory: Path, answers: Sequence[Answer], reviews: Mapping[Id, Review]) -> Score:
        """The mean over all questions; a review without a score counts as 0, as in the official evaluator."""
        annotations, given = read_annotations(directory), {str(answer.id): answer for answer in answers}
        marks = []
        for name, one in annotations.items():
            scores, answer = reviews[name].scores if name in reviews else None, given.get(name)
            marks.append(
                Mark(
                    question=answer.id if answer else name,
                    prompt=one["question"],
                    text=answer.text if answer else "",
                    score=scores[0] if scores else 0.0,
                    read=f"{scores[0]:g}" if scores else "",
                    answer=one["answer"],
                    kind=combination(one["capability"]),
                    group=name,
                )
            )
        share = mean([mark.score for mark in marks])
        totals = {"score": share}
        return Score(
            "score", share, 100.0, REFERENCE, totals, _parts(annotations, marks), marks, len(marks) - len(given)
        )

    def review_file(self, directory: Path, answers: Sequence[Answer], reviews: Mapping[Id, Review]) -> Submission:
        """As the official evaluator writes its grades."""
        grades = {
            f"{PREFIX}{name}": {
                "model": [review.model],
                "content": [review.text],
                "score": [review.scores[0] if review.scores else 0.0],
            }
            for name, review in reviews.items()
        }
        return Submission("grades.json", json.dumps(grades, indent=4).encode())

    def submission(self, directory: Path, answers: Sequence[Answer]) -> Submission:
        """What the official evaluator reads: an answer by id, "" if there is none."""
        annotations = read_annotations(directory)
        given = match_answers(answers, annotations, self.title)
        texts = {f"{PREFIX}{name}": given[name].text if name in given else "" for name in annotations}
        return Submission("mm-vet.json", json.dumps(texts, indent=2).encode())


def _content(annotation: Any, prediction: str) -> str:
    truth = annotation["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    rows = [*EXAMPLES, (annotation["question"], truth, prediction, "")]
    return INSTRUCTIONS + "\n".join(" | ".join(row) for row in rows)


def combination(capabilities: Sequence[str]) -> str:
    """The name of the questions that need exactly these capabilities."""
    known = [name for name in CAPABILITIES if name in capabilities]
    names = known + sorted(set(capabilities) - set(known))
    return "+".join(names) if len(names) > 1 else f"{names[0]} only"


def _parts(annotations: Mapping[str, Any], marks: Sequence[Mark]) -> dict[str, dict[str, float]]:
    """Scores by capability, then by combination."""
    parts: dict[str, list[float]] = {name: [] for name in CAPABILITIES}
    for one, mark in zip(annotations.values(), marks, strict=True):
        for name in dict.fromkeys(one["capability"]):
            parts.setdefault(name, []).append(mark.score)
    for mark in marks:
        parts.setdefault(mark.kind, []).append(mark.score)
    return {name: {"score": mean(scores), "questions": len(scores)} for name, scores in parts.items() if scores}


def read_annotations(directory: Path) -> dict[str, Any]:
    """The annotations by the id of the question, as a string without its prefix.

    Raises:
      InputError: the file is missing or not MM-Vet's.
    """
    path = directory / ANNOTATIONS
    annotations = {}
    for name, one in read_document(path, dict[str, Any]).items():
        if not name.startswith(PREFIX):
            raise InputError(f"{shorten(path)}: id {shorten(name)!r} does not begin with {PREFIX}")
        annotations[name.removeprefix(PREFIX)] = check_json(one, Annotation, f"{shorten(path)}: {shorten(name)}")
    return annotations
