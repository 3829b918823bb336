"""POPE: is there such an object in the image? (arXiv:2305.10355)

The reference takes any answer for a "yes" that has no "no" in its first sentence; lmms-eval wants exactly "yes" or
"no". An unanswered question counts as the wrong answer.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from infer.benchmarks.benchmark import LMMS_EVAL, REFERENCE, Answer, Benchmark, File, Mark, Question, Score
from infer.benchmarks.files import COCO_VAL2014, EVAL_ZIP, find, match, published_numbers, read_lines, read_questions
from llava_jax.console import InputError, plural, shorten

CATEGORIES = ("random", "popular", "adversarial")
DATA = "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"
QUESTIONS = File("llava_pope_test.jsonl", EVAL_ZIP, "1.7 MB")
LABELS = {category: File(f"coco/coco_pope_{category}.json", DATA, "0.4 MB", "score") for category in CATEGORIES}
IMAGES = File("val2014", COCO_VAL2014, "6.2 GB", "images")

_OTHER = {"yes": "no", "no": "yes"}
_WRONG = {"yes": "FP", "no": "FN", "": ""}


class Label(msgspec.Struct):
    """A line of a label file."""

    label: Literal["yes", "no"]
    image: str = ""
    text: str = ""


class POPE(Benchmark):
    """POPE on COCO (llava/eval/eval_pope.py; lmms-eval's tasks/pope/utils.py).

    The reference averages F1 over the three categories; lmms-eval scores all questions as one. Its yes ratio is of the
    right answers, the reference's of the model's.
    """

    name, title = "pope", "POPE"
    files = (QUESTIONS, *LABELS.values(), IMAGES)
    protocols = (REFERENCE, LMMS_EVAL)
    same_questions = True
    published = published_numbers(85.9, 85.9, 86.4, 86.7, 86.5, 86.7, 86.2, 87.7)

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        asked = read_questions(find(directory, QUESTIONS), directory / IMAGES.path)
        for one in asked:
            if one.kind not in CATEGORIES:
                raise InputError(f"{one.name}: category {shorten(one.kind)!r} must be one of {', '.join(CATEGORIES)}")
        return asked

    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        asked = self.questions(directory, protocol)
        labels = {
            one.id: label
            for category in CATEGORIES
            for one, label in _labelled(directory, category, [one for one in asked if one.kind == category])
        }
        found = match(answers, labels)
        marks: list[Mark] = []
        outcomes: dict[str, list[Outcome]] = {category: [] for category in CATEGORIES}
        for one in asked:
            answer, label, image = found.get(one.id), labels[one.id], str(one.images[0])
            said = read_answer(answer.text, protocol) if answer else ""
            outcomes[one.kind].append(Outcome(said if answer else _OTHER[label], label, image))
            prompt, text = (answer.prompt, answer.text) if answer else (one.prompt, "")
            marks.append(Mark(one.id, prompt, text, float(said == label), said, label, one.kind, group=image))
        parts = {category: numbers(some, protocol) for category, some in outcomes.items()}
        every = [outcome for some in outcomes.values() for outcome in some]
        metric, totals, averaged = "f1", numbers(every, protocol), [every]
        if protocol == REFERENCE:
            metric, averaged = "mean F1", list(outcomes.values())
            totals = {metric: sum(part["f1"] for part in parts.values()) / len(parts), **totals}
        return Score(
            metric, totals[metric], 100, protocol,
            totals=totals,
            parts={category: {**part, "questions": len(outcomes[category])} for category, part in parts.items()},
            marks=marks,
            unanswered=len(asked) - len(found),
            stderr=_f1_error(averaged),
        )  # fmt: skip


def _labelled(directory: Path, category: str, asked: Sequence[Question]) -> list[tuple[Question, str]]:
    """The questions of a category with their labels, which are in the same order in another file."""
    path = find(directory, LABELS[category])
    rows = read_lines(path, Label)
    if len(rows) != len(asked):
        raise InputError(
            f"{shorten(path)}: has {plural(len(rows), 'label')} for {plural(len(asked), 'question')} of "
            f"{QUESTIONS.path}; its labels are those of {DATA}"
        )
    for one, (number, row) in zip(asked, rows, strict=True):
        same_image = not row.image or Path(one.images[0]).name == Path(row.image).name
        if not (same_image and one.prompt.startswith(row.text.strip())):
            raise InputError(f"{shorten(path)} line {number}: is not the question of {one.name}; labels are at {DATA}")
    return [(one, row.label) for one, (_, row) in zip(asked, rows, strict=True)]


def read_answer(text: str, protocol: str) -> str:
    """Read "yes" or "no" out of an answer; lmms-eval may find neither, ""."""
    if protocol == LMMS_EVAL:
        said = text.lower().strip()
        return said if said in ("yes", "no") else ""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a model said about an image, "yes", "no" or "" for neither, and what is right."""

    said: str
    label: str
    image: str

    @property
    def kind(self) -> str:
        """ "TP", "FP", "TN" or "FN"; "" if the model said neither."""
        return {"yes": "TP", "no": "TN"}[self.label] if self.said == self.label else _WRONG[self.said]


def numbers(outcomes: Sequence[Outcome], protocol: str) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", and the share of "yes". What is undefined is 0."""
    counts = collections.Counter(outcome.kind for outcome in outcomes)
    hits, said_yes, is_yes = counts["TP"], counts["TP"] + counts["FP"], counts["TP"] + counts["FN"]
    precision = hits / said_yes if said_yes else 0.0
    recall = hits / is_yes if is_yes else 0.0
    yes = said_yes if protocol == REFERENCE else sum(outcome.label == "yes" for outcome in outcomes)
    return {
        "accuracy": (hits + counts["TN"]) / len(outcomes),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": yes / len(outcomes),
    }


def _f1_error(parts: Sequence[Sequence[Outcome]]) -> float:
    """The standard error of the mean F1 of some parts, by linearization; an image's questions are a cluster.

    F1 is a ratio of sums over questions, 2 TP / (2 TP + FP + FN).
    """
    clusters: dict[str, float] = collections.defaultdict(float)
    for outcomes in parts:
        weights = [{"TP": 2, "FP": 1, "FN": 1}.get(outcome.kind, 0) for outcome in outcomes]
        hits = [2 * (outcome.kind == "TP") for outcome in outcomes]
        total = max(sum(weights), 1)
        f1 = sum(hits) / total
        for outcome, hit, weight in zip(outcomes, hits, weights, strict=True):
            clusters[outcome.image] += (hit - f1 * weight) / total / len(parts)
    n = len(clusters)
    return math.sqrt(sum(value**2 for value in clusters.values()) * n / (n - 1)) if n > 1 else 0.0
