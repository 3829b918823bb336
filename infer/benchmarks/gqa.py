"""GQA: compositional questions, generated from scene graphs (arXiv:1902.09506)."""

import collections
import json
from collections.abc import Sequence
from pathlib import Path

import msgspec

from infer.benchmarks.benchmark import Answer, Benchmark, File, Mark, Question, Score, Submission
from infer.benchmarks.files import (
    EVAL_ZIP,
    SHORT_ANSWER,
    accuracy,
    accuracy_score,
    by_kind,
    find,
    match,
    note_unanswered,
    published_numbers,
    read_object,
    read_questions,
)

DATA = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
QUESTIONS = File("llava_gqa_testdev_balanced.jsonl", EVAL_ZIP, "2.3 MB")
ANNOTATIONS = File("data/testdev_balanced_questions.json", f"Questions 1.2, {DATA}", "1.4 GB to download", "score")
IMAGES = File("data/images", f"Images, {DATA}", "20.3 GB", "images")


class Types(msgspec.Struct):
    """What kind of question it is: "query" or "verify", ...; about "obj", "attr", "rel", ..."""

    structural: str
    semantic: str


class Annotation(msgspec.Struct):
    """A question of `ANNOTATIONS`."""

    question: str
    answer: str
    imageId: str
    types: Types


class GQA(Benchmark):
    """GQA testdev-balanced: an answer is right if it is the same word (GQA's eval.py)."""

    name, title = "gqa", "GQA"
    files = (QUESTIONS, ANNOTATIONS, IMAGES)
    published = published_numbers(62.0, 63.3, 63.0, 63.3, 64.2, 64.8, 65.4, 67.1)

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        return read_questions(find(directory, QUESTIONS), directory / IMAGES.path)

    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        rows = _read_annotations(directory)
        found = match(answers, rows)
        marks: list[Mark] = []
        semantic: dict[str, list[Mark]] = collections.defaultdict(list)
        for id, row in rows.items():
            answer = found.get(id)
            text = answer.text if answer else ""
            said = predicted(text)
            prompt = answer.prompt if answer else row.question + SHORT_ANSWER
            right = float(answer is not None and said == row.answer)
            mark = Mark(id, prompt, text, right, said, row.answer, row.types.structural, row.imageId)
            marks.append(mark)
            semantic[row.types.semantic].append(mark)
        structural = by_kind(marks)
        sides = {"open": structural.get("query"), "binary": [mark for mark in marks if mark.kind != "query"]}
        return accuracy_score(
            marks, protocol,
            unanswered=len(rows) - len(found),
            totals={side: accuracy(some) for side, some in sides.items() if some},
            parts={f"structural: {kind}": some for kind, some in structural.items()}
            | {f"semantic: {kind}": some for kind, some in semantic.items()},
        )  # fmt: skip

    def submission(self, directory: Path, answers: Sequence[Answer]) -> Submission:
        """The predictions that GQA's eval.py reads (scripts/convert_gqa_for_eval.py), and "" where one is missing."""
        rows = _read_annotations(directory)
        found = match(answers, rows)
        note_unanswered(len(rows) - len(found), len(rows))
        predictions = {id: predicted(answer.text) for id, answer in found.items()} | dict.fromkeys(
            (id for id in rows if id not in found), ""
        )
        submitted = [{"questionId": id, "prediction": prediction} for id, prediction in predictions.items()]
        return Submission("testdev_balanced_predictions.json", json.dumps(submitted).encode())


def predicted(text: str) -> str:
    """The prediction of an answer."""
    return text.rstrip(".").lower()


def _read_annotations(directory: Path) -> dict[str, Annotation]:
    return read_object(find(directory, ANNOTATIONS), dict[str, Annotation])
