"""How many questions of a file a model answers right, by kind of question.

    python -m infer.evaluate --checkpoint DIR --data test.json --image-folder DIR

The file is in the format of training data (`llava_jax.data.conversations`), and its answers are the right ones. Each
question is asked with what was said before it, right answers included. `kinds` beside a conversation names the kind of
each of its questions. A row that cannot be read counts as one question that failed; the others are asked.
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
from llava_jax.data.conversations import read_conversation, read_rows, warn_unknown_keys
from llava_jax.data.images import ImageFolder
from llava_jax.data.templates import IMAGE_TOKEN

TOLD = 10  # broken questions that are named; the rest are counted
NO_KIND = "all"  # of questions that the file gives no kind of

Metric = Callable[[str, str], float]  # answer, right answer -> 0 to 1


def exact_match(answer: str, right: str) -> float:
    """1 where they are the same, whatever the case, the spaces around them, and a full stop at the end."""
    return float(_plain(answer) == _plain(right))


def _plain(text: str) -> str:
    return text.strip().lower().removesuffix(".").rstrip()


def scienceqa(answer: str, right: str) -> float:
    """1 where both name the same option of a question with several (llava/eval/eval_science_qa.py)."""
    return float(read_option(answer) is not None and read_option(answer) == read_option(right))


def read_option(answer: str) -> str | None:
    """The letter that an answer is, or begins with ("B. ..."), or the only one after "The answer is"; else None.

    A letter that the question has no option for counts as one, and so as wrong. (The reference once drew an option at
    random then.)
    """
    if re.fullmatch("[A-E]", answer) or re.match(r"[A-E]\. ", answer):
        return answer[0]
    found = re.findall("The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 else None


METRICS: dict[str, Metric] = {"exact_match": exact_match, "scienceqa": scienceqa}


@dataclasses.dataclass(frozen=True)
class Question:
    """`turns` is question, answer, ..., question; `images` are paths, or the bytes of `data:` URLs."""

    name: str  # where it stands, for errors
    kind: str
    turns: tuple[str, ...] = ()
    images: tuple = ()
    answer: str = ""
    system: str | None = None
    problem: str = ""  # what is wrong with the row, which has no question then


# ---------------------------------------------------------------- the file


def read_questions(path: Path, folder: Path) -> list[Question]:
    """All questions of a file in the format of training data, and one with a `problem` for each row that is broken.

    Raises:
      InputError: the file cannot be read, or no row of it can.
    """
    images = ImageFolder(folder, follow_links=True)
    rows = read_rows(path)
    warn_unknown_keys(path, rows)
    found: list[Question] = []
    for number, row in enumerate(rows):
        name = f"{shorten(path)} row {number}"
        try:
            found += _questions_of(row, name, images)
        except InputError as error:
            found.append(Question(name, NO_KIND, problem=f"{name}: {error}"))
    return found


def _questions_of(row: Any, name: str, folder: ImageFolder) -> list[Question]:
    """Those that have an answer. As in training, an answer that comes first is left out; a question that comes last
    has nothing to be compared with."""
    conversation = read_conversation(row)
    turns = conversation.turns
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    if [turn["from"] for turn in turns] != (["human", "gpt"] * len(turns))[: len(turns)]:
        speakers = shorten(", ".join(turn["from"] for turn in conversation.turns))
        raise InputError(f"speakers must take turns, human first; here they are {speakers}")
    if len(turns) < 2:
        raise InputError("no answer")
    said = tuple(turn["value"] for turn in turns)
    n = len(said) // 2
    kinds = row.get("kinds") or [NO_KIND] * n
    if (
        not isinstance(kinds, list)
        or len(kinds) not in (n, len(said) - n)  # of all its questions, answered or not
        or not all(isinstance(kind, str) for kind in kinds)
    ):
        raise InputError(f"kinds must name {plural(n, 'kind')}, one for each question")
    images = tuple(map(folder.find, conversation.images))
    if len(images) == 1:
        said = tuple(map(_mark_first, said))
    marks = sum(text.count(IMAGE_TOKEN) for text in said)
    if marks not in (0, len(images)):
        raise InputError(f"{marks} {IMAGE_TOKEN} marks for {len(images)} images")
    if any(IMAGE_TOKEN in text for text in said[1::2]):
        raise InputError(f"an answer has an {IMAGE_TOKEN} mark; only questions can be asked with images")
    return [
        # Images come with the turn that has their marks; with the first where there are none.
        Question(
            name,
            kind,
            said[: 2 * i + 1],
            images[: sum(text.count(IMAGE_TOKEN) for text in said[: 2 * i + 1])] if marks else images,
            said[2 * i + 1],
            conversation.system,
        )
        for i, kind in enumerate(kinds[:n])
    ]


def _mark_first(text: str) -> str:
    """One mark for a single image, in front of its turn, as in training."""
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip() if IMAGE_TOKEN in text else text


def choose_metric(questions: list[Question]) -> str:
    """ScienceQA's where every right answer says, as there, which option "the answer is"; else exact match."""
    answers = [question.answer for question in questions if not question.problem]
    if answers and all("The answer is " in answer and read_option(answer) for answer in answers):
        note("metric scienceqa, since every right answer names an option; --metric exact_match compares all words")
        return "scienceqa"
    return "exact_match"


