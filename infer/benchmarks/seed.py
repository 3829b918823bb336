"""SEED-Bench, scored as the reference (scripts/convert_seed_for_submission.py) or lmms-eval (tasks/seedbench) does.

seed          all questions, those about videos with the frame in the middle: "SEED" in LLaVA-1.5's tables
seed-image    those about images: "SEED-I" in LLaVA-1.6's tables
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from infer.benchmarks.benchmark import (
    LMMS_EVAL,
    REFERENCE,
    Answer,
    Benchmark,
    File,
    Id,
    Mark,
    Question,
    Score,
    Submission,
)
from infer.benchmarks.files import (
    EVAL_ZIP,
    accuracy,
    accuracy_score,
    by_kind,
    find,
    match,
    note_unanswered,
    read_object,
    read_questions,
)
from llava_jax.console import InputError, note, plural, shorten

LETTERS = ("A", "B", "C", "D")
DATASET = "https://huggingface.co/datasets/AILab-CVC/SEED-Bench"
ANNOTATIONS = File("SEED-Bench.json", DATASET, "9.2 MB", "score")
QUESTIONS = File("llava-seed-bench.jsonl", EVAL_ZIP, "6 MB")
IMAGES = File("SEED-Bench-image", f"{DATASET} (SEED-Bench-image.zip)", "1.7 GB", "images")
VIDEO_IMAGES = File(
    "SEED-Bench-video-image",
    f"{DATASET} (v1_video.zip.*, and the reference's extract_video_frames.py for the frames)",
    "4 GB of videos",
    "images",
)


class Annotation(msgspec.Struct):
    """An entry of `questions` in `SEED-Bench.json`."""

    question_id: Id
    question_type_id: int
    data_type: Literal["image", "video"]
    answer: Literal["A", "B", "C", "D"]


class Annotations(msgspec.Struct):
    questions: list[Annotation]
    question_type: dict[str, int]


def read_reference(text: str) -> str:
    """The answer, which must be a letter and nothing else."""
    return text if text in LETTERS else ""


def read_lmms_eval(text: str) -> str:
    """The first character, in either case."""
    return text.strip()[:1].upper()


READERS: dict[str, Callable[[str], str]] = {REFERENCE: read_reference, LMMS_EVAL: read_lmms_eval}


class SeedBench(Benchmark):
    name = "seed"
    title = "SEED-Bench"
    directory = "seed_bench"
    files: Sequence[File] = (ANNOTATIONS, QUESTIONS, IMAGES, VIDEO_IMAGES)
    protocols = (REFERENCE, LMMS_EVAL)
    same_questions = True
    published: Mapping[str, float] = {
        "v1.5-7B": 58.6, "v1.5-13B": 61.6, "v1.5-7B LoRA": 60.1, "v1.5-13B LoRA": 61.3,
    }  # fmt: skip
    data_types: Sequence[str] = ("image", "video")  # of the questions that are asked

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        annotations, kinds = read_annotations(directory)
        questions = []
        for question in read_questions(find(directory, QUESTIONS), directory):
            annotation = annotations.get(str(question.id))
            if annotation is None:
                raise InputError(f"{question.name}: question {shorten(question.id)} is not in {ANNOTATIONS.path}")
            if annotation.data_type in self.data_types:
                kind, answer = kinds[annotation.question_type_id], annotation.answer
                questions.append(dataclasses.replace(question, kind=kind, answer=answer))
        return questions

    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        annotations, kinds = read_annotations(directory)
        given = match(answers, annotations)
        asked = {key: one for key, one in annotations.items() if one.data_type in self.data_types}
        if not asked:
            raise InputError(f"{shorten(directory / ANNOTATIONS.path)}: has no question about an image")
        if others := len(given.keys() - asked.keys()):
            note(f"{plural(others, 'answer')} not scored: not to questions about images")
        read, marks = READERS[protocol], []
        for key, one in asked.items():
            prompt, text = (given[key].prompt, given[key].text) if key in given else ("", "")
            said, kind = read(text), kinds[one.question_type_id]
            marks.append(Mark(one.question_id, prompt, text, float(said == one.answer), said, one.answer, kind))
        parts, totals = by_kind(marks), {}
        for data_type in self.data_types if len(self.data_types) > 1 else ():
            some = [mark for mark, one in zip(marks, asked.values(), strict=True) if one.data_type == data_type]
            if some:
                parts[data_type], totals[f"{data_type} accuracy"] = some, accuracy(some)
        unanswered = len(asked.keys() - given.keys())
        return accuracy_score(marks, protocol, unanswered=unanswered, parts=parts, totals=totals)

    def submission(self, directory: Path, answers: Sequence[Answer]) -> Submission | None:
        """Lines of question_id and prediction (convert_seed_for_submission.py)."""
        annotations, _ = read_annotations(directory)
        given = match(answers, annotations)
        note_unanswered(len(annotations) - len(given), len(annotations))
        lines = []
        for key, one in annotations.items():
            text = given[key].text if key in given else ""
            lines.append(json.dumps({"question_id": one.question_id, "prediction": text}) + "\n")
        return Submission("seed_bench.jsonl", "".join(lines).encode())


class SeedImage(SeedBench):
    name = "seed-image"
    title = "SEED-Bench (images)"
    files = (ANNOTATIONS, QUESTIONS, IMAGES)
    published: Mapping[str, float] = {
        "v1.6-vicuna-7B": 70.2, "v1.6-mistral-7B": 72.2, "v1.6-vicuna-13B": 71.9, "v1.6-34B": 75.9,
    }  # fmt: skip
    data_types = ("image",)

    def submission(self, directory: Path, answers: Sequence[Answer]) -> Submission | None:
        """None, since the leaderboard takes answers to all questions."""
        return None


def read_annotations(directory: Path) -> tuple[dict[str, Annotation], dict[int, str]]:
    """The annotations by the id of the question, as a string, and the names of the types of questions.

    Raises:
      InputError: the file is missing or not SEED-Bench's.
    """
    path = find(directory, ANNOTATIONS)
    contents = read_object(path, Annotations)
    kinds = {number: name for name, number in contents.question_type.items()}
    annotations: dict[str, Annotation] = {}
    for one in contents.questions:
        where = f"{shorten(path)}: question {shorten(one.question_id)}"
        if str(one.question_id) in annotations:
            raise InputError(f"{where} is there twice")
        if one.question_type_id not in kinds:
            raise InputError(f"{where}: question_type_id {one.question_type_id} is not in question_type")
        annotations[str(one.question_id)] = one
    if not annotations:
        raise InputError(f"{shorten(path)}: has no questions")
    return annotations, kinds
