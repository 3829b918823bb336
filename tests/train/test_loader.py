"""Batches: which conversations they hold, of which shapes, and what is said of them."""

import itertools

import numpy as np
import pytest

from helpers import turns
from llava_jax.config import preset
from llava_jax.console import InputError
from llava_jax.data.splice import IGNORE, TEXT
from train import row_packing
from train.config import TrainConfig
from train.loader import open_data
from train.synthetic_data import drawn_data
from training import MESSAGES, assert_same_batches, good_row, parts, take


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(template="vicuna"), "unknown template 'vicuna'"),
        (dict(template="chatml_direct"), r"--template chatml_direct: its answers end in <\|im_end\|>"),
        (dict(template="plain"), r"nothing in it can be trained on; .*data.json row 0 \(id row0\): the plain template"),
        (dict(image_folder="nowhere"), "--image-folder nowhere: no such directory"),
        (dict(data="nowhere.json"), "nowhere.json: cannot be read"),
        (dict(max_length=40), r"nothing in it can be trained on; .*row 0 .*no answer within 40 positions"),
        (dict(tiles_per_row=0), r"bad samples: \d+ among the first .*--max-bad-share 0.01"),
        (
            dict(batching="bucketed", global_batch_size=6),
            "--global-batch-size 6: .*, the mesh and the number of processes need a multiple of 4",
        ),
        (
            dict(batching="bucketed", global_batch_size=6, accumulate=4),
            "--global-batch-size 6: .*, the mesh, the number of processes and --accumulate 4 need a multiple of 4",
        ),
    ],
)
def test_what_is_refused_beforehand(write, config, models, changes, says):
    path = write([good_row(3 if "template" not in changes and i == 3 else i) for i in range(20)])
    if changes.get("template") == "plain":
        path = write([{"id": "row0", "image": "0.png", "conversations": turns("<image>", "a", "b", "c")}] * 3)
    with pytest.raises(InputError, match=says):
        open_data(config(path, template="v1").replace(**changes), *models["v1.5-llama"], rows_multiple=4)


def test_drawn_conversations_that_no_row_has_room_for_are_refused():
    with pytest.raises(InputError, match="mix665k's: bad samples: .* allows; row 0: 1 tiles, and a row has room for 0"):
        drawn_data(TrainConfig(tiles_per_row=0), preset("v1.5-7b"), 8)


def conversations(batches, model):
    """{id: what the model sees of a conversation, pixels included}"""
    found = {}
    P, side = model.vision.features_per_tile, model.vision.patches_per_side
    patch = model.vision.patch_size
    for batch, info in batches:
        ids = iter(info["ids"])
        B, T = batch.tiles.shape[:2]
        patches = batch.tiles.reshape(B, T, side, patch, side, patch, 3).swapaxes(3, 4).reshape(B, T * P, -1)
        newline = np.full((B, 1, patches.shape[-1]), -1)
        table = np.concatenate([patches, newline], axis=1)
        for b in range(B):
            for segment in range(1, batch.segments[b].max() + 1):
                at = np.flatnonzero(batch.segments[b] == segment)
                assert (np.diff(at) == 1).all()
                rows = batch.feature_rows[b, at]
                pixels = np.where((rows == TEXT)[:, None], -2, table[b, rows])
                found[next(ids)] = (batch.ids[b, at], batch.labels[b, at], batch.positions[b, at], pixels)
        assert next(ids, None) is None
    return found


