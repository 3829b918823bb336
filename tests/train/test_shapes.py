"""Images of shapes: their questions follow from what is drawn, and their files are training data."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from helpers import GOLDEN
from llava_jax.config import tiny
from llava_jax.data.conversations import read_conversation
from llava_jax.data.images import tile_layout
from train.datasets.instruct.coco import read_records
from train.datasets.shapes import __main__ as shapes
from train.datasets.shapes import questions
from train.datasets.shapes.scenes import COLOURS, SHAPES, SIZES, Scene, Thing, draw, make_scene


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    output = tmp_path_factory.mktemp("shapes") / "data"
    shapes.write(output, 60, 40, seed=3)
    return output


def read(data, name) -> list[dict]:
    return json.loads((data / name).read_text())


def thing(name: str, box) -> Thing:
    size, colour, shape = name.split()
    return Thing(shape, colour, size, box)


# A small red circle left of a large blue star, both above a small blue circle.
SCENE = Scene(
    120, 90, "plain",
    (
        thing("small red circle", (5, 10, 25, 30)),
        thing("small blue circle", (20, 60, 40, 80)),
        thing("large blue star", (60, 5, 95, 40)),
    ),
)  # fmt: skip


def ask_often(ask, *scenes) -> dict[str, str]:
    """Every question that a rule soon comes to, with its answer; the same question always has the same one."""
    found: dict[str, str] = {}
    for seed in range(1500):
        if turn := ask(np.random.default_rng(seed), *scenes):
            assert found.setdefault(*turn) == turn[1]
    return found


# ---------------------------------------------------------------- scenes


def test_objects_lie_apart_and_inside():
    for seed in range(200):
        scene = make_scene(np.random.default_rng(seed))
        assert 1 <= len(scene.things) <= 6
        assert 1 / 3.2 < scene.width / scene.height < 3.2
        for a in scene.things:
            assert 0 <= a.box[0] < a.box[2] <= scene.width and 0 <= a.box[1] < a.box[3] <= scene.height
            assert all(a is b or questions.side_of(a, b) for b in scene.things)


def test_small_and_large_differ_in_whatever_grid_they_are_seen():
    """An image is scaled to its grid of tiles; an object's pixels there tell its size."""
    config, seen = tiny(), {size: [] for size in SIZES}
    for seed in range(400):
        scene = make_scene(np.random.default_rng(seed))
        columns, rows = tile_layout((scene.width, scene.height), config).grid
        scale = min(28 * columns / scene.width, 28 * rows / scene.height)
        for a in scene.things:
            seen[a.size].append(scale * (a.box[2] - a.box[0]))
    assert max(seen["small"]) < min(seen["large"])


def test_every_grid_of_tiles_occurs():
    scenes = [make_scene(np.random.default_rng(seed)) for seed in range(200)]
    grids = {tile_layout((scene.width, scene.height), tiny()).grid for scene in scenes}
    assert grids == {(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_drawn_object_has_its_colour_and_fills_its_box(shape):
    for colour, rgb in COLOURS.items():
        box = (20.3, 10.6, 60.3, 50.6)
        scene = Scene(100, 80, "plain", (Thing(shape, colour, "large", box),))
        pixels = np.asarray(draw(scene, np.random.default_rng(0))).astype(int)
        is_object = np.abs(pixels - pixels[0, 0]).sum(axis=-1) > 20
        rows, columns = np.flatnonzero(is_object.any(axis=1)), np.flatnonzero(is_object.any(axis=0))
        got = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        assert np.abs(np.subtract(got, box)).max() < 5
        inside = pixels[is_object]
        assert np.abs(np.median(inside, axis=0) - rgb).max() <= 15


def test_shapes_look_different():
    drawn = {}
    for shape in SHAPES:
        scene = Scene(60, 60, "plain", (Thing(shape, "white", "large", (10.0, 10.0, 50.0, 50.0)),))
        drawn[shape] = np.asarray(draw(scene, np.random.default_rng(0)))[..., 0] > 200
    for a in SHAPES:
        for b in SHAPES:
            assert a == b or (drawn[a] != drawn[b]).mean() > 0.03


# ---------------------------------------------------------------- questions


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("count", {"how many objects are there?": "3", "how many circles do you see?": "2", "count the stars.": "1"}),
        ("colour", {"what colour is the star?": "blue", "what colour is the large object?": None}),
        ("shape", {"what shape is the red object?": "circle", "what shape is the blue object?": None}),
        ("size", {"is the star small or large?": "large", "is the circle small or large?": None}),
        ("existence", {"are there any blue circles?": "yes", "do you see any red stars?": "no"}),
        (
            "position",
            {
                "is the red circle left or right of the star?": "left",
                "is the red circle above or below the blue circle?": "above",
                "is the star left of the red circle?": "no",
                "is the red circle left or right of the blue circle?": None,  # they overlap
                "is the red circle above or below the star?": None,
            },
        ),
        (
            "members",  # in the order that colours and shapes have
            {
                "list the colours of the circles.": "red and blue",
                "which shapes do the blue objects have?": "circle and star",
                "list the shapes of the red objects.": "circle",
            },
        ),
        ("place", {"where is the red circle?": "top left", "where is the blue circle?": "bottom left"}),
        ("largest", {"which object is the largest?": "blue star", "which object is the smallest?": None}),
        (
            "comparison",
            {"are there more circles than stars?": "yes", "are there fewer blue objects than red objects?": "no"},
        ),
    ],
)  # fmt: skip
def test_answers_follow_from_the_scene_and_nothing_ambiguous_is_asked(kind, some):
    found = ask_often(shapes.SHORT[kind], SCENE)
    assert {question: found.get(question) for question in some} == some


