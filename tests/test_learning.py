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

from helpers import ROOT, one_device
from infer.benchmark_run import evaluate
from infer.benchmarks.conversations import Conversations
from infer.engine import Engine
from llava_jax.checkpoints.checkpoint import open_checkpoint
from llava_jax.config import tiny
from llava_jax.console import InputError
from llava_jax.models import llava
from llava_jax.models.clip import normalise, vision_features
from llava_jax.models.projector import project
from train import loop
from train.config import TrainConfig
from train.datasets.shapes.questions import middle_of, place_of
from train.datasets.shapes.scenes import COLOURS, draw, make_scene
from train.loader import open_data
from train.run import prepare

SHAPES = ROOT / "examples" / "shapes"


@pytest.fixture
def modules(monkeypatch):
    """Imports modules of the recipe by name."""
    monkeypatch.syspath_prepend(SHAPES)
    before = set(sys.modules)
    yield importlib.import_module
    for name in {path.stem for path in SHAPES.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]


def write_rows(folder: Path, split: str, number: int, seed: int) -> Path:
    """Images of one large object, and the question for its colour."""
    rng, rows = np.random.default_rng(seed), []
    while len(rows) < number:
        scene = make_scene(rng)
        large = tuple(thing for thing in scene.things if thing.size == "large")
        if not large:
            continue
        scene = dataclasses.replace(scene, things=large[:1])
        name = f"{split}-{len(rows)}.png"
        draw(scene, rng).save(folder / name)
        said = ["<image>\nWhat colour is the object?", scene.things[0].colour]
        turns = [{"from": who, "value": text} for who, text in zip(("human", "gpt"), said, strict=True)]
        rows.append({"id": name, "image": name, "conversations": turns})
    (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder / f"{split}.json"


def save_start(model, folder: Path, rows: Path, **small: int) -> None:
    """A checkpoint with tower and decoder of such dimensions, random weights and a tokenizer for these rows."""
    config = model.CONFIG.replace(
        text=dataclasses.replace(model.CONFIG.text, **small, kv_heads=1, vocab_size=300),
        vision=dataclasses.replace(model.CONFIG.vision, **small, image_size=24, patch_size=12),
        grid_pinpoints=((24, 48), (48, 24)),
    )
    tokenizer = model.make_tokenizer(model.texts_of(rows), 300)
    model.save(folder, config, model.initialize(config, 0, tokenizer), tokenizer)


def test_it_learns_to_see(modules, tmp_path, monkeypatch):
    recipe = modules("model")
    train, test = write_rows(tmp_path, "train", 2000, 0), write_rows(tmp_path, "test", 128, 1)
    save_start(recipe, tmp_path / "start", train, width=64, ffn_width=128, layers=2, heads=2)

    def accuracy(checkpoint: Path) -> float:
        engine = Engine.load(checkpoint, mesh=one_device())
        return evaluate(engine, Conversations(test, tmp_path), Path(), rows=64, max_new_tokens=8).value

    run = TrainConfig(
        checkpoint=str(tmp_path / "start"), data=str(train), image_folder=str(tmp_path), output=str(tmp_path / "run"),
        tune="projector,decoder,vision", learning_rate=1e-3, steps=450, global_batch_size=16, max_length=64,
        positions_per_row=256, dtype="float32", remat="none", save_every=0, adam_b2=0.98, workers=0, warmup_ratio=0.1,
    )  # fmt: skip
    monkeypatch.setattr("train.run.make_mesh", lambda _: one_device())  # emulated ones take twice as long
    chance = 1 / len(COLOURS)
    assert accuracy(tmp_path / "start") < 2 * chance
    assert loop.train(prepare(run)) == 0
    assert accuracy(tmp_path / "run" / "model") > 2 * chance


# ---------------------------------------------------------------- parts of the recipe


def test_gradients_that_cpus_like_are_the_gradients(modules):
    model, rng = tiny(), np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), llava.param_shapes(model))
    tiles = rng.integers(0, 256, (2, model.vision.image_size, model.vision.image_size, 3), np.uint8)

    def gradients():
        def loss(params):
            features = vision_features(params["vision"], model.vision, normalise(tiles, model.vision))
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


