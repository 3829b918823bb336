"""A run: what is asked, in which order, by whom; how it resumes; which answers it refuses to add to."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers import ROOT, contents
from infer.answers import AnswersFile, answer_line
from infer.benchmarks.answers import read_answers
from infer.benchmarks.benchmark import Question
from infer.benchmarks.conversations import Conversations
from infer.evaluation import Run, Shard, answer, left_to_ask, merge, questions_of
from llava_jax.console import InputError
from scripted_answers import ScriptedEngine, write_conversations

SETTINGS = {"model": "m", "checkpoint": "a/m", "checkpoint_fingerprint": "f" * 64, "protocol": "reference"}


@pytest.fixture
def benchmark(tmp_path):
    return Conversations(write_conversations(tmp_path / "data"), tmp_path / "data/images")


@pytest.fixture
def ask(benchmark, tmp_path):
    """Ask the questions, or the first ones: the engine and the outcome."""

    def ask(shard=None, limit=None, engine=None, **settings):
        engine = engine or ScriptedEngine()
        questions = benchmark.questions(tmp_path, "reference")[:limit]
        run = Run(benchmark, questions, SETTINGS | settings, tmp_path / "out", shard or Shard())
        return engine, answer(run, lambda: engine, rows=4, max_new_tokens=8)

    return ask


def texts(path) -> dict:
    return {(one.id, one.prompt): one.text for one in read_answers(path)}


# ---------------------------------------------------------------- order


def test_questions_about_one_image_follow_each_other():
    names = "a b a c b a".split()
    questions = [Question(i, ("?",), "?", (name,)) for i, name in enumerate(names)]
    questions += [Question(6, ("?",), "?"), Question(7, ("?",), "?", (b"bytes",)), Question(8, ("?",), "?")]
    assert [one.id for one in questions_of(Shard(), questions)] == [0, 2, 5, 1, 4, 3, 6, 7, 8]
    shards = [questions_of(Shard(i, 3), questions) for i in range(3)]
    assert [[one.id for one in shard] for shard in shards] == [[0, 2, 5, 6], [1, 4, 7], [3, 8]]


def test_answers_are_those_of_the_reference_and_in_its_format(ask, tmp_path, benchmark):
    engine, outcome = ask()
    assert (len(engine.asked), outcome.failed, outcome.speed.questions, outcome.speed.tokens) == (10, 0, 10, 30)
    merge(tmp_path / "out", benchmark.questions(tmp_path, "reference"))
    lines = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [one.id for one in benchmark.questions(tmp_path, "reference")]
    assert list(lines[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert (lines[3]["text"], lines[3]["model_id"]) == (str(len(lines[3]["prompt"])), "m")  # without spaces around it


def test_further_keys_of_a_question_are_in_its_line():
    line = answer_line(1, "p", "t", "m", {"round_id": 2})
    assert list(line) == ["question_id", "prompt", "text", "round_id", "answer_id", "model_id", "metadata"]


# ---------------------------------------------------------------- resuming


def test_what_has_an_answer_is_not_asked_again(ask, tmp_path):
    assert len(ask(limit=4)[0].asked) == 4
    with (tmp_path / "out/answers.jsonl").open("a") as file:
        file.write('{"question_id": "5/1", "pro')  # of a killed run
    engine, outcome = ask(engine=ScriptedEngine(lambda question: "later"))
    assert len(engine.asked) == 6
    assert [one.text == "later" for one in outcome.answers] == [False] * 4 + [True] * 6
    assert ask()[0].asked == []


def test_a_killed_run_resumes(tmp_path, benchmark):
    """By SIGKILL, whenever it comes."""
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from infer.benchmarks.conversations import Conversations
from infer.evaluation import Run, answer
from pathlib import Path
from scripted_answers import ScriptedEngine
here = Path({str(tmp_path)!r})
benchmark = Conversations(here / "data/test.json", here / "data/images")
run = Run(benchmark, benchmark.questions(here, "reference"), {SETTINGS!r}, here / "out")
answer(run, lambda: ScriptedEngine(delay=float(sys.argv[1])), rows=4, max_new_tokens=8)
"""
    process = subprocess.Popen([sys.executable, "-c", code, "0.2"], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    path = tmp_path / "out/answers.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        time.sleep(0.01)
    with pytest.raises(InputError, match="in use by another command"):
        answer(
            Run(benchmark, benchmark.questions(tmp_path, ""), SETTINGS, tmp_path / "out"),
            None,
            rows=1,
            max_new_tokens=1,
        )
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = read_answers(path, growing=True)
    engine = ScriptedEngine()
    run = Run(benchmark, benchmark.questions(tmp_path, "reference"), SETTINGS, tmp_path / "out")
    outcome = answer(run, lambda: engine, rows=4, max_new_tokens=8)
    assert 3 <= len(before) < 10 and len(engine.asked) == 10 - len(before)
    assert [one.text for one in outcome.answers] == [str(len(one.prompt)) for one in outcome.answers]
    assert len(outcome.answers) == 10 and len(read_answers(path)) == 10


def test_another_run_is_refused_with_its_differences(ask, tmp_path):
    ask(limit=2)
    before = contents(tmp_path / "out")
    for change, says in [
        ({"protocol": "lmms-eval"}, 'protocol is "reference" there and "lmms-eval" here'),
        ({"checkpoint_fingerprint": "0" * 64}, "checkpoint_fingerprint is ffffffffffff... there and 000000000000..."),
        ({"template": "v1"}, 'template is null there and "v1" here'),
    ]:
        with pytest.raises(InputError, match=says):
            ask(**change)
    assert contents(tmp_path / "out") == before
    assert len(ask(checkpoint="elsewhere/m2", model="m2")[0].asked) == 8  # the same weights, moved
    (tmp_path / "out/settings.json").unlink()
    with pytest.raises(InputError, match=r"out: has answers, but no settings\.json"):
        ask()


def test_settings_without_answers_are_replaced(ask, tmp_path, benchmark):
    """A run that a file or the model stopped before it asked anything; a shard's may be about to ask."""

    def stop():
        raise InputError("no model")

    questions = benchmark.questions(tmp_path, "")
    for shard in (Shard(), Shard(0, 2)):
        run = Run(benchmark, questions, SETTINGS | {"protocol": "other"}, tmp_path / "out", shard)
        with pytest.raises(InputError, match="no model"):
            answer(run, stop, rows=1, max_new_tokens=1)
    run = dataclasses.replace(run, settings=SETTINGS, shard=Shard(1, 2))
    with pytest.raises(InputError, match='protocol is "other" there and "reference" here'):
        answer(run, stop, rows=1, max_new_tokens=1)
    assert len(ask()[0].asked) == 10
    assert json.loads((tmp_path / "out/settings.json").read_text()) == SETTINGS


# ---------------------------------------------------------------- shards


def test_shards_are_one_run(ask, tmp_path, benchmark):
    questions = benchmark.questions(tmp_path, "reference")
    engines = [ask(Shard(i, 2))[0] for i in range(2)]
    assert sorted(len(engine.asked) for engine in engines) == [5, 5]  # of images 0 and 2, and of 1 and 3
    assert {path.name for path in (tmp_path / "out").glob("answers*")} == {f"answers-{i}-of-2.jsonl" for i in range(2)}
    assert {path.read_text() for path in (tmp_path / "out").glob("failed*")} == {"[]"}
    merge(tmp_path / "out", questions)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"answers.jsonl", "settings.json"}
    sharded = texts(tmp_path / "out/answers.jsonl")
    (tmp_path / "out").rename(tmp_path / "sharded")
    ask()
    merge(tmp_path / "out", questions)
    assert list(sharded.items()) == list(texts(tmp_path / "out/answers.jsonl").items())
    assert len(sharded) == 10


