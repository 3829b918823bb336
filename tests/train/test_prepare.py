"""Preparing datasets: what is written, what is left out, and that training from it is the same."""

import base64
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from helpers import GOLDEN, turns
from train.loader import open_data
from train.prepared import PreparedDataset
from train.samples import BadSample, Samples
from training import BROKEN, assert_same_batches, good_row, take

CHECKPOINT = GOLDEN / "checkpoints" / "v1.5-llama"


def files_of(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def members(path) -> dict[str, bytes]:
    """The files in a tar."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def images_of(dataset) -> list[list[bytes]]:
    return [[dataset.image(row, i) for i in range(count)] for row, count in enumerate(dataset.image_counts.tolist())]


# ---------------------------------------------------------------- what is written


def test_files_are_kept_byte_by_byte(tmp_path, folder, write, prepare):
    rows = [good_row(i) for i in range(30)] + [{"conversations": turns("ä?", "🙂\u2028"), "metadata": "\ud800"}]
    status, err = prepare("--data", write(rows), "--max-shard-size", "20KB")
    assert status == 0
    assert "31 conversations (0 left out) and 12 images" in err
    out = tmp_path / "out"
    shards = sorted(out.glob("images-*.tar"))
    assert len(shards) > 2 and all(shard.stat().st_size <= 20_000 for shard in shards)
    packed = [member for shard in shards for member in members(shard).items()]
    used = list(dict.fromkeys(name for row in rows for name in np.atleast_1d(row.get("image", [])).tolist()))
    assert packed == [(f"{i:09}.png", (folder / name).read_bytes()) for i, name in enumerate(used)]
    lines = [line for shard in sorted(out.glob("*.jsonl")) for line in shard.read_bytes().splitlines()]
    assert [json.loads(line) for line in lines[:30]] == rows[:30]
    assert json.loads(lines[30]) == rows[30]
    dataset = PreparedDataset(str(out))
    assert [dataset.row(i) for i in range(31)] == rows
    assert [dataset.id(i) for i in range(31)] == [row.get("id", 30) for row in rows]
    names = [np.atleast_1d(row.get("image", [])).tolist() for row in rows]
    assert images_of(dataset) == [[(folder / name).read_bytes() for name in row] for row in names]
    sizes = [Image.open(folder / name).size for row in names for name in row]
    assert list(map(tuple, dataset.sizes.tolist())) == sizes
    assert not dataset.described["system"]
    assert {name.split("-")[0] for name in files_of(out)} == {
        "conversations", "dataset.json", "images", "index.safetensors"
    }  # fmt: skip


def test_the_same_files_again(tmp_path, write, prepare, in_process):
    path = write([good_row(i) for i in range(8)])
    for output in ("out", "again"):
        assert prepare("--data", path, output=output)[0] == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")
    status, err = prepare("--data", path)
    assert (status, err) == (0, f"{tmp_path}/out: is complete already\n")


@pytest.mark.parametrize("name", ["v1.5-llama", "v1.6-mistral"])
def test_batches_are_the_same(tmp_path, write, config, models, prepare, in_process, name):
    one, two = write([good_row(i) for i in range(40)]), write([good_row(i) for i in range(40, 60)], "two.jsonl")
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"datasets:\n- {{json_path: {two}, sampling_strategy: 'random:30%'}}\n")
    data = (f"{one}=1.3", str(mix), f"{two}=2")
    assert prepare(*[word for one in data for word in ("--data", one)], "--seed", 3)[0] == 0
    model, tokenizer = models[name]
    expected = take(open_data(config(data), model, tokenizer), 6)
    assert_same_batches(expected, take(open_data(config(str(tmp_path / "out")), model, tokenizer), 6))


def test_images_are_stored_once(tmp_path, folder, write, prepare, in_process, monkeypatch):
    """Whatever their names; those that name no file in the folder are replaced."""
    whole = (folder / "0.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(whole).decode()}"
    (folder / "link.png").symlink_to("1.png")
    names = ["1.png", "link.png", "./1.png", str(folder / "1.png"), f"file://{folder}/1.png", url, url + "="]
    parts = [{"type": "text", "text": "Look:"}, {"type": "image"}, {"type": "image"}]
    rows = [{"image": name, "conversations": turns("<image>\n?", "x")} for name in names]
    rows.append({"id": 8, "images": [url, "1.png"], "system": "Be brief.", "kinds": ["a"],
                 "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]})  # fmt: skip
    data = write(rows[:6] + rows[7:])
    assert prepare("--data", data)[0] == 0
    (folder / "link.png").unlink()
    assert members(tmp_path / "out" / "images-00000.tar") == {
        "000000000.png": (folder / "1.png").read_bytes(), "000000001.png": whole
    }  # fmt: skip
    dataset = PreparedDataset(str(tmp_path / "out"))
    kept = [dataset.row(i) for i in range(7)]
    assert kept[:3] == rows[:3]
    assert kept[3] == kept[4] == {"images": ["000000000.png"], "conversations": turns("<image>\n?", "x")}
    assert kept[5] == {"images": ["000000001.png"], "conversations": turns("<image>\n?", "x")}
    assert kept[6] == {
        "id": 8, "kinds": ["a"], "images": ["000000001.png", "000000000.png"], "system": "Be brief.",
        "conversations": turns("Look:\n<image>\n<image>", "x"),
    }  # fmt: skip
    assert dataset.described["system"]
    assert dataset.index.image_of.tolist() == [0] * 5 + [1, 1, 0]
    assert not list((tmp_path / "out").glob("*incomplete"))


def test_images_can_be_encoded_again(tmp_path, write, prepare, in_process):
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    noise = Image.fromarray(rng.integers(0, 256, (60, 200, 3), np.uint8))
    noise.save(folder / "large.png")
    noise.convert("L").resize((40, 30)).save(folder / "small.jpg", quality=20)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(folder / "turned.jpg", exif=exif)
    names = ["large.png", "small.jpg", "turned.jpg"]
    path = write([{"image": name, "conversations": turns("<image>\n?", "x")} for name in names])
    assert prepare("--data", path, "--image-folder", folder, "--max-side", 100)[0] == 0
    dataset = PreparedDataset(str(tmp_path / "out"))
    assert dataset.sizes.tolist() == [[100, 30], [40, 30], [30, 100]]
    assert dataset.image(1, 0) == (folder / "small.jpg").read_bytes()
    assert [Image.open(io.BytesIO(dataset.image(i, 0))).size for i in range(3)] == [(100, 30), (40, 30), (30, 100)]
    prepare("--data", path, "--image-folder", folder, "--quality", 50, output="small")
    again = PreparedDataset(str(tmp_path / "small"))
    assert again.sizes.tolist() == [[200, 60], [40, 30], [60, 200]]
    assert again.image(1, 0) == (folder / "small.jpg").read_bytes()  # which would get larger
    assert len(again.image(0, 0)) < (folder / "large.png").stat().st_size / 5
    assert list(members(tmp_path / "small" / "images-00000.tar")) == [f"00000000{i}.jpg" for i in range(3)]
    status, err = prepare("--data", path, "--image-folder", folder, "--quality", 60, output="small")
    assert status == 1 and "with other settings: --quality (50, now 60)" in err


def test_text_without_images(tmp_path, write, prepare, in_process):
    assert prepare("--data", write([{"conversations": turns("a", "b")}] * 3), "--verify")[0] == 0
    assert sorted(files_of(tmp_path / "out")) == ["conversations-00000.jsonl", "dataset.json", "index.safetensors"]


# ---------------------------------------------------------------- what is left out


def test_bad_rows_are_left_out(tmp_path, folder, write, prepare, in_process):
    """Those that no tokenizer could read; for the reasons that training gives."""
    rows = [good_row(0), *BROKEN, good_row(1)]
    path = write(rows, "data.jsonl")
    status, err = prepare("--data", path, "--max-bad-share", 0.3)
    assert status == 1
    assert "rows cannot be prepared, more than --max-bad-share 0.3 allows; " in err
    assert not (tmp_path / "out").exists() or not (tmp_path / "out" / "dataset.json").exists()
    status, err = prepare("--data", path, "--max-bad-share", 1)
    assert status == 0 and err.count("\nleft out: ") == 10 and "further rows that are left out are listed in" in err
    listed = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    by_row = {one["index"]: one for one in listed}
    for index, (line, says) in enumerate(BROKEN.items(), 1):
        if index in by_row:
            assert says in by_row[index]["reason"]
        else:  # only a template can tell
            assert json.loads(line)["conversations"]
    missing = next(one for one in listed if one["file"] == "missing.png")
    assert list(missing) == ["data", "index", "id", "file", "reason"]
    dataset = PreparedDataset(str(tmp_path / "out"))
    assert len(dataset) == len(rows) - len(listed)
    assert dataset.row(0) == rows[0] and dataset.row(len(dataset) - 1) == rows[-1]
    with open(tmp_path / "out" / "dataset.json") as file:
        assert json.load(file)["counts"] == {"rows": len(dataset), "left_out": len(listed)}


def test_a_broken_image_leaves_out_all_its_rows(tmp_path, folder, write, prepare, in_process):
    rows = [
        good_row(0),
        {"id": "b", "image": ["0.png", "truncated.png"], "conversations": turns("<image><image>", "x")},
    ]
    rows += [{"image": "truncated.png", "conversations": turns("<image>\n?", "x")}, good_row(1)]
    path = write(rows)
    status, err = prepare("--data", path)
    assert status == 1
    assert "error: 2 of 4 rows cannot be prepared, more than --max-bad-share 0.01 allows; " in err
    assert f"; {tmp_path}/out/left_out.jsonl lists them\n" in err
    assert not (tmp_path / "out" / "dataset.json").exists()
    before = (tmp_path / "out" / "images-00000.tar").stat()
    status, err = prepare("--data", path, "--max-bad-share", 0.5)
    assert status == 0 and "resuming: 1 of 1 shard of images are complete" in err
    assert (tmp_path / "out" / "images-00000.tar").stat() == before
    dataset = PreparedDataset(str(tmp_path / "out"))
    assert [dataset.row(i) for i in range(2)] == [rows[0], rows[3]]
    assert images_of(dataset) == [[(folder / "0.png").read_bytes()], [(folder / "1.png").read_bytes()]]
    one = json.loads((tmp_path / "out" / "left_out.jsonl").read_text().splitlines()[0])
    assert (one["index"], one["id"], one["file"]) == (1, "b", "truncated.png") and "broken image" in one["reason"]


def test_nothing_is_written_if_all_images_are_missing(tmp_path, write, prepare):
    (tmp_path / "empty").mkdir()
    status, err = prepare("--data", write([good_row(0)] * 9), "--image-folder", tmp_path / "empty")
    assert status == 1 and err.startswith("error: 9 of 9 rows cannot be prepared; ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_failing_disk_is_not_a_bad_image(folder, write, prepare, in_process, monkeypatch):
    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("train.datasets.prepare.image_shards.open_regular", fails)
    status, err = prepare("--data", write([good_row(0)]))
    assert (status, err.splitlines()[-1]) == (1, f"error: {folder}/0.png: Input/output error")


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize("flags", [[], ["--image-first", "random"]])
def test_measured_lengths(tmp_path, folder, write, prepare, in_process, models, monkeypatch, flags):
    """Training finds them, and tokenizes nothing to plan."""
    rows = [good_row(i) for i in range(12)] + [{"conversations": turns("a")}, {"conversations": turns("<image>", "b")}]
    assert prepare("--data", write(rows))[0] == 0
    measured = ["--checkpoint", CHECKPOINT, "--template", "v1", *flags]
    status, err = prepare(*measured)
    assert status == 0 and "14 conversations measured for template v1\n" in err
    assert "warning: 1 conversation cannot be trained on; the first: row 13: " in err
    assert "is complete already" in prepare(*measured)[1]
    settings = dict(template="v1", image_first="random" if flags else "as_is", max_length=60)
    expected = Samples(write(rows), str(folder), *models["v1.5-llama"], **settings)
    samples = Samples(str(tmp_path / "out"), "", *models["v1.5-llama"], **settings)
    monkeypatch.setattr(samples._encoder, "encode", None)
    for i in range(14):
        for epoch in range(4):
            one, other = expected.measure(i, epoch), samples.measure(i, epoch)
            if isinstance(one, BadSample):
                assert isinstance(other, BadSample) and other.reason == one.reason
            else:
                assert (one.length, one.truncated, one.ids, one.layouts) == (
                    other.length, other.truncated, other.ids, other.layouts
                )  # fmt: skip
    assert prepare("--verify")[0] == 0
