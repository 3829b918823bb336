"""SEED-Bench: by type and kind of data, by the two protocols, and the file to submit."""

import json

import pytest
from choice_miniatures import DAMAGE, answers_of, assert_named, write_json, write_lines, write_seed

from infer.benchmarks.benchmark import LMMS_EVAL, REFERENCE, Answer
from infer.benchmarks.seed import SeedBench, SeedImage
from llava_jax.console import InputError

TEXTS = ["A", "B.", "C. a green triangle", "D", "A ", "b", "", "D", "A", "A"]  # right: ABCDABCDAB
RIGHT = [1, 0, 0, 1, 0, 0, 0, 1, 1, 0]
RIGHT_FIRST = [1, 1, 1, 1, 1, 1, 0, 1, 1, 0]


@pytest.fixture
def directory(tmp_path):
    return write_seed(tmp_path / "seed_bench")


def test_questions_come_from_the_reference_file(directory):
    questions = SeedBench().questions(directory, REFERENCE)
    assert [question.id for question in questions] == [*range(100, 110)]
    first, last = questions[0], questions[-1]
    assert first.prompt.startswith("What is in image 0?\nA. a red circle\nB. a blue square\n")
    assert first.turns == (f"<image>\n{first.prompt}",)
    assert first.images == (str(directory / "SEED-Bench-image/0_x"),)
    assert (first.kind, first.answer) == ("Scene Understanding", "A")
    assert (last.kind, last.images) == ("Action Recognition", (str(directory / "SEED-Bench-video-image/9_x"),))
    assert SeedBench.max_new_tokens == 128


def test_the_reference_wants_the_letter_itself(directory):
    score = SeedBench().score(directory, answers_of(SeedBench(), directory, TEXTS), REFERENCE)
    assert [mark.score for mark in score.marks] == RIGHT
    assert [mark.read for mark in score.marks] == ["A", "", "", "D", "", "", "", "D", "A", "A"]
    assert (score.value, score.unanswered) == (0.4, 0)
    assert score.totals == {"accuracy": 0.4, "image accuracy": 2 / 7, "video accuracy": 2 / 3}
    assert score.parts == {
        "Scene Understanding": {"accuracy": 1 / 4, "questions": 4},
        "Instance Counting": {"accuracy": 1 / 3, "questions": 3},
        "Action Recognition": {"accuracy": 2 / 3, "questions": 3},
        "image": {"accuracy": 2 / 7, "questions": 7},
        "video": {"accuracy": 2 / 3, "questions": 3},
    }


def test_lmms_eval_reads_the_first_character(directory):
    score = SeedBench().score(directory, answers_of(SeedBench(), directory, TEXTS), LMMS_EVAL)
    assert [mark.score for mark in score.marks] == RIGHT_FIRST
    assert (score.protocol, score.value) == (LMMS_EVAL, 0.8)


def test_unanswered_questions_are_wrong(directory):
    score = SeedBench().score(directory, answers_of(SeedBench(), directory, TEXTS)[1:], REFERENCE)
    assert (score.value, score.unanswered, len(score.marks)) == (0.3, 1, 10)


def test_only_questions_about_images(directory, capsys):
    assert len(SeedImage().questions(directory, REFERENCE)) == 7
    score = SeedImage().score(directory, answers_of(SeedBench(), directory, TEXTS), REFERENCE)
    assert (score.value, score.totals, len(score.marks)) == (2 / 7, {"accuracy": 2 / 7}, 7)
    assert score.parts.keys() == {"Scene Understanding", "Instance Counting"}
    assert capsys.readouterr().err == "3 answers not scored: not to questions about images\n"
    assert SeedImage().score(directory, answers_of(SeedImage(), directory, TEXTS[:7]), REFERENCE).value == 2 / 7
    assert capsys.readouterr().err == ""
    assert SeedImage().submission(directory, []) is None


def test_the_submission_has_a_line_for_each_question(directory):
    submission = SeedBench().submission(directory, answers_of(SeedBench(), directory, TEXTS)[1:])
    rows = [json.loads(line) for line in submission.data.decode().splitlines()]
    assert rows == [
        {"question_id": str(100 + i), "prediction": text} for i, text in enumerate(["", *TEXTS[1:]])
    ]  # the ids as SEED-Bench.json has them
    assert [*rows[0]] == ["question_id", "prediction"]


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([Answer(7, "", "A", line=2)], "answers line 2: the benchmark has no question 7"),
        (
            [Answer(100, "", "A", line=1), Answer("100", "", "A", line=2)],
            "answers line 2: a second answer to question .100",
        ),
    ],
)
def test_answers_to_no_question(directory, answers, says):
    with pytest.raises(InputError, match=says):
        SeedBench().score(directory, answers, REFERENCE)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["SEED-Bench.json", "llava-seed-bench.jsonl"])
def test_damaged_files(directory, name, damage):
    reads = [lambda: SeedBench().questions(directory, REFERENCE)]
    if name == "SEED-Bench.json":
        reads.append(lambda: SeedBench().score(directory, [], REFERENCE))
    assert_named(directory / name, damage, *reads)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answer": "E"}, "questions\\[1\\].answer: invalid enum value"),
        ({"answer": 1}, "answer: expected a string, got an integer"),
        ({"data_type": "sound"}, "questions\\[1\\].data_type: invalid enum value"),
        ({"question_type_id": 4}, "question 101: question_type_id 4 is not in question_type"),
        ({"question_id": "100"}, "question 100 is there twice"),
        ({"question_id": None}, "question_id: expected"),
    ],
)
def test_annotations_that_are_none(directory, change, says):
    contents = json.loads((directory / "SEED-Bench.json").read_text())
    contents["questions"][1] |= change
    write_json(directory / "SEED-Bench.json", contents)
    with pytest.raises(InputError, match=f"SEED-Bench.json: .*{says}"):
        SeedBench().score(directory, [], REFERENCE)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"question_id": 1, "image": "a", "text": "?"}], "line 1: question 1 is not in SEED-Bench.json"),
        ([{"question_id": 100, "image": "a", "text": "?"}] * 2, "line 2: question 100 is already on line 1"),
        ([{"question_id": 100, "text": "?"}], "line 1: image is missing"),
    ],
)
def test_question_files_that_are_none(directory, rows, says):
    write_lines(directory / "llava-seed-bench.jsonl", rows)
    with pytest.raises(InputError, match=f"llava-seed-bench.jsonl:? {says}"):
        SeedBench().questions(directory, REFERENCE)


def test_a_truncated_last_line_is_named(directory):
    path = directory / "llava-seed-bench.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="llava-seed-bench.jsonl line 10: not JSON"):
        SeedBench().questions(directory, REFERENCE)