def test_the_tower_is_told_of_every_object_once(modules, tmp_path):
    """At its middle on the base tile, with its place in the image, and again on the tiles of the grid together."""
    warm_up, config = modules("warm_up"), modules("model").CONFIG
    scenes, paths = [make_scene(np.random.default_rng(seed)) for seed in range(12)], []
    for i, scene in enumerate(scenes):
        draw(scene, np.random.default_rng(i)).save(tmp_path / f"{i}.png")
        paths.append(tmp_path / f"{i}.png")
    seen = warm_up.label_tiles(scenes, paths, config)
    starts = np.flatnonzero(seen.base)
    assert len(starts) == len(scenes) and len(seen.tiles) > 3 * len(scenes)
    side = config.vision.patches_per_side
    for scene, start, end in zip(scenes, starts, [*starts[1:], len(seen.tiles)], strict=True):
        for tiles in (slice(start, start + 1), slice(start + 1, end)):
            assert seen.centre[tiles].sum() == pytest.approx(len(scene.things), abs=1e-5)
        held = seen.centre[start] >= 0.25
        told = {
            (*(options[i] for options, i in zip(warm_up.NAMES, numbers, strict=True)), *place[:2].round(3))
            for numbers, place in zip(seen.names[start][held], seen.places[start][held], strict=True)
        }
        drawn = set()
        for thing in scene.things:
            across, down = middle_of(thing, scene)
            place = np.float32([side * (across - 0.5), side * (down - 0.5)]).round(3)
            drawn.add((thing.shape, thing.colour, thing.size, *place_of(thing, scene).split(), *place))
        assert told <= drawn
        assert len(told) >= len(drawn) - 1  # two middles may lie in one patch
        on_grid = seen.names[start + 1 : end, ..., 0] > 0
        again = zip(seen.names[start + 1 : end][on_grid], seen.places[start + 1 : end][on_grid], strict=True)
        assert {(*numbers, *place[:2].round(3)) for numbers, place in again} <= {
            (*numbers, *place[:2].round(3))
            for numbers, place in zip(seen.names[start].reshape(-1, 5), seen.places[start].reshape(-1, 4), strict=True)
        }


def test_a_middle_near_an_edge_between_patches_is_in_both_in_parts(modules):
    warm_up = modules("warm_up")
    for at in np.linspace(0, 9.999, 193):
        held = np.concatenate(
            [warm_up._centre_shares(at, 5), warm_up._centre_shares(at - 5, 5)]
        )  # on two tiles side by side
        if warm_up.NEAR < at < 10 - warm_up.NEAR:
            assert held.sum() == pytest.approx(1) and (held >= 0).all()
            assert held[int(at)] == 1 if abs(at - round(at)) >= warm_up.NEAR else held[int(at)] >= 0.5
    np.testing.assert_allclose(warm_up._centre_shares(2.0, 5), [0, 0.5, 0.5, 0, 0])
    np.testing.assert_allclose([warm_up._centre_shares(5.0, 5)[-1], warm_up._centre_shares(0.0, 5)[0]], 0.5)
    assert not warm_up._centre_shares(-0.2, 5).any() and not warm_up._centre_shares(5.2, 5).any()


def test_the_decoder_is_trained_on_batches_of_all_data_in_turn(modules, tmp_path, monkeypatch):
    model, warm_up = modules("model"), modules("warm_up")
    one, other = write_rows(tmp_path, "one", 40, 0), write_rows(tmp_path, "other", 40, 1)
    save_start(model, tmp_path / "start", one, width=32, ffn_width=64, layers=1, heads=2)
    asking = TrainConfig(
        checkpoint=str(tmp_path / "start"), data=str(one), eval_data=str(other), image_folder=str(tmp_path),
        output=str(tmp_path / "log"), tune="projector,decoder", global_batch_size=4, max_length=64, dtype="float32",
        workers=0,
    )  # fmt: skip
    telling = asking.replace(data=str(other), template="plain")

    taken = []

    def fit(loss_of, params, frozen, batches, *_):
        taken.extend(next(batches) for _ in range(6))
        return params

    monkeypatch.setattr(warm_up, "fit", fit)
    warm_up.warm_up_decoder([asking, asking, telling], steps=6, rate=1e-3)
    found = open_checkpoint(tmp_path / "start")
    first, second = (iter(open_data(c, found.config, found.tokenizer)) for c in (asking, telling))
    for got, source in zip(taken, [first, first, second] * 2, strict=True):
        np.testing.assert_array_equal(got.ids, next(source)[0].ids)


