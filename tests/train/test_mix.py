"""`python -m train.datasets.mix`: which rows are in the mix, what is left out and why, and what the report says."""

import json
import os
import re
import sys

import numpy as np
import pytest
from PIL import Image

from helpers import GOLDEN, files_of_at_most, turns
from llava_jax.data.conversations import read_conversation
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.splice import IGNORE
from train import mixture
from train.config import PRESETS
from train.datasets.mix import __main__ as mix
from train.datasets.mix import files as mix_files
from train.datasets.mix import images as mix_images
from train.datasets.mix import lengths as mix_lengths
from train.datasets.mix import plots as mix_plots
from train.datasets.mix import report as mix_report
from train.datasets.mix import rows as mix_rows
from train.datasets.mix.files import GOOD, KINDS
from train.samples import Samples

CHECKPOINT = str(GOLDEN / "checkpoints" / "v1.5-llama")


def row(id, image=None, *values, **more):
    """A row; without turns, a question and an answer of its own."""
    values = values or (f"{'<image> ' * bool(image)}Question {id}?", f"Answer {id}.")
    return {"id": id} | ({"image": image} if image else {}) | {"conversations": turns(*values)} | more


@pytest.fixture
def write_rows(tmp_path, monkeypatch):
    """Write a data file in the current directory."""
    monkeypatch.chdir(tmp_path)

    def write_rows(name, rows):
        (tmp_path / name).write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in rows))

    return write_rows


