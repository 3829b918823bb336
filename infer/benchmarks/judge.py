"""Judged benchmarks: a language model behind an OpenAI-compatible endpoint reads the answers and scores them.

    endpoint = Endpoint("http://localhost:8000/v1", "NAME", prices=Prices(2.5, 10.0))
    judgement = judge_answers(LlavaBench(), directory, answers, endpoint, Path("judge.jsonl"))
    judgement.score, judgement.reviews

Replies are kept as they arrive, by question and by a hash of the whole request: a second run asks only what has no
reply yet, and neither another answer nor another judge is given an old score.
"""

import dataclasses
import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from infer.benchmarks.benchmark import Answer, Benchmark, Id, Score, Submission
from llava_jax.console import InputError, note, plural, shorten
from llava_jax.endpoints import Endpoint, Messages, Outcome, Request, request_body
from llava_jax.replies import Replies, Reply, show_tokens

ATTEMPTS = 3  # until a review can be read
CHARACTERS_PER_TOKEN = 4  # for estimates
MAX_SHOWN = 10  # reviews without a score that are named; the rest are counted


class Review(NamedTuple):
    """What the judge wrote of an answer.

    Attributes:
      scores: as `JudgedBenchmark.read_review` reads them; None if no attempt had any.
      model: the endpoint's own name for the judge.
    """

    text: str
    scores: tuple[float, ...] | None
    model: str


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What came of judging.

    Attributes:
      score: None if a signal stopped it.
      reviews: the reviews as a file in the format of the benchmark's own scripts; None if a signal stopped it.
      signal: the signal.
    """

    score: Score | None
    reviews: Submission | None
    signal: int | None = None


class JudgedBenchmark(Benchmark):
    """A benchmark that needs a judge: `judge_answers` scores it, not `score`.

    Attributes:
      request_fields: of each request, unless the endpoint sets them itself.
      reminder: the message to the judge if its review cannot be read.
      review_tokens: of a typical review, for the estimated cost.
    """

    judged = True
    request_fields: Mapping[str, Any]
    reminder: str
    review_tokens: int

    @abstractmethod
    def judge_messages(self, directory: Path, answers: Sequence[Answer]) -> dict[Id, Messages]:
        """What the judge is asked, by question, for each question that has an answer.

        Raises:
          InputError: a file is missing or invalid, or an answer belongs to no question.
        """

    @abstractmethod
    def read_review(self, text: str) -> tuple[float, ...] | None:
        """The scores of a review; None if it has none."""

    @abstractmethod
    def score_reviews(self, directory: Path, answers: Sequence[Answer], reviews: Mapping[Id, Review]) -> Score:
        """The score, given a review of each answer."""

    @abstractmethod
    def review_file(self, directory: Path, answers: Sequence[Answer], reviews: Mapping[Id, Review]) -> Submission:
        """The reviews, in the format of the benchmark's own scripts."""

    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        raise InputError(f"{self.title} is scored by a judge: give the URL and the name of a language model")


# ---------------------------------------------------------------- asking


