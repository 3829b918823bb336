"""Answers compared with those of ten people."""

import pytest

from helpers import golden_json
from infer.benchmarks.vqa_answers import (
    leave_one_out,
    most_common,
    normalize,
    textvqa_accuracy,
    vizwiz_accuracy,
    vqa_accuracy,
)  # fmt: skip

GOLDEN = golden_json("evaluation/metrics.json")["textvqa"]


def test_normalized_as_the_reference_does():
    assert [[text, normalize(text)] for text, _ in GOLDEN["processed"]] == GOLDEN["processed"]


def test_scored_as_the_reference_does():
    for case in GOLDEN["scores"]:
        assert textvqa_accuracy(case["prediction"], case["answers"]) == pytest.approx(case["score"], abs=1e-12)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("1,000 cars", "1000 cars"),
        ("Dont  STOP", "don't stop"),
        ("The one's", "1 's"),
        ("left/right", "left right"),
        ("left/ right", "left right"),
        ("a\tb\nc", "b c"),
        ("." * 32 + "x", "x"),
        ("." * 33 + "x", ".x"),  # the reference's flag, 32, is the number of replacements
        ("3.5 m.", "3.5 m"),
        ("let's", "let 's"),
        ("", ""),
    ],
)
def test_normalize(text, normalized):
    assert normalize(text) == normalized


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_leave_one_out(matches, accuracy):
    assert leave_one_out("x", ["x"] * matches + ["y"] * (10 - matches)) == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "answers", "textvqa", "vqa", "vizwiz"),
    [
        ("Yes.", ["yes"] * 10, 1, 1, 1),
        ("e-mail", ["e-mail"] * 10, 1, 0, 0),  # VQA's evaluator normalizes nothing if all say the same
        ("e-mail", ["e-mail"] * 9 + ["mail"], 1, 1, 0),  # VizWiz's never normalizes people's answers
        ("1,000", ["1,000"] * 2 + ["1000"] * 8, 1, 1, 1),
        ("What's", ["what's"] * 9 + ["that"], 1, 0, 0),  # only the reference splits off 's
        ("two dogs", ["2 dogs"] * 2 + ["dogs"] * 8, 0.6, 0.6, 0.6),
        ("The dog ", ["dog\n"] * 3 + ["cat"] * 7, 0.9, 0.9, 0),
    ],
)
def test_the_three_evaluators(text, answers, textvqa, vqa, vizwiz):
    assert textvqa_accuracy(text, answers) == pytest.approx(textvqa)
    assert vqa_accuracy(text, answers) == pytest.approx(vqa)
    assert vizwiz_accuracy(text, answers) == pytest.approx(vizwiz)


def test_most_common():
    assert most_common(["a", "b", "b", "c", "c"]) == "b"
