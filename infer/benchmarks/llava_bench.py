"""LLaVA-Bench (in the wild): 60 questions about 24 images, whose answers a judge compares with GPT-4's.

Asked as by llava/eval/model_vqa.py, judged as by eval_gpt_review_bench.py and summarize_gpt_review.py. The rules of the
judge are those of the reference's `rule.json` (llava/eval/table/rule.json), by which published numbers were judged, if
the directory has it, and otherwise those below.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from infer.benchmarks.benchmark import REFERENCE, Answer, File, Id, Mark, Question, Score, Submission
from infer.benchmarks.files import (
    find,
    image_path,
    image_question,
    match,
    published_numbers,
    read_lines,
    read_object,
    read_unique_lines,
)
from infer.benchmarks.judge import JudgedBenchmark, Review
from llava_jax.console import InputError, shorten
from llava_jax.endpoints import Messages
from llava_jax.json_files import check_json

DATASET = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
QUESTIONS = File("questions.jsonl", DATASET, "8 kB")
CONTEXT = File("context.jsonl", DATASET, "8 kB", "score")
GPT4_ANSWERS = File("answers_gpt4.jsonl", DATASET, "47 kB", "score")
IMAGES = File("images", DATASET, "9.7 MB", "images")
RULES = File(
    "rule.json",
    "https://github.com/haotian-liu/LLaVA/blob/main/llava/eval/table/rule.json",
    "14 kB; other rules are used if it is missing",
    "",
)
RULE_PREFIX = "llava_bench_"
BEST = 10.0  # of the judge's scale
UNREAD = (-1.0, -1.0)  # the scores of a review that has none, as in the reference

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."  # the reference's
RULE = """\
Two AI assistants have answered the question above, which a user asked about an image. You cannot see the image: the \
context above describes what it shows.
{focus}
Give each assistant one overall score from 1 to 10, where 10 is best. Write the two scores, of Assistant 1 and of \
Assistant 2, on the first line, separated by one space and with nothing else on that line. From the second line on, \
explain your scores. Be impartial: neither the order of the answers nor their length alone should count."""
FOCUS = {
    "conv": "Judge how helpful, relevant, accurate and detailed each answer is.",
    "detail": "The user wants a description. Judge how complete, accurate, relevant and detailed each one is.",
    "complex": "The question takes reasoning. Judge how sound, relevant, accurate and detailed each answer is.",
}


class Row(msgspec.Struct):
    """A line of `questions.jsonl`."""

    question_id: Id
    image: str
    text: str
    category: str


class Context(msgspec.Struct):
    """A line of `context.jsonl`."""

    image: str
    caption: str | list[str]


class Gpt4Answer(msgspec.Struct):
    """A line of `answers_gpt4.jsonl`."""

    question_id: Id
    text: str
    answer_id: Id | None = None


class Rule(msgspec.Struct):
    """An entry of `rule.json`."""

    role: str
    prompt: str


class LlavaBench(JudgedBenchmark):
    name = "llava-bench-in-the-wild"
    title = "LLaVA-Bench (in the wild)"
    files = (QUESTIONS, CONTEXT, GPT4_ANSWERS, IMAGES, RULES)
    max_new_tokens = 1024
    published = published_numbers(65.4, 72.5, 67.9, 69.5, 81.6, 83.2, 87.3, 89.6)
    request_fields: Mapping[str, Any] = {"temperature": 0.2, "max_tokens": 1024}
    reminder = "Write the two scores, separated by one space, on the first line and nothing else on it."
    review_tokens = 250

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        path = find(directory, QUESTIONS)
        questions = []
        for row in read_unique_lines(path, Row).values():
            name = f"{shorten(path)}: question {shorten(row.question_id)}"
            image = image_path(directory / IMAGES.path, row.image, name)
            questions.append(image_question(row.question_id, row.text, image, name, kind=row.category))
        return questions

    def judge_messages(self, directory: Path, answers: Sequence[Answer]) -> dict[Id, Messages]:
        rows = _read_questions(directory)
        given = match(answers, rows)
        contexts, gpt4, rules = _read_contexts(directory), _read_gpt4(directory, rows), read_rules(directory)
        messages = {}
        for key, row in rows.items():
            if row.image not in contexts:
                raise InputError(f"{shorten(directory / CONTEXT.path)}: has no context of {shorten(row.image)}")
            if row.category not in rules:
                raise InputError(
                    f"{shorten(directory / QUESTIONS.path)}: question {row.question_id}: no rule for the category "
                    f"{shorten(row.category)!r}, only for {', '.join(rules)}"
                )
            if key in given:
                content = _content(row, contexts[row.image], gpt4[key].text, given[key].text, rules[row.category])
                messages[row.question_id] = [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": content},
                ]
        return messages

    def read_review(self, text: str) -> tuple[float, ...] | None:
        """The two numbers that are the first line of a review (`parse_score`)."""
        try:
            first, second = map(float, text.split("\n")[0].replace(",", " ").split(" "))
        except ValueError:
            return None
        return (first, second) if math.isfinite(first) and math.isfinite(second) else None

    def score_reviews(self, directory: Path, answers: Sequence[Answer], reviews: Mapping[Id, Review]) -> Score:
        """The mean score of the model, with 0 for unanswered questions, over that of GPT-4 where both were judged."""
        rows = _read_questions(directory)
        gpt4, given = _read_gpt4(directory, rows), match(answers, rows)
        pairs = {key: _pair(reviews.get(row.question_id)) for key, row in rows.items()}
        marks = []
        for key, row in rows.items():
            text, pair = given[key].text if key in given else "", pairs[key]
            score = min(max(pair[1] / BEST, 0.0), 1.0) if pair else 0.0
            read = f"{pair[1]:g} (GPT-4: {pair[0]:g})" if pair else ""
            marks.append(Mark(row.question_id, row.text, text, score, read, gpt4[key].text, row.category))
        totals, parts = _ratio([*pairs.values()]), {}
        for kind in sorted({row.category for row in rows.values()}):
            some = [pairs[key] for key, row in rows.items() if row.category == kind]
            parts[kind] = _ratio(some) | {"questions": len(some)}
        return Score(
            metric="relative score",
            value=totals["relative score"],
            scale=100.0,
            protocol=REFERENCE,
            totals=totals,
            parts=parts,
            marks=marks,
            unanswered=len(rows) - len(given),
            stderr=_ratio_error([pair for pair in pairs.values() if pair]),
        )

    def review_file(self, directory: Path, answers: Sequence[Answer], reviews: Mapping[Id, Review]) -> Submission:
        """As eval_gpt_review_bench.py writes them."""
        rows = _read_questions(directory)
        gpt4, given, lines = _read_gpt4(directory, rows), match(answers, rows), []
        for number, (key, row) in enumerate(rows.items(), 1):
            if (review := reviews.get(row.question_id)) is None:
                continue
            gpt4_id = gpt4[key].answer_id
            line = {
                "id": number,
                "question_id": row.question_id,
                "answer1_id": row.question_id if gpt4_id is None else gpt4_id,
                "answer2_id": given[key].extra.get("answer_id", row.question_id),
                "category": RULE_PREFIX + row.category,
                "content": review.text,
                "tuple": list(review.scores or UNREAD),
            }
            lines.append(json.dumps(line) + "\n")
        return Submission("reviews.jsonl", "".join(lines).encode())


# ---------------------------------------------------------------- what the judge is asked


def read_rules(directory: Path) -> dict[str, Rule]:
    """The rules by category, from the reference's file or our own.

    Raises:
      InputError: the file is not one of rules.
    """
    path = directory / RULES.path
    if not path.exists():
        return {kind: Rule("Assistant", RULE.format(focus=focus)) for kind, focus in FOCUS.items()}
    found = {
        name.removeprefix(RULE_PREFIX): check_json(rule, Rule, f"{shorten(path)}: {shorten(name)}")
        for name, rule in read_object(path, dict[str, Any]).items()
        if name.startswith(RULE_PREFIX)
    }
    if not found:
        raise InputError(f"{shorten(path)}: has no rule {RULE_PREFIX}*")
    return found


def _content(row: Row, context: str, gpt4: str, answer: str, rule: Rule) -> str:
    """The layout of the reference."""
    sections = [f"[Context]\n{context}", f"[Question]\n{row.text}"]
    for number, text in enumerate((gpt4, answer), 1):
        sections += [f"[{rule.role} {number}]\n{text}", f"[End of {rule.role} {number}]"]
    sections.append(f"[System]\n{rule.prompt}")
    return "".join(f"{section}\n\n" for section in sections)


def _read_questions(directory: Path) -> dict[str, Row]:
    return read_unique_lines(find(directory, QUESTIONS), Row)


def _read_contexts(directory: Path) -> dict[str, str]:
    """The contexts by image."""
    contexts = {}
    for _, row in read_lines(find(directory, CONTEXT), Context):
        contexts[row.image] = row.caption if isinstance(row.caption, str) else "\n".join(row.caption)
    return contexts


def _read_gpt4(directory: Path, rows: Mapping[str, Row]) -> dict[str, Gpt4Answer]:
    """GPT-4's answers by question, one for each."""
    path = find(directory, GPT4_ANSWERS)
    answers = read_unique_lines(path, Gpt4Answer)
    for key in rows:
        if key not in answers:
            raise InputError(f"{shorten(path)}: has no answer to question {shorten(key)}")
    return answers


# ---------------------------------------------------------------- what its reviews are worth


def _pair(review: Review | None) -> tuple[float, float] | None:
    """The scores of GPT-4's answer and of the model's; None if the question is unanswered."""
    if review is None:
        return None
    first, second = review.scores or UNREAD
    return first, second


def _ratio(pairs: Sequence[tuple[float, float] | None]) -> dict[str, float]:
    """The relative score, and the two mean scores, all as shares."""
    judged = [pair for pair in pairs if pair]
    gpt4 = sum(pair[0] for pair in judged) / max(len(judged), 1) / BEST
    model = sum(pair[1] for pair in judged) / len(pairs) / BEST
    return {"relative score": model / gpt4 if gpt4 else 0.0, "model": model, "gpt-4": gpt4}


def _ratio_error(pairs: Sequence[tuple[float, float]]) -> float | None:
    """The standard error of the ratio of two means (delta method)."""
    n = len(pairs)
    if n < 2 or not (base := statistics.fmean(first for first, _ in pairs)):
        return None
    ratio = statistics.fmean(second for _, second in pairs) / base
    variance = sum((second - ratio * first) ** 2 for first, second in pairs) / (n - 1)
    return math.sqrt(variance / n) / abs(base)
