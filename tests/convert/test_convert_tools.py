"""The conversion tool as a command: what it shows, compares and refuses; nothing half-done, whatever happens."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.numpy import load_file

from convert import __main__ as cli
from convert.finite import is_finite
from convert.to_orbax import to_orbax
from convert.verify import compare
from helpers import CHECKPOINTS, GOLDEN, ROOT, golden_tensors, read_damaged, write_checkpoint
from llava_jax.checkpoints import safetensors_files
from llava_jax.checkpoints.checkpoint import open_any
from llava_jax.checkpoints.config_json import read_config
from llava_jax.checkpoints.hf_files import write_hf
from llava_jax.config import tiny
from llava_jax.console import InputError
from llava_jax.data.templates import TEMPLATES, render, to_jinja
from llava_jax.data.tokenizer import load_tokenizer

MISTRAL = GOLDEN / "checkpoints" / "v1.6-mistral"


# ---------------------------------------------------------------- inspect


def test_inspect_counts_everything(run_cli, tmp_path):
    to_orbax(MISTRAL, tmp_path / "orbax")
    parameters = sum(x.size for x in golden_tensors("v1.6-mistral").values())
    for where, dialect in ((MISTRAL, "original"), (tmp_path / "orbax", "llava-jax")):
        status, out, err = run_cli(cli.main, "inspect", where, "--json")
        assert (status, err) == (0, "")
        found = json.loads(out)
        assert found["dialect"] == dialect
        assert sum(part["parameters"] for part in found["parts"].values()) == parameters
        assert sum(part["bytes"] for part in found["parts"].values()) == 4 * parameters
        assert found["parts"]["projector"]["tensors"] == 4
        assert "mistral decoder: 3 layers" in found["config"]
    row = next(row for row in found["tensors"] if row["path"] == "decoder/head/kernel")
    assert (row["shape"], row["dtype"], row["bytes"]) == ([64, 1000], "float32", 256_000)
    status, out, _ = run_cli(cli.main, "inspect", MISTRAL)
    assert status == 0
    assert "vision/layers/2/mlp/up/kernel" in out and "projector mlp2x_gelu" in out and "dialect: original" in out


def test_inspect_takes_what_is_no_whole_model(run_cli, tmp_path):
    from safetensors.numpy import save_file

    save_file({"model.mm_projector.0.weight": np.zeros((4, 2), np.float16), "odd": np.zeros(3, np.float32)},
              tmp_path / "mm_projector.safetensors")  # fmt: skip
    for where in (tmp_path, tmp_path / "mm_projector.safetensors"):
        status, out, _ = run_cli(cli.main, "inspect", where, "--json")
        assert status == 0
        assert {k: v["tensors"] for k, v in json.loads(out)["parts"].items()} == {"projector": 1, "other": 1}
    status, _, err = run_cli(cli.main, "inspect", tmp_path / "nothing")
    assert (status, err.count("\n")) == (1, 1)


# ---------------------------------------------------------------- verify


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_verify_across_dialects(run_cli, tmp_path, name):
    assert run_cli(cli.main, "to-orbax", GOLDEN / "checkpoints" / name, tmp_path / "o")[0] == 0
    assert run_cli(cli.main, "to-hf", tmp_path / "o", tmp_path / "h", "--format", "original")[0] == 0
    status, out, err = run_cli(cli.main, "verify", tmp_path / "o", tmp_path / "h")
    assert status == 0
    assert {line.split(": ")[1] for line in out.splitlines()} == {"identical"}
    assert err.endswith("identical\n")


def test_verify_tells_rounding_from_difference(run_cli, tmp_path):
    to_orbax(MISTRAL, tmp_path / "exact")
    to_orbax(MISTRAL, tmp_path / "rounded", dtype="bfloat16")
    status, out, _ = run_cli(cli.main, "verify", tmp_path / "exact", tmp_path / "rounded", "--json")
    rows = {row["path"]: row for row in map(json.loads, out.splitlines())}
    assert status == 0
    kernel = rows["decoder/layers/0/mlp/up/kernel"]
    assert kernel["result"] == "equal within rounding" and 0 < kernel["relative"] <= 2**-8
    tensors = golden_tensors("v1.6-mistral")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.01)
    status, out, err = run_cli(
        cli.main, "verify", tmp_path / "exact", write_checkpoint(tmp_path / "c", tensors, "v1.6-mistral")
    )
    assert status == 1
    assert [line.split(":")[0] for line in out.splitlines() if ": different" in line] == ["decoder/norm/scale"]
    assert "1 different" in err


BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("x", "y", "result"),
    [
        (np.float32([1, np.nan, np.inf]), np.float32([1, np.nan, np.inf]), "identical"),
        (np.float32([0.0]), np.float32([-0.0]), "equal within rounding"),
        (np.float32([1.001]), np.float32([1.001]).astype(BF16), "equal within rounding"),
        (np.float32([1e-7]), np.float32([1e-7]).astype(np.float16), "equal within rounding"),
        (np.float32([1.0]), np.float32([1.0 + 2**-20]), "different"),
        (np.float32([1.0]), np.float32([np.nan]), "different"),
        (np.float32([1.0]), np.float32([np.inf]), "different"),
        (np.float32([-np.inf]), np.float32([np.inf]), "different"),
        (np.float32([1.0, 2.0]), np.float32([1.0]), "different"),
        (np.float32([100.0]), np.float32([101.0]).astype(BF16), "different"),
    ],
)
def test_comparison(x, y, result):
    assert compare("p", x, y).result == result


# ---------------------------------------------------------------- to-hf


@pytest.mark.parametrize(
    ("name", "says"),
    [("v1-linear-llama", "linear projector"), ("v1.6-spatial-llama", "mm_patch_merge_type spatial")],
)
def test_what_transformers_cannot_hold(run_cli, tmp_path, name, says):
    status, _, err = run_cli(cli.main, "to-hf", GOLDEN / "checkpoints" / name, tmp_path / "h")
    assert (status, err.count("\n")) == (1, 1)
    assert says in err and "--format original" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["200KB", "0.2MB", "200000"])
def test_shards_have_at_most_the_size_asked_for(run_cli, tmp_path, size):
    arguments = "to-hf", MISTRAL, tmp_path / "h", "--format", "original", "--max-shard-size", size
    assert run_cli(cli.main, *arguments)[0] == 0
    index = json.loads((tmp_path / "h" / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(set(index.values()))
    assert len(files) == len(list((tmp_path / "h").glob("model-*.safetensors"))) > 3
    for file in files:
        held = load_file(tmp_path / "h" / file)
        assert {name for name, f in index.items() if f == file} == held.keys()
        assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= 200_000


def test_sizes_that_are_none(run_cli, tmp_path):
    for size in ("", "5 apples", "-3GB", "0"):
        status, _, err = run_cli(cli.main, "to-hf", MISTRAL, tmp_path / "h", f"--max-shard-size={size}")
        assert (status, err.count("\n")) == (1, 1) and "--max-shard-size" in err


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_write_what_we_write(name):
    template = TEMPLATES[name]
    compiled = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        to_jinja(template, tiny())
    )
    for turns in (
        ['<image>\nWhat\'s "{{ this }}"?\n', None],
        ["Q1", "A1", "<image>\nQ2", None],
        ["Q1", " A1 "],
        ["Q1", "A1", "Q2", "A2"],
    ):
        for system in (None, "Be {nice}.\n"):
            if system and template.style == "plain":
                continue  # which has none
            messages = [{"role": "system", "content": system}] if system else []
            for i, turn in enumerate(turn for turn in turns if turn is not None):
                parts = [{"type": "text", "text": turn.removeprefix("<image>\n")}]
                parts += [{"type": "image"}] if turn.startswith("<image>") else []
                messages.append({"role": ("user", "assistant")[i % 2], "content": parts if i % 4 == 0 else turn})
            written = compiled.render(messages=messages, add_generation_prompt=turns[-1] is None)
            assert written == render(template, turns, system=system)[0]


# ---------------------------------------------------------------- bad input, and trouble on the way


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("to-orbax", "SRC"), "needs SRC and DST"),
        (("to-orbax", "a", "b", "c"), "takes SRC and DST, got 3"),
        (("to-orbax", "DST", "--delta", "SRC"), "--delta needs --base"),
        (("to-orbax", "SRC", "DST", "--projector-type", "linear"), "plain language models"),
        (("to-orbax", "SRC", "DST", "--base", "EMPTY"), "a complete model, which needs no --base"),
        (("to-orbax", "EMPTY", "DST"), "no config.json"),
        (("to-orbax", "nowhere", "DST"), "no such directory"),
        (("to-hf", "SRC", "SRC"), "exists already"),
        (("verify", "SRC", "nowhere"), "no such directory"),
    ],
)
def test_bad_arguments_are_one_line(run_cli, tmp_path, arguments, says):
    (tmp_path / "empty").mkdir()
    places = {"SRC": MISTRAL, "DST": tmp_path / "dst", "EMPTY": tmp_path / "empty"}
    status, out, err = run_cli(cli.main, *(places.get(a, a) for a in arguments))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert re.search(says, err), err
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, np.float64])
def test_every_kind_of_nonfinite_number_is_seen(dtype, value):
    x = np.linspace(-6e4, 6e4, 700_001).astype(dtype)
    assert is_finite(x)
    for place in (0, 300_000, -1):
        y = x.copy()
        y[place] = value
        assert not is_finite(y)


def test_nonfinite_tensors_are_named(run_cli, tmp_path):
    tensors = golden_tensors("v1.6-mistral")
    tensors["model.norm.weight"][3] = np.nan
    source = write_checkpoint(tmp_path / "c", tensors, "v1.6-mistral")
    status, _, err = run_cli(cli.main, "to-orbax", source, tmp_path / "o")
    assert (status, err.count("\n")) == (1, 1)
    assert f"{source}/model.safetensors: tensor model.norm.weight has NaN or infinity" in err
    status, _, err = run_cli(cli.main, "to-hf", source, tmp_path / "h", "--format", "original")
    assert (status, err.count("\n")) == (1, 1) and "model.norm.weight has NaN" in err
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    status, _, err = run_cli(cli.main, "to-orbax", source, tmp_path / "o", "--allow-nonfinite")
    assert status == 0
    assert f"warning: {source}/model.safetensors: tensor model.norm.weight" in err
    assert np.isnan(open_any(tmp_path / "o").tensors["decoder/norm/scale"].read()[3])


def test_numbers_that_a_type_has_no_room_for_are_named(run_cli, tmp_path):
    tensors = golden_tensors("v1.6-mistral")
    tensors["model.norm.weight"][3] = 1e6
    source = write_checkpoint(tmp_path / "c", tensors, "v1.6-mistral")
    for kind in ("to-orbax", "to-hf"):
        status, _, err = run_cli(cli.main, kind, source, tmp_path / "o", "--dtype", "float16")
        assert (status, err.count("\n")) == (1, 1) and "numbers too large for float16" in err
        assert run_cli(cli.main, kind, source, tmp_path / kind, "--dtype", "bfloat16")[0] == 0


@pytest.mark.parametrize("name", ["we%20ird", "a#b?c|d", "sp ace ü"])
def test_any_name_will_do(run_cli, tmp_path, name):
    assert run_cli(cli.main, "to-orbax", MISTRAL, tmp_path / name)[0] == 0
    assert run_cli(cli.main, "verify", MISTRAL, tmp_path / name)[0] == 0


def test_what_is_read_is_not_overwritten(run_cli, tmp_path):
    shutil.copytree(MISTRAL, tmp_path / "m")
    shutil.copytree(MISTRAL / "vision_tower", tmp_path / "tower")
    for arguments in (
        ("to-orbax", tmp_path / "m", tmp_path / "m" / "vision_tower"),
        ("to-hf", tmp_path / "m", tmp_path / "tower", "--vision-tower", tmp_path / "tower"),
    ):
        status, _, err = run_cli(cli.main, *arguments, "--overwrite")
        assert (status, err.count("\n")) == (1, 1) and "overlaps an input of this command" in err
    assert (tmp_path / "tower" / "model.safetensors").exists()


def test_the_template_finds_its_way_back(tmp_path):
    found = open_any(GOLDEN / "checkpoints" / "v1.5-llama")
    tokenizer = load_tokenizer(found.directory)
    for form in ("transformers", "original"):
        for template in ("mpt", "llava_v0", "llava_llama_2"):
            source = dataclasses.replace(found, config=found.config.replace(template=template))
            write_hf(tmp_path / "h", source, tokenizer, form=form, overwrite=True)
            assert open_any(tmp_path / "h").config.template == template


def test_every_token_that_ends_an_answer_goes_along(tmp_path):
    found = open_any(GOLDEN / "checkpoints" / "v1.5-llama")
    text = dataclasses.replace(found.config.text, eos_ids=(7,))
    source = dataclasses.replace(found, config=found.config.replace(text=text))
    write_hf(tmp_path / "h", source, load_tokenizer(found.directory))
    assert json.loads((tmp_path / "h" / "generation_config.json").read_text())["eos_token_id"] == [2, 7]


def test_unused_tensors_are_checked_too(tmp_path):
    tensors = golden_tensors("v1.6-mistral")
    name = "model.vision_tower.vision_tower.vision_model.post_layernorm.weight"
    tensors[name] = np.zeros((3, 2), np.float32)
    with pytest.raises(InputError, match=r"post_layernorm\.weight .*should be \[32\]"):
        to_orbax(write_checkpoint(tmp_path / "c", tensors, "v1.6-mistral"), tmp_path / "o")


@pytest.mark.parametrize("model_type", ["gemma", "granite", "phi3", "qwen3"])
def test_decoders_of_other_kinds_are_refused(model_type):
    with pytest.raises(InputError, match=f"model_type '{model_type}' is not supported"):
        read_config({"model_type": model_type, "mm_vision_tower": "openai/clip-vit-large-patch14-336"})


def test_an_index_that_names_what_is_not_there(tmp_path):
    source = write_checkpoint(tmp_path / "c", golden_tensors("v1.6-mistral"), "v1.6-mistral")
    names = dict.fromkeys(golden_tensors("v1.6-mistral"), "model.safetensors") | {"ghost.weight": "model.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(InputError, match=r"in the index but not in their file: ghost\.weight \(model\.safetensors\)"):
        to_orbax(source, tmp_path / "o")


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "convert", *map(str, arguments)]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands in for a disk that is full."""
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "sys.argv = ['convert', *sys.argv[1:]]; runpy.run_module('convert', run_name='__main__')"
    )
    for arguments in (("to-orbax", MISTRAL, tmp_path / "o"), ("to-hf", MISTRAL, tmp_path / "h")):
        run = subprocess.run(
            [sys.executable, "-c", limited, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
        )
        assert run.returncode == 1
        assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
        assert "cannot be written (File too large)" in run.stderr and len(run.stderr) < 300
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["to-orbax", "to-hf"])
def test_killed_at_any_moment_it_leaves_all_or_nothing(tmp_path, kind):
    """`benchmarks/convert.py --kills 20` does it at 20 moments of a larger one."""
    destination = tmp_path / "out"
    arguments = command(kind, MISTRAL, destination)
    start = time.monotonic()
    subprocess.run(arguments, check=True, cwd=ROOT, capture_output=True)
    whole = time.monotonic() - start
    files = sorted(p.relative_to(destination) for p in destination.rglob("*") if kind == "to-hf")
    pick = random.Random(0)
    for i in range(2):
        shutil.rmtree(destination, ignore_errors=True)
        process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL)
        time.sleep(whole * (0.7 + 0.2 * i + 0.1 * pick.random()))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if destination.exists():
            open_any(destination)
            assert kind != "to-hf" or sorted(p.relative_to(destination) for p in destination.rglob("*")) == files
    subprocess.run([*arguments, "--overwrite"], check=True, cwd=ROOT, capture_output=True)
    open_any(destination)
    assert os.listdir(tmp_path) == ["out"]


def test_damaged_safetensors_are_refused_or_read(tmp_path):
    from safetensors.numpy import save_file

    whole = tmp_path / "whole.safetensors"
    save_file({"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(9, dtype=np.int8)}, whole)
    read, refused = read_damaged(safetensors_files.File, whole)
    assert read > 100 and refused > 1000
