"""The command line of training: wrong input is one line, presets, and the commands that the docs give."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers import GOLDEN, ROOT, turns
from llava_jax.config import preset
from llava_jax.console import InputError
from train import __main__ as command
from train import loop
from train.config import PRESETS, TrainConfig, check_preset
from training import CHECKPOINT, flags

NEXT = GOLDEN / "checkpoints/v1.6-mistral"


def broken_lines(directory) -> Path:
    path = directory / "broken.json"
    path.write_text('[{"id": 1}, {"id": 2, "conversations": []}]')
    return path


def without_images(directory) -> Path:
    (directory / "eval.json").write_text(
        json.dumps([{"image": "none.png", "conversations": turns("<image>\nWhat is this?", "cat")}])
    )
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
    "eval data is empty": (lambda t: ("--eval-data", make(t / "e.json", Path.touch)), "has no conversations"),
    "eval data is a directory": (lambda t: ("--eval-data", t), "a directory, but not a prepared dataset"),
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
    "stray": (lambda t: ("fast",), "'fast': belongs to no flag"),
    "learning rate": (lambda t: ("--learning-rate", "0"), "nothing would be trained: all parts in --tune have"),
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


# ---------------------------------------------------------------- presets

VICUNA, MISTRAL, YI, LLAMA_3 = (preset(name) for name in ("v1.5-7b", "v1.6-mistral-7b", "v1.6-34b", "llama3-8b-next"))


@pytest.mark.parametrize(
    ("name", "model", "given", "says"),
    [
        ("v1.5-finetune", VICUNA, {}, None),
        ("v1.5-finetune", VICUNA.replace(aspect_ratio="square"), {}, None),
        ("v1-finetune", VICUNA, {}, None),
        ("v1.5-finetune", VICUNA.replace(template="vicuna_v1"), {}, None),
        ("v1.5-finetune", VICUNA.replace(template="llava_v0"), {}, "has v1, the checkpoint llava_v0: give --template "),
        ("v1.5-finetune", VICUNA.replace(template="mpt"), {}, "has v1, the checkpoint mpt: "),
        ("v1.5-pretrain", VICUNA, {}, None),
        ("v1.5-pretrain", MISTRAL, {}, "has square, the checkpoint anyres: give --aspect-ratio anyres "),
        ("v1.5-pretrain", MISTRAL.replace(aspect_ratio="pad"), {}, None),
        ("v1.6-finetune", MISTRAL, {}, None),
        ("v1.6-finetune-lora", YI, {}, None),
        ("v1.6-finetune-lora", VICUNA, {}, "has anyres, the checkpoint pad: take --preset v1.5-finetune-lora, or give"),
        (
            "v1.5-finetune-lora",
            YI,
            {},
            "has v1 and pad, the checkpoint chatml_direct and anyres: take --preset v1.6-fin",
        ),
        ("v1.5-finetune-task", LLAMA_3, {}, "anyres: give --template llava_llama_3 --aspect-ratio anyres to"),
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
    assert "warning: the preset's template v1 replaces the checkpoint's own chat template" in capsys.readouterr().err
    for config in (
        PRESETS["v1.5-pretrain"],
        PRESETS["v1.5-finetune"].replace(template="v1"),
        TrainConfig(template="v1"),
    ):
        check_preset(config, own)
    assert capsys.readouterr().err == ""


def test_list_presets(run_cli):
    status, out, err = run_cli(command.main, "--list-presets")
    assert (status, err) == (0, "")
    header, *rows = (line.split() for line in out.splitlines())
    assert header == list(PRESETS)
    table = {row[0]: row[1:] for row in rows if len(row) == len(PRESETS) + 1}
    assert table["learning_rate"] == [command.show(preset.learning_rate) for preset in PRESETS.values()]


def test_what_is_said_of_a_configuration_is_what_differs_from_its_preset():
    given = ["--checkpoint", "org/model", "--data", "/d.json", "--output", "/out"]
    _, config = command.read_config([*given, "--preset", "v1.5-finetune", "--steps", "5"])
    said = "data /d.json, steps 5, checkpoint org/model, output /out"
    assert command.describe("v1.5-finetune", config) == f"preset v1.5-finetune with {said}"
    _, config = command.read_config(given)
    assert command.describe(None, config) == "defaults with data /d.json, checkpoint org/model, output /out"


# ---------------------------------------------------------------- documentation


def test_the_table_of_presets_in_the_documentation():
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "docs/training.md").read_text().splitlines()]
    written = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in PRESETS}
    assert written.keys() == PRESETS.keys()
    for name, (trains, template, aspect_ratio, rate, batch, epochs, length) in written.items():
        preset = PRESETS[name]
        parts = "lora,projector" if preset.tune == "lora" else preset.tune
        own = {"projector": preset.projector_learning_rate, "vision": preset.vision_learning_rate}
        shown = [f"{part} ({own[part]})" if own.get(part) else part for part in parts.split(",")]
        assert trains.lower() == ", ".join(shown)
        assert template == (preset.template or "the checkpoint's")
        assert (aspect_ratio, rate, batch, epochs, length) == tuple(
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
        "eval_benchmarks": ("pope", "gqa"), "export_hf": True, "follow_links": True, "reduce_dtype": "float32",
    } | dict.fromkeys(command.PATHS, "/x")  # fmt: skip
    value = others.get(field.name, field.default or 2)
    flag = f"--{field.name.replace('_', '-')}"
    given = [flag] if value is True else [flag, command.show(value)]
    _, config = command.read_config(flags(data, "/out", *given))
    assert getattr(config, field.name) == value