@pytest.fixture
def run_mix(run_cli, tmp_path, monkeypatch):
    """Run the command: (standard error, the mix, what is left out, the report). It draws nothing, unless it is to."""

    def run_mix(*flags, output="out", plots=False):
        if not plots:
            monkeypatch.setattr(mix, "draw", lambda *_: ())
        status, out, err = run_cli(mix.main, "--output", output, *flags)
        assert (status, out) == (0, ""), err
        written, listed = tmp_path / output / "mix.json", tmp_path / output / "left_out.jsonl"
        return (
            err,
            json.loads(written.read_text()) if written.exists() else None,
            [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else [],
            json.loads((tmp_path / output / "report.json").read_text()),
        )

    return run_mix


# ---------------------------------------------------------------- what is in the mix


def test_files_are_joined_as_they_are(write_rows, run_mix):
    first = [row("a", "0.png", score=[1, 2.5, "\ud800"]), {"id": 7, "messages": [
        {"role": "user", "content": [{"type": "image", "path": "1.png"}, {"type": "text", "text": "Ü?"}]},
        {"role": "assistant", "content": "Ja."}]}]  # fmt: skip
    second = [row(None, None, "Hi?", "Hello. 🙂", system="Be brief.")]
    write_rows("a.jsonl", first)
    write_rows("b.jsonl", second)
    err, rows, listed, report = run_mix("--data", "a.jsonl", "--data", "b.jsonl")
    assert rows == first + second and listed == []
    assert err.splitlines()[-2:] == ["3 rows in out/mix.json", "the report is in out/report.md"]
    assert (report["rows"], report["read"], report["ids_changed"]) == (3, 3, 0)


def test_the_same_rows_are_used_once_whatever_their_ids(write_rows, run_mix):
    same = row("x", "0.png")
    write_rows("a.jsonl", [same, row("y", "0.png"), same | {"id": "z"}, row("x", "1.png"), row("x")])
    turned = {"id": 1, "images": ["0.png"], "messages": [
        {"role": "user", "content": "<image> Question x?"}, {"role": "assistant", "content": "Answer x."}]}  # fmt: skip
    other = same | {"system": "Be brief."}
    write_rows("b.jsonl", [turned, other, row("w"), row("v")])
    _, rows, listed, report = run_mix("--data", "a.jsonl", "--data", "b.jsonl")
    assert [one["id"] for one in rows] == [
        "x",
        "y",
        "x-2",
        "x-3",
        "x-4",
        "w",
        "v",
    ]  # VQA's, many about an image, remain
    assert [(one["data"], one["row"], one["id"], one["reason"]) for one in listed] == [
        ("a.jsonl", 2, "z", "the same as row 0 of a.jsonl"),
        ("b.jsonl", 0, 1, "the same as row 0 of a.jsonl"),
    ]
    assert [source["duplicates"] for source in report["sources"]] == [1, 1] and report["ids_changed"] == 3
    assert rows[4] == other | {"id": "x-4"}


def test_new_ids_avoid_those_that_exist(write_rows, run_mix):
    write_rows("a.jsonl", [row(one) | {"conversations": turns(f"{i}?", "!")} for i, one in enumerate(
        ["a", "a-2", "a", 5, "5", "a", "a-2", 1.5])])  # fmt: skip
    _, rows, *_ = run_mix("--data", "a.jsonl")
    assert [one["id"] for one in rows] == ["a", "a-2", "a-3", 5, "5-2", "a-4", "a-2-2", 1.5]


def test_weights_repeat_and_choose_what_is_left(write_rows, run_mix):
    write_rows("a.jsonl", [row(i) for i in range(20)] + ["broken", json.dumps(row(3))])
    write_rows("b.jsonl", [row(f"b{i}") for i in range(3)])
    err, rows, _, report = run_mix("--data", "a.jsonl=0.5", "--data", "b.jsonl=2", "--data", "b.jsonl", "--seed", 4)
    drawn = mixture.Part("", weight=0.5).choose(20, (4, 0))
    assert [one["id"] for one in rows[:10]] == drawn.tolist()
    assert [one["id"] for one in rows[10:]] == [f"b{i}{n}" for n in ("", "-2", "-3") for i in range(3)]
    assert "left out: 1 invalid, 1 duplicates; listed in out/left_out.jsonl" in err
    assert [(source["read"], source["rows"], source["use"]) for source in report["sources"]] == [
        (22, 10, "0.5"), (3, 6, "2"), (3, 3, "1")
    ]  # fmt: skip
    with open("mix.yaml", "w") as file:
        file.write('datasets:\n- json_path: a.jsonl\n  sampling_strategy: "end:2"\n')
    assert [one["id"] for one in run_mix("--data", "mix.yaml", output="second")[1]] == [18, 19]


def test_invalid_rows_are_left_out_with_the_reason(write_rows, run_mix):
    bad = {
        "[1]": "not a JSON object",
        "{": "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        json.dumps(row(1, None, "Hi?")): "no answer",
        json.dumps(row(2, None, "Hi?", " ")): "no answer",
        json.dumps(row(3, None, "Hi?", "Yes.", "And?", "So.") | {"video": "a.mp4"}): "video: video is not supported",
        json.dumps(row(4, "0.png", "What?", "A.")): "0 <image> tokens for 1 images",
        json.dumps(row(5, ["0.png", "1.png"], "<image> What?", "A.")): "1 <image> tokens for 2 images",
        json.dumps(row(6) | {"conversations": turns("Hi?", "A.") * 2 + turns("Q?")[:1] * 2}):
            "speakers must take turns, human first",
        '{"id": 8, "conversations": [{"from": "human", "value": "\\ud800"}]}':
            "text is not valid Unicode (surrogates not allowed)",
    }  # fmt: skip
    write_rows("a.jsonl", [row("good"), *bad, row("last", "0.png", "<image> <image> What?", "A.")])
    _, rows, listed, report = run_mix("--data", "a.jsonl")
    assert [one["id"] for one in rows] == ["good", "last"]
    assert [one["reason"] for one in listed] == list(bad.values())
    assert report["left_out"]["invalid"] == len(bad) and sum(report["reasons"].values()) == len(bad)
    assert report["reasons"]["… <image> tokens for … images"] == 2 == report["reasons"]["no answer"]


@pytest.mark.parametrize("values", [["Hi?", "A."], ["Hi?", "A.", "B?", "C."], ["<image> Q?", "A.", "R?"], ["Q?", ""]])
def test_training_agrees_on_what_is_invalid(values, models, folder, tmp_path):
    """Of rows that mix keeps and leaves out, training makes good and bad samples."""
    for image in (None, "0.png"):
        (tmp_path / "a.jsonl").write_text(json.dumps(row(0, image, *values)))
        is_good = mix_files.measure_file(str(tmp_path / "a.jsonl")).status[0] == GOOD
        sample = Samples(str(tmp_path / "a.jsonl"), str(folder), *models["v1.5-llama"], template="v1").measure(0)
        assert is_good == hasattr(sample, "length")


def test_missing_and_broken_images(write_rows, run_mix, folder):
    names = ("0.png", "gone.png", "truncated.jpg", "text.png", "thin.png", "../0.png", "1.png")
    rows = [row(i, name) for i, name in enumerate(names)] + [row("two", ["2.png", "gone.png"], "<image><image>?", "A.")]
    write_rows("a.jsonl", [*rows, row("text")])
    flags = ("--data", "a.jsonl", "--image-folder", folder)
    _, kept, listed, report = run_mix(*flags)
    assert [one["id"] for one in kept] == [0, 2, 6, "text"]  # the header of truncated.jpg is whole
    assert [one["id"] for one in listed] == [1, 3, 4, 5, "two"]
    assert listed[0]["reason"] == listed[4]["reason"] == "gone.png: no such image"
    assert "not an image in a supported format" in listed[1]["reason"] and "text.png" in listed[1]["reason"]
    images = report["images"]
    assert (images["images"], images["missing"], images["broken"]) == (8, 1, 3)
    assert images["bad"][0] == "gone.png: no such image"
    _, kept, listed, report = run_mix(*flags, "--decode", output="decoded")
    assert [one["id"] for one in kept] == [0, 6, "text"] and "broken image" in listed[1]["reason"]
    assert (report["images"]["missing"], report["images"]["broken"]) == (1, 4)


# ---------------------------------------------------------------- the report


SAID = {
    "text only": row(0), "several images": row(1, ["a", "b"], "<image><image> Describe?", "A."),
    "short answers": row(2, "a", "<image>?", "A cat.", "Why?", "x" * 40),
    "description": row(3, "a", "<image>\nDescribe the image.", "A."), "one question": row(4, "a", "<image>?", "x" * 41),
    "conversation": row(5, "a", "<image>?", "A.", "Why?", "x" * 41),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    assert mix_files.kind_of(read_conversation(SAID[kind])) == kind
    [brief] = [turns(f"<image>\n{line}", "x" * 50) for line in ["What do you see in this image?"]]
    assert mix_files.kind_of(read_conversation({"image": "a", "conversations": brief})) == "description"


@pytest.fixture
def mix_known(write_rows, run_mix, folder):
    """Mix files of which everything is known: the report."""
    write_rows("a.jsonl", [
        row("long", "0.png", "<image> " + "q" * 10, "x" * 5000, tag="a|b"), row("x", "1.png", score=1),
        {"id": 1, "conversations": [{"from": "human", "value": "Hi", "loss": 0}, {"from": "gpt", "value": "Yes"}]},
        {"id": 2, "conversations": turns("Hi", "No"), "video": "v"}, row("y", "gone.png"),
    ])  # fmt: skip
    write_rows("b|c.jsonl", [row(i, f"{i % 3}.png", f"<image> {i}?", "A.", "B?", "C.") for i in range(6)])
    flags = ("--data", "a.jsonl", "--data", "b|c.jsonl=2", "--image-folder", folder)
    return lambda **options: run_mix(*flags, "--checkpoint", CHECKPOINT, "--max-length", 128, **options)[-1]


def test_what_the_report_says(mix_known, tmp_path):
    found, text = mix_known(plots=True), (tmp_path / "out/report.md").read_text()
    assert found["kinds"] == {
        name: {"text only": 1, "one question": 1, "short answers": 13}.get(name, 0) for name in KINDS
    }
    assert found["with_image"] == 14 and found["rows"] == 15
    assert found["per_row"]["questions"] == {"mean": 1.8, "median": 2, "90 %": 2, "99 %": 2, "max": 2}
    assert found["per_row"]["answered"]["max"] == 5000
    assert found["longest"][0] == {"data": "a.jsonl", "row": 0, "id": "long", "questions": 1, "characters": 5018}
    assert len(found["longest"]) == 9  # a row that is repeated is listed once
    assert found["unread_keys"] == {
        "tag": 1, "score": 1, "loss of a turn": 1, "video (unsupported)": 1
    } and found["rows_with_unread_keys"] == 4  # fmt: skip
    sizes = {(20, 20): 1, (40, 20): 1, (20, 50): 1}
    assert {tuple(one["size"]): one["images"] for one in found["images"]["frequent_sizes"]} == sizes
    assert [found["images"][name] for name in ("landscape", "square", "portrait")] == [1, 1, 1]
    assert "| b\\|c.jsonl | 2 | 6 | 0 | 0 | 0 | 12 | 80.0 % |" in text
    assert "15 rows from 11 rows in 2 sources; 93.3 % of them have an image." in text
    assert "| 20 x 20 | 1 | 33.3 % |" in text
    assert "broken. Of the others, 33.3 % landscape, 33.3 % square, 33.3 % portrait." in text
    assert "4 images, 1 missing and 0 broken." in text and "- gone.png: no such image" in text
    assert "36.4 % of the rows have keys that are not read:" in text
    shown = re.findall(r"!\[\w+\]\((\w+\.png)\)", text)
    assert shown == ["sources.png", "texts.png", "images.png", "positions.png"]
    for name in shown:
        image = Image.open(tmp_path / "out" / name).convert("RGB")
        assert image.width > 400 and len(image.getcolors(10**6)) > 30


def test_lengths_are_those_of_training(mix_known, models, folder, tmp_path):
    positions = mix_known()["positions"]
    samples = Samples("out/mix.json", str(folder), *models["v1.5-llama"], max_length=128)
    measured = [samples.measure(i) for i in range(len(samples))]
    lengths = [one.length + one.truncated for one in measured if hasattr(one, "length")]
    assert positions["positions"]["max"] == max(lengths) and positions["measured"] == 15
    assert positions["truncated"] == sum(length > 128 for length in lengths)
    assert positions["without_answer"] == 15 - len(lengths)
    rows = [samples.load(one) for one in measured]
    trained = sum(int((row.labels[1:] != IGNORE).sum()) for row in rows)
    assert positions["labels"] - positions["labels_truncated"] == trained
    assert positions["longest"][0]["id"] == "long" and positions["labels_truncated"] > 4000
    assert "are longer than --max-length 128 and are truncated" in (tmp_path / "out/report.md").read_text()


def test_a_sample_of_a_large_mix_is_measured(write_rows, monkeypatch):
    monkeypatch.setattr(mix_lengths, "MAX_MEASURED", 5)
    write_rows("a.jsonl", [row(i) for i in range(21)])
    files = [mix_files.measure_file("a.jsonl")]
    mixed = mix_rows.choose(mixture.read_parts("a.jsonl"), files, None, 0)
    args = mix.parser().parse_args(["--data", "a.jsonl", "--checkpoint", CHECKPOINT])
    assert mix_lengths.measure_lengths(mixed, mix_lengths.open_model(args)).rows.tolist() == [0, 5, 10, 15, 20]
    plain = ["--data", "a.jsonl", "--checkpoint", CHECKPOINT, "--preset", "v1.5-pretrain"]
    model = mix_lengths.open_model(mix.parser().parse_args(plain))
    assert (model.template, model.max_length) == ("plain", PRESETS["v1.5-pretrain"].max_length)
    lengths = mix_lengths.measure_lengths(mixed, model)
    assert (len(lengths.rows), lengths.unfit) == (0, 5)  # it needs an image
    text = mix_report.render(mix_report.summarize(mixed, lengths), [])
    assert text.endswith("## Positions\n\n5 rows cannot be used with the template plain.\n")


def test_the_plots_show_the_counts(write_rows, folder):
    write_rows("a.jsonl", [row(i, f"{i}.png") for i in range(6)] + ["x", row("t")])
    files = [mix_files.measure_file("a.jsonl")]
    images = mix_images.check_images(files, ImageFolder(folder), decode=False)
    mixed = mix_rows.choose(mixture.read_parts("a.jsonl=2"), files, images, 0)
    sources = mix_plots.draw_sources(mixed).axes[0]
    bars = {bar.get_label(): [patch.get_width() for patch in bar] for bar in sources.containers}
    assert bars == {"text only": [2], "short answers": [12], "left out": [1]}
    questions, characters = mix_plots.draw_texts(mixed).axes
    assert [patch.get_height() for patch in questions.patches] == [14]
    plane, ratio, _ = mix_plots.draw_images(images.sizes.astype(np.int64)).axes
    assert sum(patch.get_height() for patch in ratio.patches) == 6 and plane.get_xlabel() == "width"
    assert len(characters.patches) == 2


def test_only_the_report(write_rows, run_cli, run_mix, tmp_path):
    write_rows("a.jsonl", [row(0), row(1), "{"])
    before = set(tmp_path.iterdir())
    status, out, err = run_cli(mix.main, "--data", "a.jsonl", "--report-only")
    assert (status, err) == (0, "") and set(tmp_path.iterdir()) == before
    assert out.startswith("# Data\n\n## Sources\n") and "| a.jsonl | 1 | 3 | 1 | 0 | 0 | 2 | 100.0 % |" in out
    assert "](" not in out and "Not checked: --image-folder was not given." in out
    _, rows, listed, _ = run_mix("--data", "a.jsonl", "--report-only")
    assert rows is None and len(listed) == 1
    assert "## Kinds" in (tmp_path / "out/report.md").read_text()


def test_a_report_of_nothing(write_rows, run_cli, run_mix):
    """What is in the data is of most interest if none of it can be used."""
    write_rows("a.jsonl", ["{", "[]"])
    status, out, err = run_cli(mix.main, "--data", "a.jsonl", "--report-only", "--image-folder", ".")
    assert status == 0 and err == "warning: a.jsonl: all of its rows are left out\n"
    assert "0 rows from 2 rows in 1 source; - of them have an image." in out and "| not a JSON object | 1 |" in out
    assert run_mix("--data", "a.jsonl", "--report-only", plots=True)[1] is None


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data", "a.jsonl"], "give --output DIR for the mix, or --report-only"),
        (["--data", "none", "--output", "out"], "none: cannot be read (No such file or directory)"),
        (["--data", "a.jsonl=0", "--output", "out"], "--data a.jsonl=0: the weight after = must be a number above 0"),
        (["--data", "full", "--output", "out"], "--data full: is a prepared dataset; mix the data file"),
        (["--data", "pipe", "--output", "out"], "pipe: a pipe, not a file"),
        (["--data", "bad.jsonl", "--output", "out"], "nothing is left of the data; the first: bad.jsonl row 0: not"),
        (["--data", "a.jsonl", "--output", "full"], "--output full: is not empty; give a new directory"),
        (["--data", "a.jsonl", "--output", "gs://b/x"], "--output gs://b/x: must be a local directory"),
        (["--data", "a.jsonl", "--output", "out", "--decode"], "--decode: needs --image-folder"),
        (["--data", "a.jsonl", "--output", "out", "--max-length", "9"], "--max-length: needs --checkpoint"),
        (["--data", "a.jsonl", "--output", "out", "--preset", "v1-finetune"], "--preset: needs --checkpoint"),
        (["--data", "a.jsonl", "--output", "out", "--image-folder", "none"], "--image-folder none: no such directory"),
        (["--data", "a.jsonl", "--report-only", "--checkpoint", "none"], "none: "),
        (["--data", "a.jsonl", "--report-only", "--checkpoint", str(GOLDEN / "checkpoints/v1.6-mistral")],
         "--checkpoint: the sizes of images determine their tiles; give --image-folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_mixed_is_one_line(write_rows, run_cli, tmp_path, flags, says):
    write_rows("a.jsonl", [row(0)])
    write_rows("bad.jsonl", ["{"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").touch()
    os.mkfifo(tmp_path / "pipe")
    before = set(tmp_path.rglob("*"))
    status, out, err = run_cli(mix.main, *flags)
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert (status, out, len(lines)) == (1, "", 1) and lines[0].startswith(f"error: {says}"), err
    assert set(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(write_rows, run_cli, tmp_path):
    write_rows("a.jsonl", [row(i) for i in range(300)])
    with files_of_at_most(20_000):
        status, _, err = run_cli(mix.main, "--data", "a.jsonl", "--output", "out")
    assert (status, err) == (1, "error: out: cannot be written (File too large)\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_without_matplotlib(write_rows, run_cli, monkeypatch, tmp_path):
    write_rows("a.jsonl", [row(0)])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = run_cli(mix.main, "--data", "a.jsonl", "--output", "out")
    assert (status, err) == (1, "error: plots need matplotlib: pip install 'llava-jax[plots]'\n")
    assert run_cli(mix.main, "--data", "a.jsonl", "--report-only")[0] == 0  # which draws nothing


def test_tables_are_markdown():
    assert mix_report.table(("a", "b"), [("x|y\n", 1234), ("z", 0.5)]) == [
        "| a | b |", "| --- | ---: |", "| x\\|y  | 1,234 |", "| z | 0.5 |", ""
    ]  # fmt: skip
