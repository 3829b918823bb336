"""VQAv2: open questions about COCO's images, each answered by ten people (arXiv:1612.00837)."""

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec

from infer.benchmarks.benchmark import Answer, Benchmark, File, Id, Mark, Question, Score, Submission
from infer.benchmarks.files import (
    COCO_VAL2014,
    EVAL_ZIP,
    SHORT_ANSWER,
    accuracy_score,
    by_kind,
    find,
    image_question,
    match,
    note_unanswered,
    published_numbers,
    read_object,
    read_question_lines,
    read_questions,
)
from infer.benchmarks.vqa_answers import most_common, normalize, vqa_accuracy
from llava_jax.console import InputError, shorten

DATA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
TEST_DEV = File("llava_vqav2_mscoco_test-dev2015.jsonl", EVAL_ZIP, "20 MB")
TEST = File("llava_vqav2_mscoco_test2015.jsonl", EVAL_ZIP, "80 MB", "score")
TEST_IMAGES = File("test2015", "http://images.cocodataset.org/zips/test2015.zip", "12 GB", "images")
QUESTIONS = File("v2_OpenEnded_mscoco_val2014_questions.json", f"{DATA}/v2_Questions_Val_mscoco.zip", "22 MB")
ANNOTATIONS = File("v2_mscoco_val2014_annotations.json", f"{DATA}/v2_Annotations_Val_mscoco.zip", "180 MB", "score")
IMAGES = File("val2014", COCO_VAL2014, "6.2 GB", "images")


class VQAv2(Benchmark):
    """VQAv2 test-dev, or the whole test set if only its questions are there. The server expects an answer to each
    question of the whole test set, and scores those of the phase (scripts/convert_vqav2_for_submission.py)."""

    name, title = "vqav2", "VQAv2 test-dev"
    files = (TEST_DEV, TEST, TEST_IMAGES)
    server = "https://eval.ai/web/challenges/challenge-page/830/my-submission"
    published = published_numbers(78.5, 80.0, 79.1, 80.0, 81.8, 82.2, 82.8, 83.7)

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        file = TEST if (directory / TEST.path).exists() and not (directory / TEST_DEV.path).exists() else TEST_DEV
        return read_questions(find(directory, file), directory / TEST_IMAGES.path)

    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        raise InputError(f"{self.title}: only its server has the right answers; submit to {self.server}")

    def submission(self, directory: Path, answers: Sequence[Answer]) -> Submission:
        every = [row.question_id for _, row in read_question_lines(find(directory, TEST))]
        found = match(answers, set(every))
        asked = {one.id for one in self.questions(directory, self.protocols[0])}
        note_unanswered(len(asked - found.keys()), len(asked))
        rows = [{"question_id": id, "answer": normalize(found[id].text) if id in found else ""} for id in every]
        return Submission("vqav2.json", json.dumps(rows).encode())


# ---------------------------------------------------------------- val


class ValQuestion(msgspec.Struct):
    """A question of `QUESTIONS`."""

    question_id: int
    image_id: int
    question: str


class ValQuestions(msgspec.Struct):
    """The file `QUESTIONS`."""

    questions: list[ValQuestion]


class PersonsAnswer(msgspec.Struct):
    """One of the ten answers."""

    answer: str


class Annotation(msgspec.Struct):
    """The answers to a question, in `ANNOTATIONS`. `answer_type` is "yes/no", "number" or "other"."""

    question_id: int
    answer_type: str
    answers: list[PersonsAnswer]
    image_id: Id = ""


class Annotations(msgspec.Struct):
    """The file `ANNOTATIONS`."""

    annotations: list[Annotation]


class VQAv2Val(Benchmark):
    """VQAv2 val, scored as the server scores the test set (GT-Vision-Lab/VQA: vqaEval.py)."""

    name, title, directory = "vqav2-val", "VQAv2 val", "vqav2"
    files = (QUESTIONS, ANNOTATIONS, IMAGES)

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        path, asked = find(directory, QUESTIONS), {}
        for i, row in enumerate(read_object(path, ValQuestions).questions):
            name = f"{shorten(path)}: questions[{i}]"
            if row.question_id in asked:
                raise InputError(f"{name}: question {row.question_id} is there twice")
            image = str(directory / IMAGES.path / f"COCO_val2014_{row.image_id:012}.jpg")
            asked[row.question_id] = image_question(row.question_id, row.question + SHORT_ANSWER, image, name)
        if not asked:
            raise InputError(f"{shorten(path)}: questions is empty")
        return list(asked.values())

    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        rows = _read_annotations(directory)
        found = match(answers, rows)
        has_questions = (directory / QUESTIONS.path).exists()
        asked = {one.id: one for one in self.questions(directory, protocol)} if has_questions else {}
        marks = []
        for id, row in rows.items():
            answer = found.get(id)
            one = answer or asked.get(id) or Answer(id, "", "")
            text, ten = answer.text if answer else "", [person.answer for person in row.answers]
            right = vqa_accuracy(text, ten) if answer else 0.0
            marks.append(
                Mark(id, one.prompt, text, right, normalize(text), most_common(ten), row.answer_type, str(row.image_id))
            )
        return accuracy_score(marks, protocol, unanswered=len(rows) - len(found), parts=by_kind(marks))


def _read_annotations(directory: Path) -> dict[int, Annotation]:
    path, rows = find(directory, ANNOTATIONS), {}
    for i, row in enumerate(read_object(path, Annotations).annotations):
        name = f"{shorten(path)}: annotations[{i}]"
        if row.question_id in rows:
            raise InputError(f"{name}: question {row.question_id} is there twice")
        if len(row.answers) != 10:
            raise InputError(f"{name}: has {len(row.answers)} answers instead of 10")
        rows[row.question_id] = row
    if not rows:
        raise InputError(f"{shorten(path)}: annotations is empty")
    return rows
