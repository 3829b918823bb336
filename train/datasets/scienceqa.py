"""Convert ScienceQA to conversations for training (the reference's scripts/convert_sqa_to_llava.py).

    python -m train.datasets.scienceqa --base-dir ScienceQA/data/scienceqa --split train --prompt-format QCM-LEA

reads `problems.json` and `pid_splits.json` there, and writes `llava_train_QCM-LEA.json` beside them. Evaluate with
`python -m infer.evaluate --metric scienceqa`.
"""

import json
import os
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from llava_jax.checkpoints.outputs import write_file
from llava_jax.console import InputError, Parser, first_line, note, run_main, shorten
from llava_jax.data.scienceqa import Problem, question_and_answer
from llava_jax.files import read_bytes
from llava_jax.json_files import check_json, parse_json, read_json

MAX_FILE_BYTES = 2**30


class Row(TypedDict):
    """A row of the output."""

    id: str
    image: NotRequired[str]
    conversations: list[dict[str, str]]


def convert(base_dir: Path, split: str, prompt_format: str) -> list[dict[str, Any]]:
    """Convert a split to conversations.

    Raises:
      InputError: the files are not ScienceQA's, or do not have the split.
    """
    problems = _read(base_dir / "problems.json", dict[str, Any])
    splits = _read(base_dir / "pid_splits.json", dict[str, Any])
    if split not in splits:
        raise InputError(f"--split {shorten(split)}: {base_dir / 'pid_splits.json'} has {shorten(', '.join(splits))}")
    numbers = splits[split]
    if not isinstance(numbers, list) or not all(isinstance(number, str) for number in numbers):
        raise InputError(
            f"{shorten(base_dir / 'pid_splits.json')}: {shorten(split)} must be a list of problem numbers, as strings"
        )
    rows = []
    for number in numbers:
        where = f"{shorten(base_dir / 'problems.json')}: problem {shorten(number)}"
        problem = check_json(problems.get(number), Problem, f"{where} is not ScienceQA's")
        option, n = problem["answer"], len(problem["choices"])
        if type(option) is not int or not 0 <= option < n:
            raise InputError(f"{where}: answer {shorten(repr(option))} is not one of its {n} choices (counted from 0)")
        question, answer = question_and_answer(problem, prompt_format)
        image = problem["image"]
        row = {"id": number}
        if image is not None:
            row["image"] = os.path.join(number, image)
            question += "\n<image>"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append(row | {"conversations": turns})
    return rows


def _read(path: Path, schema: Any) -> dict[str, Any]:
    contents = read_json(path, schema, max_bytes=MAX_FILE_BYTES)
    if contents is None:
        raise InputError(f"{shorten(path)}: no such file")
    return contents


def parser() -> Parser:
    p = Parser(
        prog="python -m train.datasets.scienceqa", description="Convert ScienceQA to conversations for training."
    )
    p.add_argument(
        "--base-dir", required=True, metavar="DIR", help="the directory of problems.json and pid_splits.json"
    )
    p.add_argument("--split", required=True, metavar="NAME", help="train, val, test, trainval, minival or minitest")
    p.add_argument(
        "--prompt-format", default="QCM-LEA", metavar="Q-A", help="components of question and answer (default QCM-LEA)"
    )
    p.add_argument("--output", metavar="FILE", help="default: llava_SPLIT_FORMAT.json in the base directory")
    return p


def main() -> None:
    args = parser().parse_args()
    base_dir = Path(args.base_dir)
    rows = convert(base_dir, args.split, args.prompt_format)
    output = Path(args.output) if args.output else base_dir / f"llava_{args.split}_{args.prompt_format}.json"
    if output.exists() and not _is_split(output):
        raise InputError(f"{shorten(output)}: exists and does not hold ScienceQA conversations; give another file")
    try:
        write_file(output, json.dumps(rows, indent=2).encode())
    except OSError as error:
        raise InputError(f"{shorten(output)}: cannot be written ({first_line(error)})") from None
    note(f"{len(rows)} conversations, {sum('image' in row for row in rows)} of them with an image, in {output}")


def _is_split(path: Path) -> bool:
    """Whether a file is an output of this command."""
    try:
        rows = parse_json(read_bytes(path, MAX_FILE_BYTES))
        check_json(rows, list[Row], "split")
        return all(os.path.dirname(row.get("image", f"{row['id']}/")) == row["id"] for row in rows)
    except InputError:
        return False


if __name__ == "__main__":
    run_main(main)
