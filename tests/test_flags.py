"""Every flag of every command that takes a value, given a long one: the error repeats little of it. Every number of
theirs, and of the library, at the ends of its range and beyond; and numbers that together are too much."""

import argparse
import dataclasses
import functools
import json
import math
import re
import typing

import numpy as np
import pytest

from convert import __main__ as convert
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from helpers import GOLDEN, golden_engine, turns
from infer import evaluate, flags, generate
from infer import plan as infer_plan
from infer.engine import Engine, Request
from infer.sampling import Sampling
from llava_jax import config as c
from llava_jax.aot import tpu_plan
from llava_jax.aot.tpu import parse_topology
from llava_jax.checkpoints.directories import find_directory
from llava_jax.checkpoints.outputs import new_directory
from llava_jax.console import InputError, Range, flag_of, ranges
from llava_jax.processes import connect
from llava_jax.sharding.mesh import make_mesh, parse_mesh
from llava_jax.sizes import parse_size
from train import __main__ as train
from train import plan as train_plan
from train import plot, preview
from train.config import TrainConfig
from train.datasets import scienceqa
from train.datasets.captions import __main__ as captions
from train.datasets.mix import __main__ as mix
from train.datasets.shapes import __main__ as shapes
from train.mixture import read_parts
from train.optim import schedule
from train.plan_run import numbers_of_parts
from train.profiling import parse_profile_steps
from train.row_packing import fill_rows
from train.synthetic_data import drawn_data

