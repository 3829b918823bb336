"""LLaVA-Bench (in the wild): 60 questions about 24 images, whose answers a judge compares with GPT-4's.

Asked as by llava/eval/model_vqa.py, judged as by eval_gpt_review_bench.py and summarize_gpt_review.py. The rules of the
judge are those of the reference's `rule.json` (llava/eval/table/rule.json), by which published numbers were judged, if
the directory has it, and otherwise those below.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from infer.benchmarks.benchmark import REFERENCE, Answer, File, Id, Mark, Question, Score, Submission
from infer.benchmarks.judge import JudgedBenchmark, Review
from infer.benchmarks.shared import (
    check_unique,
    find_image,
    image_folder,
    match_answers,
    mean,
    read_document,
    read_rows,
)
from llava_jax.console import InputError, shorten
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.endpoints import Messages
from llava_jax.json_files import check_json

QUESTIONS, CONTEXT, GPT4_ANSWERS, RULES = "questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "rule.json"
DATASET = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
BEST = 10.0  # of the judge's scale
UNREAD = (-1.0, -1.0)  # the scores of a review that has none, as in the reference

SYSTEM = "You check answers for their quality, helpfully and with precision."
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


class Row(TypedDict):
    """A line of `questions.jsonl`."""

    question_id: Id
    image: str
    text: str
    category: str


class Context(TypedDict):
    """A line of `context.jsonl`."""

    image: str
    caption: str | list[str]


class Gpt4Answer(TypedDict):
    """A line of `answers_gpt4.jsonl`."""

    question_id: Id
    text: str


class Rule(TypedDict):
    """An entry of `rule.json`."""

    role: str
    prompt: str


class LlavaBench(JudgedBenchmark):
    name = "llava-bench-in-the-wild"
    title = "LLaVA-Bench (in the wild)"
    files = (
        File(QUESTIONS, DATASET, "8 kB"),
        File(CONTEXT, DATASET, "8 kB", "score"),
        File(GPT4_ANSWERS, DATASET, "47 kB", "score"),
        File("images", DATASET, "9.7 MB", "images"),
        File(RULES, "https://github.com/haotian-liu/LLaVA/blob/main/llava/eval/table/rule.json", "14 kB", ""),
    )
    max_new_tokens = 1024
    published: Mapping[str, float] = {
        "v1.5-7B": 65.4, "v1.5-13B": 72.5, "v1.5-7B LoRA": 67.9, "v1.5-13B LoRA": 69.5, "v1.6-vicuna-7B": 81.6,
        "v1.6-mistral-7B": 83.2, "v1.6-vicuna-13B": 87.3, "v1.6-34B": 89.6,
    }  # fmt: skip
    request_fields: Mapping[str, Any] = {"temperature": 0.2, "max_tokens": 1024}
    reminder = "Write the two scores, separated by one space, on the first line and nothing else on it."
    review_tokens = 250

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        images = image_folder(directory / "images")
        questions = []
        for number, row in enumerate(_read_questions(directory), 1):
            name = f"{shorten(directory / QUESTIONS)} row {number}"
            found, error = find_image(images, row["image"], name)
            turns = (f"{IMAGE_TOKEN}\n{row['text']}",)
            questions.append(
                Question(row["question_id"], turns, row["text"], found, row["category"], name=name, problem=error)
            )
        return questions

    def judge_messages(self, directory: Path, answers: Sequence[Answer]) -> dict[Id, Messages]:
        rows = _read_questions(directory)
        given = match_answers(answers, {str(row["question_id"]) for row in rows}, self.title)
        contexts, gpt4, rules = _read_contexts(directory), _read_gpt4(directory, rows), read_rules(directory)
        messages = {}
        for row in rows:
            if row["image"] not in contexts:
                raise InputError(f"{shorten(directory / CONTEXT)}: has no context of {shorten(row['image'])}")
            if row["category"] not in rules:
                raise InputError(
                    f"{shorten(directory / QUESTIONS)}: question {row['question_id']}: no rule for the category "
                    f"{shorten(row['category'])!r}, only for {', '.join(rules)}"
                )
            if answer := given.get(str(row["question_id"])):
                reference = gpt4[str(row["question_id"])]["text"]
                content = _content(row, contexts[row["image"]], reference, answer.text, rules[row["category"]])
                messages[row["question_id"]] = [
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
        rows, given = _read_questions(directory), {str(answer.id): answer for answer in answers}
        gpt4 = _read_gpt4(directory, rows)
        pairs = {row["question_id"]: _pair(reviews.get(row["question_id"])) for row in rows}
        marks = []
        for row in rows:
            answer, pair = given.get(str(row["question_id"])), pairs[row["question_id"]]
            marks.append(
                Mark(
                    question=row["question_id"],
                    prompt=row["text"],
                    text=answer.text if answer else "",
                    score=min(max(pair[1] / BEST, 0.0), 1.0) if pair else 0.0,
                    read=f"{pair[1]:g} (GPT-4: {pair[0]:g})" if pair else "",
                    answer=gpt4[str(row["question_id"])]["text"],
                    kind=row["category"],
                    group=str(row["question_id"]),
                )
            )
        totals = _ratio([*pairs.values()])
        kinds = sorted({row["category"] for row in rows})
        parts = {}
        for kind in kinds:
            some = [pairs[row["question_id"]] for row in rows if row["category"] == kind]
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
        rows, given = _read_questions(directory), {str(answer.id): answer for answer in answers}
        gpt4, lines = _read_gpt4(directory, rows), []
        for number, row in enumerate(rows, 1):
            name = row["question_id"]
            if name not in reviews:
                continue
            line = {
                "id": number,
                "question_id": name,
                "answer1_id": gpt4[str(name)].get("answer_id", name),
                "answer2_id": given[str(name)].extra.get("answer_id", name),
                "category": f"llava_bench_{row['category']}",
                "content": reviews[name].text,
                "tuple": list(reviews[name].scores or UNREAD),
            }
            lines.append(json.dumps(line) + "\n")
        return Submission("reviews.jsonl", "".join(lines).encode())


# ---------------------------------------------------------------- what the judge is asked


def read_rules(directory: Path) -> dict[str, Rule]:
    """The rules by category, from the reference's file or our own.

    Raises:
      InputError: the file is not one of rules.
    """
    path = directory / RULES
    if not path.exists():
        return {kind: Rule(role="Assistant", prompt=RULE.format(focus=focus)) for kind, focus in FOCUS.items()}
    prefix = "llava_bench_"
    rules = read_document(path, dict[str, Any])
    found = {
        name.removeprefix(prefix): check_json(rule, Rule, f"{shorten(path)}: {shorten(name)}")
        for name, rule in rules.items()
        if name.startswith(prefix)
    }
    if not found:
        raise InputError(f"{shorten(path)}: has no rule {prefix}*")
    return found


def _content(row: Any, context: str, gpt4: str, answer: str, rule: Rule) -> str:
    """The layout of the reference."""
    role = rule["role"]
    sections = [f"[Context]\n{context}", f"[Question]\n{row['text']}"]
    for number, text in enumerate((gpt4, answer), 1):
        sections += [f"[{role} {number}]\n{text}", f"[End of {role} {number}]"]
    sections.append(f"[System]\n{rule['prompt']}")
    return "".join(f"{section}\n\n" for section in sections)


def _read_questions(directory: Path) -> list[Any]:
    path = directory / QUESTIONS
    rows = read_rows(path, Row)
    check_unique((row["question_id"] for row in rows), path)
    return rows


def _read_contexts(directory: Path) -> dict[str, str]:
    contexts = {}
    for row in read_rows(directory / CONTEXT, Context):
        caption = row["caption"]
        contexts[row["image"]] = caption if isinstance(caption, str) else "\n".join(caption)
    return contexts


def _read_gpt4(directory: Path, rows: list[Any]) -> dict[str, Any]:
    """GPT-4's answers by question, one for each."""
    path = directory / GPT4_ANSWERS
    found = read_rows(path, Gpt4Answer)
    check_unique((row["question_id"] for row in found), path)
    answers = {str(row["question_id"]): row for row in found}
    for row in rows:
        if str(row["question_id"]) not in answers:
            raise InputError(f"{shorten(path)}: has no answer to question {shorten(row['question_id'])}")
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
    gpt4 = mean([pair[0] for pair in judged]) / BEST
    model = sum(pair[1] for pair in judged) / len(pairs) / BEST
    return {"relative score": model / gpt4 if gpt4 else 0.0, "model": model, "gpt-4": gpt4}


def _ratio_error(pairs: Sequence[tuple[float, float]]) -> float | None:
    """The standard error of the ratio of two means (delta method)."""
    n = len(pairs)
    if n < 2 or not (base := mean([first for first, _ in pairs])):
        return None
    ratio = mean([second for _, second in pairs]) / base
    variance = sum((second - ratio * first) ** 2 for first, second in pairs) / (n - 1)
    return math.sqrt(variance / n) / abs(base)
