"""`python -m infer.evaluate --data`: conversations, which answers count as right, and how they are counted."""

import base64
import gzip
import json
import shutil

import pytest

from helpers import GOLDEN, QUESTION, golden_engine, turns
from infer import benchmark_run, evaluate
from infer.benchmarks.conversations import Conversations, choose_metric, exact_match, read_questions, scienceqa
from infer.benchmarks.options import read_option
from scripted_answers import ScriptedEngine

CHECKPOINT = GOLDEN / "checkpoints/v1.6-mistral"
IMAGE_FILES = ["0_64x48.png", "3_90x30.png"]


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDEN / "images", tmp_path / "images")
    return tmp_path


def row(said, kinds=None, image=None) -> dict:
    return {"conversations": turns(*said)} | ({"kinds": kinds} if kinds else {}) | ({"image": image} if image else {})


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
    write(folder, [row(turns, ["x", "y"], IMAGE_FILES[0]), row(["c?", "3"])])
    first, second, third = read_questions(folder / "test.json", folder / "images")
    image_file = str(folder / "images" / IMAGE_FILES[0])
    assert (first.turns, first.answer, first.kind, first.images) == (("<image>\na?",), "1", "x", (image_file,))
    assert (second.turns, second.answer, second.kind, second.images) == (tuple(turns[:3]), "2", "y", (image_file,))
    assert (third.turns, third.answer, third.kind, third.images) == (("c?",), "3", "all", ())


def test_an_image_comes_with_the_turn_that_shows_it(folder):
    turns = ["hi", "hello", "b?\n<image>", "2"]
    write(folder, "\n".join(map(json.dumps, [row(turns, image=IMAGE_FILES[0]), row(["a?", "1"], image=IMAGE_FILES)])))
    first, second, third = read_questions(folder / "test.json", folder / "images")
    assert first.images == ()
    assert len(second.images) == 1 and second.turns[-1] == "<image>\nb?"  # in front, as in training
    assert len(third.images) == 2


def test_accuracy_by_kind(run, folder):
    """Right answers are the model's own; one of them is wrong, one is in other letters."""
    engine = golden_engine("v1.6-mistral")
    image_files = [folder / "images" / name for name in IMAGE_FILES]
    one = engine.ask(QUESTION, image_files[0], max_new_tokens=4).text
    two = engine.ask("<image> or <image>?", image_files, max_new_tokens=4).text
    later = engine.ask([QUESTION, one, "And now?"], image_files[0], max_new_tokens=4).text
    none = engine.ask("Hello", max_new_tokens=4).text
    rows = [
        row([f"<image>\n{QUESTION}", one, "And now?", later.upper() + "."], ["first", "later"], IMAGE_FILES[0]),
        row([f"<image>\n{QUESTION}", one + " not"], ["first"], IMAGE_FILES[0]),
        row(["<image> or <image>?", two], ["two"], IMAGE_FILES),
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
    (folder / "images" / IMAGE_FILES[0]).write_bytes(b"no picture")
    rows = [row(["Hello", none]), row(["<image>\nHello", none], image=IMAGE_FILES[0])]
    status, out, err = run(*write(folder, rows))
    assert (status, out.split()) == (1, ["all", "50.00%", "of", "2"])
    assert f"{IMAGE_FILES[0]}: not an image" in err
    assert err.splitlines()[-1] == "error: conversations: 1 of 2 questions could not be asked, counted as wrong"


@pytest.mark.parametrize(
    ("answers", "says"), [(["?"], "1 answer"), (["?", "A"], "1 answer"), (["?", "?"], "2 answers")]
)
def test_what_counts_as_wrong_is_said_of_one_and_of_several(run, folder, monkeypatch, answers, says):
    engine = ScriptedEngine(lambda question: answers[int(question)])
    monkeypatch.setattr(benchmark_run, "load_engine", lambda args: engine)
    rows = [row([str(i), "The answer is B."]) for i in range(len(answers))]
    status, out, err = run(*write(folder, [*rows, {}]), "--json", "--metric", "scienceqa")
    assert json.loads(out)["no_option"] == int(says[0])
    asked = f"error: conversations: 1 of {len(answers) + 1} questions could not be asked, counted as wrong"
    assert (status, err.splitlines()[-2:]) == (1, [asked, f"{says} without a single option, counted as wrong"])


def test_rows_are_asked_as_training_reads_them(folder):
    """An answer that comes first is left out, so is a question that comes last; marks of one image become one; other
    formats and system messages."""
    data = "data:image/png;base64," + base64.b64encode((folder / "images" / IMAGE_FILES[0]).read_bytes()).decode()
    said = row(["Hello", "a?", "1", "b?", "2", "Thanks!"])["conversations"]
    for turn, speaker in zip(said, ["gpt", "human"] * 3, strict=True):
        turn["from"] = speaker
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "c?"}, {"type": "image", "image": data}]},
        {"role": "assistant", "content": "3"},
    ]
    absolute = str(folder / "images" / IMAGE_FILES[0])
    rows = [
        {"conversations": said, "kinds": ["x", "y", "z"]},
        {"messages": messages},
        row(["<image>d?<image>", "4"], image=f"file://{absolute}") | {"system": "Be kind."},
        row(["e?", "5"], image=[absolute, IMAGE_FILES[1]]),
    ]
    write(folder, rows)
    a, b, c, d, e = read_questions(folder / "test.json", folder / "images")
    assert [(one.turns, one.answer, one.kind) for one in (a, b)] == [(("a?",), "1", "x"), (("a?", "1", "b?"), "2", "y")]
    assert (c.turns, c.answer, c.system) == (("<image>\nc?",), "3", "Be brief.")
    assert c.images == ((folder / "images" / IMAGE_FILES[0]).read_bytes(),)
    assert (d.turns, d.system, d.images) == (("<image>\nd?",), "Be kind.", (absolute,))
    assert e.images == (absolute, str(folder / "images" / IMAGE_FILES[1]))


