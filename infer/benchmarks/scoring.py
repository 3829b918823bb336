"""Score a benchmark's answers: by its protocols, by a judge, a part of its questions; standard errors."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infer.benchmarks.benchmark import Answer, Benchmark, Mark, Question, Score, Submission
from infer.benchmarks.files import accuracy, by_kind
from llava_jax.console import InputError
from llava_jax.replies import Prices

SAMPLES, SEED = 2000, 0  # of the bootstrap
LIMITED = "mean score"  # the metric of some questions, if the benchmark's own is not the mean of marks


@dataclasses.dataclass(frozen=True)
class Judge:
    """A language model that scores answers.

    Attributes:
      prices: dollars per million tokens of requests, and of replies.
    """

    url: str
    model: str
    prices: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Scored:
    """What became of answers.

    Attributes:
      scores: by the protocol, and by further ones that ask the same questions.
      files: the judge's reviews.
      signal: the signal that stopped the judge, if any; then there is no score.
    """

    scores: Sequence[Score]
    files: Sequence[Submission] = ()
    signal: int = 0


def score_answers(
    benchmark: Benchmark,
    directory: Path,
    answers: Sequence[Answer],
    protocol: str | None,
    *,
    judge: Judge | None,
    replies: Path,
) -> Scored:
    """Score answers.

    Args:
      protocol: None for the benchmark's first one, and others by which the same answers can be scored.
      replies: the file of the judge's replies.

    Raises:
      InputError: as `Benchmark.score` and `judge_answers`, or there is no judge.
    """
    if not benchmark.judged:
        protocols = benchmark.protocols if benchmark.same_questions else benchmark.protocols[:1]
        chosen = protocols if protocol is None else (protocol,)
        return Scored([benchmark.score(directory, answers, one) for one in chosen])
    if judge is None:
        raise InputError(f"{benchmark.title} is scored by a language model: give --judge URL and --judge-model NAME")
    from infer.benchmarks.judge import JudgedBenchmark, judge_answers
    from llava_jax.endpoints import Endpoint

    assert isinstance(benchmark, JudgedBenchmark)
    endpoint = Endpoint(judge.url, judge.model, prices=judge.prices and Prices(*judge.prices))
    judgement = judge_answers(benchmark, directory, answers, endpoint, replies)
    if judgement.score is None:
        return Scored([], signal=judgement.signal or 0)
    return Scored([judgement.score], [judgement.reviews] if judgement.reviews else [])


def score_empty(questions: Sequence[Question], score: Callable[[Sequence[Answer]], Any]) -> None:
    """Score an empty answer to each question: before they are asked, since all answers would fail in the same way.

    Args:
      score: what scores answers.

    Raises:
      InputError: a file is invalid, or has no answer to a question, whose line is named.
    """
    try:
        score([Answer(one.id, one.prompt, "", one.extra, line) for line, one in enumerate(questions, 1)])
    except InputError as error:
        if (found := re.match(r"answers line (\d+): ", str(error))) is None:
            raise
        problem = str(error)[found.end() :].replace("the benchmark has", "the files that it is scored by have")
        raise InputError(f"{questions[int(found[1]) - 1].name}: {problem}") from None


def find_question(questions: Sequence[Question]) -> Callable[[Mark], Question | None]:
    """A function that finds the question of a mark: that of its id and prompt, or the only one of its id, since marks
    of unanswered questions may lack the prompt."""
    by_key = {(str(question.id), question.prompt): question for question in questions}
    by_id: dict[str, list[Question]] = {}
    for question in questions:
        by_id.setdefault(str(question.id), []).append(question)

    def find(mark: Mark) -> Question | None:
        same = by_id.get(str(mark.question), [])
        return by_key.get((str(mark.question), mark.prompt)) or (same[0] if len(same) == 1 else None)

    return find


def standard_error(score: Score) -> float | None:
    """The standard error of a score's value: the benchmark's own, or else, if the value is the mean score of its marks,
    a bootstrap over groups of marks. None if it is neither.

    Marks that fall together (an image's questions, rotations of one question) are drawn together.
    """
    if score.stderr is not None:
        return score.stderr
    if not score.marks:
        return None
    groups: dict[Any, list[float]] = {}
    for number, mark in enumerate(score.marks):
        groups.setdefault(mark.group or number, []).append(mark.score)
    sums = np.array([(sum(scores), len(scores)) for scores in groups.values()], float)
    if not _is_mean(score):
        return None
    # Drawing groups with replacement draws how often each distinct pair of (score, marks) occurs.
    pairs, counts = np.unique(sums, axis=0, return_counts=True)
    drawn = np.random.default_rng(SEED).multinomial(len(sums), counts / len(sums), size=SAMPLES) @ pairs
    return float(np.std(drawn[:, 0] / drawn[:, 1], ddof=1))


def limit_score(score: Score, questions: Sequence[Question], unanswered: int) -> Score:
    """The mean score of some questions, in all and by kind: what a benchmark makes of all its questions (F1 by
    category, points of pairs) it may not make of some.

    Args:
      unanswered: how many of them have no answer.
    """
    name = score.metric if score.metric == "accuracy" and score.questions is None else LIMITED
    asked = {str(question.id) for question in questions}  # all questions of an id are among them
    marks = [mark for mark in score.marks if str(mark.question) in asked]
    value = accuracy(marks)
    return Score(
        metric=name,
        value=value,
        scale=100,
        protocol=score.protocol,
        totals={name: value},
        parts={kind: {name: accuracy(some), "questions": len(some)} for kind, some in by_kind(marks).items()},
        marks=marks,
        unanswered=unanswered,
    )


def _is_mean(score: Score) -> bool:
    """Whether its value is the mean score of its marks."""
    return math.isclose(accuracy(score.marks), score.value, abs_tol=1e-9)


def score_first(
    benchmark: Benchmark,
    directory: Path,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    limit: int | None,
) -> Score:
    """Score answers by the benchmark's first protocol.

    Args:
      questions: those that were asked: all, or `first_questions` of a `limit`.

    Raises:
      InputError: as `Benchmark.score`.
    """
    score = benchmark.score(directory, answers, benchmark.protocols[0])
    return score if limit is None else limit_score(score, questions, len(questions) - len(answers))


def first_questions(questions: Sequence[Question], limit: int | None) -> Sequence[Question]:
    """The first `limit` questions, and those with the id of the last of them, since they are scored together."""
    if limit is None or limit >= len(questions):
        return questions
    ids = {str(question.id) for question in questions[:limit]}
    return [question for question in questions if str(question.id) in ids]


def describe(benchmark: Benchmark, scores: Sequence[Score]) -> dict[str, Any]:
    """A benchmark's score as JSON; those by further protocols are in `also`. What cannot be computed is null."""
    first, *others = [
        {
            "benchmark": benchmark.name,
            "protocol": score.protocol,
            "metric": score.metric,
            "value": _finite(score.value),
            "stderr": _finite(standard_error(score)),
            "scale": score.scale,
            "totals": _finite(score.totals),
            "parts": {name: _finite(part) for name, part in score.parts.items()},
            "questions": len(score.marks) if score.questions is None else score.questions,
            "unanswered": score.unanswered,
        }
        for score in scores
    ]
    return first | ({"also": others} if others else {})


def _finite(value: Any) -> Any:
    """A number, or a mapping of numbers, with null in the place of what is not finite."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return value if value is not None and math.isfinite(value) else None