def test_lists_name_each_once_and_images_are_described_as_one_reads():
    things = [
        thing("small red star", (5, 10, 15, 20)),
        thing("large red circle", (20, 5, 35, 20)),
        thing("small blue star", (50, 50, 60, 60)),
        thing("small red star", (70, 40, 80, 50)),
    ]
    scene = Scene(90, 60, "plain", tuple(things))
    found = ask_often(questions.members, scene)
    assert found["list the shapes of the red objects."] == "circle and star"
    assert found["list the colours of the stars."] == "red and blue"
    assert questions.placed(scene) == (
        "at the top left a small red star, at the top left a large red circle, at the bottom center a small blue star "
        "and at the bottom right a small red star"
    )
    alone = Scene(90, 60, "plain", (things[0],))
    assert questions.detail(np.random.default_rng(0), alone)[1] == "1 object: at the top left a small red star"


def test_where_an_object_is_at_the_edge_of_a_third_is_not_asked():
    edge = Scene(60, 60, "plain", (thing("small red star", (15, 5, 25.4, 15.4)),))  # its middle a third from the left
    assert ask_often(questions.place, edge) == {}
    assert ask_often(questions.place, SCENE)


def test_reasoning_shows_its_steps():
    found = ask_often(questions.reasoning, SCENE)
    some = {
        "are there more circles than stars? explain.": "circles: 2, stars: 1, so yes",
        "how many more circles than stars are there? explain.": "circles: 2, stars: 1, so 1",
        "how many objects are left without the blue objects? explain.": "objects: 3, blue objects: 2, so 1",
    }
    assert {question: found.get(question) for question in some} == some


def test_two_images():
    other = Scene(60, 60, "noisy", (thing("large blue star", (10, 10, 30, 30)),))
    found = ask_often(questions.two_images, SCENE, other)
    some = {
        "which of the two pictures has more objects?": "first",
        "which of the two pictures has circles?": "first",
        "which of the two pictures has stars?": None,  # both
        "what colour is the star in the second picture?": "blue",
    }
    assert {question: found.get(question) for question in some} == some


def test_captions_count_and_name_everything_as_one_reads():
    rng = np.random.default_rng(0)
    everything = (
        "at the top left a small red circle, at the top center a large blue star and at the bottom left a small blue "
        "circle"
    )
    numbers = "objects: 3, small objects: 2, large objects: 1, circles: 2, stars: 1, red objects: 1, blue objects: 2"
    assert questions.caption(rng, SCENE)[1] == f"{numbers}, {everything}"
    assert questions.description(rng, SCENE)[1] == everything
    assert questions.detail(rng, SCENE)[1] == f"3 objects: {everything}"


def test_text_questions_are_right():
    found = ask_often(questions.text)
    assert len(found) > 80
    for question, answer in found.items():
        numbers = [int(n) for n in re.findall(r"\d+", question)]
        if "plus" in question:
            assert int(answer) == sum(numbers)
        elif "minus" in question:
            assert int(answer) == numbers[0] - numbers[1] >= 0
        elif "after" in question:
            assert int(answer) == numbers[0] + 1
        elif "more than" in question:
            assert answer == ("yes" if numbers[0] > numbers[1] else "no")


def test_guessing_does_not_pay():
    """Of questions with two answers neither has more than two thirds."""
    asked = {kind: [] for kind in questions.SHORT}
    for seed in range(1500):
        rng = np.random.default_rng(seed)
        scene = make_scene(rng)
        for kind, ask in questions.SHORT.items():
            if turn := ask(rng, scene):
                asked[kind].append(turn[1])
    for kind, answers in asked.items():
        counts = sorted((answers.count(answer) for answer in set(answers)), reverse=True)
        assert counts[0] / len(answers) < 2 / 3, kind


# ---------------------------------------------------------------- files


def test_rows_are_training_data(data):
    for name in ("captions.json", "train.json", "test.json", "test_captions.json"):
        rows = read(data, name)
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            conversation = read_conversation(row)
            turns, images = conversation.turns, conversation.images
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * len(row["kinds"])
            marks = [turn["value"].count("<image>") for turn in turns]
            assert marks[0] == len(images) and not any(marks[1:])
            for image in images:
                with Image.open(data / "images" / image) as opened:
                    assert opened.size[0] <= 3.2 * opened.size[1]


