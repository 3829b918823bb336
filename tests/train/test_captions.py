"""`python -m train.datasets.captions`: what it reads, what it writes of it, and what it leaves out and refuses."""

import collections
import io
import json
import os
import tarfile

import pytest
from PIL import Image

from helpers import files_of_at_most, image_file
from llava_jax.console import InputError
from train.datasets.captions import __main__ as captions
from train.datasets.captions import sources as caption_sources
from train.datasets.captions.sources import Fields, Pair, Skipped, read_captions
from train.samples import Sample, Samples

BRIEF = captions.read_requests("brief")
PNG = image_file(Image.new("RGB", (20, 30)), "PNG")


@pytest.fixture
def convert(run_cli, tmp_path, monkeypatch):
    """Run the command in an empty directory: (status, standard error, rows, rows that are left out)."""
    monkeypatch.chdir(tmp_path)

    def convert(*flags):
        status, out, err = run_cli(captions.main, "--output", "out", *flags)
        assert out == ""
        rows, left_out = tmp_path / "out/captions.json", tmp_path / "out/left_out.jsonl"
        return (
            status,
            err,
            json.loads(rows.read_text()) if rows.exists() else None,
            [json.loads(line) for line in left_out.read_text().splitlines()] if left_out.exists() else [],
        )

    return convert


def pairs(path, **fields) -> list[tuple[str, str, str]]:
    """The ids, images and captions of a source without anything to skip."""
    found = list(read_captions(str(path), Fields(**fields)))
    assert all(isinstance(one, Pair) for one in found), found
    return [(one.id, one.image, one.caption) for one in found]


def reasons(path, **fields) -> list[str]:
    return [one.reason for one in read_captions(str(path), Fields(**fields)) if isinstance(one, Skipped)]


