"""Bad samples of a run: log, list and count them, and stop the run when there are too many."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from llava_jax.checkpoints.outputs import write_file
from llava_jax.console import InputError, note, shorten
from llava_jax.files import read_bytes
from llava_jax.json_files import parse_appended
from train.config import TrainConfig
from train.samples import MAX_NAMED, BadSample, SampleSource, describe_first

MAX_LIST = 2**30  # bytes of a list of bad samples
START = '{"data": '  # of each line of the list
MAX_NOTED = 10  # bad samples that are logged; further ones are only listed in the file
MIN_COUNTED = 1000  # conversations that the share of bad ones is relative to, at least


class Listed(TypedDict):
    """The keys of a line of `bad_samples.jsonl` that are read."""

    data: str
    index: int


class BadSamples:
    """Logs, lists and counts the bad samples of a run, and raises `InputError` when there are too many.

    `bad_samples.jsonl` lists each bad sample once, over epochs and restarts. With several processes, each process
    detects the broken images of its shard, lists them in its own file, and raises only in `agree`, which all
    processes call at the same step: a process that stops alone would leave the others waiting.

    Attributes:
      count, seen: bad samples that all processes know of, and conversations seen; repeated ones count again.
      begun: whether the run has begun. A run refused before that writes no list; the error names the first bad samples.
      own, others: broken images found by this process, and by the others as of the last `agree`.
    """

    def __init__(
        self, config: TrainConfig, samples: SampleSource, folder: Path | None, process: int = 0, processes: int = 1
    ):
        """`folder`: the directory of the list; None: no list is written."""
        self._config, self._samples, self._process, self._alone = config, samples, process, processes == 1
        self.count = self.seen = self.own = self.others = self._noted = 0
        self._failed = ""  # the error that `agree` raises on all processes
        self._first: list[BadSample] = []  # for errors
        self.begun = False
        name = f"bad_samples.{process}.jsonl" if process else "bad_samples.jsonl"
        self._file = folder and folder / name
        self._listed = self._read()

    @property
    def total(self) -> int:
        """Bad samples so far, as far as this process knows."""
        return self.count + self.own + self.others

    def add(self, bad: Sequence[BadSample], seen: int = 0, *, known_to_all: bool = False) -> None:
        """Count `bad` among `seen` more conversations.

        Raises:
          InputError: `on_bad_sample` is "fail", or there are too many. If not all processes know of these samples,
            only `agree` raises it.
        """
        self.seen += seen
        if known_to_all:
            self.count += len(bad)
        else:
            self.own += len(bad)
        for one in bad:
            if len(self._first) < MAX_NAMED and (one.data, one.index) not in {(a.data, a.index) for a in self._first}:
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
        """Exchange counts and errors with the other processes. All processes call it at the same step.

        Args:
          share: sends a text of this process, and returns those of all.

        Raises:
          InputError: on all processes, as `add`.
        """
        own = self.own  # other threads continue to count
        reports = [
            json.loads(text) for text in share(json.dumps([self._process, own, self.count, self.seen, self._failed]))
        ]
        parts, owns, counts, seens, failures = zip(*reports, strict=True)
        of_all = sum(dict(zip(parts, owns, strict=True)).values())  # several processes may load the same rows
        self.others = of_all - own
        if any(failures):
            raise InputError(next(filter(None, failures)))
        self._check(max(counts) + of_all, max(seens))

    def begin(self) -> None:
        """Restart the count at zero: the run reads the surveyed conversations again."""
        self.set_state((0, 0))
        self._first, self.begun = [], True

    def get_state(self) -> list[int]:
        """The counts that a resumed run continues from."""
        return [self.total, self.seen]

    def set_state(self, state: Sequence[int]) -> None:
        self.count, self.seen = state

    def _check(self, count: int, seen: int) -> None:
        # The share is relative to at least a thousand conversations, or to all if there are fewer. One row of a small
        # dataset is a large share, so one row, with its repetitions, is always allowed unless the share is 0.
        share, n = self._config.max_bad_share, len(self._samples)
        allowed = max(share * max(seen, min(n, MIN_COUNTED)), -(-seen // n) * self._samples.repeats if share else 0)
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
        if self._noted <= MAX_NOTED:
            note(f"bad sample: {bad.describe()}")
        if self._noted == MAX_NOTED:
            note("further bad samples are " + (f"listed in {self._file}" if self._file else "not logged"))
        if self._file is None:
            return
        line = json.dumps(
            {name: getattr(bad, name) for name in ("data", "index", "id", "file", "reason")}, ensure_ascii=False
        )
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8", errors="backslashreplace") as file:  # half a character
                file.write(line + "\n")
        except OSError as error:  # for example, the disk is full
            note(f"warning: {self._file}: cannot be written ({error.strerror or error}); the run continues without it")
            self._file = None

    def _read(self) -> set[tuple[str, int]]:
        """Read the bad samples already listed. An incomplete last line is removed."""
        if self._file is None or not self._file.exists():
            return set()
        data = read_bytes(self._file, MAX_LIST)
        try:
            rows, whole = parse_appended(data, Listed, shorten(self._file), START)
        except InputError as error:
            raise InputError(f"{error}; this is not a list of bad samples: move the file away") from None
        try:
            if whole != data:
                write_file(self._file, whole)
        except OSError as error:
            raise InputError(f"{self._file}: cannot be written ({error.strerror or error})") from None
        return {(row["data"], row["index"]) for row in rows}
