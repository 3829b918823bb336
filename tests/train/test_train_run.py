"""`python -m train` as people run it: a run and its files, interrupted and gone on with; one line for bad input."""

import dataclasses
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from helpers import GOLDEN, ROOT, files_of_at_most, golden_tensors, write_checkpoint
from llava_jax.checkpoints.checkpoint import open_any, open_checkpoint
from llava_jax.checkpoints.orbax_files import open_ours
from llava_jax.config import preset, tiny
from llava_jax.console import InputError
from llava_jax.sharding.mesh import make_mesh
from train import __main__ as command
from train import loop, step, tensorboard
from train import run_directory as output_module
from train import states as checkpoints_module
from train.config import PRESETS, TrainConfig, check_preset
from train.metrics import MetricsFiles, device_peak, flops_of_batch
from train.results import export
from train.run_directory import Output
from train.states import LOOK_EVERY, Checkpoints, SaveClock
from train_processes import start, wait_for_updates

CHECKPOINT = GOLDEN / "checkpoints/v1.5-llama"
NEXT = GOLDEN / "checkpoints/v1.6-mistral"
WORDS = ("cat", "dog", "tree", "house", "street")


def mesh_of_one(sizes):
    """Whatever was asked for: one of the eight devices."""
    return make_mesh({}, jax.devices()[:1])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty conversations; those with a picture, as stage 1 wants them; half of these for evaluation."""
    directory = tmp_path_factory.mktemp("data")
    shutil.copytree(GOLDEN / "images", directory / "images")
    names = sorted(path.name for path in (directory / "images").iterdir())
    rows = []
    for i in range(20):
        question = "What is this?" if i % 5 == 0 else "<image>\nWhat is this?"
        answer = " ".join(WORDS[(i * k) % 5] for k in range(1, 3 + i % 4))
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"r{i}", "conversations": turns} | ({"image": names[i % len(names)]} if i % 5 else {}))
    (directory / "data.json").write_text(json.dumps(rows))
    pictured = [row for row in rows if "image" in row]
    (directory / "plain.json").write_text(json.dumps(pictured))
    (directory / "eval.json").write_text(json.dumps(pictured[::2]))
    return directory


def flags(data, output, *more) -> list[str]:
    """A short stage 1; a later flag wins, but for `--data`, of which there may be several."""
    own = () if "--data" in more else ("--data", data / "plain.json")
    return [str(part) for part in (
        "--preset", "v1.5-pretrain", "--checkpoint", CHECKPOINT, *own, "--image-folder", data / "images",
        "--output", output, "--global-batch-size", 16, "--max-length", 128, "--dtype", "float32",
        "--learning-rate", 1e-2, "--workers", 1, "--steps", 10, "--save-every", 2, *more,
    )]  # fmt: skip


@pytest.fixture
def one_device(monkeypatch):
    """Runs in this process use one of its eight devices: that compiles faster."""
    monkeypatch.setattr(loop, "make_mesh", mesh_of_one)


@pytest.fixture
def train(run_cli, data):
    """Run the command: (exit status, standard output, standard error)."""
    return lambda output, *more: run_cli(command.main, *flags(data, output, *more))


def read_metrics(output) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def steps_and_losses(output) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(output)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """An undisturbed run, evaluated and traced on the way: its directory, and what it said."""
    output = tmp_path_factory.mktemp("finished") / "out"
    more = ("--eval-data", data / "eval.json", "--eval-every", 5, "--keep", 1, "--profile-steps", "2:3")
    with pytest.MonkeyPatch.context() as patch, open(output.parent / "said", "w+") as said:
        patch.setattr(loop, "make_mesh", mesh_of_one)
        patch.setattr("sys.stderr", said)
        _, config = command.read_config(flags(data, output, *more))
        assert loop.train(loop.prepare(config)) == 0
    return output, (output.parent / "said").read_text()


# ---------------------------------------------------------------- a run and its files


def test_metrics(finished):
    output, said = finished
    lines = read_metrics(output)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    for line in lines:
        assert {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "images_per_second"} <= line.keys()
        assert 0 <= line["data_wait"] <= 1
        assert 0 < line["labelled"] < line["tokens"]
    assert [line["step"] for line in lines if "eval_loss" in line] == [5, 10]
    assert lines[9]["eval_loss"] < lines[4]["eval_loss"] < lines[0]["loss"]
    assert "first step" in said


def test_the_configuration_in_force_is_kept(finished, data):
    kept = json.loads((finished[0] / "config.json").read_text())
    del kept["data_sha256"]
    preset = dataclasses.asdict(PRESETS["v1.5-pretrain"])
    changed = {name for name in preset if json.loads(json.dumps(preset[name])) != kept[name]}
    given = {flag[2:].replace("-", "_") for flag in map(str, flags(data, "")) if flag.startswith("--")}
    assert changed == given - {"preset"} | {"eval_data", "eval_every", "keep", "profile_steps"}
    assert (kept["learning_rate"], kept["steps"], kept["template"]) == (0.01, 10, "plain")


def test_what_is_said_of_a_configuration_is_what_differs_from_its_preset():
    given = ["--checkpoint", "org/model", "--data", "/d.json", "--output", "/out"]
    _, config = command.read_config([*given, "--preset", "v1.5-finetune", "--steps", "5"])
    said = "data /d.json, steps 5, checkpoint org/model, output /out"
    assert command.describe("v1.5-finetune", config) == f"preset v1.5-finetune with {said}"
    _, config = command.read_config(given)
    assert command.describe(None, config) == "defaults with data /d.json, checkpoint org/model, output /out"


def test_peak_share():
    """Of one layer, by hand; six operations a weight and position where it is trained, four where it is not."""
    assert [device_peak(kind) for kind in ("TPU v5 lite", "TPU v5p", "TPU v6 lite", "cpu")] == [
        197e12,
        459e12,
        918e12,
        None,
    ]
    model = tiny(merge="flat", aspect_ratio="pad")
    weights = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)  # q, k and v, o, feed-forward, of two layers
    attention = 2 * 2 * 4 * 8 * 3 * 100**2  # forward
    tower = 2 * 2 * 3 * 5 * 17 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 4 * 16 * 3 * 5 * 17 * 17
    got = flops_of_batch(model, TrainConfig(), rows=3, length=100, tiles=5)
    assert got == 6 * weights * 300 + 3 * attention + tower
    got = flops_of_batch(model, TrainConfig(tune="projector"), rows=3, length=100, tiles=5)
    assert got == 4 * weights * 300 + 3 * attention + tower


def test_trace_is_written(finished):
    assert list((finished[0] / "profile").rglob("*.xplane.pb"))


def read_records(path: Path) -> list[bytes]:
    data, records = path.read_bytes(), []
    while data:
        (n,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == tensorboard.masked_crc32c(data[:8])
        assert struct.unpack("<I", data[12 + n : 16 + n])[0] == tensorboard.masked_crc32c(data[12 : 12 + n])
        records.append(data[12 : 12 + n])
        data = data[16 + n :]
    return records


def parse_message(data: bytes) -> list[tuple[int, object]]:
    """Fields of a protobuf message: (number, value); bytes where it has a length."""

    def varint():
        nonlocal data
        n = shift = 0
        while True:
            byte, data = data[0], data[1:]
            n, shift = n | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return n

    fields = []
    while data:
        number, kind = divmod(varint(), 8)
        if kind == 0:
            value = varint()
        elif kind == 2:
            n = varint()
            value, data = data[:n], data[n:]
        else:
            n, code = {1: (8, "<d"), 5: (4, "<f")}[kind]
            (value,), data = struct.unpack(code, data[:n]), data[n:]
        fields.append((number, value))
    return fields


def test_tensorboard_events_say_what_the_metrics_say(finished):
    output, _ = finished
    [file] = (output / "events").iterdir()
    version, start, *events = (dict(parse_message(record)) for record in read_records(file))
    assert (version[3], start[2], start[7]) == (b"brain.Event:2", 1, b"\x08\x01")
    for event, line in zip(events, read_metrics(output), strict=True):
        assert event[2] == line["step"]
        values = [dict(parse_message(value)) for _, value in parse_message(event[5])]
        got = {value[1].decode(): value[2] for value in values}
        assert got == {name: pytest.approx(value, rel=1e-6) for name, value in line.items() if name != "step"}


def test_events_are_whole_whatever_the_clock_says(monkeypatch, tmp_path):
    """It is the one place that asks for the time of day; all that waits or saves asks how much of it has passed."""
    times = iter([1e9, 2e9, -5.0, 0.0, 4e9, 1e9, 1e9])
    monkeypatch.setattr(tensorboard.time, "time", lambda: next(times))
    for first in (1, 3):
        events = tensorboard.EventWriter(tmp_path, first)
        for number in (first, first + 1):
            events.write(number, {"loss": 1.0})
        events.close()
    steps = [dict(parse_message(record)).get(2) for path in tmp_path.iterdir() for record in read_records(path)]
    assert sorted(filter(None, steps)) == [1, 1, 2, 3, 3, 4]


def test_crc32c():
    """RFC 3720, B.4, masked as TFRecord does."""
    crc = 0x8A9136AA  # of 32 zero bytes
    assert tensorboard.masked_crc32c(bytes(32)) == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def test_the_same_command_after_the_end_does_nothing(train, finished):
    output, _ = finished
    before = (output / "metrics.jsonl").stat().st_mtime_ns
    status, _, err = train(output)
    assert status == 0
    assert "holds the finished run: 10 updates" in err
    assert (output / "metrics.jsonl").stat().st_mtime_ns == before


# ---------------------------------------------------------------- the result


def changed_paths(output) -> set[str]:
    before, after = open_checkpoint(CHECKPOINT).source().tensors, open_ours(output / "model").tensors
    assert before.keys() == after.keys()
    assert all(before[path].dtype == after[path].dtype for path in before)
    return {path for path in before if not np.array_equal(before[path].read(), after[path].read())}


def test_what_eight_devices_write_is_what_one_writes(train, data, monkeypatch, tmp_path):
    """Every weight is trained, cut and put together again."""
    full = (
        "--preset", "v1.5-finetune", "--tune", "projector,decoder,vision", "--data", data / "data.json", "--steps", 2,
        "--mesh", "data=2,fsdp=2,tensor=2", "--adam-eps", 0.01, "--global-batch-size", 8,
    )  # fmt: skip
    for output in ("eight", "one"):
        status, _, err = train(tmp_path / output, *full)
        assert status == 0, err
        monkeypatch.setattr(loop, "make_mesh", mesh_of_one)
    eight, one = (open_ours(tmp_path / output / "model").tensors for output in ("eight", "one"))
    assert eight.keys() == one.keys()
    moved = {path for path in one if not path.endswith("k/bias")}  # attention takes no notice of that
    assert moved <= changed_paths(tmp_path / "eight")
    for path in moved:
        np.testing.assert_allclose(eight[path].read(), one[path].read(), atol=1e-6, err_msg=path)


def test_stage_1_changes_the_projector_alone(finished):
    assert changed_paths(finished[0]) == {
        f"projector/linear_{i}/{name}" for i in range(2) for name in ("kernel", "bias")
    }


def test_what_is_frozen_is_bit_for_bit_what_it_was_whatever_the_run_computes_in(data, tmp_path):
    """The checkpoint is in float32; the decoder's copy on the devices is not."""
    _, config = command.read_config(flags(data, tmp_path / "out", "--dtype", "bfloat16"))
    found, mesh = open_checkpoint(CHECKPOINT), make_mesh({}, jax.devices()[:1])
    params = found.load(mesh, lambda path: step.load_dtype(path, config))
    frozen, state, _, _ = step.setup(params, found.config, config, mesh, 6)
    assert frozen["decoder"]["embed"]["embedding"].dtype == jax.numpy.bfloat16
    export(Output(config), found, found.config, config, state)
    assert changed_paths(tmp_path / "out") == set()


