"""Throughput of `python -m infer.evaluate` compared with `python -m infer.generate --questions`, on the same questions.

    python benchmarks/evaluate.py --json evaluate.json

The bundled model answers questions about images of shapes; the answers are one to a few tokens, so that what a command
does beside answering (reading, writing, scoring, results) weighs as much as it can. Both commands run in this process,
with one engine, which forgets everything between them; a round runs both, the second round in the other order, and so
on. The figure is the ratio of their median times, beside that of the CPU time that they take; below the goal the exit
status is 1.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# ruff: noqa: E402
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from infer import benchmark_run, generate
from infer import evaluate as command
from infer.answers import AnswersFile
from infer.engine import Engine
from infer.questions import answer_questions, read_questions
from llava_jax.console import enable_compilation_cache, silence_notes
from llava_jax.data.conversations import read_conversation
from llava_jax.data.data_files import read_rows
from train.datasets.shapes import __main__ as shapes

GOAL = 0.9  # of the throughput of `generate --questions`
TOKENS = 64


def write_questions(folder: Path, images: int) -> int:
    """Write `data/test.json`, for `evaluate`, and its questions as `questions.jsonl`, for `generate`. Returns their
    number."""
    shapes.write(folder / "data", 1, images, seed=7)
    rows = [read_conversation(row) for row in read_rows(folder / "data" / "test.json")]
    lines = [{"question_id": i, "image": row.images, "text": row.turns[0]["value"]} for i, row in enumerate(rows)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)


def run_generate(engine: Engine, folder: Path, rows: int, name: str) -> None:
    """`generate --questions`, but for loading the model."""
    args = generate.parser().parse_args(
        ["--questions", str(folder / "questions.jsonl"), "--image-folder", str(folder / "data" / "images"),
         "--answers", str(folder / f"{name}.jsonl"), "--batch-size", str(rows), "--max-new-tokens", str(TOKENS),
         "--checkpoint", str(generate.BUNDLED)]
    )  # fmt: skip
    with AnswersFile(args.answers, args.questions) as answers:
        questions = read_questions(args, answers)
        assert answer_questions(engine, questions, answers, generate.sampling_of(args), args) == 0


def run_evaluate(engine: Engine, folder: Path, rows: int, name: str) -> None:
    """`evaluate --data --output`, but for loading the model."""
    args = command.parser().parse_args(
        ["--data", str(folder / "data" / "test.json"), "--image-folder", str(folder / "data" / "images"),
         "--output", str(folder / name), "--batch-size", str(rows), "--max-new-tokens", str(TOKENS),
         "--checkpoint", str(generate.BUNDLED), "--json"]
    )  # fmt: skip
    benchmark_run.load_engine = lambda args: engine
    with contextlib.redirect_stdout(io.StringIO()):
        assert benchmark_run.run_benchmarks(args, command.choose(args)) == 0


def same_answers(folder: Path, name: str, other: str) -> bool:
    """Whether two files of answers have the same texts, by their prompts."""
    texts = []
    for path in (folder / f"{name}.jsonl", folder / other / "conversations" / "answers.jsonl"):
        lines = map(json.loads, path.read_text().splitlines())
        texts.append(sorted((line["prompt"], line["text"].strip()) for line in lines))
    return texts[0] == texts[1]


def measure(images: int, rounds: int, rows: int) -> dict[str, Any]:
    """Run both commands in turn, and compare their times."""
    enable_compilation_cache()
    engine = Engine.load(generate.BUNDLED)
    commands = {"generate": run_generate, "evaluate": run_evaluate}
    times: dict[str, list[float]] = {name: [] for name in commands}
    cpu: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n = write_questions(folder, images)
        for number in range(rounds + 1):  # the first compiles
            for which in list(commands)[:: 1 if number % 2 else -1]:
                if engine._scheduler:
                    engine._scheduler.forget()
                started, used = time.perf_counter(), time.process_time()
                commands[which](engine, folder, rows, f"{which}-{number}")
                if number:
                    times[which].append(time.perf_counter() - started)
                    cpu[which].append(time.process_time() - used)
        same = same_answers(folder, "generate-1", "evaluate-1")
    medians = {which: statistics.median(some) for which, some in times.items()}
    return {
        "questions": n,
        "rounds": rounds,
        "batch_size": rows,
        "questions_per_second": {which: n / seconds for which, seconds in medians.items()},
        "seconds": times,
        "cpu_ratio": statistics.median(cpu["generate"]) / statistics.median(cpu["evaluate"]),
        "same_answers": same,
        "ratio": medians["generate"] / medians["evaluate"],
        "goal": GOAL,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=200, help="with three questions each (default 200)")
    parser.add_argument("--rounds", type=int, default=7, help="(default 7)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default 32)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    silence_notes()
    report = measure(args.images, args.rounds, args.batch_size)
    text = json.dumps(report, indent=2)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n")
    if report["ratio"] < GOAL or not report["same_answers"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
