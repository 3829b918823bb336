"""Measure the conversations of a prepared dataset: the numbers of tokens from which a run plans its batches."""

import argparse
import dataclasses
import functools
import zlib
from collections.abc import Iterator

import numpy as np

from llava_jax.checkpoints.checkpoint import open_checkpoint
from llava_jax.console import InputError, Progress, note, plural, shorten
from llava_jax.data.conversations import read_conversation
from llava_jax.json_files import parse_json
from train.config import PRESETS, TrainConfig, check_preset
from train.datasets.worker_processes import Report, run_jobs
from train.encoding import Encoder
from train.lengths import Length, Lengths, contents_of, read_lengths
from train.prepared import INDEX, PreparedDataset
from train.stores import Store

ROWS = 2048  # that a worker measures at a time


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What the tokens of a conversation depend on: a checkpoint, and the flags of the same names."""

    checkpoint: str
    vision_tower: str | None
    template: str | None
    orders: int  # as in `lengths_key`

    @functools.cache  # noqa: B019  # once in each worker
    def encoder(self) -> Encoder:
        found = open_checkpoint(self.checkpoint, vision_tower=self.vision_tower)
        return Encoder(found.config, found.tokenizer, self.template)


@dataclasses.dataclass(frozen=True)
class Job:
    """Consecutive rows of a shard, from number `first` on, and their `Index` arrays."""

    tokens: Tokens
    output: str
    shard: str
    first: int
    start: np.ndarray
    bytes: np.ndarray
    crc: np.ndarray
    images: np.ndarray


def measure(args: argparse.Namespace, workers: int) -> None:
    """Measure a dataset, unless that is done, and write its file of lengths.

    Args:
      args: the flags of `train.datasets.prepare`.

    Raises:
      InputError: the dataset is not complete, or the checkpoint or the template cannot be used.
      OSError: it cannot be read or written.
    """
    dataset = PreparedDataset(args.output)
    tokens = _tokens(args)
    name = tokens.encoder().lengths_name(tokens.orders)
    where = shorten(dataset.store.name_of(name))
    if read_lengths(dataset, name, tokens.orders):
        note(f"{where}: is complete already")
        return
    lengths = Lengths(dataset.image_counts, tokens.orders)
    jobs = list(_jobs(dataset, tokens))
    with Progress("measuring conversations", len(dataset), "rows") as bar:
        for first, part in run_jobs(measure_rows, jobs, min(workers, len(jobs)), lambda rows, _: bar.advance(rows)):
            lengths.insert(first, part)
    dataset.store.write(name, lengths.save(contents_of(dataset.digest, name)))
    note(f"{where}: {plural(len(dataset), 'conversation')} measured for template {tokens.encoder().name}")
    for (_, row), reason in sorted(lengths.reasons.items())[:1]:
        bad = len({row for _, row in lengths.reasons})
        note(f"warning: {plural(bad, 'conversation')} cannot be trained on; the first: row {row}: {reason}")


def _tokens(args: argparse.Namespace) -> Tokens:
    if args.preset and args.preset not in PRESETS:
        raise InputError(f"--preset {shorten(args.preset)}: must be one of {', '.join(PRESETS)}")
    config = PRESETS[args.preset] if args.preset else TrainConfig()
    given = {name: vars(args)[name] for name in ("template", "image_first") if vars(args)[name]}
    config = config.replace(**given)
    tokens = Tokens(args.checkpoint, args.vision_tower, config.template, 1 + (config.image_first == "random"))
    check_preset(config, open_checkpoint(args.checkpoint, vision_tower=args.vision_tower).config)
    return tokens


def _jobs(dataset: PreparedDataset, tokens: Tokens) -> Iterator[Job]:
    first, index = 0, dataset.index
    for shard in dataset.described["conversations"]:
        end = first + shard["count"]
        for at in range(first, end, ROWS):
            rows = slice(at, min(at + ROWS, end))
            yield Job(
                tokens,
                dataset.path,
                shard["name"],
                at,
                index.row_start[rows],
                index.row_bytes[rows],
                index.row_crc[rows],
                index.row_images[rows],
            )
        first = end


def measure_rows(job: Job, report: Report) -> tuple[int, Lengths]:
    """The number of the first row, and the lengths of the rows of a job.

    Raises:
      InputError: the dataset is damaged.
      OSError: it cannot be read.
    """
    encoder, lengths = job.tokens.encoder(), Lengths(job.images, job.tokens.orders)
    start, end = int(job.start[0]), int(job.start[-1]) + int(job.bytes[-1])
    data = Store(job.output).read_range(job.shard, start, end - start)
    for row, (at, size, crc, images) in enumerate(zip(job.start, job.bytes, job.crc, job.images, strict=True)):
        line = data[int(at) - start : int(at) - start + int(size)]
        if zlib.crc32(line) != crc:
            raise InputError(f"{job.shard}: row {job.first + row}: damaged (another checksum than in {INDEX})")
        try:
            conversation = read_conversation(parse_json(line, bounded=False))
        except InputError as error:
            raise InputError(f"{job.shard}: row {job.first + row}: {error}; prepare it again") from None
        if len(conversation.images) != images:
            raise InputError(f"{job.shard}: row {job.first + row} has other images than the index; prepare it again")
        for order in range(job.tokens.orders):
            try:
                encoded = encoder.encode(conversation, order)
                lengths.set(order, row, Length.of(encoded.ids, encoded.labels))
            except InputError as error:
                lengths.set_bad(order, row, str(error))
        report(1, int(size))
    return job.first, lengths