def test_the_result_in_transformers_format_is_the_same_model(train, one_device, tmp_path):
    """It may be asked for afterwards."""
    assert train(tmp_path / "out")[0] == 0
    status, _, err = train(tmp_path / "out", "--export-hf")
    assert status == 0, err
    ours, theirs = (open_any(tmp_path / "out" / name) for name in ("model", "hf"))
    assert ours.unused.keys() == theirs.unused.keys() != set()  # what LLaVA does not use came along
    for tensors in ("tensors", "unused"):
        for path, tensor in getattr(ours, tensors).items():
            mine, other = tensor.read(), getattr(theirs, tensors)[path].read()
            if path in ("decoder/embed/embedding", "decoder/head/kernel"):  # the vocabulary has grown
                other = other[: mine.shape[0], : mine.shape[1]]
            np.testing.assert_array_equal(mine, other, err_msg=path)


def test_export_that_transformers_cannot_hold_is_refused_beforehand(train, one_device, tmp_path):
    linear = GOLDEN / "checkpoints" / "v1-linear-llama"
    status, _, err = train(tmp_path / "out", "--checkpoint", linear, "--export-hf")
    assert status == 1
    assert "linear projector" in err.splitlines()[-1]


def test_the_model_answers(finished):
    from infer import load

    model = load(finished[0] / "model", mesh=make_mesh({}, jax.devices()[:1]))
    assert model.template_name == "llava_v1"  # `plain` is for training alone
    assert model.ask("What is this?", [GOLDEN / "images/0_64x48.png"], max_new_tokens=2).token_ids


