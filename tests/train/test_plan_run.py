"""`train.plan` and `infer.plan` as commands: the batch that training makes, and what would fit."""

import dataclasses
import functools
import json
import math
import re
import types

import numpy as np
import pytest

from helpers import GOLDEN, turns
from infer import plan as infer_plan
from llava_jax import config as c
from llava_jax.aot import hlo, tpu, tpu_plan
from llava_jax.checkpoints import checkpoint
from llava_jax.checkpoints.checkpoint import open_checkpoint
from llava_jax.console import InputError
from llava_jax.sharding.mesh import make_mesh, parse_mesh
from train import __main__ as train_main
from train import plan as train_plan
from train import plan_run
from train import run as train_run
from train.config import PRESETS, TrainConfig, check_preset
from train.loader import open_data

# ---------------------------------------------------------------- the commands


@pytest.mark.parametrize(
    ("command", "flags", "says"),
    [
        (train_plan, ["--topology", "v9:2x2"], "write it as v5e:4x8"),
        (train_plan, ["--topology", "v5e:2x2", "--preset", "v2"], "unknown preset 'v2'; "),
        (
            train_plan,
            ["--topology", "v5e:2x2", "--rows-per-chip", "0"],
            "--rows-per-chip 0: must be a whole number from 1",
        ),
        (train_plan, ["--topology", "v5e:2x2", "--remat", "some"], "--remat 'some': only full"),
        (train_plan, ["--topology", "v5e:2x2", "--mesh", "model=4"], "write it as data=1"),
        (infer_plan, ["--topology", "v5e:2x2", "--context", "1"], "--context 1: must be a whole number from 16"),
        (infer_plan, ["--topology", "v5e:2x2", "--slots", "0"], "--slots 0: must be a whole number from 1"),
    ],
)
def test_wrong_flags(run_cli, command, flags, says):
    status, out, err = run_cli(command.main, "--model", "llava-v1.5-7b", *flags)
    assert (status, out) == (1, "")
    assert says in err
    assert err.count("\n") == 1


def test_a_search_prints_the_best(run_cli, monkeypatch):
    fits = tpu_plan.Plan(True, 8 * 10**9, 16 * 10**9, 10**9, 2 * 10**9, 1.3e12, 1e12, {}, 1e9, 3.0)
    best = train_plan.Choice("fsdp=8", "full", 2, fits, "compute", 0.6)
    too_large = train_plan.Choice("fsdp=8", "none", 1, dataclasses.replace(fits, fits=False))
    monkeypatch.setattr(train_plan, "search", lambda *_: [best, too_large])
    monkeypatch.setattr(tpu_plan, "mesh_of", lambda *_: make_mesh({"fsdp": 8}))
    flags = ["--model", "llava-v1.5-7b", "--topology", "v5e:2x4", "--search"]
    status, out, _ = run_cli(train_plan.main, *flags)
    assert (status, out.count("\n")) == (0, 1)
    assert re.search(r"mesh fsdp=8 +remat full +2 rows per chip +8.0 of 16.0 GB +60% of peak, bound by compute", out)
    status, out, _ = run_cli(train_plan.main, *flags, "--json")
    assert [choice["remat"] for choice in json.loads(out)] == ["full", "none"]
    monkeypatch.setattr(train_plan, "search", lambda *_: [too_large])
    status, out, err = run_cli(train_plan.main, *flags)
    assert (status, out) == (1, "")
    assert "no choice fits v5e:2x4" in err


def test_what_does_not_fit_says_what_would(run_cli, monkeypatch):
    needed = tpu_plan.Plan(False, 40 * 10**9, 16 * 10**9, 10**9, 2 * 10**9, None, 1e12, None, 1e9, 3.0)
    monkeypatch.setattr(
        train_plan, "plan_step", lambda *_: (needed, tpu_plan.Compiled(3.0, needed.peak_bytes_per_chip))
    )
    monkeypatch.setattr(tpu_plan, "mesh_of", lambda *_: make_mesh({"fsdp": 8}))
    flags = ["--model", "llava-v1.5-7b", "--topology", "v5e:2x4", "--rows-per-chip", "4", "--remat", "dots"]
    status, out, err = run_cli(train_plan.main, *flags, "--json")
    assert status == 1
    assert json.loads(out) == dataclasses.asdict(needed)
    assert "error: does not fit: 40.0 GB per chip, v5e:2x4 has 16.0" in err
    assert "try fewer --rows-per-chip, or --remat full" in err
    status, out, _ = run_cli(train_plan.main, *flags)
    assert "peak" in out
    assert "40.00 GB of 16.00 GB (250%)" in out


