"""`python -m infer.evaluate`: which answers count as right, and how they are counted."""

import json
import shutil

import pytest
from conftest import GOLDEN, QUESTION, golden_engine

from infer import evaluate
from infer.evaluate import exact_match, read_questions

CHECKPOINT = GOLDEN / "checkpoints/v1.6-mistral"
PICTURES = ["0_64x48.png", "3_90x30.png"]


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDEN / "images", tmp_path / "images")
    return tmp_path


def row(turns, kinds=None, image=None) -> dict:
    said = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"conversations": said} | ({"kinds": kinds} if kinds else {}) | ({"image": image} if image else {})


def write(folder, rows):
    (folder / "test.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return "--data", folder / "test.json", "--image-folder", folder / "images"


@pytest.fixture
def run(run_cli):
    def run(*args):
        flags = ("--checkpoint", CHECKPOINT, "--max-new-tokens", "4", "--batch-size", "4", "--mesh", "tensor=8")
        return run_cli(evaluate.main, *flags, *args)

    return run


@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [("2", "2", 1), (" Red Circle.", "red circle", 1), ("yes", "no", 0), ("", "no", 0), ("12", "2", 0)],
)
def test_exact_match(answer, right, score):
    assert exact_match(answer, right) == score


def test_questions_come_with_what_was_said_before(folder):
    turns = ["<image>\na?", "1", "b?", "2"]
    write(folder, [row(turns, ["x", "y"], PICTURES[0]), row(["c?", "3"])])
    first, second, third = read_questions(folder / "test.json", folder / "images")
    picture = str(folder / "images" / PICTURES[0])
    assert (first.turns, first.answer, first.kind, first.images) == (("<image>\na?",), "1", "x", (picture,))
    assert (second.turns, second.answer, second.kind, second.images) == (tuple(turns[:3]), "2", "y", (picture,))
    assert (third.turns, third.answer, third.kind, third.images) == (("c?",), "3", "all", ())


def test_a_picture_comes_with_the_turn_that_shows_it(folder):
    turns = ["hi", "hello", "b?\n<image>", "2"]
    write(folder, "\n".join(map(json.dumps, [row(turns, image=PICTURES[0]), row(["a?", "1"], image=PICTURES)])))
    first, second, third = read_questions(folder / "test.json", folder / "images")
    assert first.images == ()
    assert len(second.images) == 1 and second.turns[-1] == "<image>\nb?"  # in front, as in training
    assert len(third.images) == 2


def test_accuracy_by_kind(run, folder):
    """Right answers are the model's own; one of them is told wrong, one is in other letters."""
    engine = golden_engine("v1.6-mistral")
    pictures = [folder / "images" / name for name in PICTURES]
    one = engine.ask(QUESTION, pictures[0], max_new_tokens=4).text
    two = engine.ask("<image> or <image>?", pictures, max_new_tokens=4).text
    later = engine.ask([QUESTION, one, "And now?"], pictures[0], max_new_tokens=4).text
    none = engine.ask("Hello", max_new_tokens=4).text
    rows = [
        row([f"<image>\n{QUESTION}", one, "And now?", later.upper() + "."], ["first", "later"], PICTURES[0]),
        row([f"<image>\n{QUESTION}", one + " not"], ["first"], PICTURES[0]),
        row(["<image> or <image>?", two], ["two"], PICTURES),
        row(["Hello", none], ["none"]),
    ]
    status, out, err = run(*write(folder, rows), "--json")
    assert status == 0, err
    got = json.loads(out)
    assert (got["accuracy"], got["questions"], got["failed"]) == (0.8, 5, 0)
    assert {kind: (part["accuracy"], part["questions"]) for kind, part in got["by_kind"].items()} == {
        "first": (0.5, 2), "later": (1.0, 1), "two": (1.0, 1), "none": (1.0, 1),
    }  # fmt: skip
    status, out, _ = run(*write(folder, rows))
    assert [line.split() for line in out.splitlines()] == [
        ["first", "50.00%", "of", "2"],
        ["later", "100.00%", "of", "1"],
        ["two", "100.00%", "of", "1"],
        ["none", "100.00%", "of", "1"],
        ["all", "80.00%", "of", "5"],
    ]


def test_a_question_that_cannot_be_asked_is_named_and_counts_as_wrong(run, folder):
    none = golden_engine("v1.6-mistral").ask("Hello", max_new_tokens=4).text
    (folder / "images" / PICTURES[0]).write_bytes(b"no picture")
    rows = [row(["Hello", none]), row(["<image>\nHello", none], image=PICTURES[0])]
    status, out, err = run(*write(folder, rows))
    assert (status, out.split()) == (1, ["all", "50.00%", "of", "2"])
    assert f"{PICTURES[0]}: not an image" in err
    assert err.splitlines()[-1] == "error: 1 of 2 questions could not be asked; they count as wrong"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("[", "not JSON"),
        ([], "no conversations in it"),
        ("{", "row 0: not JSON"),
        ([row(["a?"])], "row 0: speakers must take turns"),
        ([row(["a?", "1"]), {"id": 3}], "row 1: conversations must be a list"),
        ([row(["a?", "1"], ["x", "y"])], "row 0: kinds must name one kind for each of the 1 questions"),
        ([row(["a?", 1])], "row 0: each turn of conversations must have from and value, both text"),
    ],
)
def test_bad_files_are_one_line(run, folder, rows, says):
    status, out, err = run(*write(folder, rows))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert says in err


def test_missing_files_are_one_line(run, folder):
    for flags in (("--data", folder / "none.json"), ("--image-folder", folder / "none"), ("--batch-size", "0")):
        status, out, err = run(*write(folder, [row(["a?", "1"])]), *flags)
        assert (status, out, err.count("\n")) == (1, "", 1), err