def test_a_run_is_no_checkpoint_but_its_model_is(finished):
    with pytest.raises(InputError, match=r"out: a training run; the model that it made is .*out/model$"):
        open_checkpoint(finished[0])


def test_lora_gives_an_adapter_and_the_merged_model(train, one_device, data, tmp_path):
    from safetensors.numpy import load_file

    output = tmp_path / "out"
    status, _, err = train(
        output, "--preset", "v1.5-finetune-lora", "--data", data / "data.json", "--lora-rank", 4, "--lora-alpha", 8,
        "--global-batch-size", 8, "--save-every", 0,
    )  # fmt: skip
    assert status == 0, err
    lines = read_metrics(output)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    before, after = open_checkpoint(CHECKPOINT).source().tensors, open_ours(output / "model").tensors
    targets = tuple(f"/{name}/kernel" for name in PRESETS["v1.5-finetune-lora"].lora_targets)
    layers = {path for path in before if path.startswith("decoder/layers/") and path.endswith(targets)}
    assert changed_paths(output) == layers | {path for path in before if path.startswith("projector/")}
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    name, path = "base_model.model.model.layers.0.self_attn.q_proj", "decoder/layers/0/attention/q/kernel"
    update = 2.0 * (adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]).T
    np.testing.assert_allclose(after[path].read(), before[path].read() + update, rtol=1e-6, atol=1e-7)
    with pytest.raises(InputError, match=r"adapter: an adapter; `python -m convert to-orbax` merges it"):
        open_checkpoint(output / "adapter")


