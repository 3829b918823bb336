"""`python -m train.preview` shows what a batch holds."""

import json

import numpy as np
import pytest

from helpers import GOLDEN, turns
from llava_jax.data.splice import IGNORE, IMAGE, TEXT
from train import preview
from train.loader import open_data
from training import good_row, take


def test_preview_of_several_files(write, folder, run_cli):
    paths = [write([good_row(i)], name) for i, name in ((0, "a.json"), (7, "b.json"))]
    args = ["--data", paths[0], "--data", f"{paths[1]}=2", "--checkpoint", GOLDEN / "checkpoints" / "v1.6-mistral"]
    status, out, err = run_cli(preview.main, *args, "--image-folder", folder, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert [(row["data"], row["index"], row["id"]) for row in rows] == [
        (paths[0], 0, "row0"), (paths[1], 0, "row7"), (paths[1], 0, "row7"),
    ]  # fmt: skip


def test_preview_for_people(write, folder, models, run_cli):
    path = write([good_row(0), good_row(7), good_row(3), {"id": "x", "conversations": turns("a")}])
    checkpoint = GOLDEN / "checkpoints" / "v1.6-mistral"
    args = ["--data", path, "--checkpoint", checkpoint, "--image-folder", folder]
    status, out, err = run_cli(preview.main, *args, "-n", "3")
    assert (status, err) == (0, "")
    assert "row 0 (id row0), template mistral_instruct: " in out
    assert "  0.png: 3 tiles, grid 1x2, 36 features\n" in out
    assert "<s>[INST] <image>\nWhat? [/INST][[ 0  </s>]]\n" in out
    assert "<s>[INST] From <image> to <image>? [/INST][[ 7 the the the" in out
    assert "[[ 3 the the the the the the the the the the the the the the the the the the the the the  </s>]]" in out
    status, out, err = run_cli(preview.main, *args)
    assert status == 1
    assert f"{path} row 3 (id x): no answer" in err
    status, out, err = run_cli(preview.main, *args, "--start", "4")
    assert (status, err) == (1, f"error: {path} has 4 rows, none from --start 4 on\n")


def test_preview_in_json_is_what_a_batch_holds(write, config, models, run_cli):
    rows = [good_row(i) for i in range(8)]
    rows[7]["conversations"] += turns("And then?", "is and " * 40)
    rows[6] |= {"image": ["6.png", "3.png"], "conversations": turns("<image>", "the " * 100, "<image>", "x")}
    settings = config(write(rows), batching="bucketed", global_batch_size=8, max_length=200)
    [(batch, info)] = take(open_data(settings, *models["v1.6-mistral"], train=False))
    checkpoint = GOLDEN / "checkpoints" / "v1.6-mistral"
    status, out, _ = run_cli(
        preview.main, "--data", settings.data, "--checkpoint", checkpoint, "--image-folder", settings.image_folder,
        "-n", 8, "--json", "--max-length", 200,
    )  # fmt: skip
    shown = {row["id"]: row for row in map(json.loads, out.splitlines())}
    assert status == 0
    assert shown.keys() == set(info["ids"])
    for b, name in enumerate(info["ids"]):
        n = batch.lengths[b]
        assert shown[name]["length"] == n <= 200
        assert shown[name]["labels"] == batch.labels[b, :n].tolist()
        assert shown[name]["positions"] == batch.positions[b, :n].tolist()
        text = batch.feature_rows[b, :n] == TEXT
        assert shown[name]["ids"] == np.where(text, batch.ids[b, :n], IMAGE).tolist()
        assert sum(image["features"] for image in shown[name]["images"]) >= (~text).sum()
    assert shown["row7"]["cut"] > 0
    assert shown["row6"]["ids"][-1] == IMAGE  # truncated within an image
    assert [image["file"] for image in shown["row1"]["images"]] == ["1.png"]
    assert shown["row1"]["trained"] == sum(label != IGNORE for label in shown["row1"]["labels"])


def test_preview_places_images_as_training_does(write, config, models, run_cli):
    rows = [{"id": i, "image": "0.png", "conversations": turns("<image>\nWhat?", "x")} for i in range(12)]
    settings = config(write(rows), template="v1", batching="bucketed", global_batch_size=12, image_first="random")
    data = open_data(settings, *models["v1.5-llama"])
    trained = []
    for _ in range(2):
        batch, info = next(data)
        trained.append({i: batch.ids[b, : batch.lengths[b]].tolist() for b, i in enumerate(info["ids"])})
    data.close()
    assert trained[0] != trained[1]

    def shown(*args):
        status, out, err = run_cli(
            preview.main, "--data", settings.data, "--image-folder", settings.image_folder, "-n", 12, "--json",
            "--checkpoint", GOLDEN / "checkpoints" / "v1.5-llama", "--template", "v1", *args,
        )  # fmt: skip
        assert (status, err) == (0, "")
        rows = map(json.loads, out.splitlines())
        # A feature's id is 0 in a batch.
        return {row["id"]: [0 if i == IMAGE else i for i in row["ids"]] for row in rows}

    random = shown("--image-first", "random", "--seed", settings.seed)
    assert random == trained[0]
    assert shown("--image-first", "random", "--seed", settings.seed, "--epoch", 1) == trained[1]
    assert shown("--preset", "v1-finetune", "--seed", settings.seed) == random
    assert shown() == shown("--preset", "v1.5-finetune") != random


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--nothing"], "the following arguments are required: --data, --checkpoint (--help lists all flags)"),
        (["--data", "a", "--checkpoint", "b", "--preset", "v2"], "argument --preset: invalid choice: 'v2'"),
        (["--data", "a", "--checkpoint", "b", "-n", "x"], "-n 'x': must be a whole number from 1"),
        (["--data", "a", "--checkpoint", "b", "-n", "0"], "-n 0: must be a whole number from 1"),
        (["--data", "a", "--checkpoint", "b", "--start", "-1"], "--start -1: must be a whole number from 0"),
        (["--data", "a", "--checkpoint", "b", "--epoch", "-1"], "--epoch -1: must be a whole number from 0"),
        (["--data", "a", "--checkpoint", "b", "--seed", "-1"], "--seed -1: must be a whole number from 0"),
    ],
)
def test_preview_refuses_wrong_flags_in_a_line(args, says, run_cli):
    status, out, err = run_cli(preview.main, *args)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: {says}")
