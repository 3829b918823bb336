"""MME: right answers beside the images or in the evaluation tool, and points by category."""

import shutil

import pytest

from helpers import golden_json
from infer.benchmarks.benchmark import REFERENCE, Answer
from infer.benchmarks.mme import COGNITION, MME, PERCEPTION, read_answer
from llava_jax.console import InputError
from vqa_miniatures import MME_IMAGES, SUFFIX, answers_to, write

GOLDEN = golden_json("evaluation/metrics.json")["mme"]
RIGHT = ["Yes", "No"] * 5


@pytest.fixture
def directory(tmp_path):
    return write("mme", tmp_path)


def test_golden(tmp_path):
    """The golden rows as files, without the reference's question file; the answers in another order."""
    answers = []
    for line, row in enumerate(GOLDEN["rows"], 1):
        texts = tmp_path / "MME_Benchmark_release_version" / row["question_id"].replace(".png", ".txt")
        texts.parent.mkdir(parents=True, exist_ok=True)
        with texts.open("a") as file:
            file.write(f"{row['question']} Please answer yes or no.\t{row['answer']}\n")
        answers.append(Answer(row["question_id"], row["question"] + SUFFIX, row["prediction"], line=line))
    score = MME().score(tmp_path, answers[::-1], REFERENCE)
    expected = {name.removeprefix("mme_").removesuffix("_score"): value for name, value in GOLDEN["expected"].items()}
    assert score.totals == pytest.approx(expected, abs=1e-9)
    assert (score.metric, score.value, score.scale) == ("perception", score.totals["perception"], 1)
    assert set(score.parts) == {*PERCEPTION, *COGNITION} and score.unanswered == 0


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes", "yes"), ("no.", "no"), ("Y", "yes"), ("n.", "no"), ("x", ""), ("", ""), (" Yes, it is", "yes"),
        ("Nope", "no"), ("not", "no"), ("A no", "no"), ("I say no", ""), ("nye yes", ""), ("yes no", "yes"),
        ("Noyes", "no"),
    ],
)  # fmt: skip
def test_read_answer(text, read):
    assert read_answer(text) == read


def test_questions(directory):
    asked = MME().questions(directory, REFERENCE)
    assert [one.id for one in asked] == [name for name in MME_IMAGES for _ in range(2)]
    one = asked[6]
    assert one.turns == (f"<image>\nIs there a yellow square in this image?{SUFFIX}",) and one.kind == "posters"
    assert one.images == (str(directory / "MME_Benchmark_release_version/posters/images/tt0000001.jpg"),)


@pytest.mark.parametrize("layout", ["release", "templates", "double space"])
def test_score(directory, layout, capsys):
    """Points of an image: 50 for each right answer, and 100 more for two."""
    release = directory / "MME_Benchmark_release_version"
    if layout == "templates":
        tool = directory / "eval_tool/Your_Results"
        tool.mkdir(parents=True)
        for texts in sorted(release.rglob("*.txt")):
            category = texts.relative_to(release).parts[0]
            with (tool / f"{category}.txt").open("a") as file:
                file.writelines(f"{texts.stem}.jpg\t{line}\n" for line in texts.read_text().splitlines())
        shutil.rmtree(release)
    elif layout == "double space":
        for texts in release.rglob("*.txt"):
            texts.write_text(texts.read_text().replace("? P", "?  P"))
    asked = MME().questions(directory, REFERENCE)
    texts = ["Yes", "No", "Yes", "Yes", "No", "Yes", "Yes", None, "Yes", "No."]
    score = MME().score(directory, answers_to(asked, texts), REFERENCE)
    assert score.parts == {
        "existence": {"score": 125.0, "questions": 4},
        "color": {"score": 0.0, "questions": 2},
        "posters": {"score": 50.0, "questions": 2},
        "code_reasoning": {"score": 200.0, "questions": 2},
    }
    assert score.totals == {"perception": 175.0, "cognition": 200.0} and score.unanswered == 1
    assert score.stderr == pytest.approx(75)  # of existence: 200 and 50; the others have one image
    missing = score.marks[7]
    assert (missing.question, missing.prompt, missing.score) == (asked[7].id, asked[7].prompt, 0)
    assert (
        missing.group == "posters/tt0000001"
        and [mark.kind for mark in score.marks[2:6]] == ["existence"] * 2 + ["color"] * 2
    )
    assert "MME has no questions of count, position, celebrity" in capsys.readouterr().err


def test_questions_without_right_answers(directory, capsys):
    """MME's own templates omit two of the images that the reference asks about."""
    asked = MME().questions(directory, REFERENCE)
    (directory / "MME_Benchmark_release_version/color/000000000003.txt").unlink()
    score = MME().score(directory, answers_to(asked, RIGHT), REFERENCE)
    assert "no right answer here to 2 questions of llava_mme.jsonl; not scored" in capsys.readouterr().err
    assert score.totals["perception"] == 400 and score.unanswered == 0 and len(score.marks) == 8


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("A? Please answer yes or no.\tYes\n", "existence/000000000001 has 1 question instead of 2"),
        ("A?\tYes\nB?\tNo\nC?\tNo\n", "existence/000000000001 has 3 questions instead of 2"),
        ("A?\tYes\nA? Please answer yes or no.\tNo\n", "000000000001.txt line 2: the question is there twice"),
        ("A? Yes\nB?\tNo\n", "000000000001.txt line 1: expected question and answer, separated by tabs"),
        ("A?\tYes\tNo\nB?\tNo\n", "000000000001.txt line 1: expected question and answer"),
        ("A?\tYes\nB?\t", "000000000001.txt line 2: expected question and answer"),
        ("Caf\xe9?\tYes\nB?\tNo\n", "000000000001.txt: not UTF-8"),
        ("A?\tYes\nB?\tMaybe\n", "000000000001.txt line 2: the answer 'Maybe' must be Yes or No"),
    ],
)
def test_invalid_right_answers(directory, text, error):
    path = directory / "MME_Benchmark_release_version/existence/000000000001.txt"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=error):
        MME().score(directory, [], REFERENCE)


def test_missing_right_answers(directory):
    release = directory / "MME_Benchmark_release_version"
    for texts in release.rglob("*.txt"):
        texts.unlink()
    with pytest.raises(InputError, match="release_version: has no CATEGORY/.*.txt with questions; it is in https://"):
        MME().score(directory, [], REFERENCE)
    shutil.rmtree(release)
    with pytest.raises(InputError, match="release_version: not found"):
        MME().score(directory, [], REFERENCE)


def test_answers_to_no_question(directory):
    one = MME().questions(directory, REFERENCE)[0]
    for id, prompt in [(one.id, "Is it?"), ("x.jpg", one.prompt), (5, one.prompt)]:
        with pytest.raises(InputError, match=r"answers line 1: the benchmark has no question .* \("):
            MME().score(directory, [Answer(id, prompt, "Yes", line=1)], REFERENCE)
    with pytest.raises(InputError, match="answers line 2: a second answer to question .*, which line 1 answers"):
        MME().score(directory, [Answer(one.id, one.prompt, "Yes", line=n) for n in (1, 2)], REFERENCE)
