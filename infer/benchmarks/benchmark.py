"""What a benchmark is: files that it publishes, questions, and a score.

Each benchmark is a module of this package with a class of `Benchmark`; `infer.benchmarks` lists them.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REFERENCE, LMMS_EVAL = "reference", "lmms-eval"  # protocols: haotian-liu/LLaVA's and lmms-eval's

Id = str | int


@dataclasses.dataclass(frozen=True)
class File:
    """A file or folder of a benchmark.

    Attributes:
      path: inside the benchmark's directory.
      source: where it is published: an address, or a page that links it.
      size: in words, like "3.6 MB".
      needed: what for: "questions", "images", "score".
    """

    path: str
    source: str
    size: str
    needed: str = "questions"


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of a benchmark.

    Attributes:
      id: `question_id` in the answers file.
      turns: question, answer, ..., question, as the engine is asked; `<image>` where the reference puts it.
      prompt: `prompt` in the answers file: the last question as the reference writes it there. A benchmark may ask
        several questions under one id, but not with the same prompt.
      images: paths, or the bytes of images inside a file.
      kind: its category, for scores by part and to filter by.
      answer: the right answer, in words; "" if it isn't known.
      extra: further keys of its line in the answers file.
      name: of its file and row, for errors.
      problem: the error of an invalid question, which is not asked and counts as failed.
    """

    id: Id
    turns: tuple[str, ...]
    prompt: str
    images: tuple[Any, ...] = ()
    kind: str = "all"
    answer: str = ""
    system: str | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str = ""
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A line of an answers file (llava/eval/model_vqa_loader.py).

    Attributes:
      extra: its other keys.
      line: its number, from 1.
    """

    id: Id
    prompt: str
    text: str
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    line: int = 0


@dataclasses.dataclass(frozen=True)
class Mark:
    """What one answer is worth.

    Attributes:
      score: from 0 to 1.
      read: what was read out of the answer: an option, "yes", a normalized text; "" if nothing could be.
      answer: the right answer, in words.
      kind: the question's category.
      group: the questions that are right or wrong together (rotations of one question, an image's pair) have the same.
    """

    question: Id
    prompt: str
    text: str
    score: float
    read: str = ""
    answer: str = ""
    kind: str = "all"
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of a file of answers.

    Attributes:
      metric: the name of the main number: "accuracy", "mean F1", "perception".
      value: the main number, as the metric defines it: a share from 0 to 1, or points.
      scale: what `value` is multiplied by in tables: 100 of a share (shown in percent), 1 of points.
      protocol: one of the benchmark's.
      totals: all numbers of the whole, by name, `metric` among them.
      parts: category -> the same by name, and "questions", how many it has.
      marks: one per question that was scored, failed ones included, in the order of the questions.
      unanswered: questions without an answer; they count as wrong.
      stderr: the standard error of `value`, or None if the benchmark leaves it to a bootstrap over groups of marks.
      questions: how many were scored, if that is not the number of marks, since rotations of one count as one.
    """

    metric: str
    value: float
    scale: float
    protocol: str
    totals: Mapping[str, float]
    parts: Mapping[str, Mapping[str, float]]
    marks: Sequence[Mark]
    unanswered: int = 0
    stderr: float | None = None
    questions: int | None = None


@dataclasses.dataclass(frozen=True)
class Submission:
    """A file for an evaluation server, in the format of the reference's converter."""

    name: str  # like "llava.json"; written beside the answers
    data: bytes


class Benchmark(ABC):
    """A benchmark.

    Attributes:
      name: for `--benchmark`, and its directory inside that of all benchmarks (the reference's playground/data/eval).
      title: for people.
      directory: if not `name`.
      files: what it needs.
      protocols: the first is the default.
      same_questions: all protocols ask the same questions, so that answers have a score by each.
      max_new_tokens: as the reference generates.
      server: where to submit answers whose right answers are not public; `score` then raises `InputError`.
      published: model -> the published number, on the scale of tables.
      judged: a language model scores it (`infer.benchmarks.judge.judge_answers`).
    """

    name: str
    title: str
    directory: str = ""
    files: Sequence[File]
    protocols: Sequence[str] = (REFERENCE,)
    same_questions: bool = False
    max_new_tokens: int = 128
    server: str = ""
    published: Mapping[str, float] = {}
    judged: bool = False

    @abstractmethod
    def questions(self, directory: Path, protocol: str) -> list[Question]:
        """Read its questions. Images are not opened.

        Raises:
          InputError: a file is missing or invalid: which, where, and what to do.
        """

    @abstractmethod
    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        """Score answers. Needs the benchmark's annotations, but neither images nor a model.

        Raises:
          InputError: a file is missing or invalid, or an answer belongs to no question of it.
        """

    def submission(self, directory: Path, answers: Sequence[Answer]) -> Submission | None:
        """The file for its evaluation server, if it has one."""
        return None
