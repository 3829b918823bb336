"""A run: a model answers the questions of a benchmark. Answers are on the disk as they come.

    OUTPUT/NAME/settings.json           what the answers depend on; a run with other settings is refused
    OUTPUT/NAME/answers.jsonl           the answers, in the reference's format
    OUTPUT/NAME/answers-I-of-N.jsonl    those of one of N shards, until all are there
    OUTPUT/NAME/failed-I-of-N.json      the questions that the shard could not ask, once it has asked all others

A run asks the questions that none of these files answers, so that it resumes one that was interrupted.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from infer.answers import AnswersFile, answer_line
from infer.benchmarks.answers import Key, answer_key, read_answers
from infer.benchmarks.benchmark import Answer, Benchmark, Question
from infer.results import write_output
from llava_jax.checkpoints.outputs import make_directories, write_file
from llava_jax.console import InputError, Progress, first_line, note, plural, shorten
from llava_jax.json_files import difference, read_json

if TYPE_CHECKING:
    from infer.engine import Engine

MAX_SHOWN = 10  # failed questions that are named; the rest are counted
ANSWERS, SETTINGS = "answers.jsonl", "settings.json"
FAILED = r"failed-\d+-of-\d+\.json"
MAX_SHARDS = 2**16


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard of the questions: of `count`, the one of this index."""

    index: int = 0
    count: int = 1

    @property
    def file(self) -> str:
        return ANSWERS if self.count == 1 else f"answers-{self.index}-of-{self.count}.jsonl"

    @property
    def failed_file(self) -> str:
        return f"failed-{self.index}-of-{self.count}.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """What is asked, and where the answers go.

    Attributes:
      questions: all of them, or the first ones.
      settings: what the answers depend on.
      folder: for the answers; None keeps none.
    """

    benchmark: Benchmark
    questions: Sequence[Question]
    settings: Mapping[str, Any]
    folder: Path | None
    shard: Shard = Shard()


@dataclasses.dataclass
class Speed:
    """How fast questions were answered."""

    questions: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
      answers: all that there are, of this shard and of others, in the order of the questions.
      failed: questions that this run could not ask.
      engine: what answered; empty if nothing was asked.
    """

    answers: list[Answer]
    speed: Speed
    failed: int
    engine: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Sink(Protocol):
    """A list or a file of answers."""

    def append(self, answer: dict[str, Any], /) -> None: ...


class Failures:
    """Questions that cannot be asked: the first are named, the others counted.

    Attributes:
      keys: of the questions.
    """

    def __init__(self):
        self.keys: list[Key] = []

    @property
    def count(self) -> int:
        return len(self.keys)

    def add(self, question: Question, problem: object) -> None:
        self.keys.append(_key(question))
        if self.count <= MAX_SHOWN:
            note(f"error: {problem}")


# ---------------------------------------------------------------- the run


def answer(run: Run, load: Callable[[], "Engine"], *, rows: int, max_new_tokens: int) -> Outcome:
    """Ask the questions of the shard that have no answer yet.

    Args:
      load: loads the engine, if there is anything to ask.
      rows: questions at a time.

    Raises:
      InputError: the folder is in use, cannot be written, or has answers with other settings.
    """
    name, own, failures, speed = run.benchmark.name, questions_of(run.shard, run.questions), Failures(), Speed()
    lines: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        sink: Sink = lines
        known: Mapping[Key, Answer] = {}
        if run.folder is not None:
            sink, known = _open_folder(run.folder, run, stack), read_folder(run.folder)
        left = [question for question in own if _key(question) not in known]
        if len(left) < len(own):
            note(f"{name}: {len(own) - len(left):,} of {plural(len(own), 'question')} already have answers")
        for question in left:
            if question.problem:
                failures.add(question, question.problem)
        if valid := [question for question in left if not question.problem]:
            model = str(run.settings["model"])
            engine = load()
            try:
                speed = ask(
                    engine, valid, sink, failures, name=name, rows=rows, max_new_tokens=max_new_tokens, model=model
                )
            except KeyboardInterrupt:
                if run.folder is not None:
                    note(f"{name}: the answers are kept; the same command resumes")
                raise
        if run.folder is not None and run.shard.count > 1:
            write_output(run.folder / run.shard.failed_file, json.dumps(failures.keys).encode())
    if failures.count:
        shown = f"; the first {MAX_SHOWN} are named above" * (failures.count > MAX_SHOWN)
        asked = plural(len(own), "question")
        note(f"error: {name}: {failures.count:,} of {asked} could not be asked, counted as wrong{shown}")
    found = {answer_key(line["question_id"], line["prompt"], line): _answer(line) for line in lines}
    if run.folder is not None:
        found = read_folder(run.folder)
    return Outcome(in_order(found, run.questions)[0], speed, failures.count)


