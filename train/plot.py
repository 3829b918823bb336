"""Plot the metrics.jsonl of runs.

    python -m train.plot runs/stage1 runs/stage2 --output curves.png

Loss, learning rate and throughput over steps, one curve per run; `--metrics` names others. The loss is drawn faint,
with its running mean on top; `eval_loss` is drawn as dots in the same panel.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_jax.console import InputError, Parser, note, number, printable, run_main, shorten
from train.figures import new_figure, save_figure
from train.metrics import read_metrics

METRICS = ("loss", "learning_rate", "tokens_per_second")
FORMATS = (".png", ".svg", ".pdf")

Run = list[dict[str, Any]]  # the lines of a metrics.jsonl


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m train.plot", description="Plot the metrics of runs over their steps.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="output directory of a run, or a metrics.jsonl")
    p.add_argument("--output", required=True, metavar="FILE", help="an image: .png, .svg or .pdf")
    p.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    p.add_argument(
        "--metrics",
        default=",".join(METRICS),
        metavar="NAMES",
        help=f"keys of metrics.jsonl (default {','.join(METRICS)})",
    )
    p.add_argument(
        "--smooth", type=number(0.0, 0.999), default=0.9, metavar="SHARE",
        help="weight of the previous value in the loss's running mean (default 0.9; 0: no smoothing)",
    )  # fmt: skip
    return p


def read_run(path: str) -> Run:
    """Read the metrics of a run.

    Raises:
      InputError: there are none, or they are damaged.
    """
    file = Path(path)
    file = file if file.suffix == ".jsonl" else file / "metrics.jsonl"
    if not (lines := read_metrics(file)):
        raise InputError(f"{shorten(path)}: no metrics.jsonl, or an empty one; is it the --output of a run?")
    return lines


def points(run: Run, name: str, path: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric; a loss that is not finite is NaN.

    Raises:
      InputError: a value is not a number.
    """
    lines = [line for line in run if name in line]
    for line in lines:
        if not isinstance(line[name], int | float | None):
            raise InputError(f"{shorten(path)}: {shorten(name)} of step {line['step']} is not a number")
    return [line["step"] for line in lines], [math.nan if line[name] is None else line[name] for line in lines]


def smooth(values: Sequence[float], share: float) -> Iterator[float]:
    """A bias-corrected running mean that keeps `share` of itself at each value; NaN is skipped."""
    total = weight = 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = share * total + (1 - share) * value, share * weight + (1 - share)
        yield total / weight if weight else math.nan


def draw(runs: dict[str, Run], metrics: Sequence[str], share: float) -> Any:
    """Draw a panel per metric with a curve per run.

    Raises:
      InputError: no run has a metric, or a value is not a number.
    """
    for name in metrics:
        if not any(name in line for run in runs.values() for line in run):
            known = sorted({key for run in runs.values() for line in run for key in line} - {"step"})
            raise InputError(f"--metrics {shorten(name)}: no run has it; they have {shorten(', '.join(known), 400)}")
    figure, axes = new_figure(len(metrics))
    for ax, name in zip(axes, metrics, strict=True):
        for i, (path, run) in enumerate(runs.items()):
            steps, values = points(run, name, path)
            style = {"color": f"C{i}"}
            if name == "loss":
                ax.plot(steps, values, alpha=0.3, **style)
                ax.plot(*points(run, "eval_loss", path), "o", **style)
                values = list(smooth(values, share))
            ax.plot(steps, values, "." if len(steps) == 1 else "-", label=_label(path), **style)
        ax.set(title=name.replace("_", " "), xlabel="step")
        ax.grid(alpha=0.3)
        if name.endswith("per_second"):
            ax.set_ylim(bottom=0)
    if len(runs) > 1:
        axes[0].legend(fontsize="small")
    return figure


def _label(path: str) -> str:
    """A path for the legend; matplotlib hides labels that start with an underscore."""
    return shorten(printable(f"./{path}" if path.startswith("_") else path), 60)


def main() -> int:
    args = parser().parse_args()
    if Path(args.output).suffix.lower() not in FORMATS:
        raise InputError(f"--output {shorten(args.output)}: must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if Path(args.output).exists() and not args.overwrite:
        raise InputError(f"--output {shorten(args.output)}: exists; --overwrite replaces it")
    figure = draw({path: read_run(path) for path in args.runs}, args.metrics.split(","), args.smooth)
    save_figure(figure, args.output)
    note(f"the plot is in {shorten(args.output)}")
    return 0


if __name__ == "__main__":
    run_main(main)
