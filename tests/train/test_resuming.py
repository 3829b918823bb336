"""A run that is stopped, killed or moved is resumed, by one process or several; a changed one is refused."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from helpers import ROOT
from llava_jax.checkpoints.orbax_files import open_ours
from train import loop
from train import run_directory as output_module
from train_processes import start, wait_for_steps
from training import CHECKPOINT, flags, mesh_of_one, read_metrics, steps_and_losses


def test_a_run_that_a_signal_stops_loses_no_step(train, finished, on_one_device, monkeypatch, tmp_path):
    output, asked = tmp_path / "out", loop.StopSignal.at

    def at(self, step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return asked(self, step)

    monkeypatch.setattr(loop.StopSignal, "at", at)
    status, _, err = train(output)
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 3 of 10; the same command resumes from there" in err
    assert [line["step"] for line in read_metrics(output)] == [1, 2, 3]
    monkeypatch.setattr(loop.StopSignal, "at", asked)
    status, _, err = train(output)
    assert status == 0, err
    assert "resuming after step 3 of 10" in err
    assert steps_and_losses(output) == steps_and_losses(finished[0])


def test_killed_before_its_first_checkpoint_a_run_starts_over_and_says_so(train, on_one_device, monkeypatch, tmp_path):
    """What the attempts had written is kept."""

    def at(self, step):
        if step == 4:
            raise RuntimeError("killed")
        return 0

    more = ("--save-every", 0, "--steps", 5)
    monkeypatch.setattr(loop.StopSignal, "at", at)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="killed"):
            train(tmp_path / "out", *more)
    monkeypatch.undo()
    monkeypatch.setattr("train.run.make_mesh", mesh_of_one)
    status, _, err = train(tmp_path / "out", *more)
    assert status == 0
    assert err.count("no checkpoint yet; starting from step 0\n") == 2  # the second attempt said so too
    kept = sorted(path.name for path in (tmp_path / "out").glob("metrics*"))
    assert kept == ["metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl"]
    assert [line["step"] for line in read_metrics(tmp_path / "out")] == [1, 2, 3, 4, 5]
    for name in kept[:2]:
        lines = [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3]


def test_an_object_store_gets_copies_of_what_is_appended_to(train, finished, on_one_device, monkeypatch, tmp_path):
    """A directory stands for the bucket: all that differs is where small files are kept meanwhile."""
    monkeypatch.setattr(output_module, "is_remote", lambda path: True)
    bucket = tmp_path / "bucket"
    monkeypatch.setattr(loop.StopSignal, "at", lambda self, step: signal.SIGTERM if step == 3 else 0)
    assert train(bucket)[0] == 128 + signal.SIGTERM
    monkeypatch.undo()
    monkeypatch.setattr(output_module, "is_remote", lambda path: True)
    monkeypatch.setattr("train.run.make_mesh", mesh_of_one)
    assert [line["step"] for line in read_metrics(bucket)] == [1, 2, 3]
    assert train(bucket)[0] == 0
    assert steps_and_losses(bucket) == steps_and_losses(finished[0])
    assert len(list((bucket / "events").iterdir())) == 2
    assert {"checkpoints", "config.json", "metrics.jsonl", "model"} <= {path.name for path in bucket.iterdir()}


def test_another_configuration_is_refused_with_its_differences(train, finished, data, tmp_path):
    output = finished[0]
    status, _, err = train(output, "--seed", "3", "--warmup-ratio", "0.5", "--workers", "2", "--log-every", "5")
    assert (status, err.count("\n")) == (1, 1)
    assert "warmup_ratio is 0.03 there and 0.5 here; seed is 0 there and 3 here; resume with" in err
    changed = tmp_path / "changed.json"
    changed.write_text((data / "plain.json").read_text() + " ")
    status, _, err = train(output, "--data", changed)
    assert status == 1
    assert "data_sha256 is" in err
    moved = shutil.copy(data / "plain.json", tmp_path / "moved.json")
    assert train(output, "--data", moved)[0] == 0


def test_the_input_checkpoint_may_move_but_not_change(train, on_one_device, monkeypatch, tmp_path):
    golden, moved = tmp_path / "a", tmp_path / "b"
    shutil.copytree(CHECKPOINT, golden)
    monkeypatch.setattr(loop.StopSignal, "at", lambda self, step: signal.SIGTERM if step == 1 else 0)
    assert train(tmp_path / "out", "--checkpoint", golden)[0] == 128 + signal.SIGTERM
    golden.rename(moved)
    (weights,) = moved.glob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    status, _, err = train(tmp_path / "out", "--checkpoint", moved)
    assert (status, err.count("\n")) == (1, 1) and "checkpoint_fingerprint is " in err
    weights.write_bytes(whole)
    monkeypatch.undo()
    status, _, err = train(tmp_path / "out", "--checkpoint", moved, "--mesh", "fsdp=8", "--steps", 10)
    assert status == 0
    assert "warning: this mesh does not divide the 4 rows of a batch; each gets 4 more, which stay empty: " in err
    assert "a batch holds about 16 conversations, as before\n" in err


# ---------------------------------------------------------------- in processes of their own


def test_killed_at_any_moment_a_run_computes_the_same():
    run = subprocess.run(
        [sys.executable, "benchmarks/train_kill.py", "--kills", "3", "--steps", "12", "--preset", "v1.5-pretrain"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert report["losses_equal"]
    assert report["models_equal"]
    assert [kill["too late"] for kill in report["kills"]] == [False] * 3


def test_two_processes_are_one_run(train, finished, on_one_device, monkeypatch, data, tmp_path):
    """They resume what one process on one device began. Process 1 is killed; process 0 says so in one line, and
    ends. Started again they end the run: the losses and the model of one process in one go."""
    output = tmp_path / "out"
    monkeypatch.setattr(loop.StopSignal, "at", lambda self, step: signal.SIGTERM if step == 3 else 0)
    assert train(output)[0] == 128 + signal.SIGTERM
    run = dict(stderr=subprocess.PIPE, text=True)
    started = start([*flags(data, output), "--heartbeat", 5], **run)
    wait_for_steps(output, 4, started[0])
    started[1].kill()
    begun = time.monotonic()
    said = started[0].communicate()[1]
    assert time.monotonic() - begun < 60
    assert started[0].returncode != 0
    assert said.splitlines()[-1].startswith("error: another process of this run died or is unreachable"), said
    assert 4 <= len(read_metrics(output)) < 10
    for process in start(flags(data, output), **run):
        said = process.communicate()[1]
        assert process.returncode == 0, said
    (steps, got), (_, wanted) = (zip(*steps_and_losses(one), strict=True) for one in (output, finished[0]))
    assert steps == tuple(range(1, 11))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    one, other = (open_ours(directory / "model").tensors for directory in (output, finished[0]))
    for path in one:
        np.testing.assert_allclose(one[path].read(), other[path].read(), rtol=1e-3, atol=1e-4, err_msg=path)


def test_an_image_that_one_process_cannot_read_stops_both(data, tmp_path):
    """Each says which, and ends with status 1: not aborted, and not with the advice to start again. Before that they
    train in bfloat16."""
    rows = json.loads((data / "plain.json").read_text())
    shutil.copytree(data / "images", tmp_path / "images")
    (tmp_path / "images" / "cut.png").write_bytes((data / "images" / rows[0]["image"]).read_bytes()[:60])
    rows = [*rows * 3, rows[-1] | {"image": "cut.png"}]  # more than are all read beforehand
    (tmp_path / "data.json").write_text(json.dumps(rows))
    more = ("--data", tmp_path / "data.json", "--image-folder", tmp_path / "images", "--on-bad-sample", "fail")
    run = dict(stderr=subprocess.PIPE, text=True)
    started = start(flags(data, tmp_path / "out", *more, "--dtype", "bfloat16", "--tune", "projector,decoder"), **run)
    for process in started:
        said = process.communicate()[1]
        assert process.returncode == 1, said
    assert "cut.png: broken image" in said
    assert read_metrics(tmp_path / "out")