def test_a_run_without_shards_asks_what_they_left(ask, tmp_path, benchmark):
    ask(Shard(1, 2), limit=6)
    with AnswersFile(tmp_path / "out/answers-1-of-2.jsonl"), pytest.raises(InputError, match="in use by another"):
        ask()
    with (tmp_path / "out/answers-1-of-2.jsonl").open("a") as file:
        file.write('{"question_id": "5/1"')
    engine, outcome = ask()
    assert (len(engine.asked), len(outcome.answers)) == (7, 10)


def test_what_a_shard_cannot_ask_is_not_left_to_others(ask, tmp_path, benchmark):
    """The last shard scores without it, and a later run asks it again."""
    run = Run(benchmark, benchmark.questions(tmp_path, "reference"), SETTINGS, tmp_path / "out", Shard(0, 2))
    image = tmp_path / "data/images/1.png"
    image.rename(tmp_path / "1.png")
    _, outcome = ask(Shard(0, 2))
    assert len(left_to_ask(run, outcome.answers)) == 5
    _, outcome = ask(Shard(1, 2))
    assert (outcome.failed, len(outcome.answers), left_to_ask(run, outcome.answers)) == (3, 7, [])
    (tmp_path / "1.png").rename(image)
    engine, outcome = ask(Shard(1, 2))
    assert (len(engine.asked), outcome.failed, len(outcome.answers)) == (3, 0, 10)
    merge(tmp_path / "out", run.questions)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"answers.jsonl", "settings.json"}


