"""Convert images and their captions to conversations for stage 1: a request, answered with the caption.

    python -m train.datasets.captions --captions Train_GCC-training.tsv --image-name GCC_train_{row:9}.jpg \\
        --image-folder cc3m --output cc3m-595k --balance

Reads JSON, CSV, CC3M's own file, COCO's and WebDataset's tars (`captions.sources`), and writes, as a new directory,

    captions.json    the original's format: {"id", "image", "conversations": [request with <image>, caption]}
    images/          the images of tars
    left_out.jsonl   rows that are left out, such as those whose image is missing, with the reason
    balance.json, balance.png   with --balance: the noun phrases before and after (`balance`)

The request of a row, and the place of `<image>` before or after it, follow from the seed, its id and its caption.
"""

import argparse
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from llava_jax.checkpoints.outputs import new_directory
from llava_jax.console import SEED, InputError, Parser, integer, note, plural, run_main, shorten
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.files import open_regular, read_text
from train.datasets.captions import balance
from train.datasets.captions.sources import Fields, Member, Pair, Skipped, read_captions

REQUESTS = Path(__file__).parent / "requests"
NAMED_REQUESTS = ("brief", "detailed")
MAX_REQUESTS_BYTES = 2**20
MAX_NAMED = 5  # rows left out that are named on the terminal

Source = Callable[[str], Iterator[Pair | Skipped]]  # reads all pairs, with a progress bar of this name


def read_requests(name: str) -> list[str]:
    """The requests of a list that comes with the package, or of a file with one a line.

    Raises:
      InputError: the file cannot be read, is empty, or a request has an image token.
    """
    path = REQUESTS / f"{name}.txt" if name in NAMED_REQUESTS else Path(name)
    requests = [line.strip() for line in read_text(path, MAX_REQUESTS_BYTES).split("\n") if line.strip()]
    if not requests:
        raise InputError(f"--requests {shorten(name)}: has no requests; write one a line")
    if any(IMAGE_TOKEN in request for request in requests):
        raise InputError(f"--requests {shorten(name)}: a request has an {IMAGE_TOKEN} token, which is added to each")
    return requests


def make_row(pair: Pair, requests: Sequence[str], seed: int) -> dict[str, Any]:
    """A row in the original's format. Its randomness depends on the seed and the pair alone."""
    digest = hashlib.blake2b(f"{seed}\0{pair.id}\0{pair.caption}".encode(), digest_size=16).digest()
    number, image_last = divmod(int.from_bytes(digest), 2)
    request = requests[number % len(requests)]
    question = f"{request}\n{IMAGE_TOKEN}" if image_last else f"{IMAGE_TOKEN}\n{request}"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": pair.caption}]
    return {"id": pair.id, "image": pair.image, "conversations": turns}


# ---------------------------------------------------------------- reading


def open_source(paths: Sequence[str], fields: Fields, folder: ImageFolder | None, *, extract: bool) -> Source:
    """A source that reads all files in order.

    Args:
      folder: skip pairs whose image is not in it, unless it is extracted from a tar.
    """

    def check(found: Pair | Skipped) -> Pair | Skipped:
        if folder is None or isinstance(found, Skipped) or (extract and found.member):
            return found
        try:
            path = folder.find(found.image)
        except InputError as error:
            return Skipped(found.where, found.image, str(error))
        is_there = not isinstance(path, str) or os.path.isfile(path)  # not a path: the bytes of a `data:` URL
        return found if is_there else Skipped(found.where, found.image, "its image is missing")

    def read(task: str) -> Iterator[Pair | Skipped]:
        for path in paths:
            yield from map(check, read_captions(path, fields, task))

    return read


def pairs_of(source: Source, task: str) -> Iterator[Pair]:
    return (found for found in source(task) if isinstance(found, Pair))


# ---------------------------------------------------------------- writing


class Writer:
    """Writes the rows of pairs, and those that are left out, into a directory."""

    def __init__(self, directory: Path, requests: Sequence[str], seed: int, *, extract: bool):
        self._directory, self._requests, self._seed, self._extract = directory, requests, seed, extract
        self.written = self.left_out = 0
        self.first: list[str] = []  # of those left out

    def write(self, found: Iterable[Pair | Skipped], chosen: np.ndarray | None) -> None:
        """Write all pairs, or those that are chosen.

        Args:
          chosen: bool [pairs].

        Raises:
          InputError: the number of pairs is another one.
        """
        number = 0  # of the pair
        with contextlib.ExitStack() as stack:
            rows = stack.enter_context(open(self._directory / "captions.json", "wb"))
            left_out = stack.enter_context(open(self._directory / "left_out.jsonl", "wb"))
            for one in found:
                if isinstance(one, Pair):
                    number += 1
                    if chosen is not None and not (number <= len(chosen) and chosen[number - 1]):
                        continue
                    one = self._write_image(one)
                if isinstance(one, Pair):
                    self._write_row(one, rows)
                else:
                    self._leave_out(one, left_out)
            rows.write(b"\n]\n")
        if chosen is not None and number != len(chosen):
            raise InputError("--captions or --image-folder: changed while it was read; run the command again")
        if not self.left_out:
            (self._directory / "left_out.jsonl").unlink()

    def _write_row(self, pair: Pair, file: BinaryIO) -> None:
        row = make_row(pair, self._requests, self._seed)
        file.write((b",\n" if self.written else b"[\n") + msgspec.json.encode(row))
        self.written += 1

    def _leave_out(self, skipped: Skipped, file: BinaryIO) -> None:
        entry = {"row": skipped.where, "image": skipped.image, "reason": skipped.reason}
        file.write(json.dumps(entry).encode() + b"\n")  # in ASCII: a name may be invalid Unicode
        if self.left_out < MAX_NAMED:
            image = f" ({shorten(skipped.image, 60)})" if skipped.image else ""
            self.first.append(f"{skipped.where}{image}: {skipped.reason}")
        self.left_out += 1

    def _write_image(self, pair: Pair) -> Pair | Skipped:
        if not self._extract or pair.member is None:
            return pair
        path = self._directory / "images" / pair.image
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:
                _copy(pair.member, file)
        except (FileExistsError, NotADirectoryError):
            return Skipped(pair.where, pair.image, "another image has its name")
        return pair


