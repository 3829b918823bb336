"""Which option an answer means."""

import json
from pathlib import Path

import pytest

from infer.benchmarks.options import find_letter, infer_letter, infer_option, infer_text

GOLDEN = Path(__file__).parents[2] / "golden/evaluation/metrics.json"
SHAPES = {"A": "a circle", "B": "a Square", "C": "a cat", "D": "a line"}


def test_mmbench_answers_mean_what_lmms_eval_reads():
    rows = json.loads(GOLDEN.read_text())["mmbench"]
    assert len(rows) == 300
    assert [infer_option(row["answer"], row["choices"]) or False for row in rows] == [row["option"] for row in rows]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("B. a square", "B"), ("(B)", "B"), ("It is (C).", "C"), ("Answer:D", None), ("Answer :D", "D"),
        ("A", "A"), ("A it is", "A"), ("A it is, yes", None),  # an article, if there are more than three words
        ("A. it is, yes", "A"), ("A cat. B. is it", "B"), ("A or B", None), ("B or B", "B"), ("E", "E"), ("F", None),
        ("b", None), ("", None), ("B: or C. or", "C"), ("Failed to obtain answer via API B", None),
    ],
)  # fmt: skip
def test_letters_of_mmbench(answer, letter):
    assert infer_letter(answer) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("It's a SQUARE!", "B"), ("a circle or a line", None), ("a dog", None), ("acting: a catalogue", "C"), ("", None)],
)
def test_texts_of_mmbench(answer, letter):
    assert infer_text(answer, SHAPES) == letter
    assert infer_option(answer, SHAPES) == letter
    assert infer_option(f"D {answer}", SHAPES) == "D"  # a letter goes first


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("", None), (" .", None), ("none", None), ("A", "A"), ("B.", "B"), ("**C**", "C"), ("D) is right", "D"),
        ("I think that the answer is B, not C", "C"),
        ("the answer is B, not Cats", "C"), ("the answer is B, not it", "B"),
        ("(A) or (B)", "B"), ("A. or (B)", "A"), ("B because of A", "B"),
        ("Because I choose D", "D"), ("the answer is Babel", "B"), ("E", None), ("it is C", "C"), ("选 B 吧", "B"),
        ("ABBA", "A"), ("xBAx", "A"),
    ],
)  # fmt: skip
def test_the_most_likely_letter(answer, letter):
    """As lmms-eval's `extract_mcq_answer` finds them."""
    assert find_letter(answer, "ABCD") == letter
