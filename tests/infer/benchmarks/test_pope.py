"""POPE: both protocols, and the reference's numbers."""

import json
import random

import numpy as np
import pytest

from helpers import golden_json
from infer.benchmarks.benchmark import LMMS_EVAL, REFERENCE, Answer
from infer.benchmarks.pope import CATEGORIES, POPE, Outcome, _f1_error, numbers, read_answer
from llava_jax.console import InputError
from vqa_miniatures import SUFFIX, answers_to, write, write_lines

GOLDEN = golden_json("evaluation/metrics.json")["pope"]


@pytest.fixture
def directory(tmp_path):
    return write("pope", tmp_path)


def write_golden(directory):
    """The golden labels and answers as files. Returns the answers."""
    lines, answers = [], []
    for category, case in GOLDEN.items():
        texts = [f"Is there a thing {n} in the image?" for n in range(len(case["labels"]))]
        rows = [{"question_id": n, "image": "a.jpg", "text": t} for n, t in enumerate(texts)]
        labels = [row | {"label": label} for row, label in zip(rows, case["labels"], strict=True)]
        write_lines(directory / f"coco/coco_pope_{category}.json", labels)
        for row, text in zip(rows, case["answers"], strict=True):
            id, prompt = len(lines) + 1, row["text"] + SUFFIX
            lines.append(row | {"question_id": id, "text": prompt, "category": category})
            answers.append(Answer(id, prompt, text, line=id))
    write_lines(directory / "llava_pope_test.jsonl", lines)
    return answers


def test_golden(tmp_path):
    answers = write_golden(tmp_path)
    random.Random(0).shuffle(answers)
    score = POPE().score(tmp_path, answers, REFERENCE)
    for category, case in GOLDEN.items():
        part = dict(score.parts[category])
        assert part.pop("questions") == 120
        assert part == pytest.approx(case["expected"], abs=1e-12)
    mean = sum(case["expected"]["f1"] for case in GOLDEN.values()) / 3
    assert (score.metric, score.value, score.scale) == ("mean F1", pytest.approx(mean, abs=1e-12), 100)
    assert score.totals["mean F1"] == score.value and len(score.marks) == 360


@pytest.mark.parametrize(
    ("text", "reference", "lmms_eval"),
    [
        ("Yes", "yes", "yes"),
        (" NO\n", "yes", "no"),
        ("No, there is not.", "no", ""),
        ("It is. No", "yes", ""),
        ("not here", "no", ""),
        ("Nope", "yes", ""),
        ("no.", "no", ""),
        ("", "yes", ""),
        ("Yes\nno", "yes", ""),
    ],
)
def test_read_answer(text, reference, lmms_eval):
    assert (read_answer(text, REFERENCE), read_answer(text, LMMS_EVAL)) == (reference, lmms_eval)


def test_questions(directory):
    asked = POPE().questions(directory, REFERENCE)
    assert [one.kind for one in asked] == ["adversarial"] * 3 + ["popular"] * 3 + ["random"] * 4
    assert asked[3].prompt == f"Is there a red square in the image?{SUFFIX}"
    assert asked[3].images == (str(directory / "val2014/COCO_val2014_000000000000.jpg"),)


def test_score(directory):
    """Three of ten are wrong: a false "yes" and a false "no", both random, and a popular one without an answer."""
    asked = POPE().questions(directory, REFERENCE)
    right = ["yes", "no", "yes", "yes", "no", "yes", "yes", "no", "yes", "no"]
    texts = [*right[:4], None, *right[5:7], "yes", "no", "no"]
    score = POPE().score(directory, answers_to(asked, texts), REFERENCE)
    half = dict(accuracy=0.5, precision=0.5, recall=0.5, f1=0.5, yes_ratio=0.5, questions=4)
    perfect = dict(accuracy=1, precision=1, recall=1, f1=1, yes_ratio=2 / 3, questions=3)
    assert score.parts["random"] == half and score.parts["adversarial"] == perfect
    assert score.parts["popular"] == dict(
        accuracy=pytest.approx(2 / 3), precision=pytest.approx(2 / 3), recall=1, f1=pytest.approx(0.8), yes_ratio=1,
        questions=3,
    )  # fmt: skip
    assert score.value == pytest.approx((0.5 + 1 + 0.8) / 3) and score.unanswered == 1
    assert [mark.score for mark in score.marks] == [1, 1, 1, 1, 0, 1, 1, 0, 0, 1]
    missing = score.marks[4]
    assert (missing.question, missing.text, missing.read, missing.answer) == (asked[4].id, "", "", "no")