def ask(
    engine: "Engine",
    questions: Sequence[Question],
    sink: Sink,
    failures: Failures,
    *,
    name: str,
    rows: int,
    max_new_tokens: int,
    model: str,
) -> Speed:
    """Ask questions, greedily, and append their answers as they come. The progress bar has the share of answers that
    are word for word the right ones, where these are known.

    Args:
      name: of the benchmark, for the progress bar.
      model: the name of the model, for the answers.
    """
    from infer.prompt import Request
    from infer.sampling import Sampling

    has_system = engine.template.style != "plain"  # as in training
    requests = [Request(one.turns, one.images, one.system if has_system else None, one.name) for one in questions]
    speed, started = Speed(), time.monotonic()
    right = scored = 0
    with Progress(name, len(requests), "questions") as bar:
        for i, reply in engine.generate(requests, Sampling(max_new_tokens=max_new_tokens), rows=rows):
            question = questions[i]
            if isinstance(reply, InputError):
                failures.add(question, reply)
            else:
                text = reply.text.strip()  # as the reference does
                sink.append(answer_line(question.id, question.prompt, text, model, question.extra))
                speed.questions += 1
                speed.tokens += len(reply.token_ids)
                right += bool(question.answer) and _simplify(text) == _simplify(question.answer)
            scored += bool(question.answer)
            bar.advance(1, f"exact match {right / scored:.1%}" if scored else "")
    speed.seconds = time.monotonic() - started
    return speed


def _simplify(text: str) -> str:
    return text.strip().lower().removesuffix(".")


# ---------------------------------------------------------------- order and shards


def by_image(questions: Iterable[Question]) -> list[list[Question]]:
    """Group questions by their images. Prompts with the same beginning are cheapest one after the other, since only
    what differs is computed."""
    groups = collections.defaultdict[Any, list[Question]](list)
    for number, question in enumerate(questions):
        groups[question.images or number].append(question)
    return list(groups.values())


def questions_of(shard: Shard, questions: Sequence[Question]) -> list[Question]:
    """The questions of a shard, those about one image one after the other. Images are dealt out in turn."""
    return [question for group in by_image(questions)[shard.index :: shard.count] for question in group]


def _key(question: Question) -> Key:
    return answer_key(question.id, question.prompt, question.extra)


# ---------------------------------------------------------------- the folder


def _open_folder(folder: Path, run: Run, stack: contextlib.ExitStack) -> AnswersFile:
    """Check the settings, and lock what this run writes, the file of its shard; without shards all files. Forget what
    the shard could not ask before, since it is asked again."""
    name = f"--output {shorten(folder)}"
    try:
        make_directories(folder)
        _check_settings(folder, run.settings, name, alone=run.shard.count == 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be written ({first_line(error)})") from None
    sink = stack.enter_context(AnswersFile(folder / run.shard.file, flag="--output"))
    if run.shard.count == 1:
        for path in shard_files(folder):
            stack.enter_context(AnswersFile(path, flag="--output"))
    else:
        (folder / run.shard.failed_file).unlink(missing_ok=True)
    return sink


def shard_files(folder: Path, pattern: str = r"answers-\d+-of-\d+\.jsonl") -> list[Path]:
    """The files of shards in a folder, those of answers or others of a pattern."""
    return sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name))


