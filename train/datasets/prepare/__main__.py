"""Prepare data files and their images for training: a few large files, on a disk or in an object store.

    python -m train.datasets.prepare --data mix665k.json --image-folder data --output gs://bucket/mix665k

Training reads it with `--data gs://bucket/mix665k`. `train.prepared` describes the files. The rows are those that
training with the same `--data` and `--seed` uses, in the same order, so that its batches are the same. Every image is
decoded once: rows whose images are missing or broken are left out, and listed in `left_out.jsonl`.

The same command resumes after an interruption: complete shards of images stay. `--checkpoint` also measures all
conversations with its tokenizer, of an existing dataset too, and `--verify` reads everything back.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator

from llava_jax.console import (
    SEED,
    InputError,
    Parser,
    Progress,
    integer,
    note,
    number,
    plural,
    run_main,
    shorten,
)
from llava_jax.data.image_folder import ImageFolder
from llava_jax.sizes import parse_size
from train import mixture
from train.datasets.prepare.conversation_shards import write_conversations
from train.datasets.prepare.image_shards import ImagePart, Job, write_shard
from train.datasets.prepare.output import LEFT_OUT, Preparation
from train.datasets.prepare.plan import Plan
from train.datasets.worker_processes import run_jobs
from train.prepared import FORMAT, Description, is_prepared
from train.samples import describe_first

MAX_NOTED = 10  # rows that are left out
WORKERS = integer(1, 1024)


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m train.datasets.prepare",
        description="Prepare data files and their images for training from a few large files.",
    )
    p.add_argument("--data", action="append", metavar="FILE", help="conversations, as for training; repeatable")
    p.add_argument("--image-folder", default="", metavar="DIR", help="default: the current directory")
    p.add_argument("--follow-links", action="store_true", help="links in the image folder may point outside it")
    p.add_argument("--seed", type=SEED, default=0, metavar="N", help="chooses shares of files, as in training (0)")
    p.add_argument("--output", required=True, metavar="DIR", help="a directory, or gs://BUCKET/NAME")
    p.add_argument("--workers", type=WORKERS, metavar="N", help="processes (default: one for each CPU)")
    p.add_argument(
        "--max-shard-size", type=parse_size, default="1GB", metavar="SIZE", help="largest file, before images are "
        "encoded again (default 1GB)",
    )  # fmt: skip
    p.add_argument(
        "--max-side", type=integer(64, 65500), metavar="N", help="scale down images with a longer side; default: none"
    )
    p.add_argument(
        "--quality", type=integer(1, 100), metavar="Q",
        help="encode images as JPEG of this quality, unless that is larger; default: files stay as they are",
    )  # fmt: skip
    p.add_argument(
        "--max-bad-share", type=number(0, 1), default=0.01, metavar="SHARE",
        help="share of the rows that may be left out (default 0.01)",
    )  # fmt: skip
    group = p.add_argument_group("measuring, so that a run plans its batches without reading the text")
    group.add_argument("--checkpoint", metavar="DIR", help="measure with the tokenizer of this checkpoint")
    group.add_argument("--vision-tower", metavar="DIR", help="CLIP directory, for original checkpoints without it")
    group.add_argument("--preset", metavar="NAME", help="the run's preset, for its template and image order")
    group.add_argument(
        "--template", metavar="NAME", help="conversation template; default: the preset's or checkpoint's"
    )
    group.add_argument("--image-first", metavar="ORDER", help="as_is or random; default: the preset's or as_is")
    p.add_argument("--verify", action="store_true", help="read all of the dataset, and check it")
    return p


def main() -> int:
    args = parser().parse_args()
    workers = args.workers or os.cpu_count() or 1
    if not (args.data or args.checkpoint or args.verify):
        raise InputError("--data is needed to prepare a dataset; --checkpoint or --verify to measure or check one")
    if not args.checkpoint and (
        flag := next((f for f in ("vision_tower", "preset", "template", "image_first") if vars(args)[f]), "")
    ):
        raise InputError(f"--{flag.replace('_', '-')}: is for measuring, which needs --checkpoint")
    if args.data:
        prepare(args, workers)
    if args.checkpoint:
        from train.datasets.prepare.lengths import measure  # slow, and not needed otherwise

        measure(args, workers)
    if args.verify:
        from train.datasets.prepare.verify import verify

        return verify(args.output, workers)
    return 0


def prepare(args: argparse.Namespace, workers: int) -> None:
    """Write the dataset, unless it is complete already.

    Raises:
      InputError: the data cannot be prepared, or not there.
      OSError: something cannot be read or written.
    """
    start = time.monotonic()
    parts = mixture.read_parts(args.data)
    for part in parts:
        if is_prepared(part.path):
            raise InputError(f"--data {shorten(part.path)}: is not a data file; only data files can be prepared")
    folder = ImageFolder(args.image_folder, follow_links=args.follow_links)
    settings = {
        "format": FORMAT,
        "data": mixture.checksum(parts),
        "seed": args.seed,
        "shard_bytes": args.max_shard_size,
        "max_side": args.max_side,
        "quality": args.quality,
    }
    with Preparation(args.output, settings) as preparation:
        if preparation.is_complete:
            preparation.tidy()
            note(f"{shorten(args.output)}: is complete already")
            return
        plan = Plan(parts, folder, args.seed)
        _check_left_out(plan, args.max_bad_share)
        preparation.begin(plan.digest())
        images = _write_images(plan, preparation, args, workers)
        broken = {image: reason for shard in images for image, reason in shard.broken.items()}
        for source in plan.sources:
            source.leave_out_broken(broken)
        _list_left_out(plan, preparation)
        _check_left_out(plan, args.max_bad_share, preparation.store.name_of(LEFT_OUT))
        index, description = write_conversations(
            plan, images, preparation.store, preparation.folder, args.max_shard_size
        )
        left_out = int(plan.is_left_out().sum())
        preparation.complete(index, description, {"rows": len(index.row_start), "left_out": left_out})
    _report(args, description, left_out, time.monotonic() - start)


def _check_left_out(plan: Plan, share: float, list_name: str = "") -> None:
    """Raise `InputError` if too many rows are left out. As in training, one bad row of a small file is tolerated."""
    bad, count = plan.left_out(), int(plan.is_left_out().sum())
    if count > max(share * len(plan), plan.repeats if share else 0) or count == len(plan):
        listed = f"; {shorten(list_name)} lists them" if list_name else ""
        allowed = "" if count == len(plan) else f", more than --max-bad-share {share:g} allows"
        raise InputError(
            f"{count:,} of {plural(len(plan), 'row')} cannot be prepared{allowed}; {describe_first(bad)}{listed}"
        )


def _write_images(plan: Plan, preparation: Preparation, args: argparse.Namespace, workers: int) -> list[ImagePart]:
    """Write the shards of images that are not there yet; returns what is in all of them."""
    shards = plan.shards(args.max_shard_size)
    missing = [i for i, part in enumerate(preparation.parts(len(shards))) if part is None]

    def jobs() -> Iterator[Job]:
        for i in missing:
            images, folder = shards[i], preparation.folder
            paths = [plan.file_of(image, folder) for image in images]
            yield Job(args.output, str(folder), i, images.start, paths, args.max_side, args.quality)

    if done := len(shards) - len(missing):
        note(f"resuming: {done:,} of {plural(len(shards), 'shard')} of images are complete")
    start, total, read = time.monotonic(), sum(len(shards[i]) for i in missing), 0
    with Progress("writing images", total, "images") as bar:

        def advance(count: int, size: int) -> None:
            nonlocal read
            read += size
            bar.advance(count, f"{read / 1e6 / max(time.monotonic() - start, 1e-3):,.1f} MB/s")

        for _ in run_jobs(write_shard, jobs(), min(workers, max(len(missing), 1)), advance):
            pass
    written = [part for part in preparation.parts(len(shards)) if part]
    if len(written) < len(shards):
        raise InputError(f"{shorten(args.output)}: shards that were written are missing; repeat the command")
    return written


def _list_left_out(plan: Plan, preparation: Preparation) -> None:
    """Log the first rows that are left out, and list all in the output directory."""
    bad = plan.left_out()
    for one in bad[:MAX_NOTED]:
        note(f"left out: {one.describe()}")
    if not bad:
        preparation.store.remove(LEFT_OUT)
        return
    if len(bad) > MAX_NOTED:
        note(f"further rows that are left out are listed in {preparation.store.name_of(LEFT_OUT)}")
    names = ("data", "index", "id", "file", "reason")
    lines = [json.dumps({name: getattr(one, name) for name in names}, ensure_ascii=False) for one in bad]
    preparation.store.write(LEFT_OUT, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))


def _report(args: argparse.Namespace, description: Description, left_out: int, seconds: float) -> None:
    conversations, images = description["conversations"], description["images"]
    rows, files = (sum(shard["count"] for shard in shards) for shards in (conversations, images))
    size = sum(shard["bytes"] for shard in (*conversations, *images))
    amount = f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
    note(
        f"{args.output}: {plural(rows, 'conversation')} ({left_out:,} left out) and {plural(files, 'image')}, "
        f"{amount} in {plural(len(conversations) + len(images), 'shard')}, in {seconds:,.0f} s "
        f"({files / seconds:,.0f} images/s, {size / 1e6 / seconds:,.1f} MB/s)"
    )
    note(f"train from it with: python -m train ... --data {args.output}")


if __name__ == "__main__":
    run_main(main)
