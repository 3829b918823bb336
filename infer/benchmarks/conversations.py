"""A file of conversations as a benchmark: its answers are the reference answers (`llava_jax.data.conversations`).

Each question is asked with the turns before it, including their reference answers. `kinds` in a row names the kind of
each question. An invalid row counts as one failed question; the others are asked.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infer.benchmarks.benchmark import REFERENCE, Answer, Benchmark, Mark, Question, Score
from infer.benchmarks.files import accuracy, accuracy_score, by_kind, match
from infer.benchmarks.options import read_option
from llava_jax.console import InputError, note, plural, shorten
from llava_jax.data.conversations import read_conversation
from llava_jax.data.data_files import read_rows, summarize
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.templates import IMAGE_TOKEN

NO_KIND = "all"  # the kind of questions without `kinds`

Metric = Callable[[str, str], float]  # answer, reference answer -> score from 0 to 1


def exact_match(answer: str, reference: str) -> float:
    """1 if the answers are equal, ignoring case, surrounding spaces, and a final full stop."""
    return float(_normalize(answer) == _normalize(reference))


def _normalize(text: str) -> str:
    return text.strip().lower().removesuffix(".").rstrip()


def scienceqa(answer: str, reference: str) -> float:
    """1 if both name the same option of a multiple-choice question (llava/eval/eval_science_qa.py)."""
    return float(read_option(answer) is not None and read_option(answer) == read_option(reference))


METRICS: dict[str, Metric] = {"exact_match": exact_match, "scienceqa": scienceqa}
READERS: dict[str, Callable[[str], str | None]] = {"exact_match": _normalize, "scienceqa": read_option}


class Conversations(Benchmark):
    """The questions of a file in the format of training data.

    Attributes:
      metric: the name of the metric, one of `METRICS`.
    """

    name = "conversations"
    title = "Conversations"
    files = ()

    def __init__(self, data: Path, image_folder: Path, metric: str | None = None):
        """
        Args:
          metric: default: `scienceqa` if every reference answer names an option, otherwise `exact_match`.
        """
        self.data, self.image_folder, self._metric = data, image_folder, metric

    @functools.cached_property
    def _read(self) -> list[Question]:
        return read_questions(self.data, self.image_folder)

    @functools.cached_property
    def metric(self) -> str:
        return self._metric or choose_metric(self._read)

    @functools.cached_property
    def _checked(self) -> list[Question]:
        return check_answers(self._read, self.metric)

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        """The questions of the file; `directory` is not used."""
        return self._checked

    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        given = match(answers, {question.id for question in self._checked})
        marks = [self._mark(question, given.get(question.id)) for question in self._checked]
        with_images = [mark for mark, question in zip(marks, self._checked, strict=True) if question.images]
        totals = {}
        if self.metric == "scienceqa" and with_images:
            totals["accuracy with images"] = accuracy(with_images)
        return accuracy_score(
            marks, REFERENCE, unanswered=len(marks) - len(given), parts=by_kind(marks), totals=totals
        )  # fmt: skip

    def _mark(self, question: Question, answer: Answer | None) -> Mark:
        text = answer.text if answer else ""
        score = METRICS[self.metric](text, question.answer) if answer and not question.problem else 0.0
        read = (READERS[self.metric](text) or "") if answer else ""
        return Mark(question.id, question.prompt, text, score, read, question.answer, question.kind)


# ---------------------------------------------------------------- the file


def read_questions(path: Path, folder: Path) -> list[Question]:
    """Read all questions of a file in the format of training data, and one with a `problem` for each invalid row.

    Raises:
      InputError: the file cannot be read.
    """
    images = ImageFolder(folder, follow_links=True)
    rows = read_rows(path)
    summarize(path, rows)
    found: list[Question] = []
    for number, row in enumerate(rows):
        name = f"{shorten(path)} row {number}"
        try:
            found += questions_of(row, name, images.find, str(number))
        except InputError as error:
            found.append(Question(f"{number}/1", (), "", name=name, problem=f"{name}: {error}"))
    return found


def questions_of(row: Any, name: str, find: Callable[[str], Any], row_id: str = "0") -> list[Question]:
    """The questions of a row that have an answer. As in training, an answer before the first question is dropped.

    Args:
      name: the name of the row in errors.
      find: returns the image of a name.
      row_id: begins the ids of the questions, "0/1", "0/2", ...

    Raises:
      InputError: the row is not a conversation, or `find` raised.
    """
    conversation = read_conversation(row)
    turns = conversation.turns
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    if [turn["from"] for turn in turns] != (["human", "gpt"] * len(turns))[: len(turns)]:
        speakers = shorten(", ".join(turn["from"] for turn in conversation.turns))
        raise InputError(f"speakers must take turns, human first; got {speakers}")
    if len(turns) < 2:
        raise InputError("no answer")
    texts = tuple(turn["value"] for turn in turns)
    n = len(texts) // 2
    kinds = row.get("kinds") or [NO_KIND] * n
    if (
        not isinstance(kinds, list)
        or len(kinds) not in (n, len(texts) - n)  # with or without an unanswered last question
        or not all(isinstance(kind, str) for kind in kinds)
    ):
        raise InputError(f"kinds must list {plural(n, 'kind')}, one per question")
    images = tuple(map(find, conversation.images))
    if len(images) == 1:
        texts = tuple(map(_image_first, texts))
    image_tokens = sum(text.count(IMAGE_TOKEN) for text in texts)
    if image_tokens not in (0, len(images)):
        raise InputError(f"{image_tokens} {IMAGE_TOKEN} tokens for {len(images)} images")
    if any(IMAGE_TOKEN in text for text in texts[1::2]):
        raise InputError(f"an answer has an {IMAGE_TOKEN} token; only questions can have images")
    return [
        # Images belong to the turn with their <image> tokens, or to the first turn if there are none.
        Question(
            f"{row_id}/{i + 1}",
            texts[: 2 * i + 1],
            texts[2 * i],
            images[: sum(text.count(IMAGE_TOKEN) for text in texts[: 2 * i + 1])] if image_tokens else images,
            kind,
            texts[2 * i + 1],
            conversation.system,
            name=name,
        )
        for i, kind in enumerate(kinds[:n])
    ]


def _image_first(text: str) -> str:
    """Move the `<image>` token of a single image to the front of its turn, as in training."""
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip() if IMAGE_TOKEN in text else text


def choose_metric(questions: list[Question]) -> str:
    """`scienceqa` if every reference answer says which option "The answer is", otherwise `exact_match`."""
    answers = [question.answer for question in questions if not question.problem]
    if answers and all("The answer is " in answer and read_option(answer) for answer in answers):
        note("metric scienceqa, since every reference answer names an option; --metric exact_match compares all words")
        return "scienceqa"
    return "exact_match"


def check_answers(questions: list[Question], metric: str) -> list[Question]:
    """Return the questions, with a `problem` if the metric cannot read their reference answer.

    Raises:
      InputError: no valid question is left.
    """
    if metric == "scienceqa":
        no_option = "the reference answer names no option, which --metric scienceqa needs"
        named = lambda one: one.problem or read_option(one.answer)  # noqa: E731
        questions = [
            one if named(one) else dataclasses.replace(one, problem=f"{one.name}: {no_option}") for one in questions
        ]
    if all(question.problem for question in questions):
        more = f" ({len(questions)} rows, and none can be asked)" if len(questions) > 1 else ""
        raise InputError(f"{questions[0].problem}{more}")
    return questions
