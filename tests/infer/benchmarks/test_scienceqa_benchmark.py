"""ScienceQA as a benchmark: prompts, and scores as the reference's and ScienceQA's own scripts give them."""

import gzip
import json
from pathlib import Path

import pytest
from choice_miniatures import DAMAGE, answers_of, assert_named, write_json, write_scienceqa

from infer.benchmarks.benchmark import REFERENCE, Answer
from infer.benchmarks.scienceqa import ScienceQA, ScienceQAImages
from llava_jax.console import InputError

GOLDEN = Path(__file__).parents[2] / "golden/evaluation"
SUFFIX = "Answer with the option's letter from the given choices directly."
TEXTS = ["A", "B. a blue square", "The answer is A.", "C", "E", "B", "", "I think B", "A", "B"]
RIGHT = [1, 1, 1, 0, 0, 1, 0, 0, 1, 1]  # to i: i % 2, of i % 4 + 2 choices


@pytest.fixture
def directory(tmp_path):
    return write_scienceqa(tmp_path / "scienceqa")


def test_questions_are_worded_as_the_reference_words_them(directory):
    first, second, *_ = questions = ScienceQA().questions(directory, REFERENCE)
    assert len(questions) == 10
    options = "Options: (A) a red circle (B) a blue square"
    asked = f"<image>\nContext: Hint 0.\nQuestion: Which one is number 0?\n{options}\n{SUFFIX}"
    assert (first.id, first.turns, first.prompt) == ("1", (asked,), asked)
    assert first.images == (str(directory / "images/test/1/image.png"),)
    asked = f"Context: N/A\nQuestion: Which one is number 1?\n{options} (C) a green triangle\n{SUFFIX}"
    assert (second.id, second.turns, second.prompt, second.images) == ("2", (asked,), asked, ())
    assert (second.answer, second.kind) == ("B. a blue square", "social science")


def test_the_question_file_of_the_reference_comes_first(directory):
    rows = [{"id": "3", "image": "3/image.png", "conversations": [{"from": "human", "value": "Which?\n<image>"}]}]
    rows.append({"id": "2", "conversations": [{"from": "human", "value": " Why? "}]})
    write_json(directory / "llava_test_CQM-A.json", rows)
    three, two = ScienceQA().questions(directory, REFERENCE)
    assert (three.id, three.prompt, two.prompt) == ("3", f"<image>\nWhich?\n{SUFFIX}", f"Why?\n{SUFFIX}")
    assert three.images == (str(directory / "images/test/3/image.png"),)
    for wrong, says in [
        ([{"id": "99", "conversations": [{"value": "?"}]}], "question 99 is not in the split test"),
        ([rows[0]] * 2, "question 3 is there twice"),
        ([{"id": "3", "conversations": []}], "expected a list of length >= 1"),
    ]:
        write_json(directory / "llava_test_CQM-A.json", wrong)
        with pytest.raises(InputError, match=f"llava_test_CQM-A.json.*{says}"):
            ScienceQA().questions(directory, REFERENCE)


def test_an_image_outside_the_folder_is_an_error(directory):
    rows = [{"id": "3", "image": "../3.png", "conversations": [{"value": "Which?\n<image>"}]}]
    write_json(directory / "llava_test_CQM-A.json", rows)
    with pytest.raises(InputError, match=r"CQM-A.json: question 3: image ../3.png is outside the image folder"):
        ScienceQA().questions(directory, REFERENCE)


def test_scores(directory):
    score = ScienceQA().score(directory, answers_of(ScienceQA(), directory, TEXTS), REFERENCE)
    assert [mark.score for mark in score.marks] == RIGHT
    assert [mark.read for mark in score.marks] == ["A", "B", "A", "C", "E", "B", "", "", "A", "B"]
    assert (score.metric, score.value, score.unanswered) == ("accuracy", 0.6, 0)
    assert score.totals == {"accuracy": 0.6, "IMG accuracy": 0.6}  # 0, 2 and 8 of 0, 2, 4, 6, 8
    assert score.parts == {
        "NAT": {"accuracy": 0.5, "questions": 4}, "SOC": {"accuracy": 1 / 3, "questions": 3},
        "LAN": {"accuracy": 1.0, "questions": 3}, "TXT": {"accuracy": 0.5, "questions": 4},
        "IMG": {"accuracy": 0.6, "questions": 5}, "NO": {"accuracy": 2 / 3, "questions": 3},
        "G1-6": {"accuracy": 4 / 6, "questions": 6}, "G7-12": {"accuracy": 0.5, "questions": 4},
    }  # fmt: skip


