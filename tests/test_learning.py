"""Training makes a model see: a tiny one, from random weights, learns the colours of shapes it was not shown. Pieces of
the recipe for a larger one (`examples/shapes`)."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from conftest import one_device

from infer.engine import Engine
from infer.evaluate import evaluate, exact_match, read_questions
from llava_jax import llava
from llava_jax.config import tiny
from llava_jax.vision import normalise, project, vision_features
from train import loop
from train.config import TrainConfig
from train.scenes import COLOURS, draw, make_scene

SHAPES = Path(__file__).parents[1] / "examples" / "shapes"


@pytest.fixture
def modules(monkeypatch):
    """Imports modules of the recipe by name."""
    monkeypatch.syspath_prepend(SHAPES)
    before = set(sys.modules)
    yield importlib.import_module
    for name in {"model", "warm_up", "cpu"} & (set(sys.modules) - before):
        del sys.modules[name]


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


def test_it_learns_to_see(modules, tmp_path):
    recipe = modules("model")
    train, test = write_rows(tmp_path, "train", 2000, 0), write_rows(tmp_path, "test", 128, 1)
    small = dict(width=64, ffn_width=128, layers=2, heads=2)
    config = recipe.CONFIG.replace(
        text=dataclasses.replace(recipe.CONFIG.text, **small, kv_heads=1, vocab_size=300),
        vision=dataclasses.replace(recipe.CONFIG.vision, **small, image_size=24, patch_size=12),
        grid_pinpoints=((24, 48), (48, 24)),
    )
    tokenizer = recipe.make_tokenizer(recipe.texts_of(train), 300)
    recipe.save(tmp_path / "start", config, recipe.start(config, 0, tokenizer), tokenizer)

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


# ---------------------------------------------------------------- pieces of the recipe


def test_gradients_that_cpus_like_are_the_gradients(modules):
    model, rng = tiny(), np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), llava.param_shapes(model))
    tiles = rng.integers(0, 256, (2, model.vision.image_size, model.vision.image_size, 3), np.uint8)

    def gradients():
        def loss(params):
            features = vision_features(params["vision"], model, normalise(tiles, model.vision))
            return jnp.sum(project(params["projector"], model, features) ** 2)

        return jax.jit(jax.grad(loss))(params)

    want = gradients()
    with modules("cpu").quick_gradients():
        got = gradients()
        llava.param_shapes(model)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want)) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-12), got, want)


def test_the_first_patch_embedding_tells_patches_apart(modules):
    config = modules("model").CONFIG.vision
    rng = np.random.default_rng(0)
    tiles = np.stack([np.asarray(draw(make_scene(rng), rng).resize((config.image_size,) * 2)) for _ in range(100)])
    patch = modules("warm_up").whitened(tiles, config, seed=0)
    side, p = config.patches_per_side, config.patch_size
    pixels = np.asarray(normalise(tiles, config)).reshape(-1, side, p, side, p, 3).swapaxes(2, 3)
    out = pixels.reshape(-1, p * p * 3) @ patch.reshape(-1, config.width)
    power = np.linalg.eigvalsh(out.T @ out / len(out))
    assert power[0] > 0.3 and power[-1] < 1.01  # in all directions alike


def test_forms_of_a_word_begin_alike(modules):
    model = modules("model")
    texts = ["how many circles are there?", "is the circle red?", "Circles, crosses and a cross.", "red"] * 50
    tokenizer = model.make_tokenizer(texts, 300)
    config = model.CONFIG.replace(text=dataclasses.replace(model.CONFIG.text, vocab_size=300))
    table = np.asarray(model.start(config, 0, tokenizer)["decoder"]["embed"]["embedding"])
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    alike = lambda a, b: float(np.corrcoef(table[pieces.piece_to_id(a)], table[pieces.piece_to_id(b)])[0, 1])  # noqa: E731
    assert alike("▁circle", "▁circles") > 0.8
    assert abs(alike("▁circle", "▁red")) < 0.4
    assert [pieces.id_to_piece(i) for i in model.ids_of(["red"], tokenizer)] == ["▁red"]
    with pytest.raises(KeyError):
        model.ids_of(["blue"], tokenizer)