# ---------------------------------------------------------------- going on


def test_told_to_stop_a_run_loses_no_update(train, finished, one_device, monkeypatch, tmp_path):
    output, asked = tmp_path / "out", loop.StopSignal.at

    def at(self, step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return asked(self, step)

    monkeypatch.setattr(loop.StopSignal, "at", at)
    status, _, err = train(output)
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after update 3 of 10; the same command goes on from there" in err
    assert [line["step"] for line in read_metrics(output)] == [1, 2, 3]
    monkeypatch.setattr(loop.StopSignal, "at", asked)
    status, _, err = train(output)
    assert status == 0, err
    assert "going on after update 3 of 10" in err
    assert steps_and_losses(output) == steps_and_losses(finished[0])


def test_killed_before_its_first_checkpoint_a_run_starts_over_and_says_so(train, one_device, monkeypatch, tmp_path):
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
    monkeypatch.setattr(loop, "make_mesh", mesh_of_one)
    status, _, err = train(tmp_path / "out", *more)
    assert status == 0
    assert err.count("no checkpoint yet; starting from step 0\n") == 2  # the second attempt said so too
    kept = sorted(path.name for path in (tmp_path / "out").glob("metrics*"))
    assert kept == ["metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl"]
    assert [line["step"] for line in read_metrics(tmp_path / "out")] == [1, 2, 3, 4, 5]
    for name in kept[:2]:
        lines = [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3]


def test_a_run_saves_by_the_clock_too(train, one_device, tmp_path):
    status, _, err = train(tmp_path / "out", "--save-every", 0, "--save-minutes", 1e-9, "--steps", 5)
    assert status == 0, err
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == ["3", "4", "5"]


def saves_by(clocks, minutes: float, updates: int, monkeypatch) -> list[list[int]]:
    """The updates after which processes save whose clocks these are: functions of the number of updates made."""
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
    assert len(clocks) == 1 or len(asked) <= updates / LOOK_EVERY + 12 * (1 + len(saved[0]))
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
        assert all(60 <= gap * seconds <= max(60, seconds) + seconds + 0.1 * LOOK_EVERY for gap in gaps)
    assert (
        saves_by([lambda step: 300.0 + even(step) * (step > 0), even], 30.0, 200, monkeypatch)[1] == [180 - 30 + 0] or 1
    )


def test_an_object_store_gets_copies_of_what_is_appended_to(train, finished, one_device, monkeypatch, tmp_path):
    """A directory stands for the bucket: all that differs is where small files are kept meanwhile."""
    monkeypatch.setattr(output_module, "is_remote", lambda path: True)
    bucket = tmp_path / "bucket"
    monkeypatch.setattr(loop.StopSignal, "at", lambda self, step: signal.SIGTERM if step == 3 else 0)
    assert train(bucket)[0] == 128 + signal.SIGTERM
    monkeypatch.undo()
    monkeypatch.setattr(output_module, "is_remote", lambda path: True)
    monkeypatch.setattr(loop, "make_mesh", mesh_of_one)
    assert [line["step"] for line in read_metrics(bucket)] == [1, 2, 3]
    assert train(bucket)[0] == 0
    assert steps_and_losses(bucket) == steps_and_losses(finished[0])
    assert len(list((bucket / "events").iterdir())) == 2
    assert {"checkpoints", "config.json", "metrics.jsonl", "model"} <= {path.name for path in bucket.iterdir()}


def test_an_object_store_that_fails_for_a_while_ends_no_run(train, one_device, monkeypatch, tmp_path):
    monkeypatch.setattr(output_module, "is_remote", lambda path: True)
    mine, calls = output_module.Output._is_mine, []

    def fails_at_first(self, file):
        calls.append(file)
        if len(calls) < 3:
            raise ConnectionError("503")
        return mine(self, file)

    monkeypatch.setattr(output_module.Output, "_is_mine", fails_at_first)
    status, _, err = train(tmp_path / "bucket", "--steps", 3, "--save-every", 1)
    assert status == 0, err
    assert err.count("metrics and lists cannot be written (503); the run goes on") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "bucket")] == [1, 2, 3]


