"""TextVQA: both protocols' prompts, and scores of the reference's answers file."""

import json

import pytest

from helpers import golden_json
from infer.benchmarks.benchmark import LMMS_EVAL, REFERENCE, Answer
from infer.benchmarks.textvqa import TextVQA
from llava_jax.console import InputError
from vqa_miniatures import COLORS, SUFFIX, answers_to, ten, write

PROTOCOLS = (REFERENCE, LMMS_EVAL)
RIGHT = [text for i, color in enumerate(COLORS) for text in (color, "no" if i else "yes")]


@pytest.fixture
def directory(tmp_path):
    return write("textvqa", tmp_path)


def test_prompts(directory):
    """The reference's have OCR tokens; lmms-eval's have none, and need no question file."""
    one = TextVQA().questions(directory, REFERENCE)[2]
    prompt = f"What color is the square?\nReference OCR token: SQUARE, No., 5{SUFFIX}"
    assert (one.id, one.prompt, one.turns) == ("0000000000000001", prompt, (f"<image>\n{prompt}",))
    assert one.images == (str(directory / "train_images/0000000000000001.jpg"),)
    assert one.name.endswith("llava_textvqa_val_v051_ocr.jsonl line 3") and one.kind == "all"
    (directory / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    one = TextVQA().questions(directory, LMMS_EVAL)[2]
    assert (one.id, one.prompt) == ("0000000000000001", f"What color is the square?{SUFFIX}")
    assert one.turns == (f"<image>\n{one.prompt}",) and one.answer == "green"
    with pytest.raises(InputError, match=r"llava_textvqa_val_v051_ocr.jsonl: not found \(1.5 MB; it is in eval.zip"):
        TextVQA().questions(directory, REFERENCE)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_score(directory, protocol):
    asked = TextVQA().questions(directory, protocol)
    score = TextVQA().score(directory, answers_to(asked, RIGHT)[::-1], protocol)  # in any order
    assert (score.metric, score.value, score.scale, score.protocol) == ("accuracy", 1.0, 100, protocol)
    assert score.totals == {"accuracy": 1.0} and not score.parts and score.unanswered == 0
    texts = ["Red.", "square", "blue", None, *RIGHT[4:]]
    score = TextVQA().score(directory, answers_to(asked, texts), protocol)
    assert score.value == pytest.approx((1 + 0.6 + 0 + 0 + 6) / 10) and score.unanswered == 1
    first, _, _, missing, *_ = score.marks
    assert (first.text, first.read, first.answer, first.group) == ("Red.", "red", "red", asked[0].id)
    assert (missing.question, missing.prompt, missing.score, missing.text) == (asked[3].id, asked[3].prompt, 0, "")


def test_golden(tmp_path):
    """The reference's own scores of random answers, through its files: no question file is needed."""
    cases = golden_json("evaluation/metrics.json")["textvqa"]["scores"]
    data = [{"image_id": f"{i}", "question": "What?", "answers": case["answers"]} for i, case in enumerate(cases)]
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": data}))
    prompt = f"What?\nReference OCR token: a, b{SUFFIX}"
    answers = [Answer(f"{i}", prompt, case["prediction"], line=i + 1) for i, case in enumerate(cases)]
    score = TextVQA().score(tmp_path, answers, REFERENCE)
    assert [mark.score for mark in score.marks] == pytest.approx([case["score"] for case in cases], abs=1e-12)
    assert score.value == pytest.approx(sum(case["score"] for case in cases) / len(cases), abs=1e-12)


@pytest.mark.parametrize(
    "prompt",
    [
        f"WHAT color is the Square?{SUFFIX}",
        f"what color is the square?\nReference OCR token: a{SUFFIX}",
        f"Reference OCR token: a\nwhat color is the square?{SUFFIX}",
        "OCR tokens: a, b. Question: what color is the square? Short answer:",
    ],
)
def test_formats_of_prompts(directory, prompt):
    score = TextVQA().score(directory, [Answer("0000000000000000", prompt, "red", line=1)], REFERENCE)
    assert score.value == 0.1 and score.unanswered == 9


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([("0000000000000000", "a", "x")], "answers line 1: no question can be parsed from the prompt 'a'"),
        ([("0000000000000000", "OCR tokens: a", "x")], "answers line 1: no question can be parsed"),
        (
            [("0000000000000000", f"b{SUFFIX}", "x")],
            'answers line 1: the benchmark has no question "0000000000000000" ',
        ),
        ([("7", f"what color is the square?{SUFFIX}", "x")], 'answers line 1: the benchmark has no question "7" '),
        (
            [("0000000000000000", f"what color is the square?{SUFFIX}", "x")] * 2,
            'answers line 2: a second answer to question "0000000000000000", which line 1 answers',
        ),
    ],
)
def test_answers_to_no_question(directory, answers, error):
    with pytest.raises(InputError, match=error):
        TextVQA().score(directory, [Answer(*row, line=line) for line, row in enumerate(answers, 1)], REFERENCE)


def test_a_question_twice_counts_twice_by_its_last_answers(tmp_path, capsys):
    """As in the dictionary of `eval_textvqa.py`."""
    rows = [("a", "What?", ten("x")), ("b", "What?", ten("x")), ("a", "what?", ten("y"))]
    data = [{"image_id": image, "question": question, "answers": answers} for image, question, answers in rows]
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": data}))
    line = {"question_id": "a", "image": "a.jpg", "text": f"What?\nReference OCR token: {SUFFIX}"}
    (tmp_path / "llava_textvqa_val_v051_ocr.jsonl").write_text(f"{json.dumps(line)}\n" * 2)
    score = TextVQA().score(tmp_path, [Answer("a", line["text"], "y")], REFERENCE)
    assert (score.value, len(score.marks), score.unanswered) == (2 / 3, 3, 1)
    noted = capsys.readouterr().err
    assert "val.json: data[2]: asks what data[0] asks" in noted and "ocr.jsonl line 2: asks what line 1 asks" in noted


def test_a_question_without_a_question(directory):
    """Its line is named when answers are scored, not theirs."""
    path = directory / "llava_textvqa_val_v051_ocr.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[3]["text"] = "What?"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=r"ocr.jsonl line 4: no question can be parsed from the prompt 'What\?'"):
        TextVQA().score(directory, [], REFERENCE)


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([("a", "What?", ten("x")[1:])], r"val.json: data\[0\].answers: expected a list of length >= 10"),
        ([("a", "What?", [1] * 10)], r"val.json: data\[0\].answers\[0\]: expected a string, got an integer"),
        ([("../a", "What?", ten("x"))], r"val.json: data\[0\]: image ../a.jpg is outside the image folder"),
        ([], "val.json: data is empty"),
    ],
)
def test_invalid_annotations(tmp_path, rows, error):
    data = [{"image_id": image, "question": question, "answers": answers} for image, question, answers in rows]
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": data}))
    with pytest.raises(InputError, match=error):
        TextVQA().questions(tmp_path, LMMS_EVAL)