# ---------------------------------------------------------------- the plan of a run

GB = 10**9
SMALL = ("--examples", 400, "--positions-per-row", 2048, "--tiles-per-row", 3)  # soon packed


def fake_mesh(sizes, devices=None):
    """Of as many chips as a slice has."""
    shape = {axis: sizes.get(axis, 1) for axis in ("data", "fsdp", "tensor")}
    chips = math.prod(shape.values())
    return types.SimpleNamespace(shape=shape, size=chips, devices=np.arange(chips))


@pytest.fixture
def run_plan(run_cli, monkeypatch):
    """`train.plan` for a model of `held` bytes, rows of `row` bytes each where nothing is saved, and a step of a
    quarter of a second; what the compiler was asked for."""

    def run(*flags, held: int = 208 * GB, row: int = 2 * GB):
        asked = []

        def plan_step(model, config, mesh, topology, rows, length, tiles):
            asked.append((tpu_plan.describe(mesh), topology, config.accumulate, rows, length, tiles))
            chip = tpu.CHIPS[tpu.parse_topology(topology)[0]]
            kept = {"full": 1, "dots": 4}[config.remat]
            mine = held // (mesh.shape["fsdp"] * mesh.shape["tensor"])
            peak = mine + rows // config.accumulate * row * kept // mesh.shape["tensor"]
            needs = tpu_plan.Plan(peak <= chip.hbm, peak, chip.hbm, mine, 0, 1e12, 1e12, {}, 0.0, 3.0)
            memory = tpu.Memory(peak, 0, 0, 0, 0)
            return needs, tpu_plan.Compiled(3.0, peak, memory, hlo.Work(chip.peak / 4, 0, {}, {}))

        def mesh_of(text, default, topology, slices=1):
            chips = math.prod(tpu.parse_topology(topology)[1])
            return fake_mesh(parse_mesh(text) if text else {"data": slices, "fsdp": chips})

        monkeypatch.setattr(train_plan, "plan_step", plan_step)
        monkeypatch.setattr(tpu_plan, "mesh_of", mesh_of)
        monkeypatch.setattr(plan_run, "make_mesh", fake_mesh)
        named = [] if "--model" in flags or "--checkpoint" in flags else ["--model", "llava-v1.5-13b"]
        status, out, err = run_cli(train_plan.main, *named, *flags)
        return status, out, err.splitlines()[-1] if status else "", asked

    return run


def test_a_plan_is_that_of_the_batch_that_training_makes(run_plan):
    """128 conversations of lengths like mix665k's fill some 54 rows of 2,048: on 16 chips three each, not one."""
    status, out, _, asked = run_plan("--topology", "v5litepod-16", held=GB)
    assert (status, asked) == (0, [("fsdp=16", "v5e:4x4", 1, 3, 2048, 3)])
    assert re.search(r"v5e:4x4 \(v5litepod-16\), mesh fsdp=16", out)
    assert re.search(r"batch +48 rows, 3 x 16 at once, of 2,048 positions and 3 tiles: about 11\d conversations", out)
    assert re.search(r"data +an assumption: 665,298 conversations, lengths like mix665k's", out)
    steps = int(re.search(r"run +([\d,]+) steps", out)[1].replace(",", ""))
    assert steps == pytest.approx(665_298 / 114, rel=0.02)
    hours = float(re.search(r"at least ([\d.]+) hours", out)[1])
    assert hours == pytest.approx(steps / 4 / 3600, rel=0.01)
    assert re.search(r"fits +yes", out)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--topology", "v5e:1x1"], (1, 54)),
        (["--topology", "v5e:8x16"], (1, 1)),
        (["--topology", "v5e:2x4", "--accumulate", "7"], (7, 7)),
        (["--topology", "v5e:2x4", "--global-batch-size", "16"], (1, 1)),
        (["--topology", "v5e:2x4", "--batching", "bucketed"], (1, 16)),
        (["--topology", "v5e:2x4", "--mesh", "fsdp=4,tensor=2"], (1, 14)),
        (["--topology", "v5e:2x4", "--rows-per-chip", "1"], (1, 1)),
    ],
)
def test_flags_of_training_decide_the_plan(run_plan, flags, steps):
    status, _, _, [(_, _, *planned, _, _)] = run_plan(
        *flags, *(SMALL[2:] if "--rows-per-chip" in flags else SMALL), held=GB, row=1
    )
    assert (status, tuple(planned)) == (0, steps)


