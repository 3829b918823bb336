"""How many questions of a file a model answers right, by kind of question.

    python -m infer.evaluate --checkpoint DIR --data test.json --image-folder DIR

The file is in the format of training data (`llava_jax.conversations`), and its answers are the right ones. Each
question is asked with what was said before it, right answers included. `kinds` beside a conversation names the kind of
each of its questions.
"""

import argparse
import collections
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infer.flags import add_model_flags, load_engine
from llava_jax.console import InputError, Parser, Progress, note, run_main
from llava_jax.conversations import check_row, read_rows
from llava_jax.templates import MARK

TOLD = 10  # broken questions that are named; the rest are counted
NO_KIND = "all"  # of questions that the file gives no kind of

Metric = Callable[[str, str], float]  # answer, right answer -> 0 to 1


def exact_match(answer: str, right: str) -> float:
    """1 where they are the same, whatever the case, the spaces around them, and a full stop at the end."""
    return float(_plain(answer) == _plain(right))


def _plain(text: str) -> str:
    return text.strip().lower().removesuffix(".").rstrip()


METRICS: dict[str, Metric] = {"exact_match": exact_match}


@dataclasses.dataclass(frozen=True)
class Question:
    """`turns` is question, answer, ..., question."""

    name: str  # where it stands, for errors
    kind: str
    turns: tuple[str, ...]
    images: tuple[str, ...]
    answer: str


# ---------------------------------------------------------------- the file


def read_questions(path: Path, folder: Path) -> list[Question]:
    """All questions of a file in the format of training data.

    Raises:
      InputError: it cannot be read, or a conversation in it is none.
    """
    if not folder.is_dir():
        raise InputError(f"--image-folder {folder}: no such directory")
    found = []
    for number, row in enumerate(read_rows(path)):
        name = f"{path} row {number}"
        try:
            found += _questions_of(row, name, folder)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    return found


def _questions_of(row: Any, name: str, folder: Path) -> list[Question]:
    turns, images = check_row(row)
    if [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise InputError("speakers must take turns: human, gpt, human, gpt, ...")
    said = tuple(turn["value"] for turn in turns)
    kinds = row.get("kinds", [NO_KIND] * (len(said) // 2))
    if not isinstance(kinds, list) or len(kinds) != len(said) // 2 or not all(isinstance(kind, str) for kind in kinds):
        raise InputError(f"kinds must name one kind for each of the {len(said) // 2} questions")
    paths = tuple(str(folder / image) for image in images)
    if len(paths) == 1:
        said = tuple(map(_mark_first, said))
    marks = [text.count(MARK) for text in said]
    return [
        # Images come with the turn that has their marks; with the first where there are none.
        Question(
            name, kind, said[: 2 * i + 1], paths[: sum(marks[: 2 * i + 1])] if any(marks) else paths, said[2 * i + 1]
        )
        for i, kind in enumerate(kinds)
    ]


def _mark_first(text: str) -> str:
    """The mark of a single image in front of its turn, as in training."""
    return f"{MARK}\n{text.replace(MARK, '').strip()}" if MARK in text else text


# ---------------------------------------------------------------- answers


def evaluate(engine, questions: list[Question], metric: Metric, *, rows: int, max_new_tokens: int) -> dict[str, Any]:
    """Ask all questions.

    Returns:
      `accuracy` (mean of the metric), `questions` and `failed` (how many; those that failed count as wrong),
      `by_kind`: kind -> `accuracy` and `questions`.
    """
    from infer.engine import Request
    from infer.sampling import Sampling

    requests = [Request(question.turns, question.images, None, question.name) for question in questions]
    scores: dict[str, list[float]] = collections.defaultdict(list)
    failed = 0
    with Progress("asking", len(requests), "questions") as bar:
        for i, answer in engine.generate(requests, Sampling(max_new_tokens=max_new_tokens), rows=rows):
            if isinstance(answer, InputError):
                failed += 1
                if failed <= TOLD:
                    note(f"error: {answer}")
            score = 0.0 if isinstance(answer, InputError) else metric(answer.text, questions[i].answer)
            scores[questions[i].kind].append(score)
            bar.advance(1, f"accuracy {_mean([score for part in scores.values() for score in part]):.1%}")
    return {
        "accuracy": _mean([score for part in scores.values() for score in part]),
        "questions": len(questions),
        "failed": failed,
        "by_kind": {
            kind: {"accuracy": _mean(scores[kind]), "questions": len(scores[kind])}
            for kind in dict.fromkeys(question.kind for question in questions)
        },
    }


def _mean(scores: list[float]) -> float:
    return sum(scores) / len(scores)


def table(result: dict[str, Any]) -> str:
    """The result for people: a line for each kind, and one for all."""
    lines = [*result["by_kind"].items()] if len(result["by_kind"]) > 1 else []
    lines.append((NO_KIND, result))
    width = max(len(kind) for kind, _ in lines)
    return "\n".join(f"{kind:{width}}  {part['accuracy']:7.2%}  of {part['questions']:,}" for kind, part in lines)


# ---------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m infer.evaluate", description="How many questions are answered right.")
    add_model_flags(p)
    p.add_argument("--data", required=True, metavar="FILE", help="conversations: a JSON list or JSON lines")
    p.add_argument("--image-folder", default="", metavar="DIR", help="default: the current directory")
    p.add_argument("--metric", choices=METRICS, default="exact_match", help="(default exact_match)")
    p.add_argument("--batch-size", type=int, default=32, metavar="N", help="questions at a time (default 32)")
    p.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default 64)")
    p.add_argument("--json", action="store_true", help="print one JSON object: accuracy, by_kind")
    return p


def main() -> int:
    args = parser().parse_args()
    for name in ("batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} must be 1 or more")
    questions = read_questions(Path(args.data), Path(args.image_folder or "."))
    engine = load_engine(args)
    result = evaluate(engine, questions, METRICS[args.metric], rows=args.batch_size, max_new_tokens=args.max_new_tokens)
    print(json.dumps(result) if args.json else table(result))
    if result["failed"]:
        note(f"error: {result['failed']} of {result['questions']} questions could not be asked; they count as wrong")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    run_main(main)
