"""Mix several data files: the rows of each file that a run trains on.

    --data a.json --data b.json=0.5 --data mix.yaml

A weight is the share of a file's rows to use, at least one row: 0.5 is a random half of them, 2 is all of them twice,
2.5 is all of them twice and a random half once more. A YAML file lists data files in LLaVA-NeXT's format
(llava/train/train.py `LazySupervisedDataset`):

    datasets:
      - json_path: a.json
        sampling_strategy: "first:1000"   # or "end:20%", "random:50%", "all"

The random rows depend on the seed and the position in the list, and are the same in every epoch.
"""

import argparse
import collections
import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence

import numpy as np
import yaml

from llava_jax.console import InputError, number, shorten
from llava_jax.files import open_regular, read_text
from train.prepared import is_prepared, read_description
from train.stores import Store

STRATEGIES = ("first", "end", "random")
MAX_YAML = 2**18  # bytes: some thousands of files
WEIGHT = number(0, 1000, above=True)  # of a file
MAX_ROWS = 10**8  # used of a file


@dataclasses.dataclass(frozen=True)
class Part:
    """A data file, and the rows of it to use."""

    path: str
    strategy: str = "random"  # which rows, if not all
    weight: float = 1.0  # the number of rows, as a share of all
    rows: int | None = None  # the number of rows, instead of `weight`

    def choose(self, n: int, seed: Sequence[int]) -> np.ndarray:
        """The rows, int64 [m], of a file that has `n`, in the file's order; repetitions follow.

        Raises:
          InputError: there are more than `MAX_ROWS`.
        """
        wanted = max(1, math.ceil(round(self.weight * n, 6))) if self.rows is None else self.rows
        if self.rows is None and wanted > MAX_ROWS:
            raise InputError(f"--data {shorten(self.path)}={self.weight:g}: makes {wanted} rows, more than {MAX_ROWS}")
        if self.strategy != "random":
            first = 0 if self.strategy == "first" else max(n - wanted, 0)
            return np.arange(n)[first : first + wanted]
        times, rest = divmod(wanted if self.rows is None else min(wanted, n), n)
        drawn = np.sort(np.random.default_rng(seed).choice(n, rest, replace=False))
        return np.concatenate([*[np.arange(n)] * times, drawn])


def read_parts(data: str | Sequence[str]) -> list[Part]:
    """Parse `FILE`, `FILE=WEIGHT`, `MIX.yaml`, or a list of these.

    Raises:
      InputError: a weight or a YAML file cannot be used.
    """
    parts = []
    for text in [data] if isinstance(data, str) else data:
        part = _parse_weight(text)
        if not part.path.lower().endswith((".yaml", ".yml")):
            parts.append(part)
        elif part.weight == 1:
            parts += _read_yaml(part.path)
        else:
            raise InputError(f"--data {shorten(text)}: a YAML file has its own sampling_strategy for each file")
    return parts


def choose(parts: Sequence[Part], sizes: Sequence[int], seed: int) -> list[np.ndarray]:
    """The rows, int64 [m], to use from each part, of files that have `sizes` rows.

    Raises:
      InputError: as `Part.choose`.
    """
    return [part.choose(size, (seed, i)) for i, (part, size) in enumerate(zip(parts, sizes, strict=True))]


def repeats(parts: Sequence[Part], chosen: Sequence[np.ndarray]) -> int:
    """The maximum number of times that a row occurs among the `chosen` rows of parts, which may name the same file."""
    chosen_of = collections.defaultdict(list)
    for part, rows in zip(parts, chosen, strict=True):
        chosen_of[part.path if "://" in part.path else os.path.realpath(part.path)].append(rows)
    return max(int(np.bincount(np.concatenate(rows)).max()) for rows in chosen_of.values())


def describe(parts: Sequence[Part]) -> str:
    """A short description of the files."""
    more = len(parts) - 1
    return shorten(parts[0].path) + (f" and {more} more file{'s' * (more > 1)}" if more else "")


def checksum(parts: Sequence[Part]) -> str:
    """SHA-256 of a file's bytes, or that of a prepared dataset's index; for several or a share of one, of their digests
    and shares.

    Raises:
      InputError: a file cannot be read.
    """
    digests = {path: _digest(path) for path in dict.fromkeys(part.path for part in parts)}
    if len(parts) == 1 and parts[0].weight == 1 and parts[0].rows is None:
        return digests[parts[0].path]
    lines = [f"{digests[part.path]} {part.strategy} {part.weight} {part.rows}\n" for part in parts]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    try:
        if is_prepared(path):
            return read_description(Store(path))["index"]
        with open_regular(path) as file:
            while chunk := file.read(2**24):
                digest.update(chunk)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--data {shorten(path)}: cannot be read ({reason})") from None
    return digest.hexdigest()


def _parse_weight(text: str) -> Part:
    path, equals, weight = text.rpartition("=")
    if not equals or os.path.exists(text):
        return Part(text)
    try:
        return Part(path, weight=WEIGHT(weight))
    except argparse.ArgumentTypeError:
        if not os.path.exists(path):  # the file is missing, and = may be part of its name
            return Part(text)
    raise InputError(f"--data {shorten(text)}: the weight after = must be {WEIGHT}")


class _Loader(yaml.SafeLoader):
    """Rejects aliases: lists of files do not need them, and a few hundred bytes of them can expand to terabytes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*name), which are not supported")
        return super().compose_node(parent, index)


def _read_yaml(path: str) -> list[Part]:
    name = f"--data {shorten(path)}"
    try:
        contents = yaml.load(read_text(path, MAX_YAML), _Loader)
    except InputError as error:
        raise InputError(f"--data {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: not YAML ({shorten(' '.join(str(error).split()))})") from None
    entries = contents.get("datasets") if isinstance(contents, dict) else None
    if not isinstance(entries, list) or not entries or len(contents) > 1:
        raise InputError(f"{name}: must have one key, datasets, with a list of json_path and sampling_strategy")
    parts = []
    for i, entry in enumerate(entries):
        where = f"{name}: datasets[{i}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
            raise InputError(f"{where} has no json_path")
        if unknown := [key for key in entry if key not in ("json_path", "sampling_strategy")]:
            raise InputError(f"{where}: {shorten(unknown[0], 40)} is unknown; use json_path and sampling_strategy")
        parts.append(_parse_strategy(entry["json_path"], entry.get("sampling_strategy", "all"), where))
    return parts


def _parse_strategy(path: str, strategy: object, where: str) -> Part:
    """Parse LLaVA-NeXT's `sampling_strategy`; a percentage is rounded up to a whole row, as there."""
    if strategy in ("all", None):
        return Part(path)
    kind, _, amount = str(strategy).partition(":")
    digits = amount.strip().removesuffix("%")
    if kind in STRATEGIES and digits.isascii() and digits.isdecimal() and int(digits[:12]) > 0:
        if not amount.strip().endswith("%"):
            return Part(path, kind, rows=int(digits[:12]))
        if int(digits[:12]) <= 100:
            return Part(path, kind, int(digits) / 100)
    raise InputError(
        f"{where}: sampling_strategy {shorten(strategy, 40)!r}: write all, or first, end or random, then : and a "
        "number of rows or of %"
    )
