"""A file of conversations as one more benchmark."""

import json

import pytest
from choice_miniatures import answers_of, write_image

from infer.benchmarks.benchmark import REFERENCE, Answer
from infer.benchmarks.conversations import Conversations
from llava_jax.console import InputError


def row(*said, **more) -> dict:
    return {
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)], **more
    }  # fmt: skip


@pytest.fixture
def open_file(tmp_path):
    def open_file(*rows, metric=None):
        write_image(tmp_path / "images/a.png", 0)
        (tmp_path / "test.json").write_text(json.dumps(rows))
        return Conversations(tmp_path / "test.json", tmp_path / "images", metric)

    return open_file


def test_exact_match_by_kind(open_file, tmp_path):
    benchmark = open_file(
        row("<image>\na?", "1", "b?", "Red.", image="a.png", kinds=["number", "color"]),
        row("c?", "2", kinds=["number"]),
        {"video": "x"},
    )
    questions = benchmark.questions(tmp_path, REFERENCE)
    assert [(one.id, one.prompt, one.kind) for one in questions] == [
        ("0/1", "<image>\na?", "number"), ("0/2", "b?", "color"), ("1/1", "c?", "number"), ("2/1", "", "all"),
    ]  # fmt: skip
    assert questions[1].turns == ("<image>\na?", "1", "b?")
    assert "test.json row 2: video: " in questions[3].problem
    score = benchmark.score(tmp_path, answers_of(benchmark, tmp_path, ["1", " red", "3", ""])[:3], REFERENCE)
    assert (score.value, score.unanswered, score.totals) == (0.5, 1, {"accuracy": 0.5})
    assert [mark.score for mark in score.marks] == [1, 1, 0, 0]
    assert score.marks[1].read == "red"
    assert score.parts == {
        "number": {"accuracy": 0.5, "questions": 2}, "color": {"accuracy": 1.0, "questions": 1},
        "all": {"accuracy": 0.0, "questions": 1},
    }  # fmt: skip


def test_no_answer_is_not_an_empty_answer(open_file, tmp_path):
    benchmark = open_file(row("a?", "", "b?", "x"), metric="exact_match")
    assert benchmark.score(tmp_path, [Answer("0/1", "a?", "")], REFERENCE).value == 0.5
    assert benchmark.score(tmp_path, [], REFERENCE).value == 0.0


def test_scienceqa_is_chosen_where_all_answers_name_an_option(open_file, tmp_path, capsys):
    rows = [row("<image>a?", "It is. The answer is B.", image="a.png"), row("b?", "The answer is A.")]
    benchmark = open_file(*rows)
    answers = answers_of(benchmark, tmp_path, ["B", "I see"])
    score = benchmark.score(tmp_path, answers, REFERENCE)
    assert (benchmark.metric, score.value) == ("scienceqa", 0.5)
    assert score.totals == {"accuracy": 0.5, "accuracy with images": 1.0}
    assert [mark.read for mark in score.marks] == ["B", ""]
    assert capsys.readouterr().err.count("metric scienceqa, since") == 1
    assert open_file(*rows, metric="exact_match").score(tmp_path, answers, REFERENCE).value == 0.0


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([Answer("7/1", "", "x", line=2)], "answers line 2: the benchmark has no question .7/1"),
        (
            [Answer("0/1", "", "x", line=2)] * 2,
            "answers line 2: a second answer to question .0/1., which line 2 answers",
        ),
    ],
)
def test_answers_to_no_question(open_file, tmp_path, answers, says):
    with pytest.raises(InputError, match=says):
        open_file(row("a?", "1")).score(tmp_path, answers, REFERENCE)


def test_a_file_without_a_valid_row(open_file, tmp_path):
    with pytest.raises(InputError, match=r"test.json row 0: .* \(2 rows, and none can be asked\)"):
        open_file({"id": 1}, {"id": 2}).questions(tmp_path, REFERENCE)
