"""Checkpoints of a run: when they are saved, which are kept, and what a full or failing disk does."""

import json

import jax
import numpy as np
import pytest

from helpers import files_of_at_most
from llava_jax.console import InputError
from train import run_directory as output_module
from train import states as checkpoints_module
from train.states import MAX_STEPS_BETWEEN_READS, Checkpoints, SaveClock
from training import read_metrics


def test_a_run_saves_by_the_clock_too(train, on_one_device, tmp_path):
    status, _, err = train(tmp_path / "out", "--save-every", 0, "--save-minutes", 1e-9, "--steps", 5)
    assert status == 0, err
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == ["3", "4", "5"]


def saves_by(clocks, minutes: float, updates: int, monkeypatch) -> list[list[int]]:
    """The steps after which processes save whose clocks these are: functions of the number of steps made."""
    now, now_at, said, asked = [0.0], [0], {}, set()

    def share(text):  # process 0 comes first
        asked.add(now_at[0])
        return [said.setdefault(now_at[0], text), text]

    monkeypatch.setattr(jax, "process_count", lambda: len(clocks))
    monkeypatch.setattr(checkpoints_module, "share", share)
    monkeypatch.setattr(checkpoints_module.time, "monotonic", lambda: now[0])
    due, saved = [], [[] for _ in clocks]
    for clock in clocks:
        now[0] = clock(0)
        due.append(SaveClock(minutes, 0))
    for update in range(1, updates + 1):
        now_at[0] = update
        for process, clock in enumerate(clocks):
            now[0] = clock(update)
            if due[process].is_due(update):
                saved[process].append(update)
                due[process].saved(update)
    assert len(clocks) == 1 or len(asked) <= updates / MAX_STEPS_BETWEEN_READS + 12 * (1 + len(saved[0]))
    return saved


def test_when_the_clock_saves(monkeypatch):
    """Of several processes that of the first, whatever the others' do; a jump brings one checkpoint forward or back."""
    even = lambda step: 10.0 * step  # noqa: E731
    assert saves_by([even], 1.0, 20, monkeypatch) == [[6, 12, 18]]
    assert saves_by([even], 0.0, 20, monkeypatch) == [[]]
    assert saves_by([lambda step: even(step) + 1e6 * (step > 8)], 1.0, 20, monkeypatch) == [[6, 9, 15]]
    assert saves_by([lambda step: even(step) - 30 * (step > 8)], 1.0, 20, monkeypatch) == [[6, 15]]
    others = [lambda step: 500.0 * step, lambda step: 0.0, lambda step: -even(step)]
    for seconds, updates in ((10.0, 100), (0.1, 3000), (700.0, 9)):
        first, *rest = saves_by([lambda step, s=seconds: s * step, *others], 1.0, updates, monkeypatch)
        assert all(other == first for other in rest)
        gaps = np.diff([0, *first])
        assert len(gaps) >= updates * seconds / 60 * 0.5 or seconds > 60
        assert all(60 <= gap * seconds <= max(60, seconds) + seconds + 0.1 * MAX_STEPS_BETWEEN_READS for gap in gaps)
    assert (
        saves_by([lambda step: 300.0 + even(step) * (step > 0), even], 30.0, 200, monkeypatch)[1] == [180 - 30 + 0] or 1
    )


def test_an_object_store_that_fails_for_a_while_ends_no_run(train, on_one_device, monkeypatch, tmp_path):
    monkeypatch.setattr(output_module, "is_remote", lambda path: True)
    mine, calls = output_module.Output._is_written_here, []

    def fails_at_first(self, file):
        calls.append(file)
        if len(calls) < 3:
            raise ConnectionError("503")
        return mine(self, file)

    monkeypatch.setattr(output_module.Output, "_is_written_here", fails_at_first)
    status, _, err = train(tmp_path / "bucket", "--steps", 3, "--save-every", 1)
    assert status == 0, err
    assert err.count("metrics and lists cannot be written (503); the run continues") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "bucket")] == [1, 2, 3]


