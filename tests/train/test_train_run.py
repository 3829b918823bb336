"""`python -m train` as people run it: a run, its files, its result, and what befalls it on the way."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from helpers import GOLDEN, golden_tensors, write_checkpoint
from llava_jax.checkpoints.checkpoint import open_any, open_checkpoint
from llava_jax.checkpoints.orbax_files import open_ours
from llava_jax.console import InputError
from llava_jax.sharding.mesh import make_mesh
from train import __main__ as command
from train import loop
from train.config import PRESETS
from train.parameters import load_dtype
from train.results import export
from train.run_directory import Output
from train.step import setup
from training import CHECKPOINT, flags, mesh_of_one, read_metrics


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


def test_trace_is_written(finished):
    assert list((finished[0] / "profile").rglob("*.xplane.pb"))


def test_the_same_command_after_the_end_does_nothing(train, finished):
    output, _ = finished
    before = (output / "metrics.jsonl").stat().st_mtime_ns
    status, _, err = train(output)
    assert status == 0
    assert "holds the finished run: 10 steps" in err
    assert (output / "metrics.jsonl").stat().st_mtime_ns == before


def test_an_evaluation_that_cannot_be_made_ends_no_run(train, data, on_one_device, tmp_path):
    rows = json.loads((data / "eval.json").read_text())
    shutil.copytree(data / "images", tmp_path / "images")
    (tmp_path / "images" / "cut.png").write_bytes((data / "images" / rows[0]["image"]).read_bytes()[:60])
    (tmp_path / "eval.json").write_text(json.dumps([rows[0], *[row | {"image": "cut.png"} for row in rows[1:]]]))
    more = ("--eval-data", tmp_path / "eval.json", "--image-folder", tmp_path / "images", "--steps", 2)
    status, _, err = train(tmp_path / "out", *more)
    assert status == 0, err
    assert "warning: no evaluation: " in err and "bad samples: " in err
    assert (tmp_path / "out" / "model" / "config.json").exists()


def test_an_evaluation_on_the_training_data_and_on_text_alone(train, data, on_one_device, tmp_path):
    rows = [row for row in json.loads((data / "data.json").read_text()) if "image" not in row]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    both = ("--eval-data", data / "plain.json", "--eval-data", tmp_path / "text.json")
    for files in (both, both[2:]):
        status, _, err = train(tmp_path / str(len(files)), *files, "--steps", 2, "--template", "v1")
        assert status == 0, err
        assert "evaluation after step 2: loss" in err and "warning: no evaluation" not in err


FATES = {  # of an image, during a run
    "is gone": (Path.unlink, "no such image"),
    "is a directory": (lambda path: (path.unlink(), path.mkdir()), "a directory, not a file"),
    "is a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "a pipe, not a file"),
    "is broken": (lambda path: path.write_bytes(path.read_bytes()[:60]), "broken image"),
    "is text": (lambda path: path.write_text("hello"), "not an image"),
}


def test_what_becomes_of_images_during_a_run_ends_no_run(train, data, on_one_device, monkeypatch, tmp_path):
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


def test_a_loss_that_stays_infinite_stops_the_run(train, on_one_device, monkeypatch, tmp_path):
    monkeypatch.setattr("train.recorder.MAX_SKIPPED", 4)
    tensors = golden_tensors("v1.5-llama")
    tensors["model.norm.weight"][:] = np.nan
    broken = write_checkpoint(tmp_path / "broken", tensors, "v1.5-llama")
    shutil.copytree(CHECKPOINT / "vision_tower", broken / "vision_tower", dirs_exist_ok=True)
    output = tmp_path / "out"
    status, _, err = train(output, "--checkpoint", broken)
    assert status == 1
    assert "error: step 4: the loss or the gradient is not finite, the 4th time in a row" in err
    lost = json.loads((output / "nonfinite.json").read_text())
    assert [one["step"] for one in lost] == [1, 2, 3, 4]
    assert all(name.startswith("r") for one in lost for name in one["ids"])
    lines = read_metrics(output)
    assert [line["loss"] for line in lines] == [None] * len(lines)


# ---------------------------------------------------------------- the result


def changed_paths(output) -> set[str]:
    before, after = open_checkpoint(CHECKPOINT).source().tensors, open_ours(output / "model").tensors
    assert before.keys() == after.keys()
    assert all(before[path].dtype == after[path].dtype for path in before)
    return {path for path in before if not np.array_equal(before[path].read(), after[path].read())}


def test_what_eight_devices_write_is_what_one_writes(train, data, monkeypatch, tmp_path):
    """Every weight is trained, sharded and put together again."""
    full = (
        "--preset", "v1.5-finetune", "--tune", "projector,decoder,vision", "--data", data / "data.json", "--steps", 2,
        "--mesh", "data=2,fsdp=2,tensor=2", "--adam-eps", 0.01, "--global-batch-size", 8,
    )  # fmt: skip
    for output in ("eight", "one"):
        status, _, err = train(tmp_path / output, *full)
        assert status == 0, err
        monkeypatch.setattr("train.run.make_mesh", mesh_of_one)
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
    params = found.load(mesh, lambda path: load_dtype(path, config))
    frozen, state, _, _ = setup(params, found.config, config, mesh, 6)
    assert frozen["decoder"]["embed"]["embedding"].dtype == jax.numpy.bfloat16
    export(Output(config), found, found.config, config, state)
    assert changed_paths(tmp_path / "out") == set()


def test_the_result_in_transformers_format_is_the_same_model(train, on_one_device, tmp_path):
    """It may be asked for afterwards."""
    status, _, err = train(tmp_path / "out", "--global-batch-size", 64)
    assert status == 0, err
    assert "\nwarning: --global-batch-size 64 is more than the 16 usable conversations: " in err  # on its own line
    status, _, err = train(tmp_path / "out", "--global-batch-size", 64, "--export-hf")
    assert status == 0, err
    ours, theirs = (open_any(tmp_path / "out" / name) for name in ("model", "hf"))
    assert ours.unused.keys() == theirs.unused.keys() != set()  # what LLaVA does not use came along
    for tensors in ("tensors", "unused"):
        for path, tensor in getattr(ours, tensors).items():
            mine, other = tensor.read(), getattr(theirs, tensors)[path].read()
            if path in ("decoder/embed/embedding", "decoder/head/kernel"):  # the vocabulary has grown
                other = other[: mine.shape[0], : mine.shape[1]]
            np.testing.assert_array_equal(mine, other, err_msg=path)


def test_export_that_transformers_cannot_hold_is_refused_beforehand(train, on_one_device, tmp_path):
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
    with pytest.raises(InputError, match=r"out: is a training run; its model is .*out/model$"):
        open_checkpoint(finished[0])


def test_lora_gives_an_adapter_and_the_merged_model(train, on_one_device, data, tmp_path):
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
    with pytest.raises(
        InputError, match=r"adapter: is an adapter; merge it into its --base with `python -m convert to-orbax`"
    ):
        open_checkpoint(output / "adapter")
