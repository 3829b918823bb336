"""SEED-Bench, scored as the reference (scripts/convert_seed_for_submission.py) or lmms-eval (tasks/seedbench) does.

seed          all questions, those about videos with the frame in the middle: "SEED" in LLaVA-1.5's tables
seed-image    those about images: "SEED-I" in LLaVA-1.6's tables
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

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
from infer.benchmarks.shared import (
    accuracy,
    accuracy_by_kind,
    accuracy_score,
    check_unique,
    find_image,
    image_folder,
    match_answers,
    read_document,
    read_rows,
)
from llava_jax.console import InputError, note, plural, shorten
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.json_files import check_json

ANNOTATIONS, QUESTIONS = "SEED-Bench.json", "llava-seed-bench.jsonl"
LETTERS = ("A", "B", "C", "D")
DATASET = "https://huggingface.co/datasets/AILab-CVC/SEED-Bench"


class Annotation(TypedDict):
    """An entry of `questions` in `SEED-Bench.json`."""

    question_id: Id
    question_type_id: int
    data_type: str  # "image" or "video"
    answer: str  # a letter


class Annotations(TypedDict):
    questions: list[Annotation]
    question_type: dict[str, int]


class Row(TypedDict):
    """A line of `llava-seed-bench.jsonl`."""

    question_id: Id
    image: str
    text: str


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
    files: Sequence[File] = (
        File(ANNOTATIONS, DATASET, "9.2 MB", "score"),
        File(QUESTIONS, "eval.zip of the reference's docs/Evaluation.md", "about 6 MB"),
        File("SEED-Bench-image", f"{DATASET}: SEED-Bench-image.zip", "1.7 GB", "images"),
        File(
            "SEED-Bench-video-image",
            f"{DATASET}: v1_video.zip.*, of which the reference's extract_video_frames.py takes the frames",
            "the videos several GB",
            "images",
        ),
    )
    protocols = (REFERENCE, LMMS_EVAL)
    published: Mapping[str, float] = {
        "v1.5-7B": 58.6, "v1.5-13B": 61.6, "v1.5-7B LoRA": 60.1, "v1.5-13B LoRA": 61.3,
    }  # fmt: skip
    data_types: Sequence[str] = ("image", "video")  # of the questions that are asked

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        annotations, kinds = read_annotations(directory)
        path = directory / QUESTIONS
        rows = read_rows(path, Row)
        check_unique((row["question_id"] for row in rows), path)
        images = image_folder(directory)
        questions = []
        for number, row in enumerate(rows, 1):
            annotation = annotations.get(str(row["question_id"]))
            if annotation is None:
                raise InputError(f"{shorten(path)}: question {shorten(row['question_id'])} is not in {ANNOTATIONS}")
            if annotation["data_type"] not in self.data_types:
                continue
            name = f"{shorten(path)} row {number}"
            found, error = find_image(images, row["image"], name)
            kind, answer = kinds[annotation["question_type_id"]], annotation["answer"]
            turns = (f"{IMAGE_TOKEN}\n{row['text']}",)
            questions.append(
                Question(row["question_id"], turns, row["text"], found, kind, answer, name=name, problem=error)
            )
        return questions

    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        annotations, kinds = read_annotations(directory)
        given = match_answers(answers, annotations, self.title)
        asked = {key: one for key, one in annotations.items() if one["data_type"] in self.data_types}
        if others := len(given.keys() - asked.keys()):
            note(f"{plural(others, 'answer')} not scored: not to questions about images")
        read = READERS[protocol]
        marks = [
            _mark(one, kinds[one["question_type_id"]], given.get(key), read) for key, one in asked.items()
        ]  # in the order of the annotations
        parts, more = accuracy_by_kind(marks), {}
        for data_type in self.data_types if len(self.data_types) > 1 else ():
            some = [mark for mark, one in zip(marks, asked.values(), strict=True) if one["data_type"] == data_type]
            if some:
                parts[data_type] = accuracy(some)
                more[f"{data_type} accuracy"] = accuracy(some)["accuracy"]
        return accuracy_score(marks, protocol, len(asked.keys() - given.keys()), parts=parts, more=more)

    def submission(self, directory: Path, answers: Sequence[Answer]) -> Submission | None:
        """Lines of question_id and prediction, "" if there is no answer."""
        annotations, _ = read_annotations(directory)
        given = match_answers(answers, annotations, self.title)
        lines = []
        for key, one in annotations.items():
            text = given[key].text if key in given else ""
            lines.append(json.dumps({"question_id": one["question_id"], "prediction": text}) + "\n")
        return Submission("seed_bench.jsonl", "".join(lines).encode())


class SeedImage(SeedBench):
    name = "seed-image"
    title = "SEED-Bench (images)"
    files = SeedBench.files[:3]
    published: Mapping[str, float] = {
        "v1.6-vicuna-7B": 70.2, "v1.6-mistral-7B": 72.2, "v1.6-vicuna-13B": 71.9, "v1.6-34B": 75.9,
    }  # fmt: skip
    data_types = ("image",)

    def submission(self, directory: Path, answers: Sequence[Answer]) -> Submission | None:
        """None, since the leaderboard takes answers to all questions."""
        return None


def _mark(annotation: Any, kind: str, answer: Answer | None, read_text: Callable[[str], str]) -> Mark:
    text = answer.text if answer else ""
    read, right = read_text(text), annotation["answer"]
    return Mark(
        question=annotation["question_id"],
        prompt=answer.prompt if answer else "",
        text=text,
        score=float(read == right),
        read=read,
        answer=right,
        kind=kind,
        group=str(annotation["question_id"]),
    )


def read_annotations(directory: Path) -> tuple[dict[str, Any], dict[int, str]]:
    """The annotations by the id of the question, as a string, and the names of the types of questions.

    Raises:
      InputError: the file is missing or not SEED-Bench's.
    """
    path = directory / ANNOTATIONS
    contents = check_json(read_document(path, dict[str, Any]), Annotations, shorten(path))
    kinds = {number: name for name, number in contents["question_type"].items()}
    check_unique((one["question_id"] for one in contents["questions"]), path)
    if not contents["questions"]:
        raise InputError(f"{shorten(path)}: has no questions")
    for one in contents["questions"]:
        where = f"{shorten(path)}: question {shorten(one['question_id'])}"
        if one["question_type_id"] not in kinds:
            raise InputError(f"{where}: question_type_id {one['question_type_id']} is not in question_type")
        if one["data_type"] not in SeedBench.data_types:
            raise InputError(f"{where}: data_type {shorten(one['data_type'])!r} is neither image nor video")
        if one["answer"] not in LETTERS:
            raise InputError(f"{where}: answer {shorten(one['answer'])!r} is not one of A to D")
    return {str(one["question_id"]): one for one in contents["questions"]}, kinds
