"""Measure a model's accuracy on a file of questions, by kind of question.

    python -m infer.evaluate --checkpoint DIR --data test.json --image-folder DIR

The file has the format of training data (`llava_jax.data.conversations`), and its answers are the reference answers.
Each question is asked with the turns before it, including their reference answers. `kinds` in a row names the kind of
each question. An invalid row counts as one failed question; the others are asked.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infer.benchmarks.benchmark import Question
from infer.benchmarks.conversations import (  # noqa: F401  # some for whoever imports them from here
    METRICS,
    NO_KIND,
    Metric,
    check_answers,
    choose_metric,
    exact_match,
    read_questions,
    scienceqa,
)
from infer.benchmarks.options import read_option
from infer.flags import add_batch_size_flag, add_model_flags, load_engine
from infer.sampling import Sampling
from llava_jax.console import InputError, Parser, Progress, note, plural, ranges, run_main, terminal_safe

MAX_SHOWN = 10  # failed questions that are logged; the rest are counted


# ---------------------------------------------------------------- answers


def evaluate(engine, questions: list[Question], metric: Metric, *, rows: int, max_new_tokens: int) -> dict[str, Any]:
    """Ask all questions.

    Returns:
      `accuracy` (the mean of the metric), `questions` and `failed` (counts; failed questions count as wrong), and
      `by_kind`: kind -> `accuracy` and `questions`. For ScienceQA also `with_images`, the same for questions with
      images, and `no_option`, the number of answers that name no single option.
    """
    from infer.engine import Request

    scores = [0.0] * len(questions)
    failed = unread = 0

    def fail(problem: object) -> None:
        nonlocal failed
        failed += 1
        if failed <= MAX_SHOWN:
            note(f"error: {problem}")

    for question in questions:
        if question.problem:
            fail(question.problem)
    asked = [i for i, question in enumerate(questions) if not question.problem]
    has_system = engine.template.style != "plain"  # as in training, which logs it
    requests = [
        Request(one.turns, one.images, one.system if has_system else None, one.name)
        for one in (questions[i] for i in asked)
    ]
    right = 0.0
    with Progress("asking", len(requests), "questions") as bar:
        settings = Sampling(max_new_tokens=max_new_tokens)
        for done, (i, answer) in enumerate(engine.generate(requests, settings, rows=rows), 1):
            if isinstance(answer, InputError):
                fail(answer)
            else:
                scores[asked[i]] = metric(answer.text, questions[asked[i]].answer)
                unread += read_option(answer.text) is None
            right += scores[asked[i]]
            bar.advance(1, f"accuracy {right / (done + len(questions) - len(asked)):.1%}")

    def part(chosen: Callable[[Question], bool]) -> dict[str, Any]:
        some = [score for score, question in zip(scores, questions, strict=True) if chosen(question)]
        return {"accuracy": _mean(some), "questions": len(some)}

    def part_of_kind(kind: str) -> dict[str, Any]:
        return part(lambda one: one.kind == kind)

    result = part(lambda one: True) | {"failed": failed}
    result["by_kind"] = {kind: part_of_kind(kind) for kind in dict.fromkeys(one.kind for one in questions)}
    if metric is scienceqa:
        result |= {"with_images": part(lambda one: bool(one.images)), "no_option": unread}
    return result


def _mean(scores: list[float]) -> float:
    return sum(scores) / len(scores) if scores else 0.0


def table(result: dict[str, Any]) -> str:
    """Format the result: a line per kind, and one for all questions."""
    lines = [*result["by_kind"].items()] if len(result["by_kind"]) > 1 else []
    if result.get("with_images", {}).get("questions"):
        lines.append(("with images", result["with_images"]))
    lines.append((NO_KIND, result))
    width = max(len(kind) for kind, _ in lines)
    return "\n".join(f"{kind:{width}}  {part['accuracy']:7.2%}  of {part['questions']:,}" for kind, part in lines)


# ---------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m infer.evaluate", description="Measure accuracy on a file of questions.")
    add_model_flags(p)
    p.add_argument("--data", required=True, metavar="FILE", help="conversations: a JSON list or JSON lines")
    p.add_argument("--image-folder", default="", metavar="DIR", help="default: the current directory")
    p.add_argument(
        "--metric", choices=METRICS,
        help="exact_match: the same words; scienceqa: the same option, as the reference parses it; default: scienceqa "
        "if every reference answer names an option (\"The answer is B.\"), otherwise exact_match",
    )  # fmt: skip
    add_batch_size_flag(p, default=32)
    limits = ranges(Sampling)
    p.add_argument("--max-new-tokens", type=limits["max_new_tokens"], default=64, metavar="N", help="(default 64)")
    p.add_argument("--json", action="store_true", help="print one JSON object: accuracy, by_kind")
    return p


def main() -> int:
    args = parser().parse_args()
    questions = read_questions(Path(args.data), Path(args.image_folder or "."))
    metric = args.metric or choose_metric(questions)
    questions = check_answers(questions, metric)
    engine = load_engine(args)
    result = evaluate(engine, questions, METRICS[metric], rows=args.batch_size, max_new_tokens=args.max_new_tokens)
    print(json.dumps(result) if args.json else terminal_safe(table(result)))
    if result.get("no_option"):
        note(f"{plural(result['no_option'], 'answer')} without a single option, counted as wrong")
    if failed := result["failed"]:
        asked = plural(result["questions"], "question")
        note(f"error: {failed:,} of {asked} could not be asked, counted as wrong")
    return 1 if failed else 0


def run() -> None:
    """The command `llava-evaluate`."""
    run_main(main)


if __name__ == "__main__":
    run()
