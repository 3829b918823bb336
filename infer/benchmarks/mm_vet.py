"""MM-Vet: 218 questions, whose answers a judge compares with the right ones, from 0.0 to 1.0.

Asked as by llava/eval/model_vqa.py. The judge is given a table in the published layout (mm-vet_evaluator.py of
github.com/yuweihao/MM-Vet) with examples of our own, so its scores resemble those of the official evaluator without
being the same. What that one reads is the file to submit (scripts/convert_mmvet_for_eval.py).
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from infer.benchmarks.benchmark import REFERENCE, Answer, File, Id, Mark, Question, Score, Submission
from infer.benchmarks.files import (
    EVAL_ZIP,
    find,
    image_path,
    image_question,
    match,
    note_unanswered,
    published_numbers,
    read_object,
    read_questions,
)
from infer.benchmarks.judge import JudgedBenchmark, Review
from llava_jax.console import InputError, shorten
from llava_jax.endpoints import Messages
from llava_jax.json_files import check_json

ARCHIVE = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"
ANNOTATIONS = File("mm-vet.json", ARCHIVE, "0.1 MB")
IMAGES = File("images", ARCHIVE, "200 images, 0.1 GB", "images")
QUESTIONS = File("llava-mm-vet.jsonl", EVAL_ZIP, "30 kB; built from mm-vet.json if it is missing", "")
PREFIX = "v1_"  # of the ids in mm-vet.json
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


class Annotation(msgspec.Struct):
    """An entry of `mm-vet.json`."""

    imagename: str
    question: str
    answer: str
    capability: Annotated[list[str], msgspec.Meta(min_length=1)]


class MMVet(JudgedBenchmark):
    name = "mm-vet"
    title = "MM-Vet"
    files = (ANNOTATIONS, IMAGES, QUESTIONS)
    max_new_tokens = 1024
    published = published_numbers(31.1, 36.1, 30.2, 38.3, 43.9, 47.3, 48.4, 57.4)
    request_fields: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 16}
    reminder = "Write the score of the last row, a number from 0.0 to 1.0, and nothing else."
    review_tokens = 4

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        """Those of the reference's question file, or the same built from the annotations."""
        annotations, path = read_annotations(directory), directory / QUESTIONS.path
        folder = directory / IMAGES.path
        if path.exists():
            questions = read_questions(path, folder)
        else:
            questions = []
            for key, one in annotations.items():
                name = f"{shorten(directory / ANNOTATIONS.path)}: {PREFIX}{shorten(key)}"
                image = image_path(folder, one.imagename, name)
                questions.append(image_question(int(key) if key.isdecimal() else key, one.question, image, name))
        asked = []
        for question in questions:
            if (found := annotations.get(str(question.id))) is None:
                raise InputError(f"{question.name}: question {shorten(question.id)} is not in {ANNOTATIONS.path}")
            asked.append(dataclasses.replace(question, kind=combination(found.capability), answer=found.answer))
        return asked

    def judge_messages(self, directory: Path, answers: Sequence[Answer]) -> dict[Id, Messages]:
        annotations = read_annotations(directory)
        given = match(answers, annotations)
        return {
            key: [{"role": "user", "content": _content(one, given[key].text)}]
            for key, one in annotations.items()
            if key in given
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
        annotations = read_annotations(directory)
        given, marks = match(answers, annotations), []
        for key, one in annotations.items():
            text, scores = given[key].text if key in given else "", reviews[key].scores if key in reviews else None
            score, read = (scores[0], f"{scores[0]:g}") if scores else (0.0, "")
            name = given[key].id if key in given else key
            marks.append(Mark(name, one.question, text, score, read, one.answer, combination(one.capability)))
        share = statistics.fmean(mark.score for mark in marks)
        return Score(
            metric="score",
            value=share,
            scale=100.0,
            protocol=REFERENCE,
            totals={"score": share},
            parts=_parts(annotations, marks),
            marks=marks,
            unanswered=len(marks) - len(given),
        )

    def review_file(self, directory: Path, answers: Sequence[Answer], reviews: Mapping[Id, Review]) -> Submission:
        """As the official evaluator writes its grades."""
        grades = {
            f"{PREFIX}{key}": {
                "model": [review.model],
                "content": [review.text],
                "score": [review.scores[0] if review.scores else 0.0],
            }
            for key, review in reviews.items()
        }
        return Submission("grades.json", json.dumps(grades, indent=4).encode())

    def submission(self, directory: Path, answers: Sequence[Answer]) -> Submission:
        """What the official evaluator reads: an answer by id, "" if there is none."""
        annotations = read_annotations(directory)
        given = match(answers, annotations)
        note_unanswered(len(annotations) - len(given), len(annotations))
        texts = {f"{PREFIX}{key}": given[key].text if key in given else "" for key in annotations}
        return Submission("mm-vet.json", json.dumps(texts, indent=2).encode())


def _content(annotation: Annotation, prediction: str) -> str:
    truth = annotation.answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    rows = [*EXAMPLES, (annotation.question, truth, prediction, "")]
    return INSTRUCTIONS + "\n".join(" | ".join(row) for row in rows)


def combination(capabilities: Sequence[str]) -> str:
    """The name of the questions that need exactly these capabilities."""
    known = [name for name in CAPABILITIES if name in capabilities]
    names = known + sorted(set(capabilities) - set(known))
    return "+".join(names) if len(names) > 1 else f"{names[0]} only"


def _parts(annotations: Mapping[str, Annotation], marks: Sequence[Mark]) -> dict[str, dict[str, float]]:
    """Scores by capability, then by combination."""
    parts: dict[str, list[float]] = {name: [] for name in CAPABILITIES}
    for one, mark in zip(annotations.values(), marks, strict=True):
        for name in dict.fromkeys(one.capability):
            parts.setdefault(name, []).append(mark.score)
    for mark in marks:
        parts.setdefault(mark.kind, []).append(mark.score)
    return {
        name: {"score": statistics.fmean(scores), "questions": len(scores)} for name, scores in parts.items() if scores
    }


def read_annotations(directory: Path) -> dict[str, Annotation]:
    """The annotations by the id of the question, as a string without its prefix.

    Raises:
      InputError: the file is missing or not MM-Vet's.
    """
    path = find(directory, ANNOTATIONS)
    annotations = {}
    for name, one in read_object(path, dict[str, Any]).items():
        if not name.startswith(PREFIX):
            raise InputError(f"{shorten(path)}: id {shorten(name)!r} does not begin with {PREFIX}")
        annotations[name.removeprefix(PREFIX)] = check_json(one, Annotation, f"{shorten(path)}: {shorten(name)}")
    return annotations