def test_metrics_on_a_full_disk_end_no_run(capsys, tmp_path):
    files = MetricsFiles(tmp_path, 0)
    files.file = open("/dev/full", "a")  # noqa: SIM115
    for i in (1, 2):
        files.write({"step": i, "loss": 1.0})
    files.close()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "metrics cannot be written (No space left on device); the run goes on" in err
    assert list((tmp_path / "events").iterdir())


def test_an_evaluation_that_cannot_be_made_ends_no_run(train, data, one_device, tmp_path):
    rows = json.loads((data / "eval.json").read_text())
    shutil.copytree(data / "images", tmp_path / "images")
    (tmp_path / "images" / "cut.png").write_bytes((data / "images" / rows[0]["image"]).read_bytes()[:60])
    (tmp_path / "eval.json").write_text(json.dumps([rows[0], *[row | {"image": "cut.png"} for row in rows[1:]]]))
    more = ("--eval-data", tmp_path / "eval.json", "--image-folder", tmp_path / "images", "--steps", 2)
    status, _, err = train(tmp_path / "out", *more)
    assert status == 0, err
    assert "warning: no evaluation: " in err and "bad samples: " in err
    assert (tmp_path / "out" / "model" / "config.json").exists()


def test_an_evaluation_on_the_training_data_and_on_text_alone(train, data, one_device, tmp_path):
    rows = [row for row in json.loads((data / "data.json").read_text()) if "image" not in row]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    both = ("--eval-data", data / "plain.json", "--eval-data", tmp_path / "text.json")
    for files in (both, both[2:]):
        status, _, err = train(tmp_path / str(len(files)), *files, "--steps", 2, "--template", "v1")
        assert status == 0, err
        assert "evaluation after update 2: loss" in err and "warning: no evaluation" not in err


FATES = {  # of an image, while a run goes on
    "is gone": (Path.unlink, "no such image"),
    "is a directory": (lambda path: (path.unlink(), path.mkdir()), "a directory, not a file"),
    "is a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "a pipe, not a file"),
    "is broken": (lambda path: path.write_bytes(path.read_bytes()[:60]), "broken image"),
    "is text": (lambda path: path.write_text("hello"), "not an image"),
}


