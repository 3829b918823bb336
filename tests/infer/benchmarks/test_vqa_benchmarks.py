"""VQAv2, VizWiz and GQA: questions, scores by category, and the files to submit."""

import dataclasses
import json

import pytest

from infer.benchmarks import find_benchmark
from infer.benchmarks.benchmark import REFERENCE, Answer
from infer.benchmarks.gqa import GQA
from infer.benchmarks.vizwiz import VizWiz, VizWizVal
from infer.benchmarks.vqav2 import VQAv2, VQAv2Val
from llava_jax.console import InputError
from vqa_miniatures import COLORS, SUFFIX, answers_to, ten, write

RIGHT = [text for i, color in enumerate(COLORS) for text in (color, "no" if i else "yes")]
VIZWIZ_ID = "VizWiz_val_00000001.jpg"
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def asked_and_score(benchmark, directory, texts):
    asked = benchmark.questions(directory, REFERENCE)
    return asked, benchmark.score(directory, answers_to(asked, texts)[::-1], REFERENCE)


@pytest.mark.parametrize(
    ("benchmark", "id", "prompt", "image"),
    [
        (VQAv2(), 1001, "Is the square red?" + SUFFIX, "test2015/COCO_test2015_000000000001.jpg"),
        (VQAv2Val(), 262148001, "Is the square red?" + SUFFIX, "val2014/COCO_val2014_000000262148.jpg"),
        (VizWiz(), 1, "Is the square red?" + UNANSWERABLE + SUFFIX, "test/VizWiz_test_00000001.jpg"),
        (VizWizVal(), VIZWIZ_ID, "Is the square red?" + UNANSWERABLE + SUFFIX, f"val/{VIZWIZ_ID}"),
        (GQA(), "200000001", "Is the square red?" + SUFFIX, "data/images/n0.jpg"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)  # fmt: skip
def test_questions(tmp_path, benchmark, id, prompt, image):
    directory = write(benchmark.name, tmp_path)
    asked = benchmark.questions(directory, REFERENCE)
    assert len(asked) == 10 and all((directory / one.images[0]).exists() for one in asked)
    if benchmark.name == "vqav2":
        id, image = 1, "test2015/COCO_test2015_000000000000.jpg"
    assert (asked[1].id, asked[1].prompt, asked[1].turns) == (id, prompt, (f"<image>\n{prompt}",))
    assert asked[1].images == (str(directory / image),)


@pytest.mark.parametrize("benchmark", [VQAv2Val(), VizWizVal()], ids=lambda one: one.name)
def test_ten_answers(tmp_path, benchmark):
    directory = write(benchmark.name, tmp_path)
    _, score = asked_and_score(benchmark, directory, RIGHT)
    assert score.value == 1 and score.unanswered == 0
    texts = ["The red.", "square", "purple", None, *RIGHT[4:]]
    asked, score = asked_and_score(benchmark, directory, texts)
    assert score.value == pytest.approx((1 + 0.6 + 0 + 0 + 6) / 10) and score.unanswered == 1
    assert score.parts == {
        "other": {"accuracy": 0.8, "questions": 5},
        "yes/no": {"accuracy": pytest.approx(3.6 / 5), "questions": 5},
    }
    first, second, _, missing, *_ = score.marks
    assert (first.text, first.read, first.answer, first.kind) == ("The red.", "red", "red", "other")
    assert (second.score, second.kind) == (pytest.approx(0.6), "yes/no")
    assert (missing.question, missing.prompt, missing.text, missing.score) == (asked[3].id, asked[3].prompt, "", 0)


def test_vqav2_is_scored_without_its_questions(tmp_path):
    directory = write("vqav2-val", tmp_path)
    answers = answers_to(VQAv2Val().questions(directory, REFERENCE), [*RIGHT[:9], None])
    (directory / "v2_OpenEnded_mscoco_val2014_questions.json").unlink()
    assert VQAv2Val().score(directory, answers, REFERENCE).value == 0.9


def test_gqa(tmp_path):
    directory = write("gqa", tmp_path)
    asked, score = asked_and_score(GQA(), directory, ["RED.", "yes ", "green", None, *RIGHT[4:]])
    assert score.value == 0.8 and score.unanswered == 1
    assert score.totals == {"accuracy": 0.8, "open": 1.0, "binary": 0.6}
    assert score.parts == {
        "structural: query": {"accuracy": 1.0, "questions": 5},
        "structural: verify": {"accuracy": 0.6, "questions": 5},
        "semantic: attr": {"accuracy": 0.8, "questions": 10},
    }
    first, _, _, missing, *_ = score.marks
    assert (first.read, first.answer, first.kind, first.group) == ("red", "red", "query", "n0")
    assert (missing.question, missing.prompt) == (asked[3].id, asked[3].prompt)


# ---------------------------------------------------------------- submissions


def test_submission_to_vqav2(tmp_path, capsys):
    """An answer to each question of the whole test set, of which ten of twelve were asked."""
    directory = write("vqav2", tmp_path)
    asked = VQAv2().questions(directory, REFERENCE)
    made = VQAv2().submission(directory, answers_to(asked, ["The Red.", None, *RIGHT[2:]]))
    rows = json.loads(made.data)
    assert made.name == "vqav2.json" and [list(row) for row in rows] == [["question_id", "answer"]] * 12
    assert [row["question_id"] for row in rows] == [9000, *(one.id for one in asked), 9001]
    assert [row["answer"] for row in rows] == ["", "red", "", *RIGHT[2:], ""]
    assert "1 of 10 questions have no answer; submitted as empty answers" in capsys.readouterr().err
    with pytest.raises(InputError, match="VQAv2 test-dev: only its server has the right answers; submit to https://"):
        VQAv2().score(directory, [], REFERENCE)


def test_the_whole_test_set_of_vqav2(tmp_path):
    directory = write("vqav2", tmp_path)
    (directory / "llava_vqav2_mscoco_test-dev2015.jsonl").unlink()
    assert len(VQAv2().questions(directory, REFERENCE)) == 12
    (directory / "llava_vqav2_mscoco_test2015.jsonl").unlink()
    with pytest.raises(InputError, match="test-dev2015.jsonl: not found"):
        VQAv2().questions(directory, REFERENCE)


def test_submission_to_vizwiz(tmp_path):
    directory = write("vizwiz", tmp_path)
    asked = VizWiz().questions(directory, REFERENCE)
    made = VizWiz().submission(directory, answers_to(asked, ["Unanswerable", *RIGHT[1:9], "Dont"]))
    answers = ["unanswerable", *RIGHT[1:9], "don't"]
    expected = [{"image": f"VizWiz_test_{i:08}.jpg", "answer": text} for i, text in enumerate(answers)]
    assert (made.name, made.data) == ("vizwiz.json", json.dumps(expected).encode())
    with pytest.raises(InputError, match="VizWiz test-dev: only its server has the right answers; submit to https://"):
        VizWiz().score(directory, [], REFERENCE)


def test_predictions_of_gqa(tmp_path):
    """In the order of the answers, as the reference's converter writes them; those without one come last."""
    directory = write("gqa", tmp_path)
    asked = GQA().questions(directory, REFERENCE)
    made = GQA().submission(directory, answers_to(asked, [None, "Yes..", *RIGHT[2:]]))
    texts = zip([*asked[1:], asked[0]], ["yes", *RIGHT[2:], ""], strict=True)
    assert json.loads(made.data) == [{"questionId": one.id, "prediction": text} for one, text in texts]
    assert made.name == "testdev_balanced_predictions.json"


@pytest.mark.parametrize("name", ["gqa", "pope", "textvqa", "vizwiz-val", "vqav2-val"])
def test_ids_are_strings_or_integers(tmp_path, name):
    """Whatever they are in the benchmark's files: what other tools wrote may have them the other way around."""
    benchmark, directory = find_benchmark(name), write(name, tmp_path)
    asked = benchmark.questions(directory, REFERENCE)
    other = {"gqa": int, "pope": str, "vqav2-val": str}.get(name, lambda id: id)
    answers = [Answer(other(one.id), one.prompt, "no", line=line) for line, one in enumerate(asked, 1)]
    as_asked = [dataclasses.replace(answer, id=one.id) for answer, one in zip(answers, asked, strict=True)]
    assert benchmark.score(directory, answers, REFERENCE) == benchmark.score(directory, as_asked, REFERENCE)


@pytest.mark.parametrize("benchmark", [VQAv2(), VizWiz(), GQA()], ids=lambda one: one.name)
def test_submitted_answers_to_no_question(tmp_path, benchmark):
    directory = write(benchmark.name, tmp_path)
    one = benchmark.questions(directory, REFERENCE)[0]
    with pytest.raises(InputError, match='answers line 4: the benchmark has no question "x"'):
        benchmark.submission(directory, [Answer("x", "What?", "a", line=4)])
    with pytest.raises(InputError, match="answers line 2: a second answer to question .*, which line 1 answers"):
        benchmark.submission(directory, [Answer(one.id, one.prompt, "a", line=n) for n in (1, 2)])


# ---------------------------------------------------------------- invalid files


@pytest.mark.parametrize(
    ("benchmark", "file"),
    [(VQAv2(), "llava_vqav2_mscoco_test2015.jsonl"), (VizWiz(), "llava_test.jsonl")],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_question_twice(tmp_path, benchmark, file):
    path = write(benchmark.name, tmp_path) / file
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0]]))
    with pytest.raises(InputError, match=f"line {len(lines) + 1}: question .* is already on line 1"):
        benchmark.submission(path.parent, [])


