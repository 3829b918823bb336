"""Training makes a model see: a tiny one, from random weights, learns the colours of shapes it was not shown."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import one_device

from infer.engine import Engine
from infer.evaluate import evaluate, exact_match, read_questions
from train import loop
from train.config import TrainConfig
from train.scenes import COLOURS, draw, make_scene

SHAPES = Path(__file__).parents[1] / "examples" / "shapes"


@pytest.fixture
def recipe(monkeypatch):
    """The modules of the recipe."""
    monkeypatch.syspath_prepend(SHAPES)
    import model

    yield model
    sys.modules.pop("model")


def write_rows(folder: Path, split: str, number: int, seed: int) -> Path:
    """Pictures of one object, and the question for its colour."""
    rng, rows = np.random.default_rng(seed), []
    while len(rows) < number:
        if len((scene := make_scene(rng)).things) > 1:
            continue
        name = f"{split}-{len(rows)}.png"
        draw(scene, rng).save(folder / name)
        said = ["<image>\nWhat colour is the object?", scene.things[0].colour]
        turns = [{"from": who, "value": text} for who, text in zip(("human", "gpt"), said, strict=True)]
        rows.append({"id": name, "image": name, "conversations": turns})
    (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder / f"{split}.json"


def test_it_learns_to_see(recipe, tmp_path):
    train, test = write_rows(tmp_path, "train", 2000, 0), write_rows(tmp_path, "test", 128, 1)
    small = dict(width=64, ffn_width=128, layers=2, heads=2)
    config = recipe.CONFIG.replace(
        text=dataclasses.replace(recipe.CONFIG.text, **small, kv_heads=1, vocab_size=300),
        vision=dataclasses.replace(recipe.CONFIG.vision, **small, image_size=24, patch_size=12),
        grid_pinpoints=((24, 48), (48, 24)),
    )
    recipe.save(tmp_path / "start", config, recipe.start(config, 0), recipe.make_tokenizer(recipe.texts_of(train), 300))

    def accuracy(checkpoint: Path) -> float:
        engine = Engine.load(checkpoint, mesh=one_device())
        questions = read_questions(test, tmp_path)
        return evaluate(engine, questions, exact_match, rows=64, max_new_tokens=8)["accuracy"]

    run = TrainConfig(
        checkpoint=str(tmp_path / "start"), data=str(train), image_folder=str(tmp_path), output=str(tmp_path / "run"),
        tune="projector,decoder,vision", learning_rate=3e-3, steps=300, global_batch_size=16, max_length=64,
        positions_per_row=256, dtype="float32", remat="none", save_every=0, adam_b2=0.98, workers=0,
    )  # fmt: skip
    chance = 1 / len(COLOURS)
    assert accuracy(tmp_path / "start") < 2 * chance
    assert loop.train(loop.prepare(run)) == 0
    assert accuracy(tmp_path / "run" / "model") > 2 * chance
