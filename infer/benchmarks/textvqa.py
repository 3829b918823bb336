"""TextVQA val: questions whose answers are written in the image (arXiv:1904.08920).

The reference's questions end with the tokens that an OCR system read in the image; lmms-eval's have none.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from infer.benchmarks.benchmark import LMMS_EVAL, REFERENCE, Answer, Benchmark, File, Mark, Question, Score
from infer.benchmarks.files import (
    EVAL_ZIP,
    SHORT_ANSWER,
    accuracy_score,
    find,
    image_path,
    image_question,
    match,
    published_numbers,
    read_object,
    read_questions,
)
from infer.benchmarks.vqa_answers import TenAnswers, most_common, normalize, textvqa_accuracy
from llava_jax.console import InputError, note, shorten

DATA = "https://dl.fbaipublicfiles.com/textvqa"
QUESTIONS = File("llava_textvqa_val_v051_ocr.jsonl", EVAL_ZIP, "1.5 MB")
ANNOTATIONS = File("TextVQA_0.5.1_val.json", f"{DATA}/data/TextVQA_0.5.1_val.json", "16 MB", "score")
IMAGES = File("train_images", f"{DATA}/images/train_val_images.zip", "7.1 GB", "images")

Key = tuple[str, str]  # image, question in lower case


class Annotation(msgspec.Struct):
    """A question of `ANNOTATIONS`. `image_id` is the name of its image without suffix."""

    image_id: str
    question: str
    answers: TenAnswers


class Annotations(msgspec.Struct):
    """The file `ANNOTATIONS`."""

    data: list[Annotation]


class TextVQA(Benchmark):
    """TextVQA val. Questions have the ids of their images (llava/eval/eval_textvqa.py)."""

    name, title = "textvqa", "TextVQA"
    files = (QUESTIONS, ANNOTATIONS, IMAGES)
    protocols = (REFERENCE, LMMS_EVAL)
    published = published_numbers(58.2, 61.3, 58.2, 60.2, 64.9, 65.7, 67.1, 69.5)

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        folder = directory / IMAGES.path
        if protocol == REFERENCE:
            return read_questions(find(directory, QUESTIONS), folder, ids_repeat=True)
        asked = []
        for (image, _), rows in _read_annotations(directory).items():
            name, row = rows[-1]
            path = image_path(folder, f"{image}.jpg", name)
            prompt = row.question.capitalize() + SHORT_ANSWER
            asked.append(image_question(image, prompt, path, name, answer=most_common(row.answers)))
        return asked

    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        annotations = _read_annotations(directory)
        found = match(answers, annotations, _key_of_answer)
        has_questions = protocol == LMMS_EVAL or (directory / QUESTIONS.path).exists()
        asked = {_key_of(one): one for one in self.questions(directory, protocol)} if has_questions else {}
        marks = []
        for key, rows in annotations.items():
            answer, (_, row) = found.get(key), rows[-1]
            one = answer or asked.get(key) or Answer(row.image_id, row.question, "")
            text = answer.text if answer else ""
            right = textvqa_accuracy(text, row.answers) if answer else 0.0
            best = most_common(row.answers)
            marks += [Mark(one.id, one.prompt, text, right, normalize(text), best, group=row.image_id)] * len(rows)
        missing = sum(len(rows) for key, rows in annotations.items() if key not in found)
        return accuracy_score(marks, protocol, unanswered=missing)


def _read_annotations(directory: Path) -> dict[Key, list[tuple[str, Annotation]]]:
    """Each question's key -> name, for errors, and annotation. Of a question that is there several times all count, by
    the last one's answers, as in the reference's dictionary of them."""
    path = find(directory, ANNOTATIONS)
    found: dict[Key, list[tuple[str, Annotation]]] = {}
    for i, row in enumerate(read_object(path, Annotations).data):
        same = found.setdefault((row.image_id, row.question.lower()), [])
        name = f"{shorten(path)}: data[{i}]"
        if same:
            note(f"warning: {name}: asks what {same[-1][0].rpartition(' ')[2]} asks; its answers count for both")
        same.append((name, row))
    if not found:
        raise InputError(f"{shorten(path)}: data is empty")
    return found


def _key_of(question: Question) -> Key:
    try:
        return _key(question.id, question.prompt)
    except InputError as error:
        raise InputError(f"{question.name}: {error}") from None


def _key_of_answer(answer: Answer) -> Key:
    try:
        return _key(answer.id, answer.prompt)
    except InputError as error:
        raise InputError(f"answers line {answer.line}: {error}") from None


def _key(id: str | int, prompt: str) -> Key:
    """Parse the question of a prompt, as `eval_textvqa.py: prompt_processor` does.

    Raises:
      InputError: the prompt has none of its formats.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        in_words = re.search("Question: (.*?) Short answer:", prompt, re.DOTALL)
        text = in_words[1] if in_words else None
    elif len(lines) == 3 and "Reference OCR token: " in prompt:
        text = lines[1] if prompt.startswith("Reference OCR token:") else lines[0]
    else:
        text = lines[0] if len(lines) == 2 else None
    if text is None:
        raise InputError(f"no question can be parsed from the prompt {shorten(prompt)!r}")
    return str(id), text.lower()