@pytest.mark.parametrize(
    ("flags", "held", "row", "says", "compiled"),
    [
        (["v5e:4x4"], 208, 2, "--accumulate 3, 15.0 GB per chip, 1 row at once", 3),
        (["v5e:2x4"], 8, 3, "--accumulate 2, 10.0 GB per chip, 3 rows at once", 4),
        (["v5e:4x4", "--remat", "dots"], 16, 3, "--remat full, 10.0 GB per chip, 3 rows at once", 2),
        (["v5e:4x4", "--remat", "dots"], 16, 7, "--remat full --accumulate 2, ", 4),
        (["v5e:2x4", "--mesh", "data=2,fsdp=4"], 120, 0.1, "--mesh fsdp=8, ", 6),
        (["v5e:4x4"], 160, 10, "--mesh fsdp=8,tensor=2 --accumulate 6, 15.0 GB", 5),
        (["v5e:4x4"], 16 * 16, 3, "--topology v5e:4x8 (v5litepod-32), ", 4),
        (["v4-16"], 33 * 16, 3, "--topology v4:2x4x4 (v4-64), ", 5),
        (["v5e:4x4"], 10**6, 3, "take chips with more memory", 3),
    ],
)
def test_a_plan_says_what_would_fit(run_plan, flags, held, row, says, compiled):
    """And has compiled it, and few others."""
    status, out, error, asked = run_plan("--topology", *flags, *SMALL, held=held * GB, row=int(row * GB))
    assert status == 1
    assert re.search(r"fits +no", out)
    assert error.startswith("error: does not fit: ")
    assert says in error, error
    assert len(asked) <= compiled, asked


