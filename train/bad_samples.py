"""The bad samples of a run: named, listed in a file, counted, and a reason to stop when they are too many."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from llava_jax.checkpoints.outputs import write_file
from llava_jax.console import InputError, note, shorten
from llava_jax.files import read_bytes
from llava_jax.json_files import parse_appended
from train.config import TrainConfig
from train.samples import MOST_NAMED, BadSample, SampleSource, describe_first

MAX_LIST = 2**30  # bytes of a list of bad samples
START = '{"data": '  # how each line of it starts
MOST_NOTED = 10  # bad samples that are named as they are met; the rest are only listed in a file
ENOUGH = 1000  # conversations that a share of bad ones is counted against, at least


class Listed(TypedDict):
    """A line of `bad_samples.jsonl`, as far as it is read."""

    data: str
    index: int


class BadSamples:
    """Bad samples of a run: named, listed, counted, and a reason to stop when they are too many.

    `bad_samples.jsonl` has each of them once, over epochs and restarts. Of several processes each finds out for itself
    about the images of its own rows; it lists them in a file of its own, and does not stop before `agree`, which all
    call at the same step: one that stopped alone would leave the others waiting for it.

    Attributes:
      count, seen: bad samples that all processes know of, among so many conversations; those met again count again.
      begun: whether the run has begun. One that is refused before writes no list; the error names the first bad ones.
      own, others: the images that this process found broken; that the others did, as of the last `agree`.
    """

    def __init__(
        self, config: TrainConfig, samples: SampleSource, folder: Path | None, process: int = 0, processes: int = 1
    ):
        """`folder` is where the list goes; None for nowhere."""
        self._config, self._samples, self._process, self._alone = config, samples, process, processes == 1
        self.count = self.seen = self.own = self.others = self._noted = 0
        self._failed = ""  # what is to stop all processes
        self._first: list[BadSample] = []  # to name in an error
        self.begun = False
        name = f"bad_samples.{process}.jsonl" if process else "bad_samples.jsonl"
        self._file = folder and folder / name
        self._listed = self._read()

    @property
    def total(self) -> int:
        """Bad samples met, as far as this process knows."""
        return self.count + self.own + self.others

    def add(self, bad: Sequence[BadSample], seen: int = 0, *, known_to_all: bool = False) -> None:
        """Count `bad` of `seen` more conversations.

        Raises:
          InputError: the run is to stop at a bad sample, or has met too many. If not all processes know of these, only
            `agree` raises it.
        """
        self.seen += seen
        if known_to_all:
            self.count += len(bad)
        else:
            self.own += len(bad)
        for one in bad:
            if len(self._first) < MOST_NAMED and (one.data, one.index) not in {(a.data, a.index) for a in self._first}:
                self._first.append(one)
        problem = bad[0].describe() if bad and self._config.on_bad_sample == "fail" else ""
        try:
            if known_to_all or self._alone:
                if problem:
                    raise InputError(problem)
                self._check(self.count + (self.own if self._alone else 0), self.seen)
        except InputError:
            if self.begun:
                self._list(bad, known_to_all)
            raise
        self._list(bad, known_to_all)
        self._failed = self._failed or problem

    def agree(self, share: Callable[[str], list[str]]) -> None:
        """Exchange with the other processes what only one of them knows. All call it at the same step.

        Args:
          share: a text of this process -> those of all.

        Raises:
          InputError: on all of them, for the reasons of `add`.
        """
        own = self.own  # threads continue to count
        reports = [
            json.loads(text) for text in share(json.dumps([self._process, own, self.count, self.seen, self._failed]))
        ]
        parts, owns, counts, seens, failures = zip(*reports, strict=True)
        of_all = sum(dict(zip(parts, owns, strict=True)).values())  # processes may have the same part of the rows
        self.others = of_all - own
        if any(failures):
            raise InputError(next(filter(None, failures)))
        self._check(max(counts) + of_all, max(seens))

    def begin(self) -> None:
        """Count from zero: the conversations looked at beforehand will be met again."""
        self.set_state((0, 0))
        self._first, self.begun = [], True

    def get_state(self) -> list[int]:
        """What a resumed run counts from."""
        return [self.total, self.seen]

    def set_state(self, state: Sequence[int]) -> None:
        self.count, self.seen = state

    def _check(self, count: int, seen: int) -> None:
        # A share is counted against a thousand conversations at least, or all there are. One row of a few is a large
        # share: one, as often as it comes in each pass over the data, is never too many, unless none is allowed.
        share, n = self._config.max_bad_share, len(self._samples)
        allowed = max(share * max(seen, min(n, ENOUGH)), -(-seen // n) * self._samples.repeats if share else 0)
        if count > allowed:
            where = f"; {self._file} lists them" if self._file and self.begun else ""
            named = f"; {describe_first(self._first, count, path=self._samples.path)}" if self._first else ""
            raise InputError(
                f"{self._samples.path}: bad samples: {count} among the first {max(seen, count)}, more "
                f"than --max-bad-share {share:g} allows{named}{where}"
            )

    def _list(self, bad: Sequence[BadSample], known_to_all: bool) -> None:
        if not known_to_all or self._process == 0:
            for one in bad:
                self._list_one(one)

    def _list_one(self, bad: BadSample) -> None:
        if (bad.data, bad.index) in self._listed:
            return
        self._listed.add((bad.data, bad.index))
        self._noted += 1
        if self._noted <= MOST_NOTED:
            note(f"bad sample: {bad.describe()}")
        if self._noted == MOST_NOTED:
            note("more bad samples are " + (f"listed in {self._file}" if self._file else "not named"))
        if self._file is None:
            return
        line = json.dumps(
            {name: getattr(bad, name) for name in ("data", "index", "id", "file", "reason")}, ensure_ascii=False
        )
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8", errors="backslashreplace") as file:  # half a character
                file.write(line + "\n")
        except OSError as error:  # a full disk, perhaps for a while
            note(f"warning: {self._file}: cannot be written ({error.strerror or error}); the run continues without it")
            self._file = None

    def _read(self) -> set[tuple[str, int]]:
        """What is listed already. A last line that was not written to its end is removed."""
        if self._file is None or not self._file.exists():
            return set()
        data = read_bytes(self._file, MAX_LIST)
        try:
            rows, whole = parse_appended(data, Listed, shorten(self._file), START)
        except InputError as error:
            raise InputError(f"{error}; it lists something else than bad samples: move it away") from None
        try:
            if whole != data:
                write_file(self._file, whole)
        except OSError as error:
            raise InputError(f"{self._file}: cannot be written ({error.strerror or error})") from None
        return {(row["data"], row["index"]) for row in rows}