WORDS, WORD = "ab cd " * 60, "x" * 360
CHECKPOINT = str(GOLDEN / "checkpoints" / "v1.5-llama")
MODEL = ["--checkpoint", CHECKPOINT]
PLAN = ["--model", "llava-v1.5-7b", "--topology", "v5e:2x2"]
# A command, its parser, flags that make it run as far as it looks at the others, flags for which any text will do.
COMMANDS = {
    "generate": (generate.main, generate.parser, [*MODEL, "--prompt", "Hi"], ["--prompt", "--system", "--stop"]),
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
    "plot": (plot.main, plot.parser, ["none", "--output", "x.png"], []),
    "scienceqa": (scienceqa.main, scienceqa.parser, ["--base-dir", "none", "--split", "train"], []),
    "captions": (captions.main, captions.parser, ["--captions", "DATA", "--output", "OUTPUT"], []),
    "mix": (mix.main, mix.parser, ["--data", "DATA", "--output", "OUTPUT"], []),
    "shapes": (shapes.main, shapes.parser, ["--output", "OUTPUT", "--examples", "1"], []),
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


@pytest.mark.parametrize("flag", ["--seed", "--prompt", "--checkpoint", "-n"])
def test_two_dashes_are_no_value(run_cli, flag):
    for main in (generate.main, train.main, preview.main, shapes.main):
        status, out, err = run_cli(main, f"{flag}=--")
        assert (status, out, err) == (
            1,
            "",
            f"error: argument {flag}: expected one argument (--help lists all flags)\n",
        )


def test_an_error_repeats_little_of_anything_else_on_the_line(run_cli):
    quoted = "it's \\ " * 60
    for given in ([quoted], [f"--slots={WORDS}"], [f"--{WORD}=1"], ["--slots", quoted], [f"--json={WORDS}"]):
        status, _, err = run_cli(infer_plan.main, *PLAN, *given)
        assert (status, err.count("\n")) == (1, 1)
        check_short(err, given[-1].removeprefix("--slots=").removeprefix("--json="))
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
    "model_of": tpu_plan.model_of,
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


# ---------------------------------------------------------------- numbers

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
# What goes with the end of a range, where two numbers bound each other.
WITH = {"positions_per_row": ["--max-length", "2"], "accumulate": ["--global-batch-size", "1000000"]}
NO_NUMBERS = [
    "", " ", " 5", "5 ", "5\n", "1_000", "\u0665", "\u00b2", "\uff15", "0x10", "five", "1,000", "+", ".", "nan", "NaN",
    "inf", "-inf", "Infinity", "1e", "1e5.0", "1d5", "2**31", "9" * 360, "0." + "1" * 360,
]  # fmt: skip
TEXTS = ["0", "-1", str(2**31), str(2**64), str(10**9), "-0.5", "1e300", "-1e300", "1e400", "1e-300"]


@functools.cache
def parser_of(name: str) -> argparse.ArgumentParser:
    return COMMANDS[name][1]()


def is_train_field(name: str, action: argparse.Action) -> bool:
    return name in ("train", "train.plan") and action.dest in FIELDS


def range_of(name: str, action: argparse.Action) -> Range | None:
    """Of a flag that takes a number; None for others. A number without a range fails."""
    if is_train_field(name, action):
        kinds = typing.get_args(FIELDS[action.dest].type) or (FIELDS[action.dest].type,)
        found = ranges(TrainConfig).get(action.dest)
        assert bool(found) == bool({int, float} & set(kinds)), f"{action.dest} has no range"
        return found
    has_range = action.type in (None, parse_size, flags.logit_bias, evaluate.shard) or isinstance(action.type, Range)
    assert has_range, f"{name} {action.dest} has no range"
    return action.type if isinstance(action.type, Range) else None


def read(name: str, action: argparse.Action, text: str):
    """The value of a flag, as the command has it before it looks at anything else."""
    more = WITH.get(action.dest, []) if is_train_field(name, action) else []
    args = parser_of(name).parse_args([*COMMANDS[name][2], *more, f"{action.option_strings[-1]}={text}"])
    return getattr(train.config_of(args) if is_train_field(name, action) else args, action.dest)


NUMBERS = [
    (name, action, allowed) for name in COMMANDS for action in flags_of(name) if (allowed := range_of(name, action))
]


def test_every_number_is_looked_at():
    names = {(name, action.dest) for name, action, _ in NUMBERS}
    assert {("generate", "batch_size"), ("train", "seed"), ("preview", "n"), ("convert to-orbax", "seed")} < names


@pytest.mark.parametrize(
    ("name", "action", "allowed"), NUMBERS, ids=[f"{name} {action.option_strings[-1]}" for name, action, _ in NUMBERS]
)
def test_a_number_has_a_range(name, action, allowed):
    whole = allowed.kind is int
    low = math.nextafter(allowed.minimum, math.inf) if allowed.above else allowed.minimum
    low = low if low == 0 or low > 1e-30 else 1e-30
    below = (
        allowed.minimum - 1
        if whole
        else allowed.minimum
        if allowed.above
        else math.nextafter(allowed.minimum, -math.inf)
    )
    above = allowed.maximum + 1 if whole else math.nextafter(allowed.maximum, math.inf)
    for value in (low, allowed.maximum):
        assert read(name, action, str(value)) == value
    bad = [*NO_NUMBERS, str(below), str(above), *["1e5", "5.0", "1e300"] * whole]
    for text in TEXTS:
        if re.fullmatch("-?[0-9]+", text) or not whole:
            good = allowed.minimum <= float(text) <= allowed.maximum and text != "1e-300"
            good = good and not (allowed.above and float(text) == allowed.minimum)
            if good:
                assert read(name, action, text) == float(text)
            bad += [text] * (not good)
    for text in bad:
        with pytest.raises(InputError) as error:
            read(name, action, text)
        message = str(error.value)
        assert message.startswith(f"{action.option_strings[-1]} ") and ": must be " in message, (text, message)
        assert message.count("\n") == 0 and len(message) < 250, message


FILE = str(GOLDEN / "anyres.json")
# What reads a number that is part of a text; texts in range, and out of it.
PARTS = {
    "mesh": (
        parse_mesh, ["fsdp=1", "data=-1,fsdp=999999"],
        ["fsdp=0", "fsdp=-2", "fsdp=1000000", "fsdp=1000000000", "fsdp=1e5", "fsdp=1_0", "fsdp=\u0665", "fsdp="],
    ),
    "topology": (
        parse_topology, ["v5e:16x16", "v6e:1x1", "v5p:28x20x16", "v4:16x16x16", "v5e:2x2x1"],
        ["v5e:0x2", "v5e:16x17", "v5e:2x2x2", "v5e:100x100", "v5p:1000000000x2", "v4:32x2x2", "v5e:\u0662x2",
         "v5litepod-1000000000", "v5litepod-\u0664"],
    ),
    "profile steps": (
        parse_profile_steps, ["1:1", "1:999999999"],
        ["0:1", "2:1", "1:1000000000", "1:1e5", "-1:2", ":", "1:\u0665", "1:inf", "1_0:2_0"],
    ),
    "shard size": (
        lambda text: convert.parser().parse_args(["to-hf", "a", "b", f"--max-shard-size={text}"]),
        ["1", "1B", "0.5kB", "1GiB", "1000TB"],
        ["0", "-1", "0.5", "1e15", "1001TB", "999999999999999TB", "nan", "inf", "1_000", "\u0665GB", "", "GB"],
    ),
    "weight": (
        lambda weight: read_parts(f"{FILE}={weight}"), ["0.5", "1", "1e-3", "1000"],
        ["0", "-1", "1000.1", "1e400", "1e-300", "nan", "inf", "1_0", "\u0665", " 1", "1e"],
    ),
    "logit_bias": (
        lambda text: generate.parser().parse_args([f"--logit-bias={text}"]), ["0=-100", "7=1e2", "2147483647=.5"],
        ["", "5", "=1", "5=", "-1=1", "2147483648=1", "5=101", "5=-1e300", "5=nan", "1.0=1", "5=1=1"],
    ),
    "port": (
        lambda port: connect(f"host:{port}", 0, 0, 40), [], ["0", "65536", "1000000000", "-1", "\u0665", "", "1e3"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_a_number_in_a_text_has_a_range(name):
    reads, good, bad = PARTS[name]
    for text in good:
        reads(text)
    for text in bad:
        with pytest.raises(InputError) as error:
            reads(text)
        assert len(str(error.value)) < 250 and "\n" not in str(error.value)


NONE_OF_THEM = [math.nan, math.inf, -math.inf, 2**64, 10**5000, -(10**5000), 1e300, "1", [1], True, b"1", 1j]


@pytest.mark.parametrize("config", [Sampling, TrainConfig])
def test_the_library_has_the_same_ranges(config):
    for name, allowed in ranges(config).items():
        default = next(field.default for field in dataclasses.fields(config) if field.name == name)
        bad = [*NONE_OF_THEM, allowed.minimum - 1, *[1.5] * (allowed.kind is int), *[1e-300] * (allowed.kind is float)]
        for value in [*bad, *[None] * (default is not None)]:
            with pytest.raises(InputError, match=f"^{flag_of(name)} .*must be ") as error:
                config(**{name: value})
            assert len(str(error.value)) < 250
    Sampling(seed=np.int64(3), temperature=np.float32(0.5))


def test_the_engine_and_converters_have_them_too():
    engine = golden_engine("v1.5-llama")
    for value in (0, -1, 2**31, 2**40, 1.0, math.nan, None, "8"):
        for ask in (engine.ask, lambda prompt, **sampling: list(engine.stream(prompt, **sampling))):
            with pytest.raises(InputError, match="^--max-new-tokens .*: must be a whole number from 1 to 2147483647$"):
                ask("Hi", max_new_tokens=value)
    for rows in (0, -1, 257, 10**9, 2.0, None):
        with pytest.raises(InputError, match="^--batch-size .*: must be a whole number from 1 to 256$"):
            list(engine.generate([Request(("Hi",))], Sampling(), rows=rows))
    for size in (0, -1, 10**15 + 1, 5e9, math.inf):
        with pytest.raises(InputError, match="^--max-shard-size .*: must be a whole number from 1 to "):
            to_hf("none", "none", shard_bytes=size)
    for seed in (-1, 2**31, 2**64, 0.5, None):
        with pytest.raises(InputError, match="^--seed .*: must be a whole number from 0 to "):
            to_orbax("none", "none", seed=seed)


# ---------------------------------------------------------------- numbers that together are too much


def test_more_new_tokens_than_the_model_has_positions(monkeypatch, capsys):
    monkeypatch.setattr(Engine, "load", lambda *_, **__: golden_engine("v1.5-llama"))
    for number, says in (
        (512, ""),
        (2**31 - 1, "warning: --max-new-tokens 2147483647: the model's context has 512 positions, "),
    ):
        flags.load_engine(generate.parser().parse_args([*MODEL, "--prompt", "Hi", "--max-new-tokens", str(number)]))
        err = capsys.readouterr().err
        assert says in err and ("warning" in err) == bool(says)


TURNS = turns("Hi", "Hello.")
TOO_MUCH = {
    "batch": (["--global-batch-size", 10**8], "--global-batch-size 100000000: must be a whole number from 1 to"),
    "parts": (["--accumulate", 8, "--global-batch-size", 4], "must be at most --global-batch-size, 4"),
    "parts of few": (["--accumulate", 1024, "--global-batch-size", 1024], "at most the 8 conversations of a batch"),
    "memory": (["--global-batch-size", 1000, "--prefetch", 1024], "1026 batches prepared ahead, 8 rows and "),
    "row": (["--positions-per-row", 64], "--positions-per-row 64: must be at least --max-length, 128"),
    "devices": (["--mesh", "fsdp=999999"], "needs 999999 devices, here are 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_run_that_no_machine_has_room_for(run_cli, monkeypatch, tmp_path, name):
    """Refused before weights are read, and nothing is left of it."""
    given, says = TOO_MUCH[name]
    monkeypatch.setattr("train.loader.memory_bytes", lambda: 10**6)
    monkeypatch.setattr("train.loop.train", lambda run: pytest.fail("it has begun"))
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": i, "conversations": TURNS} for i in range(8)]))
    base = [*MODEL, "--data", data, "--output", tmp_path / "out", "--template", "v1", "--max-length", 128]
    status, out, err = run_cli(train.main, *base, "--warmup-ratio", 0, "--workers", 0, "--mesh", "fsdp=8", *given)
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert says in err
    assert not (tmp_path / "out").exists()


def test_more_steps_than_can_be_counted():
    config = TrainConfig(global_batch_size=1, epochs=1e6, batching="bucketed")
    data = drawn_data(config, c.tiny(), 1, 10_000)
    with pytest.raises(InputError, match=r"^--epochs 1e\+06: makes \d+ steps, more than 2147483647$"):
        data.total_steps  # noqa: B018
    assert 0 < float(schedule(config, 2**31 - 1)(2**30)) < 1


def test_rows_of_any_size_take_what_is_in_them():
    assert fill_rows([(3, 1), (2, 0), (2, 2)], 10**12, 10**9) == [[0, 2, 1]]
    assert fill_rows([(3, 1), (2, 0), (2, 2)], 10**12, 2) == [[0, 1], [2]]


def test_numbers_of_parts():
    assert numbers_of_parts(1) == [1]
    assert numbers_of_parts(10) == [1, 2, 3, 4, 5, 10]
    assert len(numbers_of_parts(10**9)) == 63_245


@pytest.mark.parametrize("weight", ["1000", "999.5"])
def test_more_rows_than_a_run_can_order(weight):
    [part] = read_parts(f"{FILE}={weight}")
    with pytest.raises(InputError, match="rows, more than 100000000$"):
        part.choose(10**6, (0, 0))


def test_a_batch_too_large_for_a_chip_is_not_compiled(monkeypatch):
    monkeypatch.setattr(tpu_plan, "compile_for_tpu", lambda *_, **__: pytest.fail("it is compiled"))
    mesh, model = make_mesh({"fsdp": -1}), c.tiny()
    needs, _ = train_plan.plan_step(model, TrainConfig(), mesh, "v5e:2x4", 2**16, 2**17, 512)
    assert not needs.fits and needs.peak_bytes_per_chip > 2**16 * 2**17 * 20
    made = infer_plan.Planner(model, mesh, "v5e:2x4", 2**20).plans(2**20)
    assert not made["prefill"][0].fits and list(made) == ["prefill"]


def test_more_chips_than_there_are():
    with pytest.raises(InputError, match="^--slices 1024: 1024 x v5e:16x16 are 262144 chips, more than 10000$"):
        tpu_plan.mesh_of(None, lambda devices: pytest.fail("made"), "v5e:16x16", 1024)