def test_the_curves_of_all_phases_are_drawn(modules, tmp_path):
    recipe = modules("recipe")
    for name in (*recipe.WARM_UPS, *recipe.STAGES):
        folder = tmp_path / "log" / name if name in recipe.WARM_UPS else tmp_path / name
        folder.mkdir(parents=True)
        lines = [{"step": i, "loss": 1 / i} | ({"accuracy": 0.1 * i} if "log" in folder.parts else {}) for i in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    axes = recipe.draw_curves(tmp_path).axes
    assert len(axes) == 2 * len(recipe.WARM_UPS) + len(recipe.STAGES)
    assert [axes[i].get_title() for i in (0, 1, -1)] == ["tower: loss", "tower: held-out patches", "stage-2: loss"]
    assert list(axes[1].get_lines()[0].get_ydata()) == [0.1, 0.2]


def test_a_run_is_resumed_only_with_the_settings_that_it_was_begun_with(modules, tmp_path, run_cli):
    recipe, run = modules("recipe"), tmp_path / "run"
    settings = {"share": 1.0, "tower": {"steps": 2}, "grid": ((1, 2),)}
    recipe.begin(run, settings)
    recipe.begin(run, settings)
    with pytest.raises(InputError, match="settings: share is 1.0 there and 0.5 here; resume with those, or"):
        recipe.begin(run, settings | {"share": 0.5})
    status, out, err = run_cli(recipe.main, "--output", str(run))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert 'tower is {"steps": 2} there and {"steps": 4500,' in err and "examples is null there" in err

    (run / "settings.json").write_text('{"share": 1')
    with pytest.raises(InputError, match="share is null there and 1.0 here"):
        recipe.begin(run, settings)
    (run / "settings.json").rename(run / "settings.new")  # interrupted while it was written
    recipe.begin(run, settings)
    recipe.begin(run, settings)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        recipe.begin(tmp_path / "other", settings)


@pytest.mark.parametrize("wrong", [("--examples", "0"), ("--tests", "-1"), ("--share", "nan"), ("--share", "0")])
def test_wrong_flags_take_no_directory(modules, tmp_path, run_cli, wrong):
    status, _, err = run_cli(modules("recipe").main, "--output", str(tmp_path / "run"), *wrong)
    assert status == 1 and err.startswith(f"error: {wrong[0]} {wrong[1]}") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_attention_begins_between_words_and_what_they_name(modules):
    """In the first half of the heads; in the others between words."""
    model = modules("model")
    config = model.CONFIG.replace(text=dataclasses.replace(model.CONFIG.text, vocab_size=300))
    tokenizer = model.make_tokenizer(["how many circles are there?", "is the circle red?", "red"] * 50, 300)
    params, text = model.initialize(config, 0, tokenizer)["decoder"], config.text
    words = params["embed"]["embedding"][:256]  # bytes: no two have a word in common
    layer = params["layers"]["0"]["attention"]
    q = (words @ layer["q"]["kernel"]).reshape(len(words), text.heads, text.head_width)

    def matched(keys) -> list[bool]:
        """Of each head, whether most words meet themselves among all others."""
        k = (keys @ layer["k"]["kernel"]).reshape(len(words), text.kv_heads, text.head_width)
        scores = jnp.einsum("qhn,khn->hqk", q, jnp.repeat(k, text.heads // text.kv_heads, axis=1))
        return [bool(x > 0.5) for x in jnp.mean(scores.argmax(-1) == jnp.arange(len(words)), axis=1)]

    half = text.heads // 2
    assert matched(model.to_visual(words)) == [True] * half + [False] * half
    assert matched(words) == [False] * half + [True] * half


def test_forms_of_a_word_begin_alike(modules):
    model = modules("model")
    texts = ["how many circles are there?", "is the circle red?", "Circles, crosses and a cross.", "red"] * 50
    tokenizer = model.make_tokenizer(texts, 300)
    config = model.CONFIG.replace(text=dataclasses.replace(model.CONFIG.text, vocab_size=300))
    table = np.asarray(model.initialize(config, 0, tokenizer)["decoder"]["embed"]["embedding"])
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    alike = lambda a, b: float(np.corrcoef(table[pieces.piece_to_id(a)], table[pieces.piece_to_id(b)])[0, 1])  # noqa: E731
    assert alike("▁circle", "▁circles") > 0.8
    assert abs(alike("▁circle", "▁red")) < 0.4
    assert [pieces.id_to_piece(i) for i in model.ids_of(["red"], tokenizer)] == ["▁red"]
    with pytest.raises(KeyError):
        model.ids_of(["blue"], tokenizer)
