"""Judged benchmarks: what the judge is asked, what its reviews are worth, and how asking resumes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from choice_miniatures import (
    DAMAGE,
    answers_of,
    assert_named,
    write_json,
    write_lines,
    write_llava_bench,
    write_mm_vet,
)

from infer.benchmarks import judge as judging
from infer.benchmarks.benchmark import REFERENCE, Answer
from infer.benchmarks.judge import ATTEMPTS, judge_answers
from infer.benchmarks.llava_bench import LlavaBench
from infer.benchmarks.mm_vet import MMVet
from llava_jax.console import InputError
from llava_jax.endpoints import Endpoint, Outcome
from llava_jax.replies import Prices
from scripted_endpoint import ScriptedEndpoint

ROOT = Path(__file__).parents[3]
SAID = [f"Said {i}." for i in range(10)]


class ScriptedJudge(ScriptedEndpoint):
    """Replies by a function of the messages."""

    def __init__(self, review, **settings):
        super().__init__(**settings)
        self.review, self.asked = review, []

    def reply(self, messages, record, kind):
        self.asked.append(messages)
        return self.review(messages), "stop"


def number_of(messages) -> int:
    """The number of the question that is judged, by the answer in `SAID`."""
    text = "".join(message["content"] for message in messages)
    return next(i for i, said in enumerate(SAID) if said in text)


def compared(messages) -> str:
    """GPT-4's answers get 8, the model's 4 to 7."""
    return f"8 {4 + number_of(messages) % 4}\nBecause."


@pytest.fixture
def bench(tmp_path):
    return write_llava_bench(tmp_path / "llava-bench-in-the-wild")


@pytest.fixture
def vet(tmp_path):
    return write_mm_vet(tmp_path / "mm-vet")


@pytest.fixture
def judged(tmp_path):
    """Judge answers of a benchmark with a scripted judge: the judgement, and what it was asked."""

    def judged(benchmark, directory, answers, review, **settings):
        with ScriptedJudge(review) as script:
            endpoint = Endpoint(script.url, "judge-1", **settings)
            judgement = judge_answers(benchmark, directory, answers, endpoint, tmp_path / "judge.jsonl")
            return judgement, script.asked

    return judged


# ---------------------------------------------------------------- LLaVA-Bench


def test_llava_bench_questions(bench):
    questions = LlavaBench().questions(bench, REFERENCE)
    third = questions[3]
    assert (third.id, third.prompt, third.turns) == (3, "What about 3?", ("<image>\nWhat about 3?",))
    assert (third.images, third.kind) == ((str(bench / "images/002.png"),), "conv")
    assert LlavaBench.max_new_tokens == 1024


def test_the_judge_is_asked_in_the_layout_of_the_reference(bench):
    answers = answers_of(LlavaBench(), bench, SAID)
    messages = LlavaBench().judge_messages(bench, answers)
    rule = {"role": "Model", "prompt": "Score them."}
    write_json(bench / "rule.json", {f"llava_bench_{kind}": rule for kind in ("conv", "detail", "complex")} | {"x": 1})
    ruled = LlavaBench().judge_messages(bench, answers)
    assert [*messages] == [*ruled] == [*range(10)]
    head = "[Context]\nImage 1 shows a blue square.\nNothing else.\n\n[Question]\nWhat about 2?\n\n"
    assert ruled[2][1] == {
        "role": "user",
        "content": f"{head}[Model 1]\nIt is 2.\n\n[End of Model 1]\n\n[Model 2]\nSaid 2.\n\n[End of Model 2]\n\n"
        "[System]\nScore them.\n\n",
    }
    ours = messages[2][1]["content"]
    assert ours.startswith(f"{head}[Assistant 1]\nIt is 2.\n\n[End of Assistant 1]\n\n[Assistant 2]\nSaid 2.\n\n")
    assert "The question takes reasoning." in ours and "The question takes reasoning." not in messages[0][1]["content"]
    assert messages[0][1]["content"].startswith("[Context]\nImage 0 shows a red circle.\n\n[Question]")  # a text


@pytest.mark.parametrize(
    ("review", "scores"),
    [
        ("8 7\nBecause.", (8.0, 7.0)), ("8, 7", None), ("8,7", (8.0, 7.0)), ("9.5 10", (9.5, 10.0)), ("8", None),
        ("Scores: 8 7", None), ("8 7 6", None), ("nan 8", None), ("inf 8", None), ("", None), ("\n8 7", None),
    ],
)  # fmt: skip
def test_the_first_line_has_two_scores(review, scores):
    assert LlavaBench().read_review(review) == scores


def test_llava_bench_score(bench, judged):
    answers = answers_of(LlavaBench(), bench, SAID)
    judgement, asked = judged(LlavaBench(), bench, answers, compared)
    score = judgement.score
    assert len(asked) == 10 and judgement.signal is None
    model = [4 + i % 4 for i in range(10)]
    assert [mark.score for mark in score.marks] == [one / 10 for one in model]
    assert score.value == pytest.approx(sum(model) / 80, abs=1e-12)
    assert score.totals == pytest.approx({"relative score": sum(model) / 80, "model": sum(model) / 100, "gpt-4": 0.8})
    assert [*score.parts] == ["complex", "conv", "detail"]
    conv = [model[i] for i in (0, 3, 6, 9)]
    assert score.parts["conv"] == pytest.approx(
        {"relative score": sum(conv) / 32, "model": sum(conv) / 40, "gpt-4": 0.8, "questions": 4}
    )
    spread = math.sqrt(sum((one - sum(model) / 10) ** 2 for one in model) / 9 / 10) / 8
    assert score.stderr == pytest.approx(spread, abs=1e-12)
    rows = [json.loads(line) for line in judgement.reviews.data.decode().splitlines()]
    assert rows[1] == {
        "id": 2, "question_id": 1, "answer1_id": "gpt4-1", "answer2_id": 1, "category": "llava_bench_detail",
        "content": "8 5\nBecause.", "tuple": [8.0, 5.0],
    }  # fmt: skip
    assert [*rows[0]] == ["id", "question_id", "answer1_id", "answer2_id", "category", "content", "tuple"]


def test_an_unanswered_question_scores_0_and_is_not_judged(bench, judged):
    answers = answers_of(LlavaBench(), bench, SAID)[1:]
    judgement, asked = judged(LlavaBench(), bench, answers, compared)
    assert (len(asked), judgement.score.unanswered, judgement.score.marks[0].score) == (9, 1, 0.0)
    assert judgement.score.totals["gpt-4"] == 0.8
    assert judgement.score.value == pytest.approx(sum(4 + i % 4 for i in range(1, 10)) / 80, abs=1e-12)


# ---------------------------------------------------------------- MM-Vet


def test_mm_vet_questions(tmp_path):
    benchmark = MMVet()
    with_file = benchmark.questions(write_mm_vet(tmp_path / "a"), REFERENCE)
    without = benchmark.questions(write_mm_vet(tmp_path / "b", with_question_file=False), REFERENCE)
    assert [(one.id, one.prompt, one.kind) for one in with_file] == [(one.id, one.prompt, one.kind) for one in without]
    first, second, third, fourth, *_ = with_file
    assert (first.id, first.turns, first.kind) == (0, ("<image>\nWhat is number 0?",), "rec only")
    assert [one.kind for one in (second, third, fourth)] == ["ocr+spat", "ocr+spat+math", "rec+know+gen"]
    assert first.images == (str(tmp_path / "a/images/v1_0.png"),)


def test_mm_vet_is_judged_in_the_published_layout(vet):
    (message,) = MMVet().judge_messages(vet, answers_of(MMVet(), vet, SAID))["1"]
    lines = message["content"].splitlines()
    assert lines[-1] == "What is number 1? | 1 <AND> 2 | Said 1. | "
    assert "Question | Ground truth | Prediction | Correctness" in lines
    assert all(line.count(" | ") == 3 for line in lines[lines.index("--- | --- | --- | ---") :])
    assert dict(MMVet.request_fields) == {"temperature": 0.0, "max_tokens": 16}


def test_mm_vet_score(vet, judged):
    answers = answers_of(MMVet(), vet, SAID)
    judgement, _ = judged(MMVet(), vet, answers[:-1], lambda messages: f"{number_of(messages) / 10} as it is")
    score = judgement.score
    assert (score.value, score.unanswered) == (pytest.approx(0.36, abs=1e-12), 1)
    rec, ocr = (0, 3, 4, 7, 8), (1, 2, 5, 6, 9)
    expected = {
        "rec": rec, "ocr": ocr, "know": (3, 7), "gen": (3, 7), "spat": ocr, "math": (2, 6),
        "rec only": (0, 4, 8), "ocr+spat": (1, 5, 9), "ocr+spat+math": (2, 6), "rec+know+gen": (3, 7),
    }  # fmt: skip
    assert [*score.parts] == [*expected]
    for name, some in expected.items():
        scores = [i / 10 for i in some if i < 9]
        assert score.parts[name] == {"score": pytest.approx(sum(scores) / len(some)), "questions": len(some)}
    grades = json.loads(judgement.reviews.data)
    assert grades["v1_3"] == {"model": ["scripted-1"], "content": ["0.3 as it is"], "score": [0.3]}
    assert len(grades) == 9


@pytest.mark.parametrize(
    ("review", "scores"),
    [("0.5", (0.5,)), ("1", (1.0,)), ("0.5\nyes", (0.5,)), ("1.1", None), ("-0.1", None), ("nan", None), ("", None),
     ("about 0.5", None)],
)  # fmt: skip
def test_a_review_begins_with_a_number(review, scores):
    assert MMVet().read_review(review) == scores


def test_mm_vet_submission(vet):
    texts = json.loads(MMVet().submission(vet, answers_of(MMVet(), vet, SAID)[:-1]).data)
    assert texts == {f"v1_{i}": text for i, text in enumerate([*SAID[:-1], ""])}


# ---------------------------------------------------------------- asking


def test_the_cost_is_shown_before_anything_is_asked(vet, judged, capsys):
    answers = answers_of(MMVet(), vet, SAID)
    characters = sum(len(message["content"]) for [message] in MMVet().judge_messages(vet, answers).values())
    prices = Prices(1000.0, 2000.0)
    judged(MMVet(), vet, answers, lambda messages: "0.5", prices=prices)
    tokens = characters // 4
    cost = (1000 * tokens + 2000 * 40) / 1e6
    says = f"asking judge-1 to judge 10 answers, an estimated {tokens:,} tokens read and 40 written: ${cost:.2f}\n"
    assert capsys.readouterr().err.startswith(says)


def test_what_was_judged_is_not_asked_again(vet, judged, capsys):
    answers = answers_of(MMVet(), vet, SAID)
    half = lambda messages: "0.5"  # noqa: E731
    first, asked = judged(MMVet(), vet, answers[:6], half)
    assert len(asked) == 6
    second, asked = judged(MMVet(), vet, answers, half)
    assert len(asked) == 4 and (first.score.value, second.score.value) == (0.3, 0.5)
    capsys.readouterr()
    third, asked = judged(MMVet(), vet, answers, half)
    assert (asked, third.score, capsys.readouterr().err) == ([], second.score, "")
    changed = [Answer(answers[0].id, answers[0].prompt, "Said 0. But no."), *answers[1:]]
    assert len(judged(MMVet(), vet, changed, half)[1]) == 1  # another answer
    assert len(judged(MMVet(), vet, answers, half, body={"temperature": 0.5})[1]) == 10  # another judge


def test_a_review_without_a_score_is_asked_for_again(vet, judged, capsys):
    def review(messages):
        if number_of(messages) == 3:
            return "It depends."
        return "0.5" if len(messages) > 1 or number_of(messages) != 2 else "Fine."

    judgement, asked = judged(MMVet(), vet, answers_of(MMVet(), vet, SAID), review)
    assert len(asked) == 8 + 2 + ATTEMPTS
    again = max((messages for messages in asked if number_of(messages) == 2), key=len)
    assert again[1:] == [{"role": "assistant", "content": "Fine."}, {"role": "user", "content": MMVet.reminder}]
    assert [mark.score for mark in judgement.score.marks[:4]] == [0.5, 0.5, 0.5, 0.0]
    assert capsys.readouterr().err.endswith(
        "warning: question 3: no score in the review 'It depends.'\n"
        f"warning: 1 review without a score after {ATTEMPTS} attempts, counted as failed\n"
    )
    judgement, asked = judged(MMVet(), vet, answers_of(MMVet(), vet, SAID), review)
    assert asked == []


def test_unread_reviews_count_as_in_the_reference(bench, judged):
    answers = answers_of(LlavaBench(), bench, SAID)
    review = lambda messages: "?" if number_of(messages) == 0 else "8 4"  # noqa: E731
    judgement, _ = judged(LlavaBench(), bench, answers, review)
    assert json.loads(judgement.reviews.data.splitlines()[0])["tuple"] == [-1.0, -1.0]
    assert judgement.score.value == pytest.approx((9 * 4 - 1) / (9 * 8 - 1), abs=1e-12)


def test_a_judge_that_gives_no_scores_gives_none(vet, judged):
    with pytest.raises(InputError, match="judge-1: no review has a score; the first is 'Who knows'"):
        judged(MMVet(), vet, answers_of(MMVet(), vet, SAID), lambda messages: "Who knows")


def test_failures_are_named_and_leave_no_score(vet, tmp_path, monkeypatch):
    outcome = Outcome(answered=8, failed={"3/abc/1": "400 too long", "4/abc/1": "400 too long"})
    monkeypatch.setattr(Endpoint, "ask", lambda *_, **__: outcome)
    answers = answers_of(MMVet(), vet, SAID)
    with pytest.raises(InputError) as error:
        judge_answers(MMVet(), vet, answers, Endpoint("http://x/v1", "m"), tmp_path / "judge.jsonl")
    assert str(error.value) == ("2 of 10 answers not judged, the first 3 (400 too long); the same command asks again")
    outcome.signal = signal.SIGINT
    judgement = judge_answers(MMVet(), vet, answers, Endpoint("http://x/v1", "m"), tmp_path / "judge.jsonl")
    assert (judgement.score, judgement.reviews, judgement.signal) == (None, None, signal.SIGINT)


def test_it_resumes_after_a_kill(vet, tmp_path, judged):
    """A process that judges is killed; the next one asks only what has no reply."""
    program = (
        "import sys; from pathlib import Path; from infer.benchmarks.benchmark import Answer;"
        "from infer.benchmarks.judge import judge_answers; from infer.benchmarks.mm_vet import MMVet;"
        "from llava_jax.endpoints import Endpoint;"
        "answers = [Answer(i, '', f'Said {i}.') for i in range(10)];"
        "judge_answers(MMVet(), Path(sys.argv[1]), answers, Endpoint(sys.argv[2], 'judge-1', 1), Path(sys.argv[3]))"
    )
    replies = tmp_path / "judge.jsonl"
    with ScriptedJudge(lambda messages: "0.5", delay=0.1) as script:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-c", program, vet, script.url, replies], env=environment)
        end = time.monotonic() + 60
        while len(script.log) < 3 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        process.kill()
        process.wait()
    kept = len(replies.read_bytes().splitlines())
    assert 2 <= kept < 10
    judgement, asked = judged(MMVet(), vet, answers_of(MMVet(), vet, SAID), lambda messages: "0.5")
    assert (len(asked), judgement.score.value) == (10 - kept, 0.5)


def test_without_a_judge_there_is_no_score(vet):
    with pytest.raises(InputError, match="MM-Vet is scored by a judge"):
        MMVet().score(vet, [], REFERENCE)
    assert MMVet.judged and LlavaBench.judged and judging.Benchmark.judged is False


# ---------------------------------------------------------------- malformed files


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "rule.json"])
def test_damaged_files_of_llava_bench(bench, name, damage):
    if name != "rule.json" or damage != "missing":
        answers = answers_of(LlavaBench(), bench, SAID)
        assert_named(bench / name, damage, lambda: LlavaBench().judge_messages(bench, answers))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["mm-vet.json", "llava-mm-vet.jsonl"])
def test_damaged_files_of_mm_vet(vet, name, damage):
    if name == "mm-vet.json" or damage != "missing":
        assert_named(vet / name, damage, lambda: MMVet().questions(vet, REFERENCE))


@pytest.mark.parametrize(
    ("name", "rows", "says"),
    [
        ("context.jsonl", [{"image": "x.png", "caption": "x"}], "context.jsonl: has no context of 001.png"),
        ("answers_gpt4.jsonl", [{"question_id": 0, "text": "x"}], "answers_gpt4.jsonl: has no answer to question 1"),
        ("answers_gpt4.jsonl", [{"question_id": 0, "text": "x"}] * 2,
         "answers_gpt4.jsonl line 2: question 0 is already on line 1"),
        ("questions.jsonl", [{"question_id": 0, "image": "001.png", "text": "?", "category": "x"}],
         "questions.jsonl: question 0: no rule for the category 'x', only for conv, detail, complex"),
        ("questions.jsonl", [{"question_id": 0, "image": "001.png", "text": "?"}],
         "questions.jsonl line 1: category is missing"),
    ],
)  # fmt: skip
def test_files_of_llava_bench_that_do_not_fit(bench, name, rows, says):
    write_lines(bench / name, rows)
    with pytest.raises(InputError, match=says):
        LlavaBench().judge_messages(bench, [])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x_1": {}}, "mm-vet.json: id 'x_1' does not begin with v1_"),
        ({"v1_1": {"imagename": "a", "question": "?", "answer": "b", "capability": []}}, "v1_1: capability: "),
        ({"v1_1": {"imagename": "a", "question": "?", "capability": ["rec"]}}, "v1_1: answer is missing"),
    ],
)
def test_annotations_of_mm_vet_that_are_none(vet, change, says):
    contents = json.loads((vet / "mm-vet.json").read_text())
    write_json(vet / "mm-vet.json", contents | change)
    with pytest.raises(InputError, match=says):
        MMVet().judge_messages(vet, [])


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([Answer(77, "", "x", line=4)], "answers line 4: the benchmark has no question 77"),
        (
            [Answer(1, "", "x", line=4), Answer(1, "", "x", line=6)],
            "line 6: a second answer to question 1, which line 4",
        ),
    ],
)
def test_answers_to_no_question(bench, vet, answers, says):
    for benchmark, directory in ((LlavaBench(), bench), (MMVet(), vet)):
        with pytest.raises(InputError, match=says):
            benchmark.judge_messages(directory, answers)
