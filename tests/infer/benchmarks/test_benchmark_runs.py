"""All benchmarks, on miniatures of their files, answered by the bundled model."""

import json
import shutil
import sys

import pytest
from choice_miniatures import write_all

from helpers import one_device
from infer import benchmark_run, evaluate
from infer.benchmarks import BENCHMARKS
from infer.benchmarks.answers import read_answers
from infer.engine import Engine
from infer.generate import BUNDLED
from llava_jax.data.buckets import Buckets
from scripted_endpoint import ScriptedEndpoint

TO_SUBMIT = {
    "vqav2": "vqav2.json", "vizwiz": "vizwiz.json", "gqa": "testdev_balanced_predictions.json",
    "mmbench": "mmbench_dev_20230712.xlsx", "mmbench-cn": "mmbench_dev_cn_20231003.xlsx", "seed": "seed_bench.jsonl",
    "mm-vet": "mm-vet.json",
}  # fmt: skip
UNSCORED = ("vqav2", "vizwiz", "llava-bench-in-the-wild", "mm-vet")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def engine():
    return Engine.load(BUNDLED, mesh=one_device(), buckets=Buckets(chunks=(256,)))  # few programs


@pytest.fixture
def run(run_cli, engine, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_run, "load_engine", lambda args: engine)
    return lambda *args: run_cli(
        evaluate.main, "--output", tmp_path / "out", "--max-new-tokens", "6", "--batch-size", "4", *args
    )


def test_all_benchmarks_are_asked_and_scored(run, data, tmp_path):
    output = tmp_path / "out"
    status, out, err = run("--benchmark", "all", "--data-dir", data)
    assert (status, "left out" in err) == (0, False), err
    assert {path.name for path in output.iterdir()} == {*BENCHMARKS, "results.json", "results.md"}
    for name in BENCHMARKS:
        found = {path.name for path in (output / name).iterdir()} - {".lock"}
        expected = {"answers.jsonl", "results.json", "settings.json"} | (
            {TO_SUBMIT[name]} if name in TO_SUBMIT else set()
        )
        assert found - {"wrong.html"} == expected, name
        result = json.loads((output / name / "results.json").read_text())
        answers = read_answers(output / name / "answers.jsonl")
        rows = 10 if "mmbench" in name else result["questions"]  # whose questions are there with rotations
        assert len(answers) == rows and result["failed"] == 0
        assert (result["value"] is None) == (name in UNSCORED)
        assert ("wrong.html" in found) == (name not in UNSCORED)
        assert f"| {result['title']} | reference | {result['metric']} |" in " ".join(out.split())
    assert "give --judge URL and --judge-model NAME" in err
    before = {path: path.read_bytes() for path in output.glob("*/answers.jsonl")}
    assert run("--benchmark", "all", "--data-dir", data)[0] == 0  # nothing is asked again
    assert before == {path: path.read_bytes() for path in output.glob("*/answers.jsonl")}


def test_answers_of_a_run_are_scored_from_their_file(run, run_cli, data, tmp_path):
    """The same score; and with another protocol."""
    for name in ("textvqa", "mmbench", "seed"):
        result = json.loads(run("--benchmark", name, "--data-dir", data, "--json")[1])
        file = ("--score", tmp_path / f"out/{name}/answers.jsonl", "--benchmark", name, "--data-dir", data, "--json")
        again = json.loads(run_cli(evaluate.main, *file)[1])
        assert again == {key: result[key] for key in again}
        other = json.loads(run_cli(evaluate.main, *file, "--protocol", "lmms-eval")[1])
        assert other["protocol"] == "lmms-eval" and other["questions"] == again["questions"]


class Judge(ScriptedEndpoint):
    """Says how right an answer is."""

    def reply(self, messages, record, kind):
        return "0.5", "stop"


def test_a_judge_scores_what_was_answered(run, run_cli, data, tmp_path):
    """In the same run, later, or from a file; it is not asked twice."""
    assert run("--benchmark", "mm-vet", "--data-dir", data)[0] == 0
    file = tmp_path / "out/mm-vet/answers.jsonl"
    with Judge() as judge:
        flags = ("--judge", judge.url, "--judge-model", "judge-1", "--price-in", "30", "--price-out", "60", "--json")
        status, out, err = run("--benchmark", "mm-vet", "--data-dir", data, *flags)
        result = json.loads(out)
        assert (status, result["value"], result["failed"], result["asked"], len(judge.log)) == (0, 0.5, 0, 10, 10)
        assert result["judge"] == "judge-1" and result["engine"]["template"] == "mistral_instruct"
        _, out, noted = run("--benchmark", "mm-vet", "--data-dir", data, "--json")
        assert json.loads(out) == result and "mm-vet: keeps its score by the judge judge-1" in noted
        table = " ".join((tmp_path / "out/results.md").read_text().split())
        assert "| reference | score, by judge-1 | 50.0 |" in table and "Scores by different judges" in table
        assert "asking judge-1 to judge 10 answers, an estimated" in err and ": $" in err
        assert run("--benchmark", "mm-vet", "--data-dir", data, *flags)[0] == 0 and len(judge.log) == 10
        status, out, _ = run_cli(evaluate.main, "--score", file, "--benchmark", "mm-vet", "--data-dir", data, *flags)
        assert (status, json.loads(out)["value"], len(judge.log)) == (0, 0.5, 20)
    assert (tmp_path / "out/mm-vet/judge.jsonl").exists() and (tmp_path / "out/mm-vet/wrong.html").exists()
    status, out, err = run_cli(evaluate.main, "--score", file, "--benchmark", "mm-vet", "--data-dir", data)
    assert (status, out, err.count("\n")) == (1, "", 1) and "give --judge URL and --judge-model NAME" in err


def test_missing_images_fail_their_questions_alone(run, data, tmp_path):
    """Those of one image, and one that is broken."""
    shutil.copytree(data / "MME", tmp_path / "MME")
    images = tmp_path / "MME/MME_Benchmark_release_version"
    (images / "existence/000000000001.jpg").unlink()
    (images / "color/000000000003.jpg").write_bytes(b"none")
    status, out, err = run("--benchmark", "mme", "--data-dir", tmp_path, "--json")
    result = json.loads(out)
    assert (status, result["failed"], result["unanswered"], result["questions"]) == (1, 4, 4, 10)
    assert err.count("llava_mme.jsonl line 1: ") == 1 and "000000000001.jpg: no such image" in err
    assert "000000000003.jpg: not an image" in err
    assert result["parts"]["color"]["score"] == 0


def test_answers_are_scored_though_a_file_to_submit_cannot_be_made(run, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)  # not installed
    status, out, err = run("--benchmark", "mmbench", "--data-dir", data, "--json")
    assert (status, json.loads(out)["metric"]) == (1, "accuracy")
    assert "error: mmbench: no file to submit: MMBench's file to submit needs openpyxl: pip install" in err
