"""Data of training: from a file of conversations and a folder of pictures to batches."""

import base64
import collections
import hashlib
import itertools
import json
import re
import tracemalloc
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from helpers import GOLDEN
from llava_jax.aot.tpu_plan import model_of
from llava_jax.checkpoints.checkpoint import open_checkpoint
from llava_jax.console import InputError
from llava_jax.data.conversations import read_rows
from llava_jax.data.splice import IGNORE, IMAGE, TEXT
from train import loader as train_data
from train import packing, preview
from train.__main__ import read_config
from train.config import TrainConfig
from train.datasets import scienceqa
from train.drawn import DrawnSamples
from train.loader import Data, open_data
from train.mixture import Part, checksum, read_parts
from train.packing import fill_rows, good_length
from train.run_directory import Output
from train.samples import BadSample, BadSamples, Samples

SIZES = [(20, 20), (40, 20), (20, 50), (56, 56), (90, 30), (30, 90)]
SAME = ("ids", "labels", "positions", "segments", "feature_rows", "tiles")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures 0.png ... 11.png, all different, and broken ones."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(12):
        width, height = SIZES[i % len(SIZES)]
        Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{i}.png")
    whole = (folder / "3.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    Image.open(folder / "3.png").save(folder / "truncated.jpg")  # unlike that of a PNG, its header stands alone
    whole = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    Image.new("RGB", (1, 600)).save(folder / "thin.png")
    (folder / "directory.png").mkdir()
    return folder


@pytest.fixture(scope="module")
def models():
    found = {name: open_checkpoint(GOLDEN / "checkpoints" / name) for name in ("v1.5-llama", "v1.6-mistral")}
    return {name: (one.config, one.tokenizer) for name, one in found.items()}


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def good_row(i: int) -> dict:
    """A conversation, about one picture, two, or none; no two are alike."""
    answer = f"{i} " + "the " * (i * 7 % 23)
    if i % 10 == 3:
        return {"id": f"row{i}", "conversations": turns(f"Say {i}", answer, "More?", "is and")}
    if i % 10 == 7:
        images = [f"{i % 12}.png", f"{i * 5 % 12}.png"]
        return {"id": f"row{i}", "image": images, "conversations": turns("From <image> to <image>?", answer)}
    return {"id": f"row{i}", "image": f"{i % 12}.png", "conversations": turns("<image>\nWhat?", answer)}


# What may be wrong with a line of the data file, and what is said about it.
PICTURE = {"image": "0.png"}
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]


def parts(*content, role="user"):
    return {"role": role, "content": content}


