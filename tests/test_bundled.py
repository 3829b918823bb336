"""The small model that ships: it is there, it answers by default, and it sees."""

import json
import re

import numpy as np
import pytest
from conftest import one_device
from PIL import Image

from infer import evaluate, generate
from infer.engine import Engine
from infer.flags import BUNDLED
from llava_jax.images import layout
from train import shapes
from train.scenes import make_scene


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Scenes that the recipe does not draw: its seed is 0."""
    output = tmp_path_factory.mktemp("fresh") / "data"
    shapes.write(output, 1, 80, seed=99)
    return output


@pytest.fixture(scope="module")
def engine():
    return Engine.load(BUNDLED, mesh=one_device())


LEAST = 0.9


def accuracy(engine, data, images) -> float:
    questions = evaluate.read_questions(data / "test.json", images)
    return evaluate.evaluate(engine, questions, evaluate.exact_match, rows=64, max_new_tokens=64)["accuracy"]


def test_it_is_small_and_complete():
    files = {file.name: file.stat().st_size for file in BUNDLED.iterdir()}
    assert sum(files.values()) < 10e6
    assert {"config.json", "model.safetensors", "tokenizer.model", "README.md", "example.png", "curves.png"} <= {*files}
    assert json.loads((BUNDLED / "config.json").read_text())["architectures"] == ["LlavaNextForConditionalGeneration"]


def test_without_a_checkpoint_it_answers(run_cli):
    status, out, err = run_cli(generate.main)
    assert status == 0 and re.fullmatch(r"[1-6]\n", out)
    assert "bundled model" in err and "How many objects are there?" in err


def test_it_answers_about_any_picture(run_cli, tmp_path):
    Image.open(BUNDLED / "example.png").save(tmp_path / "mine.png")
    args = ("--image", tmp_path / "mine.png", "--prompt", "How many objects are there?")
    assert run_cli(generate.main, *args)[1] == run_cli(generate.main)[1]


def test_a_checkpoint_still_wants_a_question(run_cli):
    status, _, err = run_cli(generate.main, "--checkpoint", BUNDLED)
    assert status == 1 and "--prompt or --questions" in err


def test_it_sees(engine, fresh, tmp_path):
    """Fresh scenes, and the same questions about noise."""
    seen = accuracy(engine, fresh, fresh / "images")
    rng = np.random.default_rng(0)
    for file in (fresh / "images").iterdir():
        width, height = Image.open(file).size
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / file.name)
    assert seen > LEAST
    assert accuracy(engine, fresh, tmp_path) < seen - 0.3


def test_its_pictures_come_in_every_grid(engine):
    scenes = [make_scene(np.random.default_rng(seed)) for seed in range(200)]
    grids = {layout((scene.width, scene.height), engine.config).grid for scene in scenes}
    assert grids == {(2, 1), (1, 2), (2, 2), (3, 1), (1, 3)}