def test_score_of_lmms_eval(directory):
    """One number for all questions. An answer that is neither counts against accuracy and nothing else."""
    asked = POPE().questions(directory, LMMS_EVAL)
    texts = ["yes", "NO ", "Yes.", "", "no", "no", *["yes"] * 4]
    score = POPE().score(directory, answers_to(asked, texts), LMMS_EVAL)
    expected = dict(accuracy=0.5, precision=0.6, recall=0.75, f1=pytest.approx(2 / 3), yes_ratio=0.6)
    assert score.totals == expected and (score.metric, score.protocol) == ("f1", LMMS_EVAL)
    assert score.value == score.totals["f1"] and set(score.parts) == set(CATEGORIES)


def test_no_yes_at_all(directory):
    asked = POPE().questions(directory, REFERENCE)
    score = POPE().score(directory, answers_to(asked, ["no"] * 10), REFERENCE)
    assert score.value == 0 and score.parts["random"]["precision"] == 0 and score.stderr == 0
    assert POPE().score(directory, [], REFERENCE).unanswered == 10


def test_standard_error():
    """It agrees with a bootstrap over images."""
    rng = np.random.default_rng(0)
    outcomes = [
        Outcome(label if rng.random() < 0.8 else "yes", label, f"{n // 6}")
        for n, label in enumerate(rng.choice(["yes", "no"], 600))
    ]
    images = [outcomes[n : n + 6] for n in range(0, 600, 6)]
    resampled = [[o for i in rng.integers(0, 100, 100) for o in images[i]] for _ in range(400)]
    scores = [numbers(sample, REFERENCE)["f1"] for sample in resampled]
    assert _f1_error([outcomes]) == pytest.approx(np.std(scores), rel=0.1)
    assert _f1_error([outcomes] * 3) == pytest.approx(_f1_error([outcomes]))  # the same images: nothing is gained


@pytest.mark.parametrize(
    ("file", "old", "new", "error"),
    [
        ("coco/coco_pope_random.json", '"yes"', '"maybe"', "random.json line 1: label: invalid enum value 'maybe'"),
        ("coco/coco_pope_random.json", "red", "black", "random.json line 1: is not the question of .* line 7"),
        ("coco/coco_pope_popular.json", "0000.jpg", "0009.jpg", "popular.json line 1: is not the question of"),
        ("llava_pope_test.jsonl", '"random"', '"easy"', "test.jsonl line 7: category 'easy' must be one of random, "),
        ("llava_pope_test.jsonl", '"question_id": 2,', '"question_id": 1,', "line 2: question 1 is already on line 1"),
        ("llava_pope_test.jsonl", '"COCO', '"../COCO', "line 1: image ../COCO.* is outside the image folder"),
    ],
)  # fmt: skip
def test_invalid_files(directory, file, old, new, error):
    path = directory / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=error):
        POPE().score(directory, [], REFERENCE)


def test_labels_of_another_release(directory):
    path = directory / "coco/coco_pope_random.json"
    write_lines(path, [json.loads(line) for line in path.read_text().split("\n")[:3]])
    with pytest.raises(InputError, match="random.json: has 3 labels for 4 questions of llava_pope_test.jsonl"):
        POPE().score(directory, [], REFERENCE)


def test_answers_to_no_question(directory):
    asked = POPE().questions(directory, REFERENCE)
    answers = answers_to(asked, ["yes"] * 10)
    with pytest.raises(InputError, match=r'answers line 3: the benchmark has no question "11" \("Is there'):
        POPE().score(directory, [*answers[:2], Answer("11", asked[0].prompt, "yes", line=3)], REFERENCE)
    with pytest.raises(InputError, match="answers line 9: a second answer to question 1, which line 1 answers"):
        POPE().score(directory, [*answers, Answer(1, asked[0].prompt, "yes", line=9)], REFERENCE)