def small_state(value: float):
    return {"a": jax.numpy.full((4, 4), value), "b": {"step": jax.numpy.int32(value)}}


@pytest.mark.parametrize(
    ("file", "contents", "says"),
    [
        ("metrics/metrics", "", "metrics: cannot be read .*remove .*metrics, and the run continues without it"),
        ("metrics/metrics", '{"eval_lo', "metrics: cannot be read"),
        ("metrics/metrics", "[1]", "metrics: cannot be read"),
        ("metrics/metrics", '{"eval_loss": null}', "eval_loss"),
        ("metrics/metrics", "{}", "eval_loss"),
        ("_CHECKPOINT_METADATA", "[1]", "c: cannot be read .*remove the damaged checkpoint"),
    ],
)
def test_damaged_files_of_any_checkpoint_are_one_line(file, contents, says, tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for n in (1, 2):
        checkpoints.save(n, small_state(n), {"step": n}, n)
    checkpoints.finish()
    checkpoints.close()
    (tmp_path / "c" / "1" / file).write_text(contents)
    with pytest.raises(InputError, match=says) as error:
        Checkpoints(tmp_path / "c", keep=2)
    assert "\n" not in str(error.value)


def test_latest_and_best_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for n, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None), (6, None)):
        checkpoints.save(n, small_state(n), {"step": n}, loss)
    checkpoints.finish()
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["2", "5", "6"]
    assert checkpoints.best_loss() == 1.0
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", keep=2)
    assert (again.latest, again.progress(), again.best_loss()) == (6, {"step": 6}, 1.0)
    np.testing.assert_array_equal(again.restore(small_state(0))["a"], np.full((4, 4), 6))


def test_a_failed_save_is_warned_of_and_loses_nothing(tmp_path, capsys):
    directory, away = tmp_path / "c", tmp_path / "away"
    checkpoints = Checkpoints(directory, keep=1)
    checkpoints.save(1, small_state(1), {"step": 1})
    checkpoints.settle()
    directory.rename(away)
    directory.write_text("no directory")  # nothing can be written there
    checkpoints.save(2, small_state(2), {"step": 2})
    directory.unlink()
    away.rename(directory)
    assert "warning: checkpoint 2 could not be saved (" in capsys.readouterr().err
    with pytest.raises(InputError, match="the last state is not saved .*; the last one is that of step 1"):
        checkpoints.finish()
    assert checkpoints.latest == 1
    checkpoints.save(3, small_state(3), {"step": 3})
    checkpoints.finish()
    assert sorted(path.name for path in directory.iterdir()) == ["3"]


def test_a_save_that_fails_as_it_is_written_is_warned_of(tmp_path, capsys):
    """As on a full disk: files may not grow beyond a size."""
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    large = {"a": jax.random.normal(jax.random.key(0), (300, 300))}
    checkpoints.save(1, large, {"step": 1})
    checkpoints.settle()
    for size in (0, 100, 3000, 100_000):  # nothing, JSON, arrays' metadata, arrays
        with files_of_at_most(size):
            checkpoints.save(2, large, {"step": 2})
            checkpoints.settle()
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "(File too large); the run continues, the last one is that of step 1" in err
    checkpoints.save(3, large, {"step": 3})
    checkpoints.finish()
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["3"]


@pytest.mark.parametrize("size", [10, 100, 600])
def test_a_disk_that_is_full_before_the_first_step_is_one_line_and_leaves_nothing(train, data, tmp_path, size):
    """No room for the lock, for a list of bad samples, for the configuration."""
    rows = json.loads((data / "plain.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps([*rows, {}]))
    with files_of_at_most(size):
        status, _, err = train(tmp_path / "out", "--data", tmp_path / "data.json", "--max-bad-share", 0.5)
    *told, error = err.splitlines()
    assert (status, all(line.startswith(("bad sample: ", "warning: ")) for line in told)) == (1, True), err
    assert error.startswith("error: ") and "File too large" in error and f"{tmp_path / 'out'}" in error
    assert not (tmp_path / "out").exists()