def check_answers(questions: list[Question], metric: str) -> list[Question]:
    """The questions; those whose right answer the metric cannot read have a `problem`.

    Raises:
      InputError: none is left that can be asked.
    """
    if metric == "scienceqa":
        no_option = "the right answer names no option, as --metric scienceqa wants"
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
      `accuracy` (mean of the metric), `questions` and `failed` (how many; those that failed count as wrong),
      `by_kind`: kind -> `accuracy` and `questions`. Of ScienceQA also `with_images`, the same for the questions that
      have images, and `no_option`, how many answers name no single option.
    """
    from infer.engine import Request

    scores = [0.0] * len(questions)
    failed = unread = 0

    def fail(problem: object) -> None:
        nonlocal failed
        failed += 1
        if failed <= TOLD:
            note(f"error: {problem}")

    for question in questions:
        if question.problem:
            fail(question.problem)
    asked = [i for i, question in enumerate(questions) if not question.problem]
    has_system = engine.template.style != "plain"  # as in training, which tells it
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

    kinds = dict.fromkeys(question.kind for question in questions)
    result = part(lambda one: True) | {"failed": failed}
    result["by_kind"] = {kind: part(lambda one, kind=kind: one.kind == kind) for kind in kinds}
    if metric is scienceqa:
        result |= {"with_images": part(lambda one: bool(one.images)), "no_option": unread}
    return result


def _mean(scores: list[float]) -> float:
    return sum(scores) / len(scores) if scores else 0.0


def table(result: dict[str, Any]) -> str:
    """The result for people: a line for each kind, and one for all."""
    lines = [*result["by_kind"].items()] if len(result["by_kind"]) > 1 else []
    if result.get("with_images", {}).get("questions"):
        lines.append(("with images", result["with_images"]))
    lines.append((NO_KIND, result))
    width = max(len(kind) for kind, _ in lines)
    return "\n".join(f"{kind:{width}}  {part['accuracy']:7.2%}  of {part['questions']:,}" for kind, part in lines)


# ---------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m infer.evaluate", description="How many questions are answered right.")
    add_model_flags(p)
    p.add_argument("--data", required=True, metavar="FILE", help="conversations: a JSON list or JSON lines")
    p.add_argument("--image-folder", default="", metavar="DIR", help="default: the current directory")
    p.add_argument(
        "--metric", choices=METRICS,
        help="exact_match: the same words; scienceqa: the same option, as the reference reads it, the default where "
        "every right answer says which (\"The answer is B.\")",
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
        note(f"no single option in {plural(result['no_option'], 'answer')}, counted as wrong")
    if failed := result["failed"]:
        asked = plural(result["questions"], "question")
        note(f"error: {failed:,} of {asked} could not be asked, counted as wrong")
    return 1 if failed else 0


def run() -> None:
    """The command `llava-evaluate`."""
    run_main(main)


if __name__ == "__main__":
    run()