def test_an_answer_given_twice_counts_once(ask, tmp_path, benchmark):
    ask()
    lines = (tmp_path / "out/answers.jsonl").read_text()
    (tmp_path / "out/answers-0-of-3.jsonl").write_text(lines.replace('"text": "', '"text": "second'))
    engine, outcome = ask()
    assert engine.asked == [] and not any("second" in one.text for one in outcome.answers)
    merge(tmp_path / "out", benchmark.questions(tmp_path, "reference"))
    assert len(read_answers(tmp_path / "out/answers.jsonl")) == 10


def test_answers_to_other_questions_are_kept(ask, tmp_path, benchmark):
    ask()
    merge(tmp_path / "out", benchmark.questions(tmp_path, "reference")[:3])
    assert len(read_answers(tmp_path / "out/answers.jsonl")) == 10


# ---------------------------------------------------------------- failures


def test_failures_are_named_then_counted(ask, tmp_path, capsys):
    (tmp_path / "data/images/1.png").unlink()
    _, outcome = ask()
    assert (outcome.failed, len(outcome.answers)) == (3, 7)
    err = capsys.readouterr().err
    assert err.count("1.png: no such image") == 3
    assert err.splitlines()[-1] == "error: conversations: 3 of 10 questions could not be asked, counted as wrong"
    assert len(ask()[0].asked) == 3  # again


def test_many_failures_are_not_all_named(tmp_path, capsys):
    benchmark = Conversations(write_conversations(tmp_path / "data", rows=14, images=1), tmp_path / "data/images")
    (tmp_path / "data/images/0.png").unlink()
    run = Run(benchmark, benchmark.questions(tmp_path, "reference"), SETTINGS, None)
    outcome = answer(run, ScriptedEngine, rows=4, max_new_tokens=8)
    err = capsys.readouterr().err
    assert (outcome.failed, outcome.answers, err.count("no such image")) == (14, [], 10)
    assert err.splitlines()[-1].endswith("counted as wrong; the first 10 are named above")


def test_an_output_that_cannot_be_written(benchmark, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file/out", tmp_path / ("x" * 300)):
        run = Run(benchmark, benchmark.questions(tmp_path, "reference"), SETTINGS, folder)
        with pytest.raises(InputError, match="^--output .*: cannot be written"):
            answer(run, ScriptedEngine, rows=4, max_new_tokens=8)