def test_a_plan_of_a_data_file_is_what_training_makes_of_it(run_plan, tmp_path):
    rows = [{"id": i, "conversations": turns("Say", "the " * n)} for i, n in enumerate([*range(5, 65)] * 5)]
    path, directory = tmp_path / "data.json", GOLDEN / "checkpoints" / "v1.5-llama"
    path.write_text(json.dumps(rows))
    flags = ["--data", path, "--checkpoint", directory, "--max-length", 256, "--global-batch-size", 64, "--epochs", 2]
    status, out, _, [asked] = run_plan("--topology", "v5e:2x2", *flags, held=GB, row=1)
    _, config = train_main.read_config([*map(str, flags), "--output", str(tmp_path), "--preset", "v1.5-finetune"])
    found = open_checkpoint(directory)
    data = open_data(config, found.config, found.tokenizer, rows_multiple=4)
    data.close()
    assert (status, asked[3:]) == (0, (data.rows // 4, data.length, data.tiles))
    assert f"{2 * data.steps_per_epoch} steps" in out
    assert f"300 conversations of {path}" in out
    status, _, error, _ = run_plan("--topology", "v5e:2x2", "--data", path)
    assert (status, error) == (
        1,
        "error: --data needs --checkpoint, whose tokenizer determines the lengths of the conversations",
    )


ROWS = ("--topology", "v5e:2x2", "--rows-per-chip", "1")  # nothing of the data is looked at


@pytest.fixture
def open_once(monkeypatch):
    """Checkpoints are opened once for all tests here: that takes a second."""
    for module in (checkpoint, train_run, train_plan):
        monkeypatch.setattr(module, "open_checkpoint", opened)


@functools.cache
def opened(directory, vision_tower=None):
    return open_checkpoint(directory, vision_tower=vision_tower)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_plan_refuses_what_training_refuses(run_plan, run_cli, open_once, tmp_path, preset):
    """A preset that contradicts the model, whether that is a checkpoint or a name, of full rows or of a whole run."""
    for directory in sorted((GOLDEN / "checkpoints").glob("v1*")):
        run = "--checkpoint", directory, "--data", "nowhere.json", "--output", tmp_path / directory.name
        _, _, err = run_cli(train_main.main, "--preset", preset, *run)
        refused = f"error: --preset {preset} has " in err
        assert refused or "nowhere.json: " in err
        for flags in (ROWS, ("--topology", "v5e:2x2"))[: 1 + refused]:  # a whole run takes a second to plan
            for name in ("--checkpoint", "--model"):
                status, _, error, asked = run_plan("--preset", preset, name, directory, *flags, held=GB, row=1)
                assert (status, len(asked)) == ((1, 0) if refused else (0, 1)), error
                assert not refused or error == err.splitlines()[-1]
    for name in c.PRESETS:
        problem = ""
        try:
            check_preset(PRESETS[preset], c.preset(name))
        except InputError as error:
            problem = f"error: {error}"
        assert run_plan("--preset", preset, "--model", name, *ROWS, held=GB, row=1)[2] == problem


def test_without_a_preset_a_plan_takes_what_suits_the_model(run_cli, open_once, monkeypatch):
    """As training without one, it contradicts no checkpoint: that decides the template and the images."""
    planned = []
    result = lambda model, config, *_: planned.append((model, config)) or (needs, tpu_plan.Compiled(3.0, 1))  # noqa: E731
    needs = tpu_plan.Plan(True, 1, 2, 1, 0, 1e12, 1e12, {}, 0.0, 3.0)
    monkeypatch.setattr(train_plan, "plan_step", result)
    monkeypatch.setattr(tpu_plan, "mesh_of", lambda *_: make_mesh({"fsdp": 8}))
    models = [*c.PRESETS, *sorted((GOLDEN / "checkpoints").glob("v1*"))]
    for name in models:
        for flag in ("--model",) if name in c.PRESETS else ("--model", "--checkpoint"):
            status, out, err = run_cli(train_plan.main, flag, name, *ROWS)
            own = tpu_plan.model_of(str(name))
            preset = "v1.6-finetune" if own.aspect_ratio == "anyres" else "v1.5-finetune"
            assert (status, f"no --preset: {preset}" in err) == (0, True), err
            assert f"{name}, {preset}, v5e:2x2, " in out
            model, config = planned.pop()
            assert model == own
            assert (config.template, config.aspect_ratio) == (None, None)
            assert (config.tune, config.max_length) == (PRESETS[preset].tune, PRESETS[preset].max_length)


def test_a_plan_refuses_a_run_in_which_nothing_would_be_trained(run_plan):
    status, _, error, asked = run_plan("--topology", "v5e:2x2", "--examples", 100)
    assert (status, asked) == (1, [])
    assert error.startswith("error: nothing would be trained: the run has one step of all 100 conversations, ")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data", "a.json", "--examples", 5], "--examples is for a plan without --data"),
        (["--data", "a.json", "--rows-per-chip", 1], "--data does not go with --rows-per-chip"),
        (["--examples", 5, "--rows-per-chip", 1], "--examples does not go with --rows-per-chip"),
        (["--data", "a.json", "--search"], "--data does not go with --search"),
        (["--examples", 5, "--search"], "--examples does not go with --search"),
        (["--seq", 512, "--max-length", 512], "give either --seq or these"),
        (["--search", "--rows-per-chip", 17], "--rows-per-chip 17: --search tries at most 16"),
        (["--seq", 512, "--positions-per-row", 512], "give either --seq or these"),
    ],
)
def test_a_plan_ignores_no_flag(run_cli, flags, says):
    status, out, err = run_cli(train_plan.main, "--model", "llava-v1.5-7b", "--topology", "v5e:2x2", *flags)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert says in err


def test_a_plan_in_json(run_plan):
    _, out, _, _ = run_plan("--topology", "v5e:4x4", "--json", "--examples", 1000, row=3 * GB)
    found = json.loads(out)
    fields = {field.name for field in dataclasses.fields(tpu_plan.Plan)}
    assert fields < found.keys() and not found["fits"]
    assert (found["slice"], found["batch"]["rows"], found["batch"]["examples"]) == ("v5litepod-16", 48, 1000)
    assert found["fits_with"]["fits"] and found["fits_with"]["flags"] == "--accumulate 3"


def test_a_plan_takes_the_flags_of_training():
    known = {flag for action in train_plan.parser()._actions for flag in action.option_strings}
    assert {"--" + field.name.replace("_", "-") for field in dataclasses.fields(TrainConfig)} <= known