def test_what_becomes_of_images_while_a_run_goes_on_ends_no_run(train, data, one_device, monkeypatch, tmp_path):
    """Each is listed with its reason; another image in the place of one is read like any other."""
    names = sorted(path.name for path in (data / "images").iterdir())
    (tmp_path / "images").mkdir()
    rows = json.loads((data / "plain.json").read_text())
    rows = [row | {"image": f"{i}.png"} for i, row in enumerate((rows * 2)[: len(FATES) + 10])]
    for row in rows:
        shutil.copy(data / "images" / names[0], tmp_path / "images" / row["image"])
    (tmp_path / "data.json").write_text(json.dumps(rows))

    def at(self, step):
        if step == 1:
            for i, (befall, _) in enumerate(FATES.values()):
                befall(tmp_path / "images" / f"{i}.png")
            shutil.copy(data / "images" / names[1], tmp_path / "images" / f"{len(FATES)}.png")
        return 0

    monkeypatch.setattr(loop.StopSignal, "at", at)
    more = ("--data", tmp_path / "data.json", "--image-folder", tmp_path / "images", "--max-bad-share", 1)
    status, _, err = train(tmp_path / "out", *more, "--global-batch-size", 4, "--prefetch", 1, "--aspect-ratio", "pad")
    assert status == 0, err
    listed = map(json.loads, (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines())
    reasons = {bad["index"]: bad["reason"] for bad in listed}
    assert reasons.keys() == set(range(len(FATES))), reasons
    for i, (_, reason) in enumerate(FATES.values()):
        assert reason in reasons[i]
    assert (tmp_path / "out" / "model" / "config.json").exists()


def test_another_configuration_is_refused_with_its_differences(train, finished, data, tmp_path):
    output = finished[0]
    status, _, err = train(output, "--seed", "3", "--warmup-ratio", "0.5", "--workers", "2", "--log-every", "5")
    assert (status, err.count("\n")) == (1, 1)
    assert "warmup_ratio is 0.03 there and 0.5 here; seed is 0 there and 3 here; go on with" in err
    changed = tmp_path / "changed.json"
    changed.write_text((data / "plain.json").read_text() + " ")
    status, _, err = train(output, "--data", changed)
    assert status == 1
    assert "data_sha256 is" in err
    moved = shutil.copy(data / "plain.json", tmp_path / "moved.json")
    assert train(output, "--data", moved)[0] == 0


def small_state(value: float):
    return {"a": jax.numpy.full((4, 4), value), "b": {"step": jax.numpy.int32(value)}}


def test_the_input_checkpoint_may_move_but_not_change(train, one_device, monkeypatch, tmp_path):
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


@pytest.mark.parametrize(
    ("file", "contents", "says"),
    [
        ("metrics/metrics", "", "metrics: cannot be read .*remove .*metrics, and the run goes on without it"),
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


def test_a_failed_save_is_told_and_loses_nothing(tmp_path, capsys):
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


def test_a_save_that_fails_as_it_is_written_is_told(tmp_path, capsys):
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
        assert err.count("\n") == 1 and "(File too large); the run goes on, the last one is that of step 1" in err
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


def test_a_loss_that_stays_infinite_stops_the_run(train, one_device, monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "MOST_SKIPPED", 4)
    tensors = golden_tensors("v1.5-llama")
    tensors["model.norm.weight"][:] = np.nan
    broken = write_checkpoint(tmp_path / "broken", tensors, "v1.5-llama")
    shutil.copytree(CHECKPOINT / "vision_tower", broken / "vision_tower", dirs_exist_ok=True)
    output = tmp_path / "out"
    status, _, err = train(output, "--checkpoint", broken)
    assert status == 1
    assert "error: update 4: the loss or the gradient is not finite, the 4th time in a row" in err
    lost = json.loads((output / "nonfinite.json").read_text())
    assert [one["step"] for one in lost] == [1, 2, 3, 4]
    assert all(name.startswith("r") for one in lost for name in one["ids"])
    lines = read_metrics(output)
    assert [line["loss"] for line in lines] == [None] * len(lines)


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


def test_two_processes_are_one_run(train, finished, one_device, monkeypatch, data, tmp_path):
    """They go on with what one process on one device began. Process 1 is killed; process 0 says so in one line, and
    ends. Started again they end the run: the losses and the model of one process in one go."""
    output = tmp_path / "out"
    monkeypatch.setattr(loop.StopSignal, "at", lambda self, step: signal.SIGTERM if step == 3 else 0)
    assert train(output)[0] == 128 + signal.SIGTERM
    run = dict(stderr=subprocess.PIPE, text=True)
    started = start([*flags(data, output), "--heartbeat", 5], **run)
    wait_for_updates(output, 4, started[0])
    started[1].kill()
    begun = time.monotonic()
    said = started[0].communicate()[1]
    assert time.monotonic() - begun < 60
    assert started[0].returncode != 0
    assert said.splitlines()[-1].startswith("error: another process of this run is gone or out of reach"), said
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


def test_a_picture_that_one_process_cannot_read_stops_both(data, tmp_path):
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


# ---------------------------------------------------------------- bad input


def broken_lines(directory) -> Path:
    path = directory / "broken.json"
    path.write_text('[{"id": 1}, {"id": 2, "conversations": []}]')
    return path


def without_images(directory) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "cat"}]
    (directory / "eval.json").write_text(json.dumps([{"image": "none.png", "conversations": turns}]))
    return directory / "eval.json"


def make(path, how) -> Path:
    how(path)
    return path


def other_directory(directory) -> Path:
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text('{"format": "llava-jax"}')
    return directory / "model"


BAD = {
    "no checkpoint": (lambda t: ("--checkpoint", t / "none"), "no such directory"),
    "no data": (lambda t: ("--data", t / "none.json"), "none.json: cannot be read"),
    "no images": (lambda t: ("--image-folder", t / "none"), "no such directory"),
    "no eval data": (lambda t: ("--eval-data", t / "none.json"), "none.json: cannot be read"),
    "eval data without a good row": (lambda t: ("--eval-data", broken_lines(t)), "nothing in it can be trained on"),
    "eval data is none": (lambda t: ("--eval-data", CHECKPOINT / "config.json"), "nothing in it can be trained on"),
    "eval data is empty": (lambda t: ("--eval-data", make(t / "e.json", Path.touch)), "no conversations in it"),
    "eval data is a directory": (lambda t: ("--eval-data", t), "a directory, not a file"),
    "eval data is a pipe": (lambda t: ("--eval-data", make(t / "e.json", os.mkfifo)), "a pipe, not a file"),
    "no image of eval data": (lambda t: ("--eval-data", without_images(t)), "none of its images can be read"),
    "output below a file": (lambda t: ("--output", CHECKPOINT / "config.json" / "x"), "cannot be used"),
    "output's name is too long": (lambda t: ("--output", t / ("x" * 256)), "cannot be used (File name too long)"),
    "output's path is too long": (lambda t: ("--output", t / ("x/" * 2048)), "cannot be used (File name too long)"),
    "no valid row": (lambda t: ("--data", broken_lines(t)), "nothing in it can be trained on"),
    "preset": (lambda t: ("--preset", "v1.5-pretrian"), "unknown preset 'v1.5-pretrian'; did you mean v1.5-pretrain?"),
    "field": (lambda t: ("--learnin-rate", "1"), "unknown field --learnin-rate; did you mean --learning-rate?"),
    "value": (lambda t: ("--steps", "many"), "--steps 'many': must be a whole number"),
    "choice": (lambda t: ("--tune", "all"), "--tune 'all': only projector, projector,decoder"),
    "stray": (lambda t: ("fast",), "'fast': no flag goes with it"),
    "learning rate": (lambda t: ("--learning-rate", "0"), "nothing would be trained: all that --tune names has"),
    "warm-up alone": (lambda t: ("--steps", "1"), "nothing would be trained: the run has one step"),
    "another model's preset": (lambda t: ("--checkpoint", NEXT, "--preset", "v1.5-finetune"), "take --preset v1.6"),
    "mesh": (lambda t: ("--mesh", "data=3"), "needs 3 devices, here are 8"),
    "batch": (lambda t: ("--global-batch-size", "12"), "--global-batch-size 12: the mesh (data=1,fsdp=8,tensor=1)"),
    "parts": (lambda t: ("--batching", "bucketed", "--accumulate", "4"), "a multiple of 32"),
    "template": (lambda t: ("--template", "v9"), "known: chatml_direct"),
    "profile": (lambda t: ("--profile-steps", "5"), "write A:B"),
    "profile of figures": (lambda t: ("--profile-steps", "\u00b2:\u00b3"), "write A:B"),
    "profile of nothing": (lambda t: ("--profile-steps", "11:12"), "--profile-steps 11:12: the run has 10 steps"),
    "output": (lambda t: ("--output", other_directory(t)), "holds something else"),
    "output is a file": (lambda t: ("--output", CHECKPOINT / "config.json"), "cannot be used"),
    "processes": (lambda t: ("--process-id", "1"), "go together"),
    "coordinator": (lambda t: ("--coordinator", "a", "--process-id", "0", "--processes", "2"), "write HOST:PORT"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_status_1(train, monkeypatch, tmp_path, name):
    flags_of, says = BAD[name]
    monkeypatch.setattr(loop, "setup", None)  # nothing is compiled before the input is known to be good
    status, out, err = train(tmp_path / "out", *flags_of(tmp_path))
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("error: ")
    assert says in err
    assert not (tmp_path / "out").exists()


VICUNA, MISTRAL, YI, LLAMA_3 = (preset(name) for name in ("v1.5-7b", "v1.6-mistral-7b", "v1.6-34b", "llama3-8b-next"))


@pytest.mark.parametrize(
    ("name", "model", "given", "says"),
    [
        ("v1.5-finetune", VICUNA, {}, None),
        ("v1.5-finetune", VICUNA.replace(aspect_ratio="square"), {}, None),
        ("v1-finetune", VICUNA, {}, None),
        ("v1.5-finetune", VICUNA.replace(template="vicuna_v1"), {}, None),
        ("v1.5-finetune", VICUNA.replace(template="llava_v0"), {}, "has v1, the checkpoint llava_v0: say --template "),
        ("v1.5-finetune", VICUNA.replace(template="mpt"), {}, "has v1, the checkpoint mpt: "),
        ("v1.5-pretrain", VICUNA, {}, None),
        ("v1.5-pretrain", MISTRAL, {}, "has square, the checkpoint anyres: say --aspect-ratio anyres "),
        ("v1.5-pretrain", MISTRAL.replace(aspect_ratio="pad"), {}, None),
        ("v1.6-finetune", MISTRAL, {}, None),
        ("v1.6-finetune-lora", YI, {}, None),
        ("v1.6-finetune-lora", VICUNA, {}, "has anyres, the checkpoint pad: take --preset v1.5-finetune-lora, or say"),
        (
            "v1.5-finetune-lora",
            YI,
            {},
            "has v1 and pad, the checkpoint chatml_direct and anyres: take --preset v1.6-fin",
        ),
        ("v1.5-finetune-task", LLAMA_3, {}, "anyres: say --template llava_llama_3 --aspect-ratio anyres to"),
        ("v1.5-finetune", MISTRAL, {"template": "v1"}, "has pad, the checkpoint anyres: "),
        ("v1.5-finetune", MISTRAL, {"aspect-ratio": "pad"}, "has v1, the checkpoint mistral_instruct: "),
        ("v1.5-finetune", MISTRAL, {"template": "v1", "aspect-ratio": "pad"}, None),
        ("v1.5-finetune", MISTRAL, {"template": "none", "aspect-ratio": "none"}, None),
        (None, MISTRAL, {"template": "v1"}, None),
    ],
)
def test_a_preset_decides_the_stage_and_flags_what_the_model_is(name, model, given, says, data):
    preset = ["--preset", name] if name else []
    words = [word for flag, value in given.items() for word in (f"--{flag}", value)]
    needed = ["--checkpoint", "/c", "--data", "/d", "--output", "/o"]
    _, config = command.read_config([*preset, *needed, *words])
    if says is None:
        check_preset(config, model)
        return
    with pytest.raises(InputError) as error:
        check_preset(config, model)
    assert str(error.value).startswith(f"--preset {name} has ")
    assert says in str(error.value)


def test_a_chat_template_that_has_no_name_gives_way_to_the_presets(capsys):
    own = VICUNA.replace(template="{{ messages[0].content }}")
    check_preset(PRESETS["v1.5-finetune"], own)
    assert "warning: the checkpoint has a chat template of its own; the preset's is used, v1" in capsys.readouterr().err
    for config in (
        PRESETS["v1.5-pretrain"],
        PRESETS["v1.5-finetune"].replace(template="v1"),
        TrainConfig(template="v1"),
    ):
        check_preset(config, own)
    assert capsys.readouterr().err == ""


def test_a_directory_in_use_is_refused(train, tmp_path):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    (tmp_path / "out").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path / "out" / ".lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "\n"
    status, _, err = train(tmp_path / "out")
    holder.communicate("\n")
    assert (status, err.count("\n")) == (1, 1)
    assert "in use by another run" in err


def test_list_presets(run_cli):
    status, out, err = run_cli(command.main, "--list-presets")
    assert (status, err) == (0, "")
    header, *rows = (line.split() for line in out.splitlines())
    assert header == list(PRESETS)
    table = {row[0]: row[1:] for row in rows if len(row) == len(PRESETS) + 1}
    assert table["learning_rate"] == [command.show(preset.learning_rate) for preset in PRESETS.values()]


def test_the_table_of_presets_in_the_documentation():
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "docs/training.md").read_text().splitlines()]
    written = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in PRESETS}
    assert written.keys() == PRESETS.keys()
    for name, (trains, template, pictures, rate, batch, epochs, length) in written.items():
        preset = PRESETS[name]
        parts = "lora,projector" if preset.tune == "lora" else preset.tune
        own = {"projector": preset.projector_learning_rate, "vision": preset.vision_learning_rate}
        shown = [f"{part} ({own[part]})" if own.get(part) else part for part in parts.split(",")]
        assert trains.lower() == ", ".join(shown)
        assert template == (preset.template or "the checkpoint's")
        assert (pictures, rate, batch, epochs, length) == tuple(
            f"{value:g}" if isinstance(value, float) else str(value)
            for value in (
                preset.aspect_ratio, preset.learning_rate, preset.global_batch_size, preset.epochs, preset.max_length
            )
        )  # fmt: skip


