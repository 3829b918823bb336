"""Write the metrics of each step: metrics.jsonl, TensorBoard events."""

import contextlib
import itertools
import json
import math
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import jax

from llava_jax.console import InputError, note, shorten
from llava_jax.files import read_bytes
from llava_jax.json_files import parse_appended

MAX_METRICS = 2**30  # bytes of metrics.jsonl
START = '{"step": '  # of each line


def device_memory() -> float | None:
    """Peak memory use of this process's first device so far, in GB; None if the backend does not report it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return round(stats["peak_bytes_in_use"] / 1e9, 3) if "peak_bytes_in_use" in stats else None


class MetricsFiles:
    """Appends to `metrics.jsonl` and `events/`. A resumed run drops the lines after its state.

    A run without a state to resume from starts a new file, and keeps the old one as `metrics.1.jsonl`, or with the next
    free number. (TensorBoard itself drops repeated events.)

    A full disk does not stop a run: it logs a warning, and writes the missing events later.
    """

    def __init__(self, directory: Path, step: int):
        """Open the files.

        Raises:
          InputError: they cannot be written, or `metrics.jsonl` does not hold metrics.
        """
        self.path, self.warned = directory / "metrics.jsonl", False
        try:
            if step == 0 and self.path.exists() and self.path.stat().st_size:
                self.path.rename(
                    next(path for n in itertools.count(1) if not (path := _numbered(self.path, n)).exists())
                )
            kept = [line for line in read_metrics(self.path) if line["step"] <= step]
            written = self.path.with_suffix(".new")
            written.write_text("".join(json.dumps(line) + "\n" for line in kept))
            written.replace(self.path)
            self.file = self.path.open("a")
            self.events = Events(directory / "events", step + 1)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror or error})") from None

    def write(self, record: dict[str, Any]) -> None:
        """Write `record`: `step` first, then numbers. A number that is not finite becomes null."""
        plain = {name: value if _is_finite(value) else None for name, value in record.items()}
        scalars = {name: float(value) for name, value in plain.items() if name != "step" and value is not None}
        with self._warn_once():
            self.file.write(json.dumps(plain) + "\n")
            self.file.flush()
        with self._warn_once():
            self.events.write(record["step"], scalars)

    def close(self) -> None:
        with self._warn_once():
            self.file.close()
        with self._warn_once():
            self.events.close()

    @contextlib.contextmanager
    def _warn_once(self):
        try:
            yield
        except OSError as error:
            if not self.warned:
                reason = error.strerror or error
                note(f"warning: {self.path.parent}: metrics cannot be written ({reason}); the run continues")
            self.warned = True


class Events:
    """Writes scalars to a new TensorBoard event file in `directory`; TensorBoard shows all its files as one run.

    When a resumed run repeats steps, TensorBoard drops earlier events from `restart_step` on.

    This uses tensorboardX's protocol buffers and record format, not its `SummaryWriter`: that one writes in a thread,
    where a full disk ends the thread and then, once its queue is full, stops the run.
    """

    def __init__(self, directory: Path, restart_step: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # here, as it imports torch where there is one
        from tensorboardX.record_writer import RecordWriter

        directory.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # In the form that TensorBoard looks for; with nanoseconds, as a file of the same name would be overwritten.
        name = f"events.out.tfevents.{now:.0f}.{socket.gethostname()}.{time.time_ns()}"
        self.file = RecordWriter(str(directory / name))
        self.pending = [
            Event(wall_time=now, file_version="brain.Event:2"),
            Event(wall_time=now, step=restart_step, session_log=SessionLog(status=SessionLog.START)),
        ]
        self._write_pending()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Raises:
        OSError: for example, the disk is full; the next call writes the missing events.
        """
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self.pending.append(Event(step=step, summary=Summary(value=values), wall_time=time.time()))
        self._write_pending()

    def close(self) -> None:
        self.file.close()

    def _write_pending(self) -> None:
        while self.pending:
            self._flush()  # a record is several writes: all of them go into an empty buffer, or none is made
            self.file.write(self.pending.pop(0).SerializeToString())
        self._flush()

    def _flush(self) -> None:
        """Without the fsync of `RecordWriter.flush`, which takes 5 ms on a local disk, and more on a network's."""
        self.file._writer.flush()


def _numbered(path: Path, n: int) -> Path:
    return path.with_name(f"{path.stem}.{n}{path.suffix}")


def _is_finite(value: Any) -> bool:
    return value is None or math.isfinite(value)


class _Line(TypedDict):
    step: int


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the metrics in a file, except for an incomplete last line. A missing file has none.

    Raises:
      InputError: the file holds something else.
    """
    if not path.exists():
        return []
    try:
        return parse_appended(read_bytes(path, MAX_METRICS), _Line, shorten(path), START)[0]
    except InputError as error:
        raise InputError(f"{error}; correct or remove the line, or move the file away") from None
