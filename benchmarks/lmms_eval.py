"""lmms-eval with our model, in its process and through the server: scores have to equal those of `infer.evaluate`.

    python -m venv ENV && ENV/bin/pip install -e '.[lmms-eval,serve]'
    ENV/bin/python benchmarks/lmms_eval.py --json lmms_eval.json

lmms-eval pins releases of many packages, so it has an environment of its own. The questions are those of
`train.datasets.shapes`, about one image, two or none; the tasks are in `lmms_eval_tasks/`. The routes are

    evaluate   python -m infer.evaluate --data
    chat       --model llava_jax
    simple     --model llava_jax --force_simple
    server     --model openai, which asks python -m infer.serve
    choices    --model llava_jax --force_simple, by likelihoods; against `Engine.score`
    rounds     --model llava_jax, in two rounds, of which the first has the same questions

The exit status is 1 if scores differ, or an answer of chat, simple, server or the first round.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# ruff: noqa: E402
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # before this directory, whose files have names of packages

from serve_load import our_server

TASKS = ROOT / "benchmarks" / "lmms_eval_tasks"
MAX_CHOICES = 4
Answers = dict[int, Any]  # by the number of the document


def write_data(folder: Path, questions: int, seed: int) -> list[dict[str, Any]]:
    """Write images and questions, for us and for lmms-eval.

    Returns:
      lmms-eval's documents.
    """
    images = -(-questions // 3)  # three questions about each
    run(
        folder, "-m", "train.datasets.shapes", "--output", folder / "data", "--examples", 1,
        "--test-examples", images, "--seed", seed,
    )  # fmt: skip
    rows = json.loads((folder / "data" / "test.json").read_text())[:questions]
    (folder / "test.json").write_text(json.dumps(rows))
    answers: dict[str, list[str]] = {}  # of each kind of question
    for row in rows:
        answers.setdefault(row["kinds"][0], []).append(row["conversations"][1]["value"])
    documents = [read_row(row, answers[row["kinds"][0]], folder / "data" / "images") for row in rows]
    (folder / "shapes.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return documents


def read_row(row: dict[str, Any], answers: list[str], images: Path) -> dict[str, Any]:
    """A row of our data file as a document; `answers` to questions of its kind are what to choose from."""
    question, answer = (turn["value"] for turn in row["conversations"])
    names = row.get("image", [])
    others = [text for text in dict.fromkeys(answers) if text != answer]
    return {
        "images": [str(images / name) for name in ([names] if isinstance(names, str) else names)],
        "question": question.replace("<image>\n", ""),
        "answer": answer,
        "choices": sorted([answer, *others[: MAX_CHOICES - 1]]),
    }


def run(folder: Path, *command: Any) -> str:
    """Run Python in the folder; what it prints."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": "none", "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def run_harness(folder: Path, name: str, task: str, model: str, arguments: str, *flags: Any) -> tuple[float, Answers]:
    """Run lmms-eval on a task.

    Returns:
      The score, and the model's output for each document.
    """
    output = folder / name
    printed = run(
        folder, "-m", "lmms_eval", "--model", model, "--model_args", arguments, "--tasks", task, "--include_path",
        TASKS, "--output_path", output, "--log_samples", *flags,
    )  # fmt: skip
    found = [*output.rglob("*_results.json")]
    if not found:  # lmms-eval logs an error and exits with 0
        raise SystemExit(f"{name}: lmms-eval has no results\n{printed[-4000:]}")
    scores = json.loads(found[0].read_text())["results"][task]
    samples = [json.loads(line) for path in output.rglob("*_samples_*.jsonl") for line in path.open()]
    (score,) = (value for key, value in scores.items() if re.fullmatch("acc(uracy)?,none", key))
    return score, {sample["doc_id"]: sample["filtered_resps"] for sample in samples}


def choose(checkpoint: str, documents: list[dict[str, Any]]) -> float:
    """The accuracy of the likeliest choice per token, as the engine scores them."""
    from infer.engine import Engine

    engine, right = Engine.load(checkpoint), 0
    for document in documents:
        scores = engine.score(document["question"], document["choices"], document["images"])
        best = max(scores, key=lambda score: score.logprob / len(score.token_ids))
        right += best.text == document["answer"]
    return right / len(documents)


def compare(folder: Path, checkpoint: str, questions: int, rows: int, seed: int) -> dict[str, Any]:
    """Run all routes. `differences` of the result are what should be equal and is not."""
    documents = write_data(folder, questions, seed)
    ours = ("llava_jax", f"checkpoint={checkpoint}")
    batch, simple = ("--batch_size", rows), "--force_simple"
    evaluate = run(
        folder, "-m", "infer.evaluate", "--checkpoint", checkpoint, "--data", folder / "test.json", "--image-folder",
        folder / "data" / "images", "--metric", "exact_match", "--json",
    )  # fmt: skip
    expected = json.loads(evaluate)["accuracy"]
    scores, texts = {"evaluate": expected}, dict[str, Answers]()
    scores["chat"], texts["chat"] = run_harness(folder, "chat", "shapes", *ours, *batch)
    scores["simple"], texts["simple"] = run_harness(folder, "simple", "shapes", *ours, *batch, simple)
    with our_server(folder / "server.log", "--checkpoint", checkpoint) as server:
        url = f"model_version={Path(checkpoint).name},base_url=http://127.0.0.1:{server.port}/v1,timeout=600"
        scores["server"], texts["server"] = run_harness(folder, "server", "shapes", "openai", url)
    scores["rounds"], texts["rounds"] = run_harness(folder, "rounds", "shapes_rounds", *ours, *batch)
    scores["choices"], _ = run_harness(folder, "choices", "shapes_choice", *ours, *batch, simple)
    scores["Engine.score"] = choose(checkpoint, documents)

    equal_to = {name: scores["Engine.score"] if name == "choices" else expected for name in scores}
    equal_to["Engine.score"] = scores["Engine.score"]
    differences = [f"{name}: {scores[name]}, not {right}" for name, right in equal_to.items() if scores[name] != right]
    for name in ("simple", "server", "rounds"):
        for number, text in texts["chat"].items():
            other = texts[name].get(number)
            if (other[0] if name == "rounds" and other else other) != text:
                differences.append(f"{name} document {number}: {other}, not {text}")
    return {"questions": len(documents), "scores": scores, "differences": differences}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default=str(ROOT / "infer" / "shapes"), help="default: the bundled model")
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), args.checkpoint, args.questions, args.batch_size, args.seed)
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if result["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