@pytest.mark.parametrize("file", ["docs/training.md", "docs/tpu-pod.md", "train/__main__.py"])
def test_commands_in_the_documentation_can_be_given(file):
    text = (ROOT / file).read_text().replace("\\\n", " ")
    commands = [line.partition("-m train ")[2].split(">")[0] for line in text.splitlines() if "-m train " in line]
    for given in commands:
        words = [word for word in given.split("`")[0].split() if word not in ("...", "[--FIELD", "VALUE", "...]", "&")]
        flags = [word for word in words if word.startswith("--")]
        assert set(flags) <= {flag for action in command.parser()._actions for flag in action.option_strings}
        if "--preset" in words and "NAME" not in words:
            command.read_config(words)


def test_the_manifest_runs_a_command_that_can_be_given():
    [job] = yaml.safe_load((ROOT / "deploy/jobset.yaml").read_text())["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][:3] == ["python", "-m", "train"]
    command.read_config(container["command"][3:])


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_every_field_is_a_flag(field, data):
    """What is shown of a value is read as that value."""
    others = {
        "tune": "lora", "mesh": "data=2,fsdp=4", "lora_targets": ("q", "v"), "profile_steps": "1:2",
        "batching": "bucketed", "schedule": "constant", "dtype": "float32", "remat": "none", "template": "plain",
        "on_bad_sample": "fail", "aspect_ratio": "anyres", "image_first": "random", "positions_per_row": 4096,
        "export_hf": True, "follow_links": True, "reduce_dtype": "float32",
    } | dict.fromkeys(command.PATHS, "/x")  # fmt: skip
    value = others.get(field.name, field.default or 2)
    flag = f"--{field.name.replace('_', '-')}"
    given = [flag] if value is True else [flag, command.show(value)]
    _, config = command.read_config(flags(data, "/out", *given))
    assert getattr(config, field.name) == value