@pytest.mark.parametrize(
    ("benchmark", "file", "change", "error"),
    [
        (VQAv2Val(), "v2_mscoco_val2014_annotations.json", lambda d: d["annotations"][3]["answers"].pop(),
         r"annotations.json: annotations\[3\]: has 9 answers instead of 10"),
        (VQAv2Val(), "v2_mscoco_val2014_annotations.json", lambda d: d["annotations"].append(d["annotations"][0]),
         r"annotations.json: annotations\[10\]: question 262148000 is there twice"),
        (VQAv2Val(), "v2_mscoco_val2014_annotations.json", lambda d: d["annotations"][1].pop("answer_type"),
         r"annotations.json: annotations\[1\].answer_type is missing"),
        (VQAv2Val(), "v2_mscoco_val2014_annotations.json", lambda d: d["annotations"].clear(), "annotations is empty"),
        (VQAv2Val(), "v2_OpenEnded_mscoco_val2014_questions.json", lambda d: d["questions"].append(d["questions"][0]),
         r"questions.json: questions\[10\]: question 262148000 is there twice"),
        (VQAv2Val(), "v2_OpenEnded_mscoco_val2014_questions.json", lambda d: d["questions"].clear(),
         "questions.json: questions is empty"),
        (VizWizVal(), "val.json", lambda d: d[2]["answers"].pop(), r"val.json: \[2\]: has 9 answers instead of 10"),
        (VizWizVal(), "val.json", lambda d: d.append(d[0]), r"val.json: \[10\]: image .* is there twice"),
        (VizWizVal(), "val.json", lambda d: d[0].update(image="/etc/x"), r"val.json: \[0\]: image /etc/x is outside"),
        (VizWizVal(), "val.json", lambda d: d[1].pop("answers"), r"val.json: \[1\].answers is missing"),
        (GQA(), "data/testdev_balanced_questions.json", lambda d: d["200000004"].pop("types"), "types is missing"),
        (GQA(), "data/testdev_balanced_questions.json", lambda d: d.clear(), "questions.json: is empty"),
    ],
)  # fmt: skip
def test_invalid_annotations(tmp_path, benchmark, file, change, error):
    directory = write(benchmark.name, tmp_path)
    contents = json.loads((directory / file).read_text())
    change(contents)
    (directory / file).write_text(json.dumps(contents))
    with pytest.raises(InputError, match=error):
        benchmark.score(directory, [], REFERENCE)


def test_vizwiz_does_not_normalize_what_people_said(tmp_path):
    directory = write("vizwiz-val", tmp_path)
    rows = json.loads((directory / "val.json").read_text())
    rows[0]["answers"] = [{"answer": text} for text in ten("e-mail", "e mail")]
    (directory / "val.json").write_text(json.dumps(rows))
    assert asked_and_score(VizWizVal(), directory, ["E-mail", *RIGHT[1:]])[1].marks[0].score == pytest.approx(0.6)
