"""Every flag of every command that takes a value, given a long one: the error repeats little of it."""

import argparse
import re

import pytest
from conftest import GOLDEN

from convert import __main__ as convert
from infer import evaluate, generate
from infer import plan as infer_plan
from llava_jax import config as c
from llava_jax import plan
from llava_jax.console import InputError
from llava_jax.directories import find_directory
from llava_jax.outputs import new_directory
from llava_jax.sharding import parse_mesh
from llava_jax.tpu import parse_topology
from train import __main__ as train
from train import plan as train_plan
from train import preview, shapes
from train.config import TrainConfig
from train.loop import parse_profile_steps

WORDS, WORD = "ab cd " * 60, "x" * 360
CHECKPOINT = str(GOLDEN / "checkpoints" / "v1.5-llama")
MODEL = ["--checkpoint", CHECKPOINT]
PLAN = ["--model", "llava-v1.5-7b", "--topology", "v5e:2x2"]
# A command, its parser, flags that make it run as far as it looks at the others, flags for which any text will do.
COMMANDS = {
    "generate": (generate.main, generate.parser, [*MODEL, "--prompt", "Hi"], ["--prompt", "--system"]),
    "evaluate": (evaluate.main, evaluate.parser, [*MODEL, "--data", "DATA", "--image-folder", "."], []),
    "infer.plan": (infer_plan.main, infer_plan.parser, PLAN, []),
    "train": (
        train.main, train.parser, [*MODEL, "--data", "DATA", "--output", "OUTPUT", "--steps", "1"], ["--eval-data"],
    ),
    "train.plan": (
        train_plan.main, train_plan.parser, [*PLAN, "--mesh", "fsdp=3"],
        ["--image-folder", "--output", "--eval-data", "--profile-steps", "--vision-tower"],
    ),
    "preview": (preview.main, preview.parser, [*MODEL, "--data", "DATA"], []),
    "shapes": (shapes.main, shapes.parser, ["--output", "OUTPUT", "--examples", "0"], []),
    **{
        f"convert {name}": (convert.main, convert.parser, [name, *flags], [])
        for name, flags in {
            "to-orbax": [CHECKPOINT, "OUTPUT"], "to-hf": [CHECKPOINT, "OUTPUT"], "inspect": [CHECKPOINT],
            "verify": [CHECKPOINT, CHECKPOINT],
        }.items()
    },
}  # fmt: skip


def flags_of(name: str) -> list[argparse.Action]:
    """The actions of a command that take a value; of those without a flag, the one action."""
    actions = COMMANDS[name][1]()._actions
    if name.startswith("convert "):
        actions = actions[-1].choices[name.removeprefix("convert ")]._actions
    return [action for action in actions if action.nargs != 0]


# Plans load the compiler for TPUs, beside which JAX's profiler crashes: last, as all that does.
CASES = [
    pytest.param(
        name,
        action,
        id=f"{name} {(action.option_strings or [action.dest])[-1]}",
        marks=[pytest.mark.tpu_compile] * name.endswith(".plan"),
    )
    for name in COMMANDS
    for action in flags_of(name)
    if not set(action.option_strings) & set(COMMANDS[name][3])
]


def check_short(message: str, value: str):
    assert len(message) < 360, message  # with a list of all templates or presets; of most, less than 250
    assert not any(value[i : i + 101] in message for i in range(len(value) - 100)), message


@pytest.mark.parametrize(("name", "action"), CASES)
def test_an_error_repeats_little_of_a_flag(run_cli, tmp_path, name, action):
    main, _, base, _ = COMMANDS[name]
    data = tmp_path / "data.jsonl"
    data.write_text('{"image": "none.png"}\n')
    base = [{"DATA": str(data), "OUTPUT": str(tmp_path / "new")}.get(word, word) for word in base]
    for value in (WORDS, WORD):
        given = [*base, action.option_strings[-1], value] if action.option_strings else [base[0], value, *base[2:]]
        status, out, err = run_cli(main, *given)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (status, out, len(errors)) == (1, "", 1), err
        check_short(errors[0], value)


def test_an_error_repeats_little_of_anything_else_on_the_line(run_cli):
    quoted = "it's \\ " * 60
    for given in ([quoted], [f"--batch={WORDS}"], [f"--{WORD}=1"], ["--batch", quoted], [f"--json={WORDS}"]):
        status, _, err = run_cli(infer_plan.main, *PLAN, *given)
        assert (status, err.count("\n")) == (1, 1)
        check_short(err, given[-1].removeprefix("--batch=").removeprefix("--json="))
        check_short(err, repr(given[-1]))


def make_directory(value: str):
    with new_directory(value):
        pass


LONG_VALUES = {
    "find_directory": find_directory,
    "new_directory": make_directory,
    "parse_mesh": parse_mesh,
    "parse_topology": parse_topology,
    "parse_topology of a kind": lambda value: parse_topology("v5e-" + value),
    "parse_profile_steps": parse_profile_steps,
    "preset": c.preset,
    "model_of": plan.model_of,
    "tune": lambda value: TrainConfig(tune=value),
    "lora_targets": lambda value: TrainConfig(lora_targets=(value,)),
    "a wrong type": lambda value: TrainConfig(epochs=value),
    "a number": lambda value: TrainConfig(steps=-(10**359)),
    "aspect_ratio": lambda value: c.tiny(aspect_ratio=value),
    "merge": lambda value: c.tiny(merge=value),
    "projector": lambda value: c.tiny(projector=value),
    "projector of many digits": lambda value: c.tiny(projector=f"mlp{value}x_gelu"),
    "activation": lambda value: c.tiny(text=c.TextConfig(activation=value)),
    "width": lambda value: c.tiny(text=c.TextConfig(width=value)),
    "norm_eps": lambda value: c.tiny(vision=c.VisionConfig(norm_eps=value)),
    "feature_layers": lambda value: c.tiny(vision=c.VisionConfig(feature_layers=tuple(range(400, 600)))),
}


@pytest.mark.parametrize("name", LONG_VALUES)
def test_an_error_of_the_library_repeats_little_of_a_value(name):
    for value in (WORDS, WORD):
        with pytest.raises(InputError) as error:
            LONG_VALUES[name](value)
        check_short(str(error.value), value)
        assert not re.search(r"\d{101}", str(error.value))
