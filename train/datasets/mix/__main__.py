"""Mix data files into one, and report what is in them before a run pays for it.

    python -m train.datasets.mix --data a.json --data b.json=0.5 --image-folder images --output mix
    python -m train.datasets.mix --data a.json --image-folder images --checkpoint DIR --report-only

writes, as a new directory,

    mix.json               the rows of all files, in their order; weights as for training (`train.mixture`)
    left_out.jsonl         the rows that are left out: invalid ones, duplicates, those with a missing or broken image
    report.md, *.png, report.json    what is in the mix (`mix_report`)

A duplicate has the same images, conversation and system message as an earlier row, whatever its id. Rows that share an
image or an id but differ otherwise are all kept; a repeated id gets a number, so that ids are unique. Weights apply to
what is left of each file, and repeat rows on purpose.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_jax.checkpoints.outputs import new_directory
from llava_jax.console import SEED, InputError, Parser, note, plural, ranges, run_main, shorten, terminal_safe
from llava_jax.data.image_folder import ImageFolder
from train import mixture
from train.config import PRESETS, TrainConfig
from train.datasets.mix import report as mix_report
from train.datasets.mix.files import MeasuredFile, mark_duplicates, measure_file
from train.datasets.mix.images import check_images
from train.datasets.mix.lengths import Positions, measure_lengths, open_model
from train.datasets.mix.plots import draw
from train.datasets.mix.rows import Mix, choose, left_out, write_mix
from train.figures import new_figure, save_figure
from train.prepared import is_prepared


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m train.datasets.mix", description="Mix data files into one, and report what is in them.")
    p.add_argument(
        "--data", required=True, action="append", metavar="FILE[=WEIGHT]", help="as for training; repeatable"
    )
    p.add_argument("--output", metavar="DIR", help="a new directory; optional with --report-only")
    p.add_argument("--report-only", action="store_true", help="print the report, and write no mix")
    p.add_argument("--image-folder", metavar="DIR", help="check all images, and leave out rows with bad ones")
    p.add_argument("--decode", action="store_true", help="decode images to check them; default: read their headers")
    p.add_argument("--follow-links", action="store_true", help="links in the image folder may point outside it")
    p.add_argument("--checkpoint", metavar="DIR", help="also report lengths in positions, with this model's tokenizer")
    p.add_argument(
        "--preset", choices=PRESETS, help="with --checkpoint: the template, length and aspect ratio of a run"
    )
    limits = ranges(TrainConfig)
    p.add_argument(
        "--max-length", type=limits["max_length"], metavar="N", help="with --checkpoint: where training truncates"
    )
    p.add_argument("--seed", type=SEED, default=0, metavar="N", help="of weights that choose at random (default 0)")
    return p


def check_flags(args: argparse.Namespace) -> None:
    """Raises:
    InputError: flags contradict each other, or the output cannot be one.
    """
    for flag, value, wanted, other in (
        ("--preset", args.preset, "--checkpoint", args.checkpoint),
        ("--max-length", args.max_length, "--checkpoint", args.checkpoint),
        ("--decode", args.decode or None, "--image-folder", args.image_folder),
        ("--follow-links", args.follow_links or None, "--image-folder", args.image_folder),
    ):
        if value is not None and other is None:
            raise InputError(f"{flag}: needs {wanted}")
    if args.output is None:
        if not args.report_only:
            raise InputError("give --output DIR for the mix, or --report-only")
        return
    if "://" in args.output:
        raise InputError(f"--output {shorten(args.output)}: must be a local directory")
    output = Path(args.output)
    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"--output {shorten(output)}: is not empty; give a new directory")


def main() -> None:
    args = parser().parse_args()
    check_flags(args)
    parts = mixture.read_parts(args.data)
    folder = None if args.image_folder is None else ImageFolder(args.image_folder, follow_links=args.follow_links)
    model = open_model(args) if args.checkpoint else None
    if args.output is not None:
        new_figure(1)  # before the work, in case matplotlib is missing
    files = read_files(parts)
    earlier = mark_duplicates(files)
    images = None if folder is None else check_images(files, folder, decode=args.decode)
    mix = choose(parts, files, images, args.seed)
    if not len(mix) and not args.report_only:
        first = next(left_out(files, earlier, images))
        where = f"{shorten(first['data'])} row {first['row']}"
        raise InputError(f"nothing is left of the data; the first: {where}: {first['reason']}")
    lengths = None if model is None or not len(mix) else measure_lengths(mix, model)
    if args.output is not None:
        write(mix, lengths, earlier, Path(args.output), report_only=args.report_only)
    else:
        print(terminal_safe(mix_report.render(mix_report.summarize(mix, lengths), [])))


def read_files(parts: Sequence[mixture.Part]) -> list[MeasuredFile]:
    """Read and measure the data files of parts, each once."""
    paths: dict[str, str] = {}
    for part in parts:
        if is_prepared(part.path):
            raise InputError(
                f"--data {shorten(part.path)}: is a prepared dataset; mix the data file that it was made of"
            )
        paths.setdefault(os.path.realpath(part.path), part.path)
    return [measure_file(path) for path in paths.values()]


def write(
    mix: Mix, lengths: Positions | None, earlier: Sequence[np.ndarray], output: Path, *, report_only: bool
) -> None:
    """Write the mix, what is left out, and the report.

    Raises:
      InputError: the directory cannot be written.
    """
    report = mix_report.summarize(mix, lengths)
    with new_directory(output, overwrite=output.is_dir()) as staged:
        directory = Path(staged)
        if not report_only:
            report["ids_changed"] = write_mix(mix, directory / "mix.json")
        if any(report["left_out"].values()):
            with open(directory / "left_out.jsonl", "w") as file:
                for row in left_out(mix.files, earlier, mix.images):
                    file.write(json.dumps(row) + "\n")
        plots = []
        for name, figure in draw(mix, lengths):
            save_figure(figure, directory / name)
            plots.append(name)
        (directory / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (directory / "report.md").write_text(mix_report.render(report, plots), "utf-8", errors="backslashreplace")
    counts = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in report["left_out"].items() if n)
    if counts:
        note(f"left out: {counts}; listed in {output / 'left_out.jsonl'}")
    if not report_only:
        changed = report["ids_changed"]
        note(
            f"{plural(len(mix), 'row')} in {output / 'mix.json'}"
            + f"; {plural(changed, 'repeated id')} changed" * (changed > 0)
        )
    note(f"the report is in {output / 'report.md'}")


if __name__ == "__main__":
    run_main(main)