def read_folder(folder: Path) -> dict[Key, Answer]:
    """All answers in a folder, by question. Where two shards have answered one, the first counts.

    Raises:
      InputError: a file is invalid.
    """
    found: dict[Key, Answer] = {}
    for path in (folder / ANSWERS, *shard_files(folder)):
        if path.exists():
            for one in read_answers(path, growing=True):
                found.setdefault(answer_key(one.id, one.prompt, one.extra), one)
    return found


def in_order(answers: Mapping[Key, Answer], questions: Sequence[Question]) -> tuple[list[Answer], list[Answer]]:
    """Answers in the order of their questions, and those to other questions."""
    asked = {_key(question): None for question in questions}
    return [answers[key] for key in asked if key in answers], [answers[key] for key in answers if key not in asked]


def left_to_ask(run: Run, answers: Sequence[Answer]) -> list[Question]:
    """The questions that have no answer, and that no shard has failed to ask.

    Raises:
      InputError: a file of failed questions is invalid.
    """
    assert run.folder is not None
    done = {answer_key(one.id, one.prompt, one.extra) for one in answers}
    for path in shard_files(run.folder, FAILED):
        done |= {tuple(key) for key in read_json(path, list[Key]) or ()}
    return [question for question in run.questions if _key(question) not in done]


def merge(folder: Path, questions: Sequence[Question]) -> None:
    """Write all answers of a folder to one file, in the order of the questions, and remove those of the shards.

    Raises:
      InputError: a file cannot be written.
    """
    answers, others = in_order(read_folder(folder), questions)
    lines = [json.dumps(_line(one), ensure_ascii=False) + "\n" for one in (*answers, *others)]
    write_output(folder / ANSWERS, "".join(lines).encode())
    try:
        for path in (*shard_files(folder), *shard_files(folder, FAILED)):
            path.unlink()
    except OSError as error:
        raise InputError(f"--output {shorten(folder)}: cannot be written ({first_line(error)})") from None


def _line(one: Answer) -> dict[str, Any]:
    return {"question_id": one.id, "prompt": one.prompt, "text": one.text, **one.extra}


def _answer(line: dict[str, Any]) -> Answer:
    extra = {key: value for key, value in line.items() if key not in ("question_id", "prompt", "text")}
    return Answer(line["question_id"], line["prompt"], line["text"], extra)


# ---------------------------------------------------------------- settings


def questions_checksum(questions: Sequence[Question]) -> str:
    """A hash of what is asked; images count by their names."""
    digest = hashlib.sha256()
    for one in questions:
        names = [
            hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else Path(str(image)).name
            for image in one.images
        ]
        digest.update(json.dumps([one.id, one.turns, one.prompt, one.system, names]).encode() + b"\n")
    return digest.hexdigest()


def _check_settings(folder: Path, settings: Mapping[str, Any], name: str, *, alone: bool) -> None:
    """Compare the settings with those of the folder's answers; write them if there are none.

    Args:
      alone: the run has no shards; then it replaces settings without answers.

    Raises:
      InputError: they differ, or the answers have no settings.
      OSError: they cannot be written.
    """
    # Looked for before the settings, which another shard writes before its answers. A run that asks has such a file, as
    # has a shard that could ask nothing.
    has_answers = any(folder.glob("answers*.jsonl")) or bool(shard_files(folder, FAILED))
    there = read_json(folder / SETTINGS)
    if there is None and has_answers:
        raise InputError(f"{name}: has answers, but no {SETTINGS} of a run; name another directory")
    if there is None or (alone and not has_answers):
        write_file(folder / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())
        return
    key = "checkpoint_fingerprint"
    moved = ("checkpoint", "model") if settings[key] and there.get(key) == settings[key] else ()
    compared = {name: value for name, value in settings.items() if name not in moved}
    if found := difference(there, compared):
        raise InputError(f"{name}: has answers of another run: {found}; use its settings, or name another directory")