def judge_answers(
    benchmark: JudgedBenchmark,
    directory: Path,
    answers: Sequence[Answer],
    endpoint: Endpoint,
    replies_path: Path,
) -> Judgement:
    """Have the answers judged that `replies_path` has no reply about, and score all. Notes the estimated cost first.

    Args:
      endpoint: the judge; fields of its `body` replace those of the benchmark.

    Raises:
      InputError: a file is missing or invalid, an answer belongs to no question, the endpoint cannot be asked, or some
        answers could not be judged. The replies so far are kept.
    """
    endpoint = dataclasses.replace(endpoint, body={**benchmark.request_fields, **endpoint.body})
    messages = benchmark.judge_messages(directory, answers)
    with Replies(replies_path) as replies:
        judging = _Judging(benchmark, endpoint, replies, messages)
        outcome = judging.ask()
        if outcome.signal:
            note(
                f"stopped: {plural(len(replies), 'review')} kept in {replies.name}; the same command asks for the rest"
            )
            return Judgement(None, None, outcome.signal)
        if outcome.failed:
            name, reason = next(iter(outcome.failed.items()))
            raise InputError(
                f"{len(outcome.failed):,} of {plural(len(messages), 'answer')} not judged, the first "
                f"{shorten(name.rsplit('/', 2)[0])} ({reason}); the same command asks again"
            )
        reviews = {question: judging.review(question) for question in messages}
    if reviews and all(review.scores is None for review in reviews.values()):
        first = next(iter(reviews.values()))
        raise InputError(
            f"{shorten(endpoint.model)}: no review has a score; the first is {shorten(first.text)!r}; give another "
            f"judge, or remove {shorten(replies_path)} to ask again"
        )
    unread = [question for question, review in reviews.items() if review.scores is None]
    for question in unread[:MAX_SHOWN]:
        note(f"warning: question {shorten(question)}: no score in the review {shorten(reviews[question].text)!r}")
    if unread:
        note(f"warning: {plural(len(unread), 'review')} without a score after {ATTEMPTS} attempts, counted as failed")
    score = benchmark.score_reviews(directory, answers, reviews)
    return Judgement(score, benchmark.review_file(directory, answers, reviews))


class _Judging:
    """The requests of one benchmark; a review that cannot be read is asked for again, with a reminder."""

    def __init__(self, benchmark: JudgedBenchmark, endpoint: Endpoint, replies: Replies, messages: dict[Id, Messages]):
        self.benchmark, self.endpoint, self.replies, self.messages = benchmark, endpoint, replies, messages
        self.keys = {question: self._key(question) for question in messages}
        self.questions = {key: question for question, key in self.keys.items()}

    def _key(self, question: Id) -> str:
        body = json.dumps(request_body(self.endpoint, self.messages[question]), sort_keys=True)
        return f"{question}/{hashlib.sha256(body.encode()).hexdigest()[:16]}"

    def replies_of(self, question: Id) -> Iterator[Reply]:
        """The replies so far, one for each attempt."""
        for attempt in range(1, ATTEMPTS + 1):
            if (reply := self.replies.get(f"{self.keys[question]}/{attempt}")) is None:
                return
            yield reply

    def review(self, question: Id) -> Review:
        """The first review with scores, or else the last one."""
        for reply in self.replies_of(question):
            if (scores := self.benchmark.read_review(reply.text)) is not None:
                break
        return Review(reply.text, scores, reply.model)

    def request(self, question: Id) -> Request | None:
        """The next request of a question; None if its review can be read, or was asked for often enough."""
        said = list(self.replies_of(question))
        if len(said) == ATTEMPTS or (said and self.benchmark.read_review(said[-1].text) is not None):
            return None
        messages = self.messages[question]
        if said:
            again = [("assistant", said[-1].text), ("user", self.benchmark.reminder)]
            messages = messages + [{"role": role, "content": text} for role, text in again]
        return Request(f"{self.keys[question]}/{len(said) + 1}", lambda: messages)

    def ask(self) -> Outcome:
        """Ask for the reviews that are missing."""
        requests = [request for question in self.messages if (request := self.request(question))]
        if not requests:
            return Outcome()
        characters = sum(len(message["content"]) for request in requests for message in request.messages())
        tokens = characters // CHARACTERS_PER_TOKEN, len(requests) * self.benchmark.review_tokens
        note(
            f"asking {shorten(self.endpoint.model)} to judge {plural(len(requests), 'answer')}, an estimated "
            f"{show_tokens(*tokens, self.endpoint.prices)}"
        )

        def follow_up(reply: Reply) -> Request | None:
            return self.request(self.questions[reply.id.rpartition("/")[0]])

        return self.endpoint.ask(requests, self.replies, total=len(requests), follow_up=follow_up)
