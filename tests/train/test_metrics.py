"""The metrics of a run: shares of a chip's peak, and the events that TensorBoard reads."""

import collections
import contextlib
import itertools
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from helpers import files_of_at_most
from train.metrics import Events, MetricsFiles
from training import read_metrics


def read_events(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a directory: (step, value) by tag."""
    shown = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def test_tensorboard_events_say_what_the_metrics_say(finished):
    output, _ = finished
    want = collections.defaultdict(list)
    for line in read_metrics(output):
        for name in line.keys() - {"step"}:
            want[name].append((line["step"], pytest.approx(line[name], rel=1e-6)))
    assert read_events(output / "events") == want


def test_a_resumed_run_replaces_its_events(tmp_path):
    for first, last in ((1, 5), (3, 4)):
        files = MetricsFiles(tmp_path, first - 1)
        for number in range(first, last + 1):
            files.write({"step": number, "loss": float(10 * first + number)})
        files.close()
    assert read_events(tmp_path / "events") == {"loss": [(1, 11.0), (2, 12.0), (3, 33.0), (4, 34.0)]}


def test_events_are_whole_whatever_the_clock_says(monkeypatch, tmp_path):
    """What waits or saves asks how much time has passed, not for the time of day."""
    times = itertools.cycle([1e9, 2e9, -5.0, 0.0, 4e9, 1e9, 1e9])
    monkeypatch.setattr(time, "time", lambda: next(times))
    for first in (1, 3):
        events = Events(tmp_path, first)
        for number in (first, first + 1):
            events.write(number, {"loss": 1.0})
        events.close()
    steps = {event.step for path in tmp_path.iterdir() for event in EventFileLoader(str(path)).Load()}
    assert steps == {0, 1, 2, 3, 4}


def test_events_follow_when_a_full_disk_has_room_again(tmp_path):
    events = Events(tmp_path, 1)
    events.write(1, {"loss": 1.0})
    [file] = tmp_path.iterdir()
    with files_of_at_most(file.stat().st_size + 100):
        for number in range(2, 400):
            with contextlib.suppress(OSError):
                events.write(number, {"loss": float(number)})
    assert file.stat().st_size < 400
    events.write(400, {"loss": 400.0})
    events.close()
    assert read_events(tmp_path) == {"loss": [(number, float(number)) for number in range(1, 401)]}


def test_metrics_on_a_full_disk_end_no_run(capsys, tmp_path):
    files = MetricsFiles(tmp_path, 0)
    files.file = open("/dev/full", "a")  # noqa: SIM115
    for i in (1, 2):
        files.write({"step": i, "loss": 1.0})
    files.close()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "metrics cannot be written (No space left on device); the run continues" in err
    assert list((tmp_path / "events").iterdir())