def test_an_unanswered_question_is_wrong_and_counts_as_one_without_an_image(directory):
    answers = answers_of(ScienceQA(), directory, TEXTS)[1:]
    score = ScienceQA().score(directory, answers, REFERENCE)
    assert (score.value, score.totals["IMG accuracy"], score.unanswered) == (0.5, 0.5, 1)
    prompts = [Answer(answer.id, answer.prompt.removeprefix("<image>\n"), answer.text) for answer in answers]
    assert ScienceQA().score(directory, prompts, REFERENCE).totals == {"accuracy": 0.5}


def test_only_questions_with_an_image(directory, capsys):
    questions = ScienceQAImages().questions(directory, REFERENCE)
    assert [question.id for question in questions] == ["1", "3", "5", "7", "9"]
    score = ScienceQAImages().score(directory, answers_of(ScienceQA(), directory, TEXTS), REFERENCE)
    assert (score.value, len(score.marks)) == (0.6, 5)
    assert capsys.readouterr().err == "5 answers not scored: to questions without an image\n"
    score = ScienceQAImages().score(directory, answers_of(ScienceQAImages(), directory, "AAEBA")[1:], REFERENCE)
    assert (score.value, score.unanswered, capsys.readouterr().err) == (0.4, 1, "")


def test_published_answers(tmp_path):
    """Where all questions have five choices, what the reference read out of each answer is right: all but one answer,
    for which it drew one of two options at random."""
    with gzip.open(GOLDEN / "scienceqa.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    problems = {row["question_id"]: {"choices": list("ABCDE"), "answer": row["option"]} for row in rows}
    write_json(tmp_path / "problems.json", problems)
    write_json(tmp_path / "pid_splits.json", {"test": [*problems]})
    score = ScienceQA().score(tmp_path, [Answer(row["question_id"], "", row["text"]) for row in rows], REFERENCE)
    assert [mark.question for mark in score.marks if not mark.score] == ["3247"]
    assert (score.value, score.parts.keys()) == (4240 / 4241, {"NO"})


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([Answer("77", "", "A", line=3)], "answers line 3: the benchmark has no question .77"),
        ([Answer("1", "", "A", line=1), Answer(1, "", "B", line=2)], "answers line 2: a second answer to question 1"),
    ],
)
def test_answers_to_no_question(directory, answers, says):
    with pytest.raises(InputError, match=says):
        ScienceQA().score(directory, answers, REFERENCE)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["problems.json", "pid_splits.json", "llava_test_CQM-A.json"])
def test_damaged_files(directory, name, damage):
    optional = name.startswith("llava")
    if optional and damage == "missing":
        return
    reads = [lambda: ScienceQA().questions(directory, REFERENCE)]
    reads += [] if optional else [lambda: ScienceQA().score(directory, [], REFERENCE)]
    assert_named(directory / name, damage, *reads)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answer": 2}, "problem 1: answer 2 is not one of its 2 choices"),
        ({"answer": -1}, "problem 1: answer -1 is not one"),
        ({"answer": "0"}, "problem 1: answer: expected an integer, got a string"),
        ({"answer": True}, "problem 1: answer: expected an integer, got a boolean"),
        ({"choices": []}, "problem 1: choices: "),
        ({"choices": ["a"] * 6}, "problem 1: choices: "),
        ({"choices": "ab"}, "problem 1: choices: expected a list"),
        ({"image": 3}, "problem 1: image: expected a string or null"),
    ],
)
def test_problems_that_are_none(directory, change, says):
    problems = json.loads((directory / "problems.json").read_text())
    problems["1"] |= change
    write_json(directory / "problems.json", problems)
    for read in (ScienceQA().questions, lambda where, protocol: ScienceQA().score(where, [], protocol)):
        with pytest.raises(InputError, match=f"problems.json: {says}"):
            read(directory, REFERENCE)


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        ({"train": ["1"]}, "has no split test, only train"), ({"test": []}, "test is empty"),
        ({"test": ["1", "1"]}, "problem 1 is in test twice"), ({"test": [1]}, "expected a string"),
        ({"test": ["1", "12"]}, "problem 12 is missing"),
    ],
)  # fmt: skip
def test_splits_that_are_none(directory, splits, says):
    write_json(directory / "pid_splits.json", splits)
    with pytest.raises(InputError, match=says):
        ScienceQA().score(directory, [], REFERENCE)


def test_files_with_a_byte_order_mark_and_crlf(directory):
    for name in ("problems.json", "pid_splits.json"):
        data = json.dumps(json.loads((directory / name).read_text()), indent=1).replace("\n", "\r\n")
        (directory / name).write_bytes(b"\xef\xbb\xbf" + data.encode())
    assert len(ScienceQA().questions(directory, REFERENCE)) == 10