def write_tar(path, files: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


# ---------------------------------------------------------------- rows


def test_there_are_enough_requests_and_no_two_alike():
    lists = {name: captions.read_requests(name) for name in captions.NAMED_REQUESTS}
    assert len(lists["brief"]) >= 11 and len(lists["detailed"]) >= 16
    assert len({*lists["brief"], *lists["detailed"]}) == len(lists["brief"]) + len(lists["detailed"])


def test_rows_have_the_originals_format_and_depend_on_themselves_alone():
    many = [Pair("", str(i), f"{i}.jpg", f"Caption {i}.") for i in range(2000)]
    rows = [captions.make_row(pair, BRIEF, 0) for pair in many]
    assert rows[7] == captions.make_row(many[7], BRIEF, 0) and rows[7].keys() == {"id", "image", "conversations"}
    assert rows[7]["conversations"][1] == {"from": "gpt", "value": "Caption 7."}
    counts: collections.Counter = collections.Counter()
    for row in rows:
        question = row["conversations"][0]["value"]
        first = question.startswith("<image>\n")
        request = question.removeprefix("<image>\n") if first else question.removesuffix("\n<image>")
        assert request in BRIEF
        counts.update([first, request])
    assert 900 < counts[True] < 1100 and all(100 < counts[request] < 210 for request in BRIEF)
    assert sum(row != captions.make_row(pair, BRIEF, 1) for row, pair in zip(rows, many, strict=True)) > 1800


def test_requests_of_a_file(convert, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"image": "a.jpg", "caption": "A cat."}')
    (tmp_path / "mine.txt").write_text("\ufeff\nWas ist das?\r\n\n")
    _, _, [row], _ = convert("--captions", "c.jsonl", "--requests", "mine.txt")
    assert row["conversations"][0]["value"] in ("<image>\nWas ist das?", "Was ist das?\n<image>")
    for text, says in (("\n \n", "has no requests"), ("What is <image>?", "a request has an <image> token")):
        (tmp_path / "mine.txt").write_text(text)
        status, err, *_ = convert("--captions", "c.jsonl", "--requests", "mine.txt", "--output", "new")
        assert status == 1 and err.startswith(f"error: --requests mine.txt: {says}")


# ---------------------------------------------------------------- sources


def test_json(tmp_path):
    rows = [
        {"id": "x", "image": "a.jpg", "caption": " A cat. "},
        {"id": 7, "file_name": "b/c.png", "text": "Ein Hund."},
        {"image": "d.jpg", "captions": ["One.", "Two."]},
    ]
    want = [("x", "a.jpg", "A cat."), ("7", "b/c.png", "Ein Hund."), ("d-0", "d.jpg", "One."), ("d-1", "d.jpg", "Two.")]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("list.json", "lines.json", "lines.jsonl"):
        assert pairs(tmp_path / name) == want
    (tmp_path / "one.json").write_text('{"picture": "e.jpg", "alt": "E", "caption": "no", "image": "no"}')
    assert pairs(tmp_path / "one.json", image="picture", caption="alt") == [("e", "e.jpg", "E")]
    assert pairs(tmp_path / "one.json", image_name="{line:4}.png") == [("0001", "0001.png", "no")]


def test_json_that_cannot_be_used_is_skipped(tmp_path):
    lines = {
        '{"image": "a", "caption": "fine"}': None,
        "[1]": "not a JSON object",
        "{": "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        '{"image": 1, "caption": "a"}': "has no image",
        '{"image": "a"}': "has no caption",
        '{"image": "a", "caption": " "}': "has no caption",
        '{"image": "a", "captions": []}': "has no caption",
        '{"image": "a", "caption": "an <image>"}': "its caption has an <image> token",
        '{"image": "a", "caption": "\\ud800"}': "its text is not valid Unicode",
        json.dumps({"image": "a", "caption": "x" * 10_001}): "its caption has 10,001 characters, more than 10,000",
    }
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    assert reasons(tmp_path / "c.jsonl") == list(lines.values())[1:]


@pytest.mark.parametrize("indent", [None, 1])
def test_coco(tmp_path, indent):
    coco = {
        "info": {}, "images": [{"id": 5, "file_name": "000005.jpg", "height": 1}],
        "annotations": [{"id": 9, "image_id": 5, "caption": "A.\n"}, {"image_id": 5, "caption": "B"},
                        {"id": 1, "image_id": 6, "caption": "C"}],
    }  # fmt: skip
    path = tmp_path / "captions_val.json"
    path.write_text(json.dumps(coco, indent=indent))
    found = list(read_captions(str(path), Fields()))
    assert [one[1:4] for one in found[:2]] == [("000005-9", "000005.jpg", "A."), ("000005-1", "000005.jpg", "B")]
    assert found[2] == Skipped(f"{path} annotation 2", None, "images has no id 6")


def test_tables(tmp_path):
    (tmp_path / "cc3m.tsv").write_text('a "big" dog\thttp://x/1\nüber, alles\thttp://x/2\r\n', encoding="utf-8-sig")
    want = [("GCC_train_000000000", "GCC_train_000000000.jpg", 'a "big" dog'),
            ("GCC_train_000000001", "GCC_train_000000001.jpg", "über, alles")]  # fmt: skip
    assert pairs(tmp_path / "cc3m.tsv", image_name="GCC_train_{row:9}.jpg") == want
    assert pairs(tmp_path / "cc3m.tsv", image="1", caption="0")[1] == ("http://x/2", "http://x/2", "über, alles")
    assert pairs(tmp_path / "cc3m.tsv", image_name="{shard:5}/{row:09}.jpg")[0][1] == "00000/000000000.jpg"
    (tmp_path / "a.csv").write_text('Image,Caption,alt\na.jpg,"A ""big"",\ndog",x\n\nb.jpg,B,y\n')
    assert pairs(tmp_path / "a.csv") == [("a", "a.jpg", 'A "big",\ndog'), ("b", "b.jpg", "B")]
    assert pairs(tmp_path / "a.csv", caption="ALT")[1] == ("b", "b.jpg", "y")
    assert pairs(tmp_path / "a.csv", image_name="{row}.png")[1] == ("1", "1.png", "B")
    (tmp_path / "b.csv").write_bytes(b"caption,image\nonly\n\xff,a.jpg\nfine,b.jpg\n")
    assert reasons(tmp_path / "b.csv") == [
        "has 1 columns, too few for column 1 (counted from 0)", "its text is not valid Unicode"
    ]  # fmt: skip


def test_fields_of_names_of_images():
    fields = Fields(image_name="{shard:3}/{row:2}_{line}.jpg")
    assert [fields.name_of(row) for row in (0, 123, 20_000)] == [
        "000/00_1.jpg",
        "000/123_124.jpg",
        "002/20000_20001.jpg",
    ]


TAR = {
    "./0001.jpg": PNG, "./0001.txt": b"A cat.\n", "./0001.json": b'{"caption": "no"}',
    "deep/0002.caption.json": b"{}", "deep/0002.PNG": PNG, "deep/0002.json": b'{"caption": "B", "alt": "C"}',
    "0003.txt": b"no image", "0004.jpg": PNG, "../0005.jpg": PNG, "../0005.txt": b"out", "0006.jpg": PNG,
    "0006.json": b"{", "0007.jpg": PNG, "0007.txt": b"\xff",
}  # fmt: skip


def test_tars(convert, tmp_path):
    write_tar(tmp_path / "00000.tar", TAR)
    status, err, rows, left_out = convert("--captions", "00000.tar")
    assert status == 0 and err.splitlines()[-1] == "2 captions in out/captions.json"
    assert [(row["id"], row["image"], row["conversations"][1]["value"]) for row in rows] == [
        ("00000/0001", "00000/0001.jpg", "A cat."), ("00000/deep/0002", "00000/deep/0002.png", "B")
    ]  # fmt: skip
    images = tmp_path / "out/images"
    assert sorted(str(path.relative_to(images)) for path in images.rglob("*.*")) == [row["image"] for row in rows]
    assert all((images / row["image"]).read_bytes() == PNG for row in rows)
    assert [one["reason"].partition(" (")[0] for one in left_out] == [
        "has no image", "has no caption", "its name is not one of a file in the image folder", "0006.json: not JSON",
        "its text is not valid Unicode",
    ]  # fmt: skip
    status, *_ = convert("--captions", "00000.tar", "--no-images", "--output", "second")
    assert status == 0 and not (tmp_path / "second/images").exists()
    assert (tmp_path / "second/captions.json").read_bytes() == (tmp_path / "out/captions.json").read_bytes()
    assert pairs(write_tar(tmp_path / "b.tar", {"1.jpg": PNG, "1.json": TAR["deep/0002.json"]}), caption="alt") == [
        ("b/1", "b/1.jpg", "C")
    ]


def test_damaged_tars_are_refused(convert, tmp_path):
    whole = write_tar(tmp_path / "a.tar", TAR).read_bytes()
    giant = tarfile.TarInfo("x")
    giant.type, giant.size = tarfile.XHDTYPE, 2**33
    second = tarfile.BLOCKSIZE * 2  # the header after that of a small file
    damaged = {
        "text": b"no tar" * 500, "cut": whole[:1000], "giant header": giant.tobuf() + whole, "empty": b"",
        "cut within a header": whole[: second + 100], "header": whole[:second] + b"?" + whole[second + 1 :],
    }  # fmt: skip
    for name, data in damaged.items():
        (tmp_path / "a.tar").write_bytes(data)
        status, err, rows, _ = convert("--captions", "a.tar")
        assert (status, rows) == (1, None) and err.startswith("error: a.tar: a damaged tar, or none ("), (name, err)


def test_headers_of_tars_are_bounded(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, text in (("1.jpg", PNG), ("1.txt", b"A")):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(text), {"comment": "x" * 5000}
            tar.addfile(member, io.BytesIO(text))
    assert pairs(tmp_path / "a.tar") == [("a/1", "a/1.jpg", "A")]
    monkeypatch.setattr(caption_sources, "MAX_TAR_READ", 4096)
    with pytest.raises(InputError, match=r"a damaged tar, or none \(a header of 5,120 bytes\)$"):
        pairs(tmp_path / "a.tar")


def test_images_of_tars_do_not_replace_each_other(convert, tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "a.tar", {"1.jpg": folder.encode(), "1.txt": folder.encode()})
    status, _, [row], left_out = convert("--captions", "x/a.tar", "y/a.tar")
    assert status == 0 and row["conversations"][1]["value"] == "x"
    assert (tmp_path / "out/images/a/1.jpg").read_bytes() == b"x"
    assert left_out == [{"row": "y/a.tar 1", "image": "a/1.jpg", "reason": "another image has its name"}]


def test_names_in_tars_that_no_file_can_have(convert, tmp_path):
    """Their rows are left out."""
    names = ("1.jpg", "1.jpg/2.jpg", "d/" * 600 + "3.jpg", "n" * 300 + ".jpg", "../4.jpg")
    write_tar(
        tmp_path / "a.tar", {end: data for name in names for end, data in ((name, PNG), (name[:-3] + "txt", b"A"))}
    )
    status, _, [row], left_out = convert("--captions", "a.tar")
    assert (status, row["image"]) == (0, "a/1.jpg")
    assert [one["reason"] for one in left_out] == [
        "another image has its name", *["its name is not one of a file in the image folder"] * 3
    ]  # fmt: skip


# ---------------------------------------------------------------- the command


def test_missing_images_are_named_and_left_out(convert, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(PNG)
    (tmp_path / "images/directory.png").mkdir()
    names = ("a.png", "gone.png", "directory.png", "../images/a.png", "http://host/a.png", *map(str, range(6)))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"image": name, "caption": "A"}) for name in names))
    status, err, rows, left_out = convert("--captions", "c.jsonl", "--image-folder", "images")
    assert status == 0 and [row["image"] for row in rows] == ["a.png"]
    assert [one["image"] for one in left_out] == [*names[1:]]
    assert left_out[0] == {"row": "c.jsonl row 1", "image": "gone.png", "reason": "its image is missing"}
    assert err.splitlines() == [
        "warning: left out: c.jsonl row 1 (gone.png): its image is missing",
        "warning: left out: c.jsonl row 2 (directory.png): its image is missing",
        "warning: left out: c.jsonl row 3 (../images/a.png): ../images/a.png: is outside the image folder",
        "warning: left out: c.jsonl row 4 (http://host/a.png): http://host/a.png: images in data files are not "
        "downloaded; save it in the image folder",
        "warning: left out: c.jsonl row 5 (0): its image is missing",
        "10 rows left out, listed in out/left_out.jsonl",
        "1 caption in out/captions.json",
    ]


