"""The small model that ships: it is there, it answers by default, and it sees."""

import json
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import ROOT, one_device
from infer import generate
from infer.benchmark_run import evaluate
from infer.benchmarks.conversations import Conversations, read_questions
from infer.engine import Engine, Request
from infer.generate import BUNDLED
from infer.sampling import Sampling
from llava_jax.data.images import tile_layout
from train.datasets.shapes import __main__ as shapes
from train.datasets.shapes.scenes import draw, make_scene

LEAST = 0.95
SHOWN = make_scene(np.random.default_rng(50))  # what example.png shows


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Scenes that the recipe does not draw: its seed is 0."""
    output = tmp_path_factory.mktemp("fresh") / "data"
    shapes.write(output, 1, 30, seed=99)
    return output


@pytest.fixture(scope="module")
def engine():
    return Engine.load(BUNDLED, mesh=one_device())


def accuracy(engine, data, images) -> float:
    return evaluate(engine, Conversations(data / "test.json", images), Path(), rows=64, max_new_tokens=64).value


def test_it_is_small_and_complete():
    files = {file.name: file.stat().st_size for file in BUNDLED.iterdir()}
    assert sum(files.values()) < 10e6
    assert {"config.json", "model.safetensors", "tokenizer.model", "README.md", "example.png", "curves.png"} <= {*files}
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = installed["package-data"]["infer"]
    assert any(fnmatch("infer", pattern) for pattern in installed["packages"]["find"]["include"])
    assert all(any(fnmatch(f"{BUNDLED.name}/{name}", pattern) for pattern in patterns) for name in files)
    assert json.loads((BUNDLED / "config.json").read_text())["architectures"] == ["LlavaNextForConditionalGeneration"]


def test_without_a_checkpoint_it_answers(run_cli):
    status, out, err = run_cli(generate.main)
    assert (status, out) == (0, f"{len(SHOWN.things)}\n")
    assert "bundled model" in err and "How many objects are there?" in err


def test_it_answers_from_a_quantized_cache(run_cli, fresh, engine):
    """Nearly always as from another."""
    status, out, _ = run_cli(generate.main, "--int8-cache")
    assert (status, out) == (0, f"{len(SHOWN.things)}\n")
    small = Engine.load(BUNDLED, mesh=one_device(), int8_cache=True)
    questions = [Request(q.turns, q.images) for q in read_questions(fresh / "test.json", fresh / "images")]
    want, got = (dict(one.generate(questions, Sampling(max_new_tokens=64), rows=64)) for one in (engine, small))
    assert all(layer.is_int8 for layer in small._scheduler.slots.cache)
    same = [want[i].token_ids == got[i].token_ids for i in range(len(questions))]
    assert sum(same) / len(same) > 0.97


def test_it_answers_about_any_image(run_cli, tmp_path):
    scene = make_scene(rng := np.random.default_rng(6))
    draw(scene, rng).save(tmp_path / "mine.png")
    out = run_cli(generate.main, "--image", tmp_path / "mine.png", "--prompt", "How many objects are there?")[1]
    assert out == f"{len(scene.things)}\n" and len(scene.things) != len(SHOWN.things)


def test_it_answers_files_of_questions(run_cli, tmp_path):
    row = {"question_id": 1, "image": "example.png", "text": "How many objects are there?"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    files = ("--questions", tmp_path / "q.jsonl", "--image-folder", BUNDLED, "--answers", tmp_path / "a.jsonl")
    assert run_cli(generate.main, *files)[0] == 0
    assert json.loads((tmp_path / "a.jsonl").read_text())["text"] == str(len(SHOWN.things))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--checkpoint", BUNDLED), "--prompt or --questions"),
        (("--image", "a.png"), "--prompt or --questions"),
        (("--checkpoint", "", "--prompt", "Hi"), "not a checkpoint"),
        (("--vision-tower", "."), "--vision-tower needs --checkpoint"),
    ],
)
def test_what_is_missing_is_said(run_cli, flags, says):
    status, out, err = run_cli(generate.main, *flags)
    assert (status, out) == (1, "") and says in err.splitlines()[-1]


def test_it_sees(engine, fresh, tmp_path):
    """Fresh scenes, and the same questions about noise."""
    seen = accuracy(engine, fresh, fresh / "images")
    rng = np.random.default_rng(0)
    for file in (fresh / "images").iterdir():
        width, height = Image.open(file).size
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / file.name)
    assert seen > LEAST
    assert accuracy(engine, fresh, tmp_path) < seen - 0.3


def test_its_images_come_in_every_grid(engine):
    scenes = [make_scene(np.random.default_rng(seed)) for seed in range(200)]
    grids = {tile_layout((scene.width, scene.height), engine.config).grid for scene in scenes}
    assert grids == {(2, 1), (1, 2), (2, 2), (3, 1), (1, 3)}