@pytest.mark.parametrize("name", ["v1.5-llama", "v1.6-mistral"])
def test_packed_and_bucketed_hold_the_same_conversations(name, write, config, models):
    model, tokenizer = models[name]
    path = write([good_row(i) for i in range(60)])
    seen = {}
    for batching in ("packed", "bucketed"):
        batches = take(open_data(config(path, batching=batching), model, tokenizer, train=False))
        seen[batching] = conversations(batches, model)
        assert any((batch.segments == 2).any() for batch, _ in batches) == (batching == "packed")
    assert seen["packed"].keys() == seen["bucketed"].keys() == {f"row{i}" for i in range(60)}
    for key, packed in seen["packed"].items():
        for ours, theirs in zip(packed, seen["bucketed"][key], strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert packed[2].tolist() == list(range(len(packed[2])))
        assert (packed[1] != IGNORE).any()
    pixels = {key: one[3][one[3][:, 0] >= 0].tobytes() for key, one in seen["packed"].items()}
    assert pixels["row0"] == pixels["row12"] == pixels["row24"]  # 0.png
    assert len({pixels[f"row{i}"] for i in (0, 1, 2, 4, 5, 6, 8, 9, 10, 11)}) == 10


def test_epochs(write, config, models):
    """A small file is one window: each pass has each conversation once, in another order."""
    n = 30
    settings = config(write([good_row(i) for i in range(n)]), global_batch_size=1)
    data = open_data(settings, *models["v1.6-mistral"])
    assert data.rows == 1
    passes = []
    for epoch in range(3):
        infos = [next(data)[1] for _ in range(data.steps_per_epoch)]
        assert {info["epoch"] for info in infos} == {epoch}
        passes.append([i for info in infos for i in info["ids"]])
        assert sorted(passes[-1]) == sorted(f"row{i}" for i in range(n))
    data.close()
    assert passes[0] != passes[1] != passes[2] != passes[0]
    other = take(open_data(settings.replace(seed=4), *models["v1.6-mistral"]), 3)
    assert [i for _, info in other for i in info["ids"]] != passes[0][: sum(len(info["ids"]) for _, info in other)]


def test_bucketed_batches_have_images_throughout_or_nowhere(write, config, models):
    settings = config(write([good_row(i) for i in range(95)]), batching="bucketed", global_batch_size=4)
    data = open_data(settings, *models["v1.6-mistral"])
    assert data.steps_per_epoch == 24  # 10 texts, 85 images: 2 and 21 batches, one of what is left
    orders = []
    for _ in range(2):
        found = [next(data) for _ in range(24)]
        orders.append([i for _, info in found for i in info["ids"]])
        kinds = [[int(i[3:]) % 10 == 3 for i in info["ids"]] for _, info in found]
        assert sum(all(kind) for kind in kinds) == 2
        assert sum(not any(kind) for kind in kinds) == 21
        assert sorted(kinds[-1]) == [False, True, True]
        assert sorted(orders[-1]) == sorted(f"row{i}" for i in range(95))
        for batch, info in found:
            assert batch.ids.shape[1] in (128, 240)
            assert (batch.tiles.shape[1] == 0) == (info["images"] == 0)
            assert batch.segments.max() == 1
    data.close()
    assert orders[0] != orders[1]
    assert sum(int(a[3:]) < int(b[3:]) for a, b in itertools.pairwise(orders[0])) < 70


def test_what_is_logged_of_a_batch(write, config, models):
    settings = config(write([good_row(i) for i in range(40)]), tiles_per_row=10)
    data = open_data(settings, *models["v1.6-mistral"])
    assert "40 conversations, template mistral_instruct" in data.describe()
    assert f"a batch is {data.rows} rows of 240 positions and 10 tiles" in data.describe()
    for batch, info in take(data, 5):
        used = batch.segments > 0
        assert info["tokens"] == used.sum()
        assert info["padding"] == pytest.approx(1 - used.mean())
        assert info["conversations"] == len(info["ids"]) == batch.segments.max(axis=1).sum()
        rows = [good_row(int(i[3:])).get("image", []) for i in info["ids"]]
        assert info["images"] == sum(len(images) if isinstance(images, list) else 1 for images in rows)
        assert info["tile_padding"] == pytest.approx((batch.tiles == 0).all(axis=(2, 3, 4)).mean())
        assert info["bad"] == 0


def test_the_batch_holds_about_as_many_conversations_as_asked_for(write, config, models):
    settings = config(write([good_row(i) for i in range(200)]), global_batch_size=32)
    infos = [info for _, info in take(open_data(settings, *models["v1.6-mistral"]), 12)]
    assert np.mean([info["conversations"] for info in infos]) == pytest.approx(32, rel=0.15)


@pytest.mark.parametrize(
    ("n", "asked", "multiple", "held", "says"),
    [
        (64, 4, 1, 4, "rows are only partly filled, so that a batch holds 4 conversations: --global-batch"),
        (64, 4, 4, 4, "rows are only partly filled, so that a batch holds 4 conversations: --global-batch"),
        (64, 6, 4, 6, "rows are only partly filled, so that a batch holds 6 conversations: --global-batch"),
        (64, 4, 8, 8, "warning: a batch holds about 8 conversations instead of 4: the mesh and the number of "),
        (12, 128, 1, 12, "warning: --global-batch-size 128 is more than the 12 usable conversations"),
        (1, 128, 1, 1, "warning: --global-batch-size 128 is more than the 1 usable conversation"),
        (12, 128, 8, 12, "batches have 12 instead"),
        (200, 128, 1, 128, None),
    ],
)
def test_a_batch_holds_what_was_asked_for_as_far_as_there_is_data_and_the_mesh_allows(
    n, asked, multiple, held, says, write, config, models
):
    """Though a row has room for more conversations than that. The first lines say what a batch holds."""
    settings = config(write([good_row(i) for i in range(n)]), global_batch_size=asked, max_length=1024)
    data = open_data(settings, *models["v1.6-mistral"], rows_multiple=multiple)
    first, *more = data.describe().splitlines()
    assert f"(--global-batch-size {asked})" in first
    assert bool(more) == bool(says)
    assert says is None or (says in more[0] and f"about {held} conversation" in first)
    assert data.rows % multiple == 0 and data.rows <= max(held, multiple)
    infos = [info for _, info in take(data, 1 + 2 * n // held)]
    assert np.mean([info["conversations"] for info in infos]) == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize(
    ("n", "asked", "multiple", "window"),
    [(13, 128, 1, 1024), (13, 128, 4, 1024), (13, 128, 8, 1024), (13, 13, 5, 1024), (13, 5, 16, 1024),
     (1, 128, 4, 1024), (40, 64, 4, 16), (40, 40, 64, 16)],
)  # fmt: skip
def test_a_batch_of_all_the_data_is_one_epoch(n, asked, multiple, window, write, config, models, monkeypatch):
    """On every mesh, also on one on which it is resumed: each conversation once, and empty rows."""
    monkeypatch.setattr(row_packing, "WINDOW", window)
    settings = config(write([good_row(i) for i in range(n)]), global_batch_size=asked)
    data = open_data(settings, *models["v1.6-mistral"], rows_multiple=multiple)
    first, *more = data.describe().splitlines()
    assert f"1 step an epoch; a batch is {data.rows} row" in first and f"about {n} conversation" in first
    assert data.steps_per_epoch == 1 and data.rows % multiple == 0
    says = [f"warning: --global-batch-size {asked} is more than the {n} "] if asked > n else []
    says += [f"warning: a batch holds about {n} conversations instead of {asked}"] if asked < n else []
    assert len(more) == len(says) and all(line.startswith(start) for line, start in zip(more, says, strict=True))
    infos = [next(data)[1] for _ in range(2)]
    state = data.get_state()
    infos += [info for _, info in take(data, 2)]
    assert [info["epoch"] for info in infos] == [0, 1, 2, 3]
    for info in infos:
        assert sorted(info["ids"]) == sorted(f"row{i}" for i in range(n))
        assert window < n or info["padding"] == pytest.approx(data.estimate()["padding"])
    other = open_data(settings, *models["v1.6-mistral"], rows_multiple=7)
    other.set_state(state)
    assert other.rows % 7 == 0
    assert [info["ids"] for _, info in take(other, 2)] == [info["ids"] for info in infos[2:]]
    once = open_data(settings, *models["v1.6-mistral"], rows_multiple=multiple, train=False)
    assert [info["conversations"] for _, info in take(once)] == [n]


@pytest.mark.parametrize(("n", "multiple", "rows"), [(1, 1, 1), (12, 8, 16)])
def test_bucketed_batches_are_no_larger_than_the_data(n, multiple, rows, write, config, models):
    settings = config(write([good_row(i) for i in range(n)]), batching="bucketed", global_batch_size=128)
    data = open_data(settings, *models["v1.6-mistral"], rows_multiple=multiple)
    assert (data.rows, data.steps_per_epoch) == (rows, 1)
    assert f": batches have {n} instead" in data.describe()
    assert "instead of" not in data.describe()
    assert take(data, 1)[0][1]["conversations"] == n


def test_rows_that_are_not_full_have_no_room_for_more(write, config, models):
    """Neither positions, of a file that is known as a whole, nor tiles: padding would be computed with."""
    rows = [good_row(0)] * 40
    found = {}
    for size in (1, 40):
        data = open_data(config(write(rows), global_batch_size=size, max_length=2048), *models["v1.6-mistral"])
        batch, info = take(data, 1)[0]
        assert (info["conversations"], batch.ids.shape, batch.tiles.shape[:2]) == (
            size, (data.rows, data.length), (data.rows, data.tiles),
        )  # fmt: skip
        found[size] = data.rows, data.length
    assert found[1] == (1, 128) and found[40][1] > 128


@pytest.mark.parametrize(("name", "most"), [("v1.5-llama", 3), ("v1.6-mistral", 15)])
def test_the_mesh_does_not_decide_which_conversations_are_trained_on(name, most, write, config, models, monkeypatch):
    """Those with the most images are not among the few looked at beforehand; rows are full, or hold one each."""
    monkeypatch.setattr(row_packing, "WINDOW", 8)
    rows = [good_row(i * 10 if i % 4 == 0 else i) | {"id": i} for i in range(32)]
    rows[5] = {"id": 5, "image": ["3.png"] * 2, "conversations": turns("<image><image>", "x")}
    content = [*[{"type": "image", "image": "3.png"}] * 3, {"type": "text", "text": "a"}]
    rows[6] = {"id": 6, "messages": [parts(*content), MESSAGES[1]]}
    settings = config(write(rows), global_batch_size=8, max_length=480, template="v1" if most == 3 else None)
    for multiple in (1, 8):
        data = open_data(settings, *models[name], rows_multiple=multiple, train=False)
        ids = [i for _, info in take(data) for i in info["ids"]]
        assert (sorted(ids), data.bad.total) == ([*range(32)], 0)
        assert data.tiles >= most
        assert bool(data.batches.filling.per_row) == (multiple == 8)
    one = [row | {"image": row["image"][:1], "conversations": turns("<image>", "x")} if i == 5 else row
           for i, row in enumerate(rows) if i != 6 and i % 10 != 7]  # fmt: skip
    data = open_data(settings.replace(data=write(one)), *models[name], rows_multiple=8)
    assert data.tiles == most // 3  # no more than any of its conversations needs
    data.close()


def test_tiles_of_a_row_are_few_but_hardly_decide_what_fits(write, config, models):
    settings = config(write([good_row(i) for i in range(200)]), max_length=480)
    found = {}
    for tiles in (14, None, 60):
        data = open_data(settings.replace(tiles_per_row=tiles), *models["v1.6-mistral"])
        found[tiles] = (data.tiles, data.estimate()["padding"])
        data.close()
    assert 14 < found[None][0] < 22  # without a limit the fullest row has 24
    assert found[60][1] <= found[None][1] < found[60][1] + 0.01 < found[14][1]


def test_longer_rows_where_images_leave_too_much_of_short_ones(write, config, models):
    model, tokenizer = models["v1.5-llama"]
    row = {"image": "0.png", "conversations": turns("<image>", " ".join(["the"] * 540))}
    settings = config(write([row] * 8), template="plain", max_length=1024, global_batch_size=4)
    data = open_data(settings, model, tokenizer)
    length = data.samples.measure(0).length
    assert 1024 < 2 * length <= 1152
    assert (data.length, data.estimate()["conversations"]) == (1152, 4)
    data.close()
    data = open_data(settings.replace(positions_per_row=1024), model, tokenizer)
    assert (data.length, data.tiles) == (1024, 1)
    data.close()


def test_one_pass_can_be_made_again(write, config, models):
    data = open_data(config(write([good_row(i) for i in range(25)])), *models["v1.6-mistral"], train=False)
    first, second = list(data), list(data)
    data.close()
    assert_same_batches(first, second)
    assert len(first) == data.steps_per_epoch
    assert {batch.ids.shape for batch, _ in first} == {(data.rows, 240)}
