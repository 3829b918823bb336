"""VizWiz: questions of blind people about their photos, which may be unanswerable (arXiv:1802.08218)."""

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec

from infer.benchmarks.benchmark import Answer, Benchmark, File, Mark, Question, Score, Submission
from infer.benchmarks.files import (
    EVAL_ZIP,
    SHORT_ANSWER,
    accuracy_score,
    by_kind,
    find,
    image_path,
    image_question,
    match,
    note_unanswered,
    published_numbers,
    read_object,
    read_question_lines,
    read_questions,
)
from infer.benchmarks.vqa_answers import most_common, normalize, vizwiz_accuracy
from infer.benchmarks.vqav2 import PersonsAnswer
from llava_jax.console import InputError, shorten

DATA = "https://vizwiz.cs.colorado.edu/VizWiz_final"
QUESTIONS = File("llava_test.jsonl", EVAL_ZIP, "2.0 MB")
TEST_IMAGES = File("test", f"{DATA}/images/test.zip", "8,000 images", "images")
ANNOTATIONS = File("val.json", f"{DATA}/vqa_data/Annotations.zip", "4,319 questions")
IMAGES = File("val", f"{DATA}/images/val.zip", "4,319 images", "images")
SUFFIX = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT_ANSWER


class VizWiz(Benchmark):
    """VizWiz test (scripts/convert_vizwiz_for_submission.py)."""

    name, title = "vizwiz", "VizWiz test-dev"
    files = (QUESTIONS, TEST_IMAGES)
    server = "https://eval.ai/web/challenges/challenge-page/2185/my-submission"
    published = published_numbers(50.0, 53.6, 47.8, 58.9, 57.6, 60.0, 60.5, 63.8)

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        return read_questions(find(directory, QUESTIONS), directory / TEST_IMAGES.path)

    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        raise InputError(f"{self.title}: only its server has the right answers; submit to {self.server}")

    def submission(self, directory: Path, answers: Sequence[Answer]) -> Submission:
        rows = [row for _, row in read_question_lines(find(directory, QUESTIONS))]
        found = match(answers, {row.question_id for row in rows})
        note_unanswered(len(rows) - len(found), len(rows))
        submitted = [
            {"image": row.image, "answer": normalize(found[row.question_id].text) if row.question_id in found else ""}
            for row in rows
        ]
        return Submission("vizwiz.json", json.dumps(submitted).encode())


# ---------------------------------------------------------------- val


class Annotation(msgspec.Struct):
    """A question of `ANNOTATIONS`. `answer_type` is "yes/no", "number", "other" or "unanswerable"."""

    image: str
    question: str
    answer_type: str
    answers: list[PersonsAnswer]


class VizWizVal(Benchmark):
    """VizWiz val, scored as VizWiz's own evaluator does. A question has the name of its image as its id."""

    name, title, directory = "vizwiz-val", "VizWiz val", "vizwiz"
    files = (ANNOTATIONS, IMAGES)

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        return [one for one, _ in _read_annotations(directory)]

    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        rows = _read_annotations(directory)
        found = match(answers, {one.id for one, _ in rows})
        marks = []
        for one, ten in rows:
            answer = found.get(one.id)
            text = answer.text if answer else ""
            right = vizwiz_accuracy(text, ten) if answer else 0.0
            prompt = answer.prompt if answer else one.prompt
            marks.append(Mark(one.id, prompt, text, right, normalize(text), one.answer, one.kind))
        return accuracy_score(marks, protocol, unanswered=len(rows) - len(found), parts=by_kind(marks))


def _read_annotations(directory: Path) -> list[tuple[Question, list[str]]]:
    """Each question with its ten answers."""
    path, found = find(directory, ANNOTATIONS), {}
    for i, row in enumerate(read_object(path, list[Annotation])):
        name = f"{shorten(path)}: [{i}]"
        if row.image in found:
            raise InputError(f"{name}: image {shorten(row.image)} is there twice")
        if len(row.answers) != 10:
            raise InputError(f"{name}: has {len(row.answers)} answers instead of 10")
        image = image_path(directory / IMAGES.path, row.image, name)
        ten = [person.answer for person in row.answers]
        prompt = row.question.capitalize() + SUFFIX
        asked = image_question(row.image, prompt, image, name, kind=row.answer_type, answer=most_common(ten))
        found[row.image] = asked, ten
    return list(found.values())
