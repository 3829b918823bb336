"""What a run comes to, as JSON and as tables.

OUTPUT/NAME/results.json    one benchmark
OUTPUT/results.json         all benchmarks of the directory that the same model answered
OUTPUT/results.md           the same as a table, with published numbers
"""

import importlib.metadata
import json
import platform
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import llava_jax
from infer.benchmarks.benchmark import Benchmark
from llava_jax.checkpoints.outputs import write_file
from llava_jax.console import InputError, first_line, note, plural, shorten
from llava_jax.json_files import read_json

RESULTS, TABLE = "results.json", "results.md"
PUBLISHED = "Published numbers: LLaVA's model zoo, by the reference's protocol."
JUDGED = "Scores by different judges do not compare: published ones are by the GPT-4 of their time."
WORDS = 3  # columns of the table that are words


# ---------------------------------------------------------------- tables


def score_table(result: Mapping[str, Any]) -> str:
    """A score by part and in all, in columns; with one number a part, a line is `kind 50.00% of 2`."""
    parts, totals, scale = result["parts"], result["totals"], result["scale"]
    names = [name for name in dict.fromkeys(n for part in parts.values() for n in part) if name != "questions"]
    names = names or list(totals)
    whole = {name: totals.get(name) for name in names} | {"questions": result["questions"]}
    has_whole = len(parts) < 2 or any(name in totals for name in names)
    rows = ([*parts.items()] if len(parts) > 1 else []) + [("all", whole)] * has_whole
    others = {name: value for name, value in totals.items() if name not in names}
    width = max(len(name) for name, _ in [*rows, *others.items()])
    if len(names) == 1:
        lines = [f"{name:{width}}  {_show(part[names[0]], scale):>8}  of {part['questions']:,}" for name, part in rows]
    else:
        widths = {name: max(len(name), 8) for name in (*names, "questions")}
        lines = [f"{'':{width}}  " + "  ".join(f"{name:>{n}}" for name, n in widths.items())]
        for name, part in rows:
            cells = [f"{_show(part.get(one), scale):>{widths[one]}}" for one in names]
            lines.append("  ".join([f"{name:{width}}", *cells, f"{part['questions']:>{widths['questions']},}"]))
    lines += [f"{name:{width}}  {_show(value, scale):>8}" for name, value in others.items()]
    return "\n".join(line.rstrip() for line in lines)


def heading(benchmark: Benchmark, result: Mapping[str, Any]) -> str:
    """`POPE, reference protocol: mean F1 85.9 ± 0.4 (8,910 questions)`."""
    value, error = (result[key] for key in ("value", "stderr"))
    number = "" if value is None else f" {_show(value, result['scale'], 1, False)}"
    number += "" if error is None else f" ± {_show(error, result['scale'], 1, False)}"
    left = f", {result['unanswered']:,} without an answer" * bool(result["unanswered"])
    asked = plural(result["questions"], "question")
    return f"{benchmark.title}, {result['protocol']} protocol: {result['metric']}{number} ({asked}{left})"


def _show(value: float | None, scale: float, digits: int = 2, percent: bool = True) -> str:
    if value is None:
        return "-"
    return f"{value * scale:.{digits}f}" + "%" * (percent and scale == 100)


def markdown(model: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of all benchmarks: a line for each protocol, with the published numbers."""
    published = list(dict.fromkeys(name for row in rows if not row["limit"] for name in row["published"]))
    header = ["benchmark", "protocol", "metric", model, "±", "questions", "failed", *published]
    lines, limited = [header], False
    for row in rows:
        judge = f", by {row['judge']}" if row.get("judge") else ""
        for one in (row, *row.get("also", ())):
            shown = [_show(one[key], one["scale"], 1, False) for key in ("value", "stderr")]
            beside = row["published"] if one["protocol"] == row["published_protocol"] and not row["limit"] else {}
            numbers = [f"{beside[name]:.1f}" if name in beside else "" for name in published]
            title = row["title"] + (" *" if row["limit"] else "")
            counts = [f"{one['questions']:,}", f"{row['failed']:,}"]
            lines.append([title, one["protocol"], one["metric"] + judge, *shown, *counts, *numbers])
        limited = limited or bool(row["limit"])
    notes = ["± is one standard error." + f" {PUBLISHED}" * bool(published)]
    if any(row.get("judge") for row in rows):
        notes.append(JUDGED)
    if limited:
        notes.append("With \\*: some questions only (`--limit`), the mean score of a question.")
    return _align(lines) + "\n\n" + "\n\n".join(notes) + "\n"


def _align(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in its source too; numbers, from the fourth on, to the right."""
    cells = [[_cell(text) for text in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * (n - 1) + ("-" if i < WORDS else ":") for i, n in enumerate(widths)]
    padded = [
        [f"{text:{'<' if i < WORDS else '>'}{n}}" for i, (text, n) in enumerate(zip(line, widths, strict=True))]
        for line in cells
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])


def _cell(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


# ---------------------------------------------------------------- files


def versions() -> dict[str, str]:
    """The versions that a run depends on."""
    jax = importlib.metadata.version("jax")
    return {"llava-jax": llava_jax.__version__, "jax": jax, "python": platform.python_version()}


class Numbers(TypedDict):
    """What a table shows of a score."""

    protocol: str
    metric: str
    value: float | None
    stderr: float | None
    scale: float
    questions: int


class Settings(TypedDict):
    """What a table needs of a run's settings. The fingerprint is "" for a checkpoint in an object store."""

    checkpoint: str
    checkpoint_fingerprint: str


class Result(Numbers):
    """What a table shows of a benchmark's results."""

    title: str
    failed: int
    limit: int | None
    published: dict[str, float]
    published_protocol: str
    settings: Settings
    judge: NotRequired[str | None]
    also: NotRequired[list[Numbers]]


def write_results(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the results of a benchmark.

    Raises:
      InputError: they cannot be written.
    """
    write_output(folder / RESULTS, (json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())


def write_output(path: Path, data: bytes) -> None:
    """Write a file of the output.

    Raises:
      InputError: it cannot be written.
    """
    try:
        write_file(path, data)
    except OSError as error:
        raise InputError(f"--output {shorten(path)}: cannot be written ({first_line(error)})") from None


def write_summary(output: Path, settings: Mapping[str, Any], order: Sequence[str], asked: Collection[str]) -> str:
    """Write the results of all benchmarks in a directory, and return those of some as a table.

    Args:
      settings: of the model; results of another checkpoint are left out.
      order: the names of benchmarks.
      asked: the names of the benchmarks in the returned table.

    Raises:
      InputError: a file is invalid, or cannot be written.
    """
    found: dict[str, Result] = {}
    model, identity = settings["model"], settings["checkpoint_fingerprint"]
    for path in sorted(output.glob(f"*/{RESULTS}"), key=lambda path: _rank(path.parent.name, order)):
        row = read_json(path, Result)
        if _identity(row["settings"]) == _identity(settings):
            found[path.parent.name] = row
        else:
            note(f"{shorten(path)}: left out of the table, since another checkpoint answered")
    rows = [*found.values()]
    write_output(output / TABLE, f"# {_cell(model)}\n\n{markdown(model, rows)}".encode())
    summary = {"model": model, "checkpoint_fingerprint": identity, "benchmarks": rows}
    write_output(output / RESULTS, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
    return markdown(model, [row for name, row in found.items() if name in asked])


def _identity(settings: Mapping[str, Any]) -> str:
    return settings["checkpoint_fingerprint"] or settings["checkpoint"]


def _rank(name: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order)), name