def test_conversations_are_of_all_kinds_and_do_not_repeat_themselves(data):
    rows = read(data, "train.json")
    kinds = {*shapes.SHORT, "detail", "description", "reasoning", "two", "text"}
    assert {kind for row in rows for kind in row["kinds"]} == kinds
    assert {len(row.get("image", [])) == 2 for row in rows if isinstance(row.get("image"), list)} == {True}
    assert any("image" not in row for row in rows)
    for row in rows:
        asked = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"][::2]]
        assert len(set(asked)) == len(asked) >= 2


def test_long_answers_come_first_or_last(data):
    rows = [row["kinds"] for row in read(data, "train.json")]
    for kind in ("reasoning", "detail", "description"):
        places = {(row[0] == kind, row[-1] == kind) for row in rows if kind in row and len({*row}) > 1}
        assert places <= {(True, False), (False, True)}
        assert kind != "reasoning" or len(places) == 2


def test_most_sentences_begin_with_a_capital(data):
    asked = [turn["value"] for row in read(data, "train.json") for turn in row["conversations"][::2]]
    explained = [question for question in asked if question.lower().endswith("? explain.")]
    assert {question[-8:] for question in explained} == {"Explain.", "explain."}
    for question in explained:
        first = question.removeprefix("<image>\n")[0]
        assert first.isupper() == question.endswith("Explain.")


def test_every_kind_is_tested_as_often(data):
    rows = read(data, "test.json")
    numbers = [sum(row["kinds"] == [kind] for row in rows) for kind in [*questions.SHORT, "reasoning", "two", "text"]]
    assert sum(numbers) == len(rows) == 3 * 40
    assert max(numbers) - min(numbers) <= 2


def test_train_and_test_share_no_image(data):
    def images(*names):
        rows = [row for name in names for row in read(data, name) if "image" in row]
        return {image for row in rows for image in np.atleast_1d(row["image"])}

    train, test = images("captions.json", "train.json"), images("test.json", "test_captions.json")
    assert not train & test
    contents = [(data / "images" / image).read_bytes() for image in train | test]
    assert len(set(contents)) == len(contents) == 100


def test_records_are_captions_and_boxes_of_the_training_images(data):
    records = read_records(data / "records.jsonl")
    assert [record.image for record in records] == [row["image"] for row in read(data, "captions.json")]
    for record, row in zip(records, read(data, "captions.json"), strict=True):
        assert len(set(record.captions)) >= 3 and len(record.captions) == 5
        said = row["conversations"][1][
            "value"
        ]  # of the same scene: "objects: 2, small objects: 1, ..., at the top ..."
        assert said.startswith(f"objects: {len(record.boxes)}, ") and said.endswith(
            record.captions[-1].removeprefix("You see ").removesuffix(".")
        )
        with Image.open(data / "images" / record.image) as image:
            width, height = image.size
        for box in record.boxes:
            left, top, right, bottom = box.bbox
            assert f"a {box.category}" in said and f"a {box.category}" in record.captions[0]
            assert (right - left) * width == pytest.approx((bottom - top) * height, abs=0.3)  # all are as wide as high


def test_a_scene_is_not_drawn_again_for_the_other_split(tmp_path, monkeypatch):
    drawn = iter([SCENE, SCENE, Scene(9, 9, "plain", SCENE.things[:1])])
    monkeypatch.setattr(shapes, "make_scene", lambda rng: next(drawn))
    taken = set()
    assert shapes.make_scenes("train", 1, 0, taken, tmp_path) == [SCENE]
    assert shapes.make_scenes("test", 1, 0, taken, tmp_path) != [SCENE]


def test_the_same_seed_gives_the_same_files_and_another_does_not(data, tmp_path):
    shapes.write(tmp_path / "again", 60, 40, seed=3)
    shapes.write(tmp_path / "other", 60, 40, seed=4)
    same = [path.relative_to(data) for path in data.rglob("*") if path.is_file()]
    assert len(same) == 105
    assert all((data / path).read_bytes() == (tmp_path / "again" / path).read_bytes() for path in same)
    assert all((data / path).read_bytes() != (tmp_path / "other" / path).read_bytes() for path in same)


def test_command(run_cli, tmp_path):
    status, out, err = run_cli(shapes.main, "--output", tmp_path / "data", "--examples", "12")
    assert (status, out) == (0, "")
    assert "12 training images with 13 conversations, 1 test images with 3 questions" in err
    status, _, err = run_cli(shapes.main, "--output", tmp_path / "data", "--examples", "12")
    assert (status, err.count("\n")) == (1, 1)
    assert "is not empty" in err
    status, _, err = run_cli(shapes.main, "--output", tmp_path / "more", "--examples", "0")
    assert (status, err) == (1, "error: --examples 0: must be a whole number from 1 to 1000000\n")
    status, _, err = run_cli(shapes.main, "--output", GOLDEN / "anyres.json", "--examples", "1")
    assert (status, err.count("\n")) == (1, 1)