def test_stage_1_trains_on_it(convert, tmp_path, models):
    write_tar(tmp_path / "a.tar", {"1.png": PNG, "1.txt": b"A red bus."})
    convert("--captions", "a.tar")
    samples = Samples("out/captions.json", "out/images", *models["v1.5-llama"], template="plain")
    measured = samples.measure(0)
    assert isinstance(measured, Sample) and samples.load(measured).tile_count == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["none.jsonl"], "none.jsonl: cannot be read (No such file or directory)"),
        (["a.txt"], "a.txt: must end in .json, .jsonl, .csv, .tsv or .tar"),
        (["pipe.tsv"], "pipe.tsv: a pipe, not a file"),
        (["pipe.json"], "pipe.json: a pipe, not a file"),
        (["pipe.tar"], "pipe.tar: a pipe, not a file"),
        (["empty.tsv"], "empty.tsv: is empty"),
        (["c.tsv"], "c.tsv: has no header, so that its images are unknown; --image-field gives the number of"),
        (["c.tsv", "--image-field", "9"], "no caption can be used; the first: c.tsv row 0: has 2 columns, too few for"),
        (["c.tsv", "--image-field", "name"], "c.tsv: its header has no name, but a cat, http://x; give --image"),
        (["c.tsv", "--image-field", "name", "--caption-field", "0"], "--caption-field and --image-field must be two"),
        (["c.tsv", "--image-name", "{row}", "--image-field", "1"], "--image-field and --image-name both say"),
        (["c.tsv", "--image-name", "a.jpg"], "--image-name 'a.jpg': must have {row}, {line} or {shard}, and no other"),
        (["c.tsv", "--image-name", "{row}{0.x}"], "--image-name '{row}{0.x}': must have"),
        (["quote.csv"], "quote.csv line 65538: not CSV (field larger than field limit"),
        (["coco.json"], "coco.json: images[0].file_name is missing"),
        (["empty.json", "--caption-field", "x"], "empty.json: COCO's files need no fields or names of images"),
        (["deep.json"], "deep.json: "),
        (["c.jsonl", "--workers", "2"], "--workers 2: needs --balance"),
        (["c.jsonl", "--spacy-model", "x"], "--spacy-model x: needs --balance"),
        (["c.jsonl", "--requests", "none"], "none: cannot be read (No such file or directory)"),
        (["c.jsonl", "--image-folder", "none"], "--image-folder none: no such directory"),
        (["c.jsonl", "--output", "full"], "--output full: is not empty; give a new directory"),
        (["c.jsonl", "--output", "gs://bucket/x"], "--output gs://bucket/x: must be a local directory"),
        (["c.jsonl", "--caption-field", "x"], "no caption can be used; the first: c.jsonl row 0 (a): has no caption"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_one_line(convert, tmp_path, flags, says):
    for name in ("pipe.tsv", "pipe.json", "pipe.tar"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").touch()
    files = {
        "a.txt": "", "empty.tsv": "", "c.tsv": "a cat\thttp://x\n", "c.jsonl": '{"image": "a", "caption": "A"}',
        "quote.csv": 'image,caption\na,"' + "x\n" * 100_000, "deep.json": "{" + '"a":{' * 10_000,
        "empty.json": '{"images": [], "annotations": []}',
        "coco.json": '{"images": [{"id": 1}], "annotations": []}',
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = set(tmp_path.rglob("*"))
    status, err, *_ = convert("--captions", *flags)
    assert status == 1 and err.startswith(f"error: {says}") and err.count("\n") == 1, err
    assert set(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(convert, tmp_path):
    (tmp_path / "c.jsonl").write_text("\n".join(['{"image": "a", "caption": "A"}'] * 1000))
    with files_of_at_most(10_000):
        status, err, *_ = convert("--captions", "c.jsonl")
    assert (status, err) == (1, "error: out: cannot be written (File too large)\n")
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]