BROKEN = {
    "{": "not JSON",
    '"text"': "not a JSON object",
    "[1]": "not a JSON object",
    '{"id": 1}': "conversations must be a list",
    '{"conversations": []}': "conversations must be a list",
    '{"conversations": [1]}': "each turn of conversations must have from and value",
    '{"conversations": [{"from": "human"}]}': "each turn of conversations must have from and value",
    '{"conversations": [{"from": "human", "value": 3}]}': "each turn of conversations must have from and value",
    json.dumps({"conversations": turns("\ud800", "x")}): "text that is no Unicode",
    json.dumps({"conversations": [{"from": "human", "value": "a"}] * 2}): "speakers must take turns",
    json.dumps({"conversations": [{"from": "system", "value": "a"}]}): "no answer",
    json.dumps({"conversations": turns("a")}): "no answer",
    json.dumps({"conversations": turns("a", "")}): "no answer",
    json.dumps({"conversations": turns("<image>\na", "x")}): "1 <image> marks for 0 images",
    json.dumps(PICTURE | {"conversations": turns("a", "x")}): "0 <image> marks for 1 images",
    json.dumps(PICTURE | {"conversations": turns("<image>\na", "x", "<image>", "y")}): "2 <image> marks for 1 images",
    json.dumps({"image": ["0.png"] * 2, "conversations": turns("<image>", "x")}): "1 <image> marks for 2 images",
    json.dumps({"image": 3, "conversations": turns("<image>", "x")}): "image must be a file name",
    json.dumps({"image": [""], "conversations": turns("<image>", "x")}): "image must be a file name",
    json.dumps({"images": 3, "conversations": turns("<image>", "x")}): "images must be a file name",
    json.dumps(PICTURE | {"images": ["0.png"], "conversations": turns("<image>", "x")}): "both image and images",
    json.dumps({"messages": MESSAGES, "conversations": turns("a", "x")}): "both conversations and messages",
    json.dumps({"messages": [MESSAGES[0] | {"from": "human"}, MESSAGES[1]]}): "both from and role",
    json.dumps({"messages": [{"role": "user"}]}): "each turn of messages must have role and content",
    json.dumps({"messages": [*MESSAGES, {"role": "tool", "content": "3"}]}): "a turn of 'tool'; known are human, user",
    json.dumps({"messages": [*MESSAGES, {"role": "system", "content": "a"}]}): "a system message that is not",
    json.dumps({"system": "a", "messages": [{"role": "system", "content": "a"}, *MESSAGES]}): "a system message both",
    json.dumps({"system": ["a"], "messages": MESSAGES}): "system must be text",
    json.dumps({"system": "\ud800", "messages": MESSAGES}): "text that is no Unicode",
    json.dumps(PICTURE | {"system": "<image>", "messages": MESSAGES}): "the system message has an <image> mark",
    json.dumps({"messages": [parts({"type": "video", "video": "a.mp4"}), MESSAGES[1]]}): "a part of type video;",
    json.dumps({"messages": [parts({"type": "text"}), MESSAGES[1]]}): "a part of type text and no text",
    json.dumps({"messages": [parts("a"), MESSAGES[1]]}): "a part of type unknown",
    json.dumps({"messages": [parts({"type": "image"}), MESSAGES[1]]}): "an image part for image 0, and 0 are named",
    json.dumps({"messages": [parts({"type": "image", "image": 3}), MESSAGES[1]]}): "an image part must name a file",
    json.dumps(PICTURE | {"messages": [parts({"type": "image", "path": "1.png"}), MESSAGES[1]]}): "images named both",
    json.dumps(PICTURE | {"messages": [parts({"type": "image", "index": 1}), MESSAGES[1]]}): "an image part for image",
    json.dumps({"images": ["0.png", "1.png"], "messages": [parts({"type": "image"}), MESSAGES[1]]}):
        "1 image parts for 2 images",
    json.dumps({"images": ["0.png", "0.png"], "messages": [parts({"type": "image"}), MESSAGES[1]]}):
        "1 image parts for 2 images: none shows image 1 of images, counted from 0",
    json.dumps({"images": ["0.png"] * 2, "messages": [parts(*[{"type": "image", "index": 1}] * 2), MESSAGES[1]]}):
        "2 image parts for 2 images: none shows image 0 of images, counted from 0",
    json.dumps({"images": ["0.png", "1.png"],
                "messages": [parts({"type": "image", "index": 1}, {"type": "image"}), MESSAGES[1]]}):
        "image parts with an index and without",
    json.dumps(PICTURE | {"messages": [parts({"type": "image", "index": False}), MESSAGES[1]]}):
        "an image part for image False",
    json.dumps({"messages": [MESSAGES[0], MESSAGES[1] | {"tool_calls": [1]}]}): "tool calls are not supported",
    json.dumps({"messages": [MESSAGES[0], MESSAGES[1] | {"weight": 0}]}): "weight: weights of turns are not supported",
    json.dumps({"messages": [MESSAGES[0] | {"images": ["0.png"]}, MESSAGES[1]]}): "images: not read in a turn",
} | {
    json.dumps({key: value, "messages": MESSAGES}): f"{key}: {says}"
    for key, value, says in [
        ("video", "a.mp4", "video is not supported"), ("videos", ["a.mp4"], "video is not supported"),
        ("audio", "a.wav", "audio is not supported"), ("audios", ["a.wav"], "audio is not supported"),
        ("tools", "[]", "tool calls"), ("functions", [1], "tool calls"), ("chosen", {"value": "x"}, "training on pref"),
        ("rejected", "x", "training on pref"), ("kto_tag", False, "training on pref"),
        ("image_url", "0.png", "not a key for images"), ("image_path", "0.png", "not a key for images"),
    ]
} | {
    json.dumps({"image": name, "conversations": turns("<image>\nWhat?", "x")}): says
    for name, says in {
        "missing.png": "no such image",
        "missing/0.png": "no such image",
        "truncated.png": "broken image",
        "truncated.jpg": "broken image",
        "text.png": "not an image",
        "empty.png": "not an image",
        "directory.png": "a directory",
        "thin.png": "cannot be looked at",
        "/etc/passwd": "leads out of the image folder",
        "../0.png": "leads out of the image folder",
        "a/../../0.png": "leads out of the image folder",
        "nul\0.png": "cannot be read",
        "https://example.com/a.png": "a URL to download",
        "HTTP://example.com/a.png": "a URL to download",
        "file:///etc/passwd": "leads out of the image folder",
        "file://host/0.png": "a file of host host",
        "file:///../0.png": "leads out of the image folder",
        "data:image/png;base64,????": "broken base64",
        "data:image/png;base64,aGVsbG8=": "not an image",
        "data:text/plain,hello": "not of an image",
    }.items()
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(rows, name="data.json"):
        path = tmp_path / name
        if name.endswith("l"):
            path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        else:
            path.write_text(json.dumps(rows))
        return str(path)

    return write


@pytest.fixture
def config(folder, tmp_path):
    def config(data, **changes):
        kept = dict(
            data=data, image_folder=str(folder), output=str(tmp_path / "run"), max_length=240, global_batch_size=12,
            workers=2, seed=3,
        )  # fmt: skip
        return TrainConfig(**kept | changes)

    return config


def take(data, n=None):
    """The first n batches of the data, or all there are."""
    found = [next(data) for _ in range(n)] if n else list(data)
    data.close()
    return found


def same(ours, theirs):
    assert [info["ids"] for _, info in ours] == [info["ids"] for _, info in theirs]
    for (a, _), (b, _) in zip(ours, theirs, strict=True):
        for name in SAME:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


# ---------------------------------------------------------------- packing


def test_rows_are_filled_as_full_as_can_be():
    sizes = [(6, 1), (5, 1), (4, 1), (3, 0), (2, 0), (2, 0), (8, 1)]
    assert fill_rows(sizes, 10, 2) == [[6, 4], [0, 2], [1, 5, 3]]
    assert fill_rows(sizes, 10, 1) == [[6, 4], [0, 3], [1, 5], [2]]
    assert fill_rows([], 10, 1) == []
    assert fill_rows([(10, 0)] * 2, 10, 0) == [[0], [1]]
    assert [len(row) for row in fill_rows([(2, 0)] * 10, 7, 1)] == [3, 3, 3, 1]


def test_every_conversation_has_one_row_with_room_for_it():
    random = np.random.default_rng(1)
    for length, tiles in [(300, 3), (1000, 12), (64, 64)]:
        n = random.integers(1, length + 1, 700)
        sizes = list(zip(n.tolist(), random.integers(0, tiles + 1, 700).tolist(), strict=True))
        rows = fill_rows(sizes, length, tiles)
        assert sorted(i for row in rows for i in row) == list(range(700))
        for row in rows:
            assert sum(sizes[i][0] for i in row) <= length
            assert sum(sizes[i][1] for i in row) <= tiles


def test_padding_of_lengths_like_mix665k_is_below_five_percent():
    random = np.random.default_rng(0)
    kind = random.choice(3, 1024, p=[0.40, 0.54, 0.06])
    short = 621 + random.integers(8, 60, 1024)
    long = 621 + np.maximum(random.lognormal(5.5, 0.6, 1024), 30)
    text = 45 + np.maximum(random.lognormal(6.8, 0.8, 1024), 20)
    n = np.minimum(np.choose(kind, [short, long, text]), 2048).astype(int)
    rows = fill_rows(list(zip(n.tolist(), (kind < 2).tolist(), strict=True)), 2048, 3)
    assert 1 - n.sum() / (2048 * len(rows)) < 0.05


@pytest.mark.parametrize(
    ("positions", "least", "chosen"),
    [
        (600, 1000, 1000), (600, 1024, 1280), (900, 2048, 2816), (1000, 2048, 2048), (2050, 4096, 4224),
        (2500, 4096, 5120), (2700, 5000, 5632), (4500, 8192, 9216), (20000, 32768, 40960),
    ],
)  # fmt: skip
def test_length_of_a_row_is_chosen_from_few(positions, least, chosen, monkeypatch):
    """To try one fills all rows with it."""
    tried = []
    monkeypatch.setattr(packing, "fill_rows", lambda *args: tried.append(args[1]) or fill_rows(*args))
    assert good_length([(positions, 1)] * 12, least, 4096) == chosen
    assert len(tried) <= 18
    tried.clear()
    assert good_length([(least // 2, 1)] * 12, least, 4096) == least  # rows are full already
    assert tried in ([], [least])


# ---------------------------------------------------------------- the data file


def test_lists_and_lines_are_read_alike(write, tmp_path):
    rows = [good_row(i) for i in range(4)]
    assert read_rows(write(rows)) == read_rows(write(rows, "data.jsonl")) == rows
    lines = tmp_path / "odd.jsonl"
    lines.write_bytes(b"\r\n\n  \n".join(json.dumps(row).encode() for row in rows))
    assert read_rows(str(lines)) == rows
    marked = tmp_path / "marked.json"
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    assert read_rows(str(marked)) == rows
    marked.write_bytes(b"\xef\xbb\xbf" + b"\r".join(json.dumps(row).encode() for row in rows))
    assert read_rows(str(marked)) == rows
    marked.write_bytes(b" \n" * 40_000 + json.dumps(rows, indent=1).encode())
    assert read_rows(str(marked)) == rows


def test_a_line_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("llava_jax.data.conversations.MAX_ROW", 100)
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + b" " * 99 + b"\n" + b" " * 101)
    with pytest.raises(InputError, match="line 3 has more than 100 bytes"):
        read_rows(tmp_path / "a.jsonl")


def test_a_file_beyond_memory_is_not_begun(write, monkeypatch):
    monkeypatch.setattr("llava_jax.data.conversations.memory_bytes", lambda: 10)
    with pytest.raises(InputError, match=r"more than this machine has memory \(10\)"):
        read_rows(write([good_row(0)]))


@pytest.mark.parametrize("value", ["[]", "{}", '"ab"', "1.5", "[[]]", '{"a":[1.5]}'])
def test_a_file_of_many_small_values_is_not_begun(tmp_path, monkeypatch, value):
    """Nor is more said to be needed than many times what it is."""
    path = tmp_path / "many.json"
    path.write_text(f"[{','.join([value] * 20_000)}]")
    tracemalloc.start()
    rows = read_rows(path)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 20_000
    monkeypatch.setattr("llava_jax.data.conversations.memory_bytes", lambda: taken // 2)
    with pytest.raises(InputError, match="its values may take") as said:
        read_rows(path)
    assert int(re.search(r"take ([\d,]+)", str(said.value))[1].replace(",", "")) < 4 * taken


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (None, "missing.json: cannot be read"),
        (b"", "no conversations in it"),
        (b"[]", "no conversations in it"),
        (b'[{"id": 1}, {"id": ]', "not JSON .*line 1 column"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, contents, says):
    path = tmp_path / "missing.json"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(InputError, match=says):
        read_rows(str(path))


@pytest.mark.parametrize("line", BROKEN)
def test_what_is_wrong_with_a_sample(line, write, folder, models):
    samples = Samples(write([line], "data.jsonl"), str(folder), *models["v1.6-mistral"])
    found = samples.measure(0)
    found = found if isinstance(found, BadSample) else samples.load(found)
    assert BROKEN[line] in found.reason
    assert samples.name(found).startswith(f"{samples.path} row 0")
    about_picture = any(
        text in found.reason for text in ("image folder", "no such", "broken", "not an", "cannot be", "URL", "host")
    )
    assert bool(found.file) == (about_picture or "a directory" in found.reason)


def test_a_conversation_is_the_same_in_every_format(write, folder, models):
    """Ids, labels and tiles of `messages`, of parts, of `images` and of a system message, wherever they stand."""
    data = "data:image/png;base64," + base64.b64encode((folder / "0.png").read_bytes()).decode()
    image, question = {"type": "image"}, {"type": "text", "text": "What?"}
    answer = {"role": "assistant", "content": "x"}
    said = turns("<image>\nWhat?", "x")
    one = [
        {"image": "0.png", "conversations": said},
        {"image": ["0.png"], "conversations": turns("What?<image>", "x")},
        {"images": "0.png", "conversations": [{"role": "user", "content": "<image>\nWhat?"}, answer]},
        {"images": ["0.png"], "image": None, "messages": said, "system": "", "tools": "", "videos": []},
        {"image": "0.png", "conversations": said, "video": False, "audio": 0, "tools": None, "chosen": False},
        {"image": "0.png", "messages": [{"role": "user", "content": "What?<image>", "video": False}, answer]},
        {"images": ["0.png"], "messages": [parts(image, question), parts({"type": "text", "text": "x"}, role="gpt")]},
        {"messages": [parts(question, image | {"path": "0.png"}), answer | {"weight": 1}]},
        {"messages": [parts(image | {"url": str(folder / "0.png")}, question), answer]},
        {"messages": [parts({"type": "image_url", "image_url": {"url": data}}, question), answer]},
        {"messages": [parts({"type": "image_url", "image_url": f"file://{folder}/0.png"}, question), answer]},
        {"image": data, "conversations": said},
        {"image": "data:;base64," + quote(data.split(",")[1]), "conversations": said},
        {"image": "DATA:image/png," + quote((folder / "0.png").read_bytes()), "conversations": said},
        {"image": f"file://localhost{folder}/%30.png", "conversations": said},
    ]
    two = [
        {"image": ["1.png", "2.png"], "conversations": turns("<image>\n<image>\nWhat?", "x")},
        {"images": ["1.png", "2.png"], "messages": [parts(image, image, question), answer]},
        {
            "images": ["2.png", "1.png"],
            "messages": [parts(image | {"index": 1}, image | {"index": 0}, question), answer],
        },
        {"messages": [parts(image | {"image": "1.png"}, image | {"image": "2.png"}, question), answer]},
        {"images": ["1.png", "2.png"], "messages": [parts(image, image | {"index": None}, question), answer]},
    ]
    told = [
        {"system": "Be brief.", "conversations": turns("a", "x")},
        {"conversations": [{"from": "system", "value": "Be brief."}, *turns("a", "x")]},
        {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]},
        {"messages": [parts({"type": "text", "text": "Be brief."}, role="System"), *MESSAGES]},
    ]
    for rows in (one, two, told):
        samples = Samples(write(rows), str(folder), *models["v1.6-mistral"], template="llava_llama_2")
        found = [samples.load(samples.measure(i)) for i in range(len(rows))]
        assert samples.has_image.tolist() == [rows is not told] * len(rows)
        assert samples.most_images == len(found[0].tiles)
        for row in found:
            np.testing.assert_array_equal(row.ids, found[0].ids)
            np.testing.assert_array_equal(row.labels, found[0].labels)
            assert [tile.tobytes() for tile in row.tiles] == [tile.tobytes() for tile in found[0].tiles]


def test_a_system_message_replaces_the_templates(write, folder, models):
    model, tokenizer = models["v1.5-llama"]
    rows = [{"system": "Be brief.", "conversations": turns("a", "the")}, {"conversations": turns("a", "the")}]
    for template in ("v1", "llava_v0", "llava_llama_2", "mistral_instruct"):
        samples = Samples(write(rows), str(folder), model, tokenizer, template=template)
        own, other = (samples.measure(i).row for i in (0, 1))
        text = tokenizer.decode(own.ids, special=True)
        assert "Be brief." in text and "artificial" not in text and "helpful" not in text
        assert tokenizer.decode(own.ids[own.labels != IGNORE]) == tokenizer.decode(other.ids[other.labels != IGNORE])


def test_plain_has_no_place_for_a_system_message_and_says_so_once(write, folder, models, capsys):
    rows = [PICTURE | {"conversations": turns("<image>", "x")}, PICTURE | {"conversations": turns("<image>", "x")}]
    path = write([row | {"system": "Be brief."} for row in rows])
    samples = Samples(path, str(folder), *models["v1.5-llama"], template="plain")
    [plain] = [Samples(write(rows, "b.json"), str(folder), *models["v1.5-llama"], template="plain").measure(0)]
    np.testing.assert_array_equal(samples.measure(1).row.ids, plain.row.ids)
    says = f"warning: {path}: the template plain has no place for its system messages\n"
    assert capsys.readouterr().err == says


def test_keys_that_nobody_knows_are_named_once(write, folder, models, capsys):
    known = {"id": 1, "model": "x", "source": "y", "kinds": ["z"], "conversations": turns("a", "x"), "video": []}
    odd = [known, known | {"bbox": [1]}, known | {"bbox": [2], "k" * 300: 1}]
    odd.append({"messages": [parts({"type": "text", "text": "a", "fps": 3}), MESSAGES[1] | {"mood": "good"}]})
    path = write(odd)
    Samples(path, str(folder), *models["v1.5-llama"])
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"warning: {path}: key 'bbox' is not read (first in row 1)",
        f"warning: {path}: key '{'k' * 24}...{'k' * 13}' is not read (first in row 2)",
        f"warning: {path}: key 'fps' of a part is not read (first in row 3)",
        f"warning: {path}: key 'mood' of a turn is not read (first in row 3)",
    ]
    Samples(write([known | {f"key{i}": 1 for i in range(15)}]), str(folder), *models["v1.5-llama"])
    said = capsys.readouterr().err.splitlines()
    assert (len(said), said[-1]) == (11, f"warning: {path}: nor are 5 other keys")


@pytest.mark.parametrize("follow", [False, True])
def test_absolute_paths_in_the_image_folder_are_taken(write, folder, models, tmp_path, follow):
    (tmp_path / "link").symlink_to(folder)
    (folder / "sub").mkdir(exist_ok=True)
    names = [
        f"{folder}/0.png",
        f"{tmp_path}/link/0.png",
        f"file://{folder}/0.png",
        f"{folder}/sub/../0.png",
        "/etc/passwd",
    ]
    path = write([{"image": name, "conversations": turns("<image>", "x")} for name in names])
    for place, taken in ((folder, 3), (tmp_path / "link", 3), ("/", 3), (folder / "sub", 0)):
        samples = Samples(path, str(place), *models["v1.6-mistral"], follow_links=follow)
        found = [samples.measure(i) for i in range(4)]
        assert [isinstance(one, BadSample) for one in found] == [i >= taken for i in range(4)], place
        assert all("leads out of the image folder" in one.reason for one in found[taken:])
        if place != "/":
            assert "leads out of the image folder" in samples.measure(4).reason


def test_a_picture_is_at_fault_by_name(write, folder, models):
    rows = [{"id": 9, "image": ["0.png", "truncated.jpg"], "conversations": turns("<image><image>", "x")}]
    samples = Samples(write(rows), str(folder), *models["v1.5-llama"])
    found = samples.load(samples.measure(0))
    assert (found.id, found.file) == (9, "truncated.jpg")
    assert samples.name(found) == f"{samples.path} row 0 (id 9): {folder}/truncated.jpg: {found.reason.split(': ')[1]}"


@pytest.mark.parametrize("name", ["v1.5-llama", "v1.6-mistral"])
def test_links_are_followed_within_the_image_folder(name, write, folder, models, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (tmp_path / "pictures2").mkdir()
    for place in (pictures, tmp_path, tmp_path / "pictures2"):
        (place / "0.png").write_bytes((folder / "0.png").read_bytes())
    (tmp_path / "link").symlink_to(pictures)
    for link, target in {
        "same.png": "0.png", "whole.png": str(pictures / "0.png"), "through.png": str(tmp_path / "link" / "0.png"),
        "here": ".", "out.png": "../0.png", "beside": "../pictures2", "up": "..", "two.png": "out.png",
        "loop.png": "loop.png", "gone.png": "missing.png",
    }.items():  # fmt: skip
        (pictures / link).symlink_to(target)
    wanted = {"0.png": None, "same.png": None, "whole.png": None, "through.png": None, "here/0.png": None} | {
        "here/out.png": "leads out of the image folder, by a link to",
        "out.png": f"out.png: leads out of the image folder, by a link to {tmp_path.resolve()}/0.png",
        "beside/0.png": "leads out of the image folder",
        "up/pictures2/0.png": "leads out of the image folder",
        "two.png": "leads out of the image folder",
        "loop.png": "cannot be read",
        "gone.png": "no such image",
    }
    path = write([{"image": image, "conversations": turns("<image>", "x")} for image in wanted])
    for directory in (pictures, tmp_path / "link"):
        samples = Samples(path, str(directory), *models[name], template="v1")
        for i, (image, says) in enumerate(wanted.items()):
            found = samples.measure(i)
            found = found if isinstance(found, BadSample) else samples.load(found)
            if says is None:
                assert found.tile_count, image
            else:
                assert (found.file, says in found.reason) == (image, True), found
    samples = Samples(path, str(pictures), *models[name], template="v1", follow_links=True)
    for i, (image, says) in enumerate(wanted.items()):
        found = samples.measure(i)
        found = found if isinstance(found, BadSample) else samples.load(found)
        assert isinstance(found, BadSample) == (image in ("loop.png", "gone.png")), (image, says)


def test_a_long_conversation_is_cut_and_pictures_behind_the_cut_are_forgotten(write, folder, models):
    model, tokenizer = models["v1.5-llama"]
    row = {"image": ["0.png", "missing.png"], "conversations": turns("<image> a", "the", "b <image>", "is")}
    path = write([row])
    whole = Samples(path, str(folder), model, tokenizer, template="llava_llama_2").measure(0)
    for room in (whole.length, whole.length - 1, whole.length - 25, 60):
        samples = Samples(path, str(folder), model, tokenizer, template="plain", max_length=room)
        assert isinstance(samples.measure(0), BadSample)
        samples = Samples(path, str(folder), model, tokenizer, template="llava_llama_2", max_length=room)
        cut = samples.measure(0)
        if isinstance(cut, BadSample):
            assert cut.reason == f"no answer within {room} positions"
            continue
        assert (cut.length, cut.cut) == (min(room, whole.length), max(0, whole.length - room))
        assert cut.tiles == len(cut.images) == (cut.row.ids == IMAGE).sum()
    answer = int(np.flatnonzero(whole.row.labels != IGNORE)[0])
    before = answer + 15  # positions before it: 16 features for one mark
    short = Samples(path, str(folder), model, tokenizer, template="llava_llama_2", max_length=before + 2)
    cut = short.measure(0)
    assert (cut.images, cut.length) == (("0.png",), before + 2)
    assert (cut.row.labels != IGNORE).sum() == 2
    assert short.load(cut).tile_count == 1
    too_short = Samples(path, str(folder), model, tokenizer, template="llava_llama_2", max_length=before)
    assert too_short.measure(0).reason == f"no answer within {before} positions"


def test_random_order_of_image_and_question(write, folder, models):
    path = write([{"image": "0.png", "conversations": turns("<image>\nWhat?", "x")}] * 40)

    def places(seed, epoch):
        samples = Samples(path, str(folder), *models["v1.5-llama"], template="v1", image_first="random", seed=seed)
        np.random.seed(epoch)  # of no importance
        return [int(np.flatnonzero(samples.measure(i, epoch).row.ids == IMAGE)[0]) for i in range(40)]

    first = places(0, 0)
    assert len(set(first)) == 2
    assert 8 < first.count(min(first)) < 32
    assert places(0, 0) == first
    assert places(0, 1) != first != places(1, 0)
    as_is = Samples(path, str(folder), *models["v1.5-llama"], template="v1").measure(0)
    assert int(np.flatnonzero(as_is.row.ids == IMAGE)[0]) == min(first)


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


# ---------------------------------------------------------------- batches


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


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_a_thousand_rows_thirty_of_them_broken(batching, write, config, models, capsys):
    lines = [json.dumps(good_row(i)) for i in range(1000)]
    broken = {i * 33 + 5: line for i, line in enumerate((list(BROKEN) * 2)[:30])}
    for i, line in broken.items():
        lines[i] = line
    path = write(lines, "data.jsonl")
    runs = {}
    for workers in (2, 0, 5):
        settings = config(path, batching=batching, workers=workers, max_bad_share=0.04, global_batch_size=32)
        data = open_data(settings.replace(output=f"{settings.output}{workers}"), *models["v1.6-mistral"])
        runs[workers] = [next(data) for _ in range(data.steps_per_epoch + 1 if workers == 2 else 4)]
        data.close()
    assert {i for _, info in runs[2] for i in info["ids"]} == {f"row{i}" for i in range(1000) if i not in broken}
    same(runs[2][:4], runs[0])
    same(runs[2][:4], runs[5])
    listed = list(map(json.loads, Path(f"{settings.output}2", "bad_samples.jsonl").read_text().splitlines()))
    assert sorted(row["index"] for row in listed) == sorted(broken)
    assert all(BROKEN[broken[row["index"]]] in row["reason"] for row in listed)
    assert all(row["data"] == path for row in listed)
    said = capsys.readouterr().err
    assert said.count("bad sample: ") == 3 * 10
    assert said.count("more bad samples are listed in") == 3


def test_bad_samples_are_listed_once_over_restarts(write, config, models, capsys):
    rows = [good_row(i) for i in range(40)] + [{"image": "missing.png", "conversations": turns("<image>", "x")}]
    settings = config(write(rows), max_bad_share=0.1)
    model = models["v1.6-mistral"]
    take(open_data(settings, *model), 8)
    file = Path(settings.output, "bad_samples.jsonl")
    once = file.read_text()
    assert json.loads(once)["index"] == json.loads(once)["id"] == 40
    with file.open("a") as cut_off:
        cut_off.write('{"data": "da')
    take(open_data(settings, *model), 8)
    assert file.read_text() == once
    assert capsys.readouterr().err.count("bad sample") == 1
    take(open_data(settings, *model, process=1, processes=2), 8)
    assert file.read_text() == once  # process 0 knows it too
    assert not file.with_name("bad_samples.1.jsonl").exists()


def test_each_process_lists_the_broken_pictures_of_its_own_rows(write, config, models):
    rows = [good_row(i) | ({"image": "truncated.jpg"} if i % 5 == 1 else {}) for i in range(40)]
    settings = config(write(rows), max_bad_share=0.3)
    for process in (0, 1):
        take(open_data(settings, *models["v1.6-mistral"], process=process, processes=2, train=False))
    files = [Path(settings.output, name) for name in ("bad_samples.jsonl", "bad_samples.1.jsonl")]
    listed = [{json.loads(line)["index"] for line in file.read_text().splitlines()} for file in files]
    assert listed[0] | listed[1] == set(range(1, 40, 5))
    assert listed[0]
    assert listed[1]
    assert len(listed[0] & listed[1]) <= 1  # but one that both looked at beforehand


def test_too_many_bad_samples_stop_a_run(write, config, models):
    rows = [good_row(i) for i in range(100)]
    for i in (5, 50):
        rows[i] = {"image": "missing.png", "conversations": turns("<image>", "x")}
    refused = "bad samples: 2 among the first 100, more than --max-bad-share 0.01 allows; row 5: .*; row 50: .*image$"
    with pytest.raises(InputError, match=refused):
        open_data(config(write(rows)), *models["v1.6-mistral"])
    assert not Path(config("").output, "bad_samples.jsonl").exists()
    with pytest.raises(InputError, match="row 5: .*missing.png: no such image"):
        open_data(config(write(rows), on_bad_sample="fail"), *models["v1.6-mistral"])
    rows[5], rows[50] = good_row(5), good_row(50) | {"image": "truncated.jpg"}
    open_data(config(write(rows)), *models["v1.6-mistral"]).close()
    data = open_data(config(write(rows), on_bad_sample="fail"), *models["v1.6-mistral"])
    with pytest.raises(InputError, match=r"row 50 \(id row50\): .*truncated.jpg: broken image"):
        take(data, 30)
    rows[9] = good_row(9) | {"image": "truncated.jpg"}
    data = open_data(config(write(rows)), *models["v1.6-mistral"])
    with pytest.raises(
        InputError, match=r"bad samples: 2 among the first 100, .*; row \d+ .*/bad_samples.jsonl lists them"
    ):
        take(data, 30)
    assert len(Path(config("").output, "bad_samples.jsonl").read_text().splitlines()) == 2


def test_one_bad_sample_of_a_few_stops_nothing(write, config, models, capsys):
    """In each pass it is met again. Two are too many, and the error names them; nothing is listed of a run refused."""
    rows = [good_row(i) for i in range(15)]
    rows[4] = {"image": "missing.png", "conversations": turns("<image>", "x")}
    settings = config(write(rows))
    data = open_data(settings, *models["v1.6-mistral"])
    infos = [next(data)[1] for _ in range(4 * data.steps_per_epoch)]
    data.close()
    assert infos[-1]["epoch"] >= 3 and infos[-1]["bad"] >= 4
    link = Path(settings.data).with_name("link.json")
    link.symlink_to(settings.data)
    for several in (f"{settings.data}=3", (settings.data,) * 2, (settings.data, f"{settings.data}=2", str(link))):
        open_data(settings.replace(data=several), *models["v1.6-mistral"]).close()
    says = f"row 4: {settings.image_folder}/missing.png: no such image\n"
    assert capsys.readouterr().err == f"bad sample: {settings.data} {says}bad sample: {link} {says}"
    with pytest.raises(
        InputError, match=r"bad samples: 1 among the first 15, more than --max-bad-share 0 allows; .*row 4: "
    ):
        open_data(settings.replace(max_bad_share=0.0), *models["v1.6-mistral"])
    for i in (6, 8, 11, 12):
        rows[i] = {"id": f"bad{i}", "conversations": turns("a")}
    settings = config(write(rows), output=f"{settings.output}2")
    with pytest.raises(InputError) as error:
        open_data(settings, *models["v1.6-mistral"])
    assert str(error.value) == (
        f"{settings.data}: bad samples: 5 among the first 15, more than --max-bad-share 0.01 allows; "
        f"row 4: {settings.image_folder}/missing.png: no such image; row 6 (id bad6): no answer; "
        "row 8 (id bad8): no answer; and 2 more"
    )
    assert not Path(settings.output).exists()
    assert capsys.readouterr().err == ""


def test_processes_stop_together_at_what_each_of_them_found(write, config, models):
    """Ten of a hundred pictures are broken. Either process knows of some, and goes on until both know of all."""
    rows = [good_row(i) | ({"image": "truncated.jpg"} if i % 10 == 1 else {}) for i in range(100)]

    def stop(**changes) -> set[str]:
        settings, said = config(write(rows), **changes), set()
        both = [open_data(settings, *models["v1.6-mistral"], process=i, processes=2, train=False) for i in (0, 1)]
        for data in both:
            take(data)
        assert all(0 < data.bad.own < 10 for data in both)
        reports = []
        for data in both:
            data.bad.agree(lambda text: [reports.append(text), text, text][1:])
        for data in both:
            with pytest.raises(InputError) as error:
                data.bad.agree(lambda text: reports)
            said.add(str(error.value).split("; ")[0])
            assert data.bad.total == 10
        return said

    share = dict(max_bad_share=0.08)  # neither alone has met so many
    (one,) = stop(**share)
    assert "bad samples: 10 among the first 100, more than --max-bad-share 0.08 allows" in one
    data = open_data(config(write(rows), max_bad_share=0.19), *models["v1.6-mistral"])
    data.bad.set_state([20, 50])  # of the run that goes on
    with pytest.raises(InputError, match="bad samples: (29|30) among the first 150"):
        take(data, 30)


def test_nothing_but_broken_pictures(write, config, models):
    path = write([good_row(0) | {"image": "truncated.jpg"}] * 3)
    with pytest.raises(InputError, match=r"none of its images can be read; .*row 0 \(id row0\): .*broken image"):
        open_data(config(path), *models["v1.6-mistral"])


@pytest.mark.parametrize("name", ["v1.5-llama", "v1.6-mistral"])
def test_text_does_not_hide_a_wrong_image_folder(name, write, config, models, tmp_path, monkeypatch):
    """Of v1.5 no picture is touched before it is loaded; of v1.6 the head of each has been read."""
    tried, load = [], Samples.load
    monkeypatch.setattr(Samples, "load", lambda self, one: tried.append(one.index) or load(self, one))
    path = write([good_row(3)] * 2 + [good_row(i) for i in range(98)])
    (tmp_path / "elsewhere").mkdir()
    settings = config(path, max_bad_share=1.0)
    with pytest.raises(InputError, match=r"none of its images can be read; .*row 2 \(id row0\): .*no such image"):
        open_data(settings.replace(image_folder=str(tmp_path / "elsewhere")), *models[name])
    assert (len(tried), max(tried, default=0) > 80) == ((8, True) if name == "v1.5-llama" else (0, False))
    tried.clear()
    open_data(settings, *models[name]).close()
    assert tried[0] == 2
    rows = [good_row(i) for i in range(20)]
    rows[0] |= {"image": "missing.png"}
    open_data(config(write(rows), max_bad_share=1.0), *models[name]).close()
    open_data(config(write([good_row(3)] * 20), image_folder=str(tmp_path / "elsewhere")), *models[name]).close()


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
@pytest.mark.parametrize("made", [1, 4, 9])
def test_resume_bit_for_bit(batching, made, write, config, models):
    model = models["v1.6-mistral"]
    settings = config(write([good_row(i) for i in range(40)]), batching=batching, image_first="random")
    whole = take(open_data(settings, *model), made + 7)  # over the end of an epoch
    data = open_data(settings, *model)
    same(take(data, made), whole[:made])
    state = json.loads(json.dumps(data.get_state()))
    again = open_data(settings.replace(workers=0, prefetch=1), *model)
    again.set_state(state)
    assert again.get_state() == state
    same(take(again, 7), whole[made:])


def test_a_place_in_the_data_that_is_none_is_refused(write, config, models):
    data = open_data(config(write([good_row(i) for i in range(8)])), *models["v1.5-llama"])
    state = data.get_state()
    for place in (
        {}, {"parent": {"next_index": 0}}, {"parent": {"next_index": 0}, "next_index_in_buffer": {}},
        {"parent": {"next_index": -1}, "next_index_in_buffer": 0}, {"parent": [0], "next_index_in_buffer": 0},
        {"parent": {"next_index": True}, "next_index_in_buffer": 0}, state["place"] | {"more": 1},
    ):  # fmt: skip
        with pytest.raises(InputError, match="place in the data .* remove the directory"):
            data.set_state(state | {"place": place})
    data.set_state(state)
    data.close()


def test_resume_with_another_number_of_processes_and_another_mesh(write, config, models):
    model = models["v1.5-llama"]
    settings = config(write([good_row(i) for i in range(70)]), template="v1")
    data = open_data(settings, *model, rows_multiple=4)
    whole = [next(data) for _ in range(6)]
    state = data.get_state()
    rest = take(data, 3)
    halves = []
    for process in (0, 1):
        half = open_data(settings, *model, rows_multiple=2, process=process, processes=2)
        half.set_state(state)
        assert (half.rows, half.steps_per_epoch) == (data.rows, data.steps_per_epoch)
        halves.append(take(half, 3))
    for (batch, info), (first, one), (second, two) in zip(rest, *halves, strict=True):
        assert info["ids"] == one["ids"] == two["ids"]
        for name in SAME:
            joined = np.concatenate([getattr(first, name), getattr(second, name)])
            np.testing.assert_array_equal(getattr(batch, name), joined)
    seen = {i for _, info in whole for i in info["ids"]}
    odd = open_data(settings, *model, rows_multiple=3)  # does not divide the rows, so each batch gets empty ones
    odd.set_state(state)
    assert (odd.rows, odd.steps_per_epoch) == (-(-data.rows // 3) * 3, data.steps_per_epoch)
    assert odd.rows != data.rows
    assert odd.get_state() == state
    for (batch, info), (padded, same) in zip(rest, take(odd, 3), strict=True):
        assert info["ids"] == same["ids"]
        for name in SAME:
            np.testing.assert_array_equal(getattr(batch, name), getattr(padded, name)[: data.rows])
        assert (padded.segments[data.rows :] == 0).all() and (padded.labels[data.rows :] == IGNORE).all()
    assert len(seen) > 30


@pytest.mark.parametrize(
    ("asked", "multiple", "other", "conversations", "rows"),
    [
        (96, 32, 24, 96, (64, 72)), (192, 96, 64, 230, (96, 128)), (48, 16, 24, 48, (32, 48)),
        (240, 80, 48, 240, (160, 192)), (96, 96, 32, 96, (96, 96)), (96, 8, 512, 96, (40, 512)),
    ],
)  # fmt: skip
def test_a_resumed_batch_holds_as_many_conversations_on_every_mesh(asked, multiple, other, conversations, rows):
    model = model_of("llava-v1.5-7b")

    def open_drawn(multiple):
        settings = TrainConfig(global_batch_size=asked, workers=0, positions_per_row=2048)
        samples = DrawnSamples(settings, model, 500)
        return Data(settings, samples, BadSamples(settings, samples, None), multiple, 0, 1, True)

    first, second = open_drawn(multiple), open_drawn(other)
    held, steps = first.estimate()["conversations"], first.steps_per_epoch
    second.set_state(first.get_state())
    assert (first.rows, second.rows) == rows
    assert round(held) == conversations
    assert (second.estimate()["conversations"], second.steps_per_epoch) == (held, steps)
    assert f"about {conversations} conversations (" in second.describe()
    first.close(), second.close()


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_processes_share_the_rows_of_each_batch(batching, write, config, models):
    model = models["v1.6-mistral"]
    settings = config(write([good_row(i) for i in range(50)]), batching=batching)
    for train in (True, False):
        n = 9 if train else None
        whole = take(open_data(settings, *model, rows_multiple=2, train=train), n)
        parts = [take(open_data(settings, *model, process=p, processes=2, train=train), n) for p in (0, 1)]
        assert len(whole) == len(parts[0]) == len(parts[1])
        for (batch, info), (first, one), (second, two) in zip(whole, *parts, strict=True):
            assert info["ids"] == one["ids"] == two["ids"]
            for name in SAME:
                assert getattr(first, name).shape == getattr(second, name).shape
                joined = np.concatenate([getattr(first, name), getattr(second, name)])
                np.testing.assert_array_equal(getattr(batch, name), joined)


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


def test_bucketed_batches_have_pictures_throughout_or_nowhere(write, config, models):
    settings = config(write([good_row(i) for i in range(95)]), batching="bucketed", global_batch_size=4)
    data = open_data(settings, *models["v1.6-mistral"])
    assert data.steps_per_epoch == 24  # 10 texts, 85 pictures: 2 and 21 batches, one of what is left
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


def test_what_is_told_of_a_batch(write, config, models):
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
        (64, 4, 1, 4, "rows are not as full as they could be, so that a batch holds 4 conversations: --global-batch"),
        (64, 4, 4, 4, "rows are not as full as they could be, so that a batch holds 4 conversations: --global-batch"),
        (64, 6, 4, 6, "rows are not as full as they could be, so that a batch holds 6 conversations: --global-batch"),
        (64, 4, 8, 8, "warning: a batch holds about 8 conversations instead of 4: the mesh and the number of "),
        (12, 128, 1, 12, "warning: --global-batch-size 128 is more than the 12 conversations that can be trained on"),
        (1, 128, 1, 1, "warning: --global-batch-size 128 is more than the 1 conversation that can be trained on"),
        (12, 128, 8, 12, "batches of 12 are made instead"),
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
    monkeypatch.setattr(train_data, "WINDOW", window)
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
    assert f"can be trained on: batches of {n} are made instead" in data.describe()
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
    monkeypatch.setattr(train_data, "WINDOW", 8)
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
        assert bool(data._per_row) == (multiple == 8)
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


@pytest.mark.parametrize(
    ("rows", "least", "sizes"),
    [([12], 3, [4, 4, 4]), ([5, 1, 2], 4, [3, 2, 1, 2]), ([5, 1, 2], 6, [2, 2, 1, 1, 1, 1]), ([2, 2], 9, [1, 1, 1, 1]),
     ([3, 2], 1, [3, 2])],
)  # fmt: skip
def test_rows_are_spread_evenly(rows, least, sizes):
    numbers = iter(range(sum(rows)))
    found = packing.spread([[next(numbers) for _ in range(n)] for n in rows], least)
    assert list(map(len, found)) == sizes
    assert sorted(i for row in found for i in row) == list(range(sum(rows)))


def test_longer_rows_where_pictures_leave_too_much_of_short_ones(write, config, models):
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


def test_changed_data_is_refused(write, config, models):
    data = open_data(config(write([good_row(i) for i in range(40)])), *models["v1.6-mistral"])
    next(data)
    state = data.get_state()
    data.close()
    other = open_data(config(write([good_row(i) for i in range(41)])), *models["v1.6-mistral"])
    with pytest.raises(InputError, match="has 41 conversations; the run to resume had 40"):
        other.set_state(state)
    other.close()


def test_one_pass_can_be_made_again(write, config, models):
    data = open_data(config(write([good_row(i) for i in range(25)])), *models["v1.6-mistral"], train=False)
    first, second = list(data), list(data)
    data.close()
    same(first, second)
    assert len(first) == data.steps_per_epoch
    assert {batch.ids.shape for batch, _ in first} == {(data.rows, 240)}


# ---------------------------------------------------------------- several files


def test_weights_take_a_share_of_a_file_or_repeat_it():
    assert Part("a").choose(5, (0, 0)).tolist() == [0, 1, 2, 3, 4]
    halves = [
        Part("a", weight=0.5).choose(15, (seed, part)).tolist() for seed, part in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert [len({*half} & {*range(15)}) for half in halves] == [8] * 4
    assert halves[0] == halves[1] == sorted(halves[0])
    assert halves[0] != halves[2] != halves[3] != halves[0]
    more = Part("a", weight=2.5).choose(4, (0, 0)).tolist()
    assert more[:8] == [*range(4)] * 2 and len({*more[8:]}) == 2
    assert len(Part("a", weight=0.1).choose(30, (0, 0))) == 3  # not 4, as 0.1 * 30 rounded up would be
    for share in (1e-6, 1e-9, 1e-300):
        assert len(Part("a", weight=share).choose(30, (0, 0))) == len(Part("a", weight=share).choose(1, (0, 0))) == 1


def test_yaml_lists_as_llava_next_has_them(tmp_path):
    for strategy, rows in {
        "all": [*range(10)], None: [*range(10)], "first:3": [0, 1, 2], "end:3": [7, 8, 9], "first:25%": [0, 1, 2],
        "end:10%": [9], "first:100": [*range(10)], "end:100": [*range(10)], "random:100": [*range(10)],
    }.items():  # fmt: skip
        line = f'\n    sampling_strategy: "{strategy}"' if strategy else ""
        (tmp_path / "mix.yaml").write_text(f"datasets:\n  - json_path: a.json{line}\n  - json_path: b.jsonl\n")
        first, second = read_parts(["c.json=2", str(tmp_path / "mix.yaml")])[1:]
        assert (first.path, first.choose(10, (0, 0)).tolist()) == ("a.json", rows)
        assert second == Part("b.jsonl")
    (tmp_path / "mix.yaml").write_text('datasets: [{json_path: a.json, sampling_strategy: "random:25%"}]')
    assert len({*read_parts(str(tmp_path / "mix.yaml"))[0].choose(10, (0, 0)).tolist()}) == 3


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        ("a: [", "not YAML"), ("", "must have one key, datasets"), ("datasets: []", "must have one key, datasets"),
        ("datasets: 3", "must have one key, datasets"), ("datasets: [3]", r"datasets\[0\] has no json_path"),
        ("datasets: [{json_path: a}]\nmore: 1", "must have one key, datasets"),
        ("datasets: [{json_path: a, data_root: b}]", r"datasets\[0\]: data_root is not read"),
        ("[" * 100_000, "cannot be read|not YAML"), ("datasets: [&a {json_path: a}, *a]", "has aliases"),
        ("a0: &a0 {x: 1}\n" + "".join(
            f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 9)}]}}\n" for i in range(12)), "has aliases"),
        *[
            (f'datasets: [{{json_path: a, sampling_strategy: "{x}"}}]', f"sampling_strategy '{x}': write all, or first")
            for x in ("some", "first", "first:", "first:0", "first:0%", "end:00%", "end:x", "random:-1", "random:200%",
                      "first:1.5%", "last:3")
        ],
    ],
)  # fmt: skip
def test_yaml_that_cannot_be_used(contents, says, tmp_path):
    (tmp_path / "mix.yaml").write_text(contents)
    with pytest.raises(InputError, match=says):
        read_parts(str(tmp_path / "mix.yaml"))


def test_weights_that_are_none(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b=2").write_text("[]")
    assert read_parts(str(tmp_path / "b=2")) == [Part(str(tmp_path / "b=2"))]
    for weight in ("0", "-1", "nan", "inf", "1e9", "half", ""):
        with pytest.raises(InputError, match="the weight after = must be a number above 0"):
            read_parts(f"{tmp_path}/a.json={weight}")
    with pytest.raises(InputError, match="c=3.json: cannot be read"):
        read_rows(read_parts(f"{tmp_path}/c=3.json")[0].path)
    with pytest.raises(InputError, match="mix.yaml=2: a YAML file has its own"):
        read_parts("mix.yaml=2")


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_several_files_are_one_list(batching, write, config, models, capsys):
    """Each row as often as its file's weight says, in the order of no file, resumed bit for bit; the bad ones named by
    their own file."""
    model = models["v1.6-mistral"]
    first = write([good_row(i) for i in range(20)], "a.json")
    second = write([good_row(i) | {"id": f"b{i}"} for i in range(12)] + ["{"], "b.jsonl")
    third = write([good_row(i) | {"id": f"c{i}"} for i in range(10)], "c.json")
    settings = config((first, f"{second}=2", f"{third}=0.5"), batching=batching, max_bad_share=0.1)
    data = open_data(settings, *model)
    assert len(data.samples) == 20 + 2 * 13 + 5
    whole = [next(data) for _ in range(data.steps_per_epoch + 4)]
    data.close()
    once = take(open_data(settings, *model, train=False))
    seen = collections.Counter(i for _, info in once for i in info["ids"])
    assert [seen[f"row{i}"] for i in range(20)] == [1] * 20 and [seen[f"b{i}"] for i in range(12)] == [2] * 12
    assert sorted(seen[f"c{i}"] for i in range(10)) == [0] * 5 + [1] * 5
    assert seen.keys() == {i for _, info in whole for i in info["ids"]}
    assert f"bad sample: {second} row 12: not JSON" in capsys.readouterr().err
    [listed] = map(json.loads, Path(settings.output, "bad_samples.jsonl").read_text().splitlines())
    assert (listed["data"], listed["index"]) == (second, 12)
    data = open_data(settings, *model)
    same(take(data, 3), whole[:3])
    state = json.loads(json.dumps(data.get_state()))
    again = open_data(settings.replace(workers=0), *model)
    again.set_state(state)
    same(take(again, 3), whole[3:6])


def test_checksum_is_of_the_files_and_of_their_shares(write):
    """That of one file alone is its own, as sha256sum prints it."""
    a, b = write([1], "a.json"), write([2], "b.json")
    moved = write([1], "moved.json")
    sums = [checksum(read_parts(data)) for data in (a, b, (a, b), (b, a), (a, f"{b}=0.5"), f"{a}=2")]
    assert len({*sums}) == len(sums)
    assert sums[0] == hashlib.sha256(Path(a).read_bytes()).hexdigest() == checksum(read_parts(moved))
    assert checksum(read_parts((moved, b))) == sums[2]
    with pytest.raises(InputError, match="--data nowhere.json: cannot be read"):
        checksum(read_parts((a, "nowhere.json")))


def test_a_run_of_several_files_resumes_with_the_same_shares_only(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = GOLDEN / "checkpoints" / "v1.5-llama"
    write([good_row(0)], "a.json"), write([good_row(1)], "b.json"), write([good_row(1)], "moved.json")

    def output(*data):
        flags = [part for one in data for part in ("--data", one)]
        _, config = read_config(["--checkpoint", str(checkpoint), "--output", "run", "--eval-data", "b.json", *flags])
        assert config.eval_data == str(tmp_path / "b.json")
        assert config.data == (tuple(str(tmp_path / one) for one in data) if len(data) > 1 else str(tmp_path / data[0]))
        return Output(config)

    output("a.json", "b.json=0.5").write_config()
    assert output("a.json", "moved.json=0.5").resumed
    for other in (("a.json",), ("a.json", "b.json"), ("b.json=0.5", "a.json")):
        with pytest.raises(InputError, match="data_sha256 is .* there and .* here"):
            output(*other)


def test_preview_of_several_files(write, folder, run_cli):
    paths = [write([good_row(i)], name) for i, name in ((0, "a.json"), (7, "b.json"))]
    args = ["--data", paths[0], "--data", f"{paths[1]}=2", "--checkpoint", GOLDEN / "checkpoints" / "v1.6-mistral"]
    status, out, err = run_cli(preview.main, *args, "--image-folder", folder, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert [(row["data"], row["index"], row["id"]) for row in rows] == [
        (paths[0], 0, "row0"), (paths[1], 0, "row7"), (paths[1], 0, "row7"),
    ]  # fmt: skip


# ---------------------------------------------------------------- preview


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
    assert (status, err) == (1, f"error: {path} has 4 rows; there is none to show from --start 4\n")


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
    assert shown["row6"]["ids"][-1] == IMAGE  # cut through a picture
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


# ---------------------------------------------------------------- ScienceQA

PROBLEM = {
    "question": "Which is  a cat?", "choices": ["a dog", "a cat"], "answer": 1, "hint": "Look at the picture.",
    "image": "image.png", "lecture": "Cats meow.\nDogs bark.", "solution": "It meows.",
}  # fmt: skip
ASKED = "Which is a cat?\nContext: Look at the picture.\nOptions: (A) a dog (B) a cat"


@pytest.mark.parametrize(
    ("prompt_format", "changes", "question", "answer"),
    [
        ("QCM-LEA", {}, ASKED, "Cats meow.\nDogs bark. It meows. The answer is B."),
        ("QCM-LEA", {"lecture": "", "hint": " "}, ASKED.replace("Look at the picture.", "N/A"),
         "It meows. The answer is B."),
        ("QCM-LEA", {"lecture": "", "solution": ""}, ASKED, " The answer is B."),
        ("QCM-A", {}, ASKED, "The answer is B."),
        ("QCM-AL", {}, ASKED, "The answer is B. BECAUSE: It meows."),
        ("QCM-AE", {"lecture": ""}, ASKED, "The answer is B."),
        ("QCM-ALE", {}, ASKED, "The answer is B. BECAUSE: Cats meow.\nDogs bark. It meows."),
        ("QCM-AEL", {}, ASKED, "The answer is B. BECAUSE: It meows. Cats meow.\nDogs bark."),
        ("QCM-LA", {}, ASKED, "Cats meow.\nDogs bark. The answer is B."),
        ("QCM-EA", {}, ASKED, "It meows. The answer is B."),
        ("QCM-ELA", {}, ASKED, "It meows. Cats meow.\nDogs bark. The answer is B."),
        ("QCM-LEPA", {}, ASKED, "LECTURE: Cats meow.\nDogs bark.\nSOLUTION: It meows.\n###\nANSWER: B."),
        ("QCM-LEPA", {"lecture": " ", "solution": ""}, ASKED, "###\nANSWER: B."),
        ("CQM-A", {}, "Context: Look at the picture.\nQuestion: Which is a cat?\nOptions: (A) a dog (B) a cat",
         "The answer is B."),
        ("QCML-A", {"lecture": ""}, ASKED, "The answer is B."),
        ("QCMLE-A", {}, f"{ASKED}\nBECAUSE: Cats meow.\nDogs bark. It meows.", "The answer is B."),
        ("QCEM-A", {}, ASKED.replace("\nOptions", "\nBECAUSE: It meows.\nOptions"), "The answer is B."),
    ],
)  # fmt: skip
def test_scienceqa_prompts(prompt_format, changes, question, answer):
    """To the space, as scripts/convert_sqa_to_llava.py of the reference writes them."""
    assert scienceqa.question_and_answer(PROBLEM | changes, prompt_format) == (question, answer)


def test_scienceqa_file(tmp_path, run_cli, models, folder):
    (tmp_path / "problems.json").write_text(json.dumps({"7": PROBLEM, "8": PROBLEM | {"image": None}, "9": {}}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["8", "7"], "test": ["9"]}))
    status, _, err = run_cli(scienceqa.main, "--base-dir", tmp_path, "--split", "train")
    path = tmp_path / "llava_train_QCM-LEA.json"
    assert (status, err) == (0, f"2 conversations, 1 of them with a picture, in {path}\n")
    answer = "Cats meow.\nDogs bark. It meows. The answer is B."
    assert json.loads(path.read_text()) == [
        {"id": "8", "conversations": turns(ASKED, answer)},
        {"id": "7", "image": "7/image.png", "conversations": turns(f"{ASKED}\n<image>", answer)},
    ]
    (tmp_path / "7").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "7" / "image.png")
    samples = Samples(str(path), str(tmp_path), *models["v1.5-llama"])
    assert samples.measure(1).tiles == samples.load(samples.measure(1)).tile_count == 1
    mine = [{"id": "7", "image": "coco/7.jpg", "conversations": [{"from": "human", "value": "<image>"}]}]
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    for args, says in [
        (["--split", "train", "--prompt-format", "QCM-X"], "--prompt-format 'QCM-X'"),
        (["--split", "dev"], "--split dev: .*pid_splits.json has train, test"),
        (["--split", "test"], "problem 9 is not ScienceQA's"),
        ([], "the following arguments are required: --split"),
        (["--splits", "train"], "the following arguments are required: --split"),
        (["--split", "train", "train"], "unrecognized arguments: train"),
        (["--split", "train", "--output", str(folder)], "holds no conversations"),
        (["--split", "train", "--output", str(tmp_path / "mine.json")], "holds no conversations of ScienceQA"),
        (["--split", "train", "--output", str(tmp_path / "problems.json")], "holds no conversations"),
        (["--split", "train", "--output", str(folder / "0.png" / "a.json")], "cannot be written"),
        (["--split", "train", "--base-dir", str(folder)], "problems.json: no such file"),
    ]:
        status, _, err = run_cli(scienceqa.main, "--base-dir", tmp_path, *args)
        assert status == 1
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert re.search(says, err)


@pytest.mark.parametrize("answer", [-1, 2, 7, None, "1", 0.5])
def test_scienceqa_answer_that_is_no_choice(answer, tmp_path, run_cli):
    (tmp_path / "problems.json").write_text(json.dumps({"7": PROBLEM | {"answer": answer}}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["7"]}))
    status, _, err = run_cli(scienceqa.main, "--base-dir", tmp_path, "--split", "train")
    says = f"{tmp_path}/problems.json: problem 7: answer {answer!r} is none of its 2 choices, counted from 0"
    assert (status, err) == (1, f"error: {says}\n")
    assert not (tmp_path / "llava_train_QCM-LEA.json").exists()


@pytest.mark.parametrize("split", ["7", 7, None, {"7": 1}, [7], ["7", ["7"]]])
def test_scienceqa_split_that_is_no_list(split, tmp_path, run_cli):
    (tmp_path / "problems.json").write_text(json.dumps({"7": PROBLEM}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": split}))
    status, _, err = run_cli(scienceqa.main, "--base-dir", tmp_path, "--split", "train")
    says = f"error: {tmp_path}/pid_splits.json: train must be a list of problems' numbers, as texts\n"
    assert (status, err) == (1, says)


def test_scienceqa_file_is_whole_or_as_it_was(tmp_path, run_cli, monkeypatch):
    (tmp_path / "problems.json").write_text(json.dumps({"7": PROBLEM}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["7"]}))
    path = tmp_path / "llava_train_QCM-LEA.json"
    path.write_text("[]")
    write = Path.write_bytes

    def full_disk(self, data):
        write(self, data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    status, _, err = run_cli(scienceqa.main, "--base-dir", tmp_path, "--split", "train")
    assert (status, err) == (1, f"error: {path}: cannot be written (No space left on device)\n")
    assert path.read_text() == "[]"
    assert {file.name for file in tmp_path.iterdir()} == {"problems.json", "pid_splits.json", path.name}
