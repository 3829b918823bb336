"""Measure a model's accuracy on a file of questions, by kind of question.

    python -m infer.evaluate --checkpoint DIR --data test.json --image-folder DIR

The file has the format of training data (`llava_jax.data.conversations`), and its answers are the reference answers.
Each question is asked with the turns before it, including their reference answers. `kinds` in a row names the kind of
each question. An invalid row counts as one failed question; the others are asked.
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infer.flags import add_batch_size_flag, add_model_flags, load_engine
from infer.sampling import Sampling
from llava_jax.console import InputError, Parser, Progress, note, plural, ranges, run_main, shorten, terminal_safe
from llava_jax.data.conversations import read_conversation
from llava_jax.data.data_files import read_rows, summarize
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.templates import IMAGE_TOKEN

MAX_SHOWN = 10  # failed questions that are logged; the rest are counted
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


def read_option(answer: str) -> str | None:
    """Parse the option of an answer: the letter that it is or begins with ("B. ..."), or the only one after "The answer
    is"; None if there is none.

    A letter without an option is returned too, and counts as wrong. (The reference once drew an option at random then.)
    """
    if re.fullmatch("[A-E]", answer) or re.match(r"[A-E]\. ", answer):
        return answer[0]
    found = re.findall("The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 else None


METRICS: dict[str, Metric] = {"exact_match": exact_match, "scienceqa": scienceqa}


@dataclasses.dataclass(frozen=True)
class Question:
    """`turns` is question, answer, ..., question; `images` are paths, or the bytes of `data:` URLs."""

    name: str  # file and row, for errors
    kind: str
    turns: tuple[str, ...] = ()
    images: tuple = ()
    answer: str = ""
    system: str | None = None
    problem: str = ""  # the error of an invalid row, which has no question


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
            found += questions_of(row, name, images.find)
        except InputError as error:
            found.append(Question(name, NO_KIND, problem=f"{name}: {error}"))
    return found


def questions_of(row: Any, name: str, find: Callable[[str], Any]) -> list[Question]:
    """The questions of a row that have an answer. As in training, an answer before the first question is dropped.

    Args:
      name: the name of the row in errors.
      find: returns the image of a name.

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
            name,
            kind,
            texts[: 2 * i + 1],
            images[: sum(text.count(IMAGE_TOKEN) for text in texts[: 2 * i + 1])] if image_tokens else images,
            texts[2 * i + 1],
            conversation.system,
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