def test_a_bad_row_fails_alone(run, folder):
    none = golden_engine("v1.6-mistral").ask("Hello", max_new_tokens=4).text
    brief = golden_engine("v1.6-mistral").ask("Hello", system="Be brief.", max_new_tokens=4).text
    rows = ["{", row(["Hello", none]), {"id": 3, "video": "a.mp4"}, row(["Hello", brief]) | {"system": "Be brief."}]
    data = write(folder, "\n".join(one if isinstance(one, str) else json.dumps(one) for one in rows))
    status, out, err = run(*data)
    assert (status, out.split()) == (1, ["all", "50.00%", "of", "4"])
    assert "row 0: not JSON" in err and "row 2: video: video is not supported" in err
    assert err.splitlines()[-1] == "error: conversations: 2 of 4 questions could not be asked, counted as wrong"


# ---------------------------------------------------------------- ScienceQA


def test_options_are_read_as_the_reference_reads_them():
    """All answers of a published model. Of one it names D where the question had two options; the script that scored
    them drew one at random then."""
    drawn = {"3247"}
    with gzip.open(GOLDEN / "evaluation/scienceqa.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 4241
    read = {row["question_id"]: read_option(row["text"]) for row in rows}
    assert {row["question_id"] for row in rows if read[row["question_id"]] != "ABCDE"[row["option"]]} == drawn
    assert read["3247"] == "D"


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("B", "B"), ("B. a cat", "B"), ("The answer is B.", "B"), ("Cats meow. The answer is C.\nBECAUSE: x", "C"),
        ("The answer is B, as cats meow", "B"), ("", None), ("b", None), ("B.", None), ("F", None), ("Bears", None),
        ("(B)", None), ("The answer is B", None), ("The answer is A. The answer is B.", None), ("AB", None),
        ("The answer is F.", "F"),
    ],
)  # fmt: skip
def test_option_of_an_answer(answer, option):
    assert read_option(answer) == option
    assert scienceqa(answer, "Dogs bark. The answer is B.") == (option == "B")
    assert scienceqa(answer, "B") == (option == "B")


def test_scienceqa_is_counted(run, folder, monkeypatch, capsys):
    """Of all questions, of those with images, and how many answers name no option."""
    said = ["Cats meow. The answer is B.", "B", "I do not know.", "A"]
    engine = ScriptedEngine(lambda question: said[int(question[-1])])
    monkeypatch.setattr(benchmark_run, "load_engine", lambda args: engine)
    rows = [row([f"{i}", "Because. The answer is B."], image=IMAGE_FILES[0] if i % 2 else None) for i in range(4)]
    rows[1]["conversations"][0]["value"] = "<image>\n1"
    rows.append(row(["Which?", "a cat"]))
    data = write(folder, rows)
    status, out, err = run(*data, "--metric", "scienceqa", "--json")
    got = json.loads(out)
    assert (got["accuracy"], got["questions"], got["failed"], got["no_option"]) == (0.4, 5, 1, 1)
    assert (status, got["totals"]["accuracy with images"]) == (1, 0.5)
    assert "row 4: the reference answer names no option, which --metric scienceqa needs" in err
    out = run(*data, "--metric", "scienceqa")[1]
    assert [line.split() for line in out.splitlines()] == [
        ["all", "40.00%", "of", "5"], ["accuracy", "with", "images", "50.00%"],
    ]  # fmt: skip
    questions = read_questions(folder / "test.json", folder / "images")
    assert choose_metric(questions) == "exact_match"  # one of them is "a cat"
    assert capsys.readouterr().err == ""
    assert choose_metric(questions[:4]) == "scienceqa"
    assert "metric scienceqa, since every reference answer names an option" in capsys.readouterr().err
    assert Conversations(folder / "test.json", folder / "images").metric == "exact_match"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("[", "not JSON"),
        ([], "has no conversations"),
        ("{", "row 0: not JSON"),
        ([row(["a?"])], "row 0: no answer"),
        ([{"conversations": [{"from": "human", "value": "a"}] * 2}], "row 0: speakers must take turns"),
        ([{"conversations": [{"from": "system", "value": "a"}]}], "row 0: no answer"),
        (
            [{"id": 2}, {"id": 3}],
            "row 0: conversations must be a list of turns; the row has neither it nor messages (2 ",
        ),
        ([row(["<image>a?", "1"])], "row 0: 1 <image> tokens for 0 images"),
        ([row(["a?", "1 <image>"], image="a.png")], "row 0: an answer has an <image> token"),
        (
            [row(["<image>a?", "1"], image="http://x/a.png")],
            "row 0: http://x/a.png: images in data files are not downloaded",
        ),
        ([row(["<image>a?", "1"], image="/etc/passwd")], "row 0: /etc/passwd: is outside the image folder"),
        ([row(["a?", "1"], ["x", "y"])], "row 0: kinds must list 1 kind, one per question"),
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