def _copy(member: Member, target: BinaryIO) -> None:
    with open_regular(member.tar) as tar:
        tar.seek(member.offset)
        left = member.size
        while left and (block := tar.read(min(left, 2**20))):
            target.write(block)
            left -= len(block)
    if left:
        raise InputError(f"{shorten(member.tar)}: ends within an image; is it still being written?")


# ---------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m train.datasets.captions",
        description="Convert images and their captions to conversations for stage 1.",
    )
    p.add_argument(
        "--captions", required=True, nargs="+", action="extend", metavar="FILE",
        help="captions: .json (also COCO's), .jsonl, .csv, .tsv (also CC3M's) or .tar (WebDataset's)",
    )  # fmt: skip
    p.add_argument("--output", required=True, metavar="DIR", help="a new directory")
    p.add_argument("--image-folder", metavar="DIR", help="leave out rows whose image is not here")
    p.add_argument("--image-field", metavar="NAME", help="key or column of images; a number if there is no header")
    p.add_argument("--caption-field", metavar="NAME", help="key or column of captions; a number if there is no header")
    p.add_argument(
        "--image-name", metavar="NAME",
        help="names of images, if the file has none: GCC_train_{row:9}.jpg; row is counted from 0, line from 1, "
        "shard is row // 10,000",
    )  # fmt: skip
    p.add_argument(
        "--requests", default="brief", metavar="LIST", help="brief (default), detailed, or a file with one a line"
    )
    p.add_argument("--no-images", action="store_true", help="leave the images of tars where they are")
    p.add_argument("--seed", type=SEED, default=0, metavar="N", help="(default 0)")
    p.add_argument(
        "--balance", action="store_true", help="choose captions so that few noun phrases dominate, as for CC3M-595K"
    )
    p.add_argument(
        "--spacy-model", metavar="NAME",
        help=f"with --balance: pipeline that finds noun phrases (default {balance.MODEL})",
    )  # fmt: skip
    p.add_argument(
        "--workers", type=integer(1, 256), metavar="N", help="with --balance: processes of spaCy (default: all cores)"
    )
    return p


def main() -> None:
    args = parser().parse_args()
    for flag, value in (("--spacy-model", args.spacy_model), ("--workers", args.workers)):
        if value is not None and not args.balance:
            raise InputError(f"{flag} {shorten(value)}: needs --balance")
    if "://" in args.output:
        raise InputError(f"--output {shorten(args.output)}: must be a local directory")
    output = Path(args.output)
    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"--output {shorten(output)}: is not empty; give a new directory")
    requests = read_requests(args.requests)
    folder = None if args.image_folder is None else ImageFolder(args.image_folder)
    fields = Fields(args.image_field, args.caption_field, args.image_name)
    source = open_source(args.captions, fields, folder, extract=not args.no_images)
    with new_directory(output, overwrite=output.is_dir()) as staged:
        directory = Path(staged)
        chosen = None
        if args.balance:
            captions = (pair.caption for pair in pairs_of(source, "finding noun phrases in"))
            workers = args.workers or os.cpu_count() or 1
            chosen = balance.balance(captions, directory, args.spacy_model or balance.MODEL, workers, args.seed)
        writer = Writer(directory, requests, args.seed, extract=not args.no_images)
        writer.write(source("converting"), chosen)
        report(writer, output)


def report(writer: Writer, output: Path) -> None:
    """Print what was written, and name what was left out.

    Raises:
      InputError: no row was written.
    """
    if not writer.written:
        raise InputError("no caption can be used" + (f"; the first: {writer.first[0]}" if writer.first else ""))
    for line in writer.first:
        note(f"warning: left out: {line}")
    if writer.left_out:
        note(f"{plural(writer.left_out, 'row')} left out, listed in {output / 'left_out.jsonl'}")
    note(f"{plural(writer.written, 'caption')} in {output / 'captions.json'}")


if __name__ == "__main__":
    run_main(main)
