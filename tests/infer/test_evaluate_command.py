"""`python -m infer.evaluate`: files of answers scored without a model, runs with their results, and one clear line for
what is wrong."""

import dataclasses
import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest

from helpers import GOLDEN, ROOT
from infer import benchmark_run, evaluate
from infer.benchmarks import BENCHMARKS
from infer.benchmarks.answers import read_answers
from infer.benchmarks.benchmark import REFERENCE, Mark, Score
from infer.benchmarks.scoring import limit_score, standard_error
from infer.generate import BUNDLED
from infer.results import write_summary
from llava_jax.locks import LockedFile
from scripted_answers import ScriptedEngine, write_conversations
from vqa_miniatures import write

SUFFIX = "\nAnswer the question using a single word or phrase."
GOLDEN_METRICS = json.loads((GOLDEN / "evaluation/metrics.json").read_text())


@pytest.fixture
def command(run_cli):
    return lambda *args: run_cli(evaluate.main, *args)


@pytest.fixture
def scripted(monkeypatch):
    engine = ScriptedEngine(lambda question: "Yes" if "1" in question else "no")
    monkeypatch.setattr(benchmark_run, "load_engine", lambda args: engine)
    return engine


def put_lines(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------- files of answers


def golden_pope(root):
    questions = []
    for category, golden in GOLDEN_METRICS["pope"].items():
        texts = [f"Is there {i} in the image?" for i in range(len(golden["labels"]))]
        labels = zip(texts, golden["labels"], strict=True)
        rows = [{"question_id": i, "image": f"{i}.jpg", "text": text, "label": x} for i, (text, x) in enumerate(labels)]
        put_lines(root / f"pope/coco/coco_pope_{category}.json", rows)
        questions += [(f"{i}.jpg", text + SUFFIX, category, golden["answers"][i]) for i, text in enumerate(texts)]
    names = ("image", "text", "category")
    rows = [{"question_id": i} | dict(zip(names, row, strict=False)) for i, row in enumerate(questions)]
    put_lines(root / "pope/llava_pope_test.jsonl", rows)
    return [{"question_id": i, "prompt": row[1], "text": row[3]} for i, row in enumerate(questions)]


def golden_textvqa(root):
    scores = GOLDEN_METRICS["textvqa"]["scores"]
    rows = [{"image_id": f"a{i}", "question": f"Q {i}?", "answers": row["answers"]} for i, row in enumerate(scores)]
    (root / "textvqa").mkdir()
    (root / "textvqa/TextVQA_0.5.1_val.json").write_text(json.dumps({"data": rows}))
    tokens = "\nReference OCR token: A, b" + SUFFIX
    return [
        {"question_id": f"a{i}", "prompt": f"q {i}?{tokens}", "text": row["prediction"]} for i, row in enumerate(scores)
    ]


def golden_mme(root):
    rows = GOLDEN_METRICS["mme"]["rows"]
    for row in rows:
        path = (root / "MME/MME_Benchmark_release_version" / row["question_id"]).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{row['question']} Please answer yes or no.\t{row['answer']}\n")
    return [
        {"question_id": row["question_id"], "prompt": row["question"] + SUFFIX, "text": row["prediction"]}
        for row in rows
    ]


def golden_scienceqa(root):
    with gzip.open(GOLDEN / "evaluation/scienceqa.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    (root / "scienceqa").mkdir()
    problems = {row["question_id"]: {"choices": [*"abcde"], "answer": row["option"]} for row in rows}
    (root / "scienceqa/problems.json").write_text(json.dumps(problems))
    (root / "scienceqa/pid_splits.json").write_text(json.dumps({"test": [*problems]}))
    return [{"question_id": row["question_id"], "prompt": "<image>\n?", "text": row["text"]} for row in rows]


@pytest.fixture
def scored(command, tmp_path):
    """Score golden answers: the result as JSON."""

    def scored(name, make, *flags):
        put_lines(tmp_path / "a.jsonl", make(tmp_path))
        args = ("--score", tmp_path / "a.jsonl", "--benchmark", name, "--data-dir", tmp_path)
        status, out, err = command(*args, "--json", *flags)
        assert (status, err) == (0, "")
        return json.loads(out)

    return scored


def test_golden_answers_to_pope(scored):
    result = scored("pope", golden_pope)
    for category, golden in GOLDEN_METRICS["pope"].items():
        part = result["parts"][category]
        assert {name: part[name] for name in golden["expected"]} == pytest.approx(golden["expected"], abs=1e-12)
    mean = sum(golden["expected"]["f1"] for golden in GOLDEN_METRICS["pope"].values()) / 3
    assert (result["metric"], result["value"]) == ("mean F1", pytest.approx(mean, abs=1e-12))
    assert (result["benchmark"], result["protocol"], result["questions"]) == ("pope", "reference", 360)
    assert (result["unanswered"], result["scale"]) == (0, 100) and 0.01 < result["stderr"] < 0.05
    [other] = result["also"]
    assert (other["protocol"], other["metric"]) == ("lmms-eval", "f1") and other["value"] != result["value"]
    assert other.keys() == result.keys() - {"also"}


def test_a_protocol_by_name(scored):
    result = scored("pope", golden_pope, "--protocol", "lmms-eval")
    assert result["protocol"] == "lmms-eval" and "also" not in result


def test_golden_answers_to_the_others(scored):
    golden = [row["score"] for row in GOLDEN_METRICS["textvqa"]["scores"]]
    result = scored("textvqa", golden_textvqa)
    assert result["value"] == pytest.approx(sum(golden) / len(golden), abs=1e-12)
    deviation = math.sqrt(sum((x - result["value"]) ** 2 for x in golden)) / len(golden)
    assert result["stderr"] == pytest.approx(deviation, rel=0.05)  # of a bootstrap
    expected = GOLDEN_METRICS["mme"]["expected"]
    want = {name: expected[f"mme_{name}_score"] for name in ("perception", "cognition")}
    assert scored("mme", golden_mme)["totals"] == pytest.approx(want, abs=1e-9)
    result = scored("scienceqa", golden_scienceqa)  # one was drawn at random
    assert (result["value"] * 4241, result["totals"]["IMG accuracy"]) == (4240, result["value"])


def test_scores_as_a_table(command, tmp_path):
    put_lines(tmp_path / "a.jsonl", golden_pope(tmp_path)[:-2])
    args = ("--score", tmp_path / "a.jsonl", "--benchmark", "pope", "--data-dir", tmp_path / "pope")
    status, out, err = command(*args)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("POPE, reference protocol: mean F1 59.") and "2 without an answer)" in lines[0]
    assert lines[1].split() == ["accuracy", "precision", "recall", "f1", "yes_ratio", "questions"]
    assert [line.split()[0] for line in lines[2:6]] == ["random", "popular", "adversarial", "all"]
    assert lines[2].split()[1:3] == ["55.00%", "55.00%"] and lines[5].split()[-1] == "360"
    assert lines[6].startswith("mean F1") and any(line.startswith("POPE, lmms-eval protocol: f1") for line in lines)


def test_scoring_needs_no_jax():
    """Nor a model: it is quick."""
    code = "import sys, infer.evaluate as e; e.find_benchmarks('all'); print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


ANSWER = json.dumps({"question_id": 0, "prompt": "Is there 0 in the image?" + SUFFIX, "text": "no"})


def test_repeated_answers_are_left_out(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(f"{ANSWER}\n" * 3)
    assert len(read_answers(tmp_path / "a.jsonl")) == 1
    assert "a.jsonl line 2: repeats an answer, left out; lines that do: 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a.jsonl: has no answers"),
        (" \r\n\n", "a.jsonl: has no answers"),
        ("{", "a.jsonl line 1: not JSON"),
        (f"{ANSWER}\n[]", "a.jsonl line 2: not an answer: expected an object"),
        (
            f"{ANSWER}\n\n{ANSWER.replace('no', 'yes')}",
            "a.jsonl line 3: question 0 with this prompt already has an answer, on line 1",
        ),
        (
            '{"question_id": 0, "text": "no"}\n{"question_id": 0, "text": "no"}',
            "a.jsonl line 2: question 0 without a prompt already has an answer, on line 1",
        ),
        (f"{ANSWER}\n{ANSWER[:-20]}", "a.jsonl line 2: not JSON"),
        (ANSWER.replace('"text"', '"txt"'), "a.jsonl line 1: not an answer: text is missing"),
        (ANSWER.replace('"no"', "null"), "a.jsonl line 1: not an answer: text: expected a string, got null"),
        (ANSWER.replace('"no"', "NaN"), "a.jsonl line 1: not JSON (NaN"),
        (ANSWER.replace('"no"', r'"\ud800"'), "a.jsonl line 1: text with an unpaired Unicode surrogate"),
        (ANSWER.replace(": 0,", ": 1.5,"), "a.jsonl line 1: not an answer: question_id: expected an integer or a"),
        (ANSWER.replace(": 0,", ": 999,"), "a.jsonl line 1: the benchmark has no question 999"),
        ("[" * 100_000, "a.jsonl line 1: not JSON (nested too deeply)"),
        (b"\xff\xfe{", "a.jsonl line 1: not UTF-8 (byte 0)"),
    ],
)
def test_bad_files_of_answers_are_one_line(command, tmp_path, text, says):
    golden_pope(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    status, out, err = command("--score", tmp_path / "a.jsonl", "--benchmark", "pope", "--data-dir", tmp_path)
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert says in err


def test_byte_order_marks_and_carriage_returns(command, tmp_path):
    golden_pope(tmp_path)
    args = ("--score", tmp_path / "a.jsonl", "--benchmark", "pope", "--data-dir", tmp_path, "--json")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + ANSWER.encode() + b"\r\n\r\n")
    status, out, _ = command(*args)
    assert status == 0 and json.loads(out)["unanswered"] == 359
    for path in (tmp_path / "none.jsonl", tmp_path):
        status, out, err = command(*args, "--score", path)
        assert (status, out, err.count("\n")) == (1, "", 1)


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "give either --benchmark NAME --data-dir DIR, or --data FILE"),
        (("--benchmark", "pope", "--data", "a.json"), "give either"),
        (("--benchmark", "pope"), "--benchmark needs --data-dir"),
        (("--benchmark", "none", "--data-dir", "."), "benchmark 'none': is not known; known: vqav2,"),
        (("--benchmark", "pope,pope", "--data-dir", "."), "names a benchmark twice"),
        (("--benchmark", "pope", "--data-dir", ".", "--protocol", "mine"), "POPE has the protocols reference, lmms-"),
        (("--benchmark", "all", "--data-dir", "none"), "--data-dir none: no such directory"),
        (("--benchmark", "all", "--data-dir", str(ROOT)), "has all files of no benchmark; --benchmark all needs"),
        (("--benchmark", "pope", "--data-dir", ".", "--metric", "exact_match"), "--metric needs --data"),
        (("--data", "a.json", "--protocol", "x"), "--protocol needs --benchmark"),
        (("--data", "a.json", "--shard", "0/2"), "several processes need --output"),
        (("--data", "a.json", "--shard", "2/2"), "--shard '2/2': must be from 0/N to N-1/N"),
        (("--data", "a.json", "--shard", "1"), "--shard '1': must be I/N"),
        (("--data", "a.json", "--judge", "http://x"), "--judge URL and --judge-model NAME go together"),
        (("--data", "a.json", "--price-in", "1"), "--price-in and --price-out go together"),
        (("--data", "a.json", "--limit", "0"), "--limit 0: must be a whole number"),
        (("--score", "a", "--benchmark", "mme,pope", "--data-dir", "."), "--score is of one benchmark"),
        (("--score", "a", "--benchmark", "pope", "--data-dir", ".", "--limit", "2"), "--limit: is not for --score"),
        (("--score", "a", "--benchmark", "pope", "--data-dir", ".", "--checkpoint", "x"), "--checkpoint: is not for"),
        (
            ("--score", "a", "--benchmark", "pope", "--data-dir", ".", "--int8-cache"),
            "--int8-cache: is not for --score",
        ),
        (("--score", "a", "--benchmark", "pope", "--data-dir", ".", "--batch-size", "8"), "--batch-size: is not for"),
        (("--score", "a", "--benchmark", "pope", "--data-dir", ".", "--max-new-tokens", "8"), "--max-new-tokens: is"),
        (("--score", "a", "--benchmark", "pope", "--data-dir", ".", "--template", "v1"), "--template: is not for"),
        (("--data", "a.json", "--price-in", "1", "--price-out", "1"), "--price-in needs --judge"),
        (("--data", "a.json", "--output", ""), "--output: is empty"),
        (
            ("--benchmark", "pope", "--data-dir", ".", "--judge", "http://x", "--judge-model", "x"),
            "--judge: scores none of these benchmarks",
        ),
    ],
)
def test_wrong_flags_are_one_line(command, flags, says):
    status, out, err = command(*flags)
    assert (status, out) == (1, "")
    assert says in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")


def test_the_list_says_where_files_are(command):
    status, out, _ = command("--list")
    assert status == 0
    assert [line.partition(":")[0] for line in out.splitlines() if not line.startswith(" ")] == [*BENCHMARKS]
    assert "    pope/coco/coco_pope_popular.json  [score, 0.4 MB]  https://github.com/AoiDragon/POPE/" in out
    rows = [json.loads(line) for line in command("--list", "--json")[1].splitlines()]
    assert [row["benchmark"] for row in rows] == [*BENCHMARKS]
    assert all(file["path"] and file["source"] and file["size"] for row in rows for file in row["files"])


# ---------------------------------------------------------------- scores


def score_of(marks, value, **fields) -> Score:
    return Score("accuracy", value, 100, REFERENCE, {"accuracy": value}, {}, marks, **fields)


def test_standard_errors():
    alone = [Mark(i, "", "", float(i % 4 == 0)) for i in range(400)]
    assert standard_error(score_of(alone, 0.25)) == pytest.approx(math.sqrt(0.25 * 0.75 / 400), rel=0.05)
    pairs = [Mark(i, "", "", float(i % 4 < 2), group=f"g{i // 2}") for i in range(400)]
    assert standard_error(score_of(pairs, 0.5)) == pytest.approx(math.sqrt(0.5 * 0.5 / 200), rel=0.05)
    assert standard_error(score_of(pairs, 0.5)) == standard_error(score_of(pairs, 0.5))  # the seed is fixed
    assert standard_error(score_of(pairs, 0.6)) is None  # not the mean of marks
    assert standard_error(score_of(pairs, 0.5, stderr=0.1)) == 0.1
    assert standard_error(score_of([], 0.0)) is None


def test_a_part_of_the_questions_has_the_mean_score():
    marks = [Mark(i, "", "", float(i % 2), kind="ab"[i % 2]) for i in range(10)]
    from infer.benchmarks.benchmark import Question

    asked = [Question(i, ("?",), "") for i in range(3)]
    limited = limit_score(score_of(marks, 0.5), asked, 1)
    assert (limited.metric, limited.value, limited.unanswered) == ("accuracy", pytest.approx(1 / 3), 1)
    assert limited.parts == {"a": {"accuracy": 0.0, "questions": 2}, "b": {"accuracy": 1.0, "questions": 1}}
    other = dataclasses.replace(score_of(marks, 0.5), metric="f1")
    assert limit_score(other, asked, 0).metric == limit_score(dataclasses.replace(other, value=0.7), asked, 0).metric
    assert limit_score(other, asked, 0).metric == "mean score"


# ---------------------------------------------------------------- runs


def test_a_run_writes_its_results(command, scripted, tmp_path):
    golden_pope(tmp_path)
    (tmp_path / "pope/val2014").mkdir()
    for i in range(120):
        (tmp_path / f"pope/val2014/{i}.jpg").write_bytes((BUNDLED / "example.png").read_bytes() if i else b"")
    (tmp_path / "pope/val2014/5.jpg").unlink()
    output = tmp_path / "results"
    args = ("--benchmark", "pope", "--data-dir", tmp_path / "pope", "--output", output)
    status, out, err = command(*args)
    assert status == 1 and err.count("5.jpg: no such image") == 3
    assert err.splitlines()[-1] == "error: pope: 3 of 360 questions could not be asked, counted as wrong"
    result = json.loads((output / "pope/results.json").read_text())
    assert (result["questions"], result["failed"], result["unanswered"], result["asked"]) == (360, 3, 3, 357)
    assert (result["model"], result["settings"]["max_new_tokens"], result["limit"]) == ("shapes", 128, None)
    assert result["versions"].keys() == {"llava-jax", "jax", "python"} and result["tokens_per_second"] > 0
    assert len(result["checkpoint_fingerprint"]) == 64 and result["published"]["v1.5-7B"] == 85.9
    text = (output / "results.md").read_text()
    table = re.sub(" +", " ", text)
    assert table.startswith("# shapes\n\n| benchmark | protocol | metric | shapes | ± | questions | failed | v1.5-7B |")
    lines = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| POPE")]
    first, second = ([cell.strip() for cell in line] for line in lines)
    assert first[1:3] == ["reference", "mean F1"] and first[5:8] == ["360", "3", "85.9"]
    assert float(first[3]) == pytest.approx(100 * result["value"], abs=0.051) and second[7] == ""
    assert text.partition("\n\n")[2] in out and (output / "pope/wrong.html").stat().st_size > 10_000
    summary = json.loads((output / "results.json").read_text())
    assert [row["benchmark"] for row in summary["benchmarks"]] == ["pope"]
    status, out, _ = command(*args, "--json", "--limit", "4")
    result = json.loads(out)
    assert (status, result["metric"], result["questions"], result["limit"]) == (0, "mean score", 4, 4)
    assert "| POPE * | reference | mean score |" in re.sub(" +", " ", (output / "results.md").read_text())


def test_all_benchmarks_whose_files_are_there(command, scripted, tmp_path):
    """One of them is damaged: the others are scored."""
    golden_mme(tmp_path)
    golden_textvqa(tmp_path)
    rows = GOLDEN_METRICS["mme"]["rows"]
    lines = [{"question_id": row["question_id"], "image": row["question_id"], "text": row["question"]} for row in rows]
    put_lines(tmp_path / "MME/llava_mme.jsonl", lines)
    (tmp_path / "textvqa/train_images").mkdir()
    (tmp_path / "textvqa/llava_textvqa_val_v051_ocr.jsonl").write_text("{")
    for row in rows:
        (tmp_path / "MME/MME_Benchmark_release_version" / row["question_id"]).write_bytes(b"")
    status, out, err = command("--benchmark", "all", "--data-dir", tmp_path, "--output", tmp_path / "out")
    assert status == 1
    assert f"gqa: left out, since {tmp_path}/gqa has no llava_gqa_testdev_balanced.jsonl, data/testdev_bal" in err
    problem, last = (line for line in err.splitlines() if line.startswith("error: "))
    assert last == "error: not scored, see above: textvqa"
    assert problem.startswith("error: textvqa: ") and "line 1" in problem
    assert out.startswith("MME, reference protocol: perception ") and "| MME | reference | perception |" in " ".join(
        (tmp_path / "out/results.md").read_text().split()
    )


def test_a_protocol_that_only_some_of_all_benchmarks_have(command, scripted, tmp_path):
    """The others are asked and scored by their own, and named so."""
    golden_mme(tmp_path)
    rows = GOLDEN_METRICS["mme"]["rows"]
    lines = [{"question_id": row["question_id"], "image": row["question_id"], "text": row["question"]} for row in rows]
    put_lines(tmp_path / "MME/llava_mme.jsonl", lines)
    golden_pope(tmp_path)
    for image in [*(row["question_id"] for row in rows), *(f"{i}.jpg" for i in range(120))]:
        folder = "pope/val2014" if "/" not in image else "MME/MME_Benchmark_release_version"
        (tmp_path / folder / image).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / image).write_bytes(b"")
    args = ("--benchmark", "all", "--data-dir", tmp_path, "--output", tmp_path / "out", "--json", "--protocol")
    status, out, _ = command(*args, "lmms-eval")
    protocols = {row["benchmark"]: row["protocol"] for row in map(json.loads, out.splitlines())}
    assert (status, protocols) == (0, {"pope": "lmms-eval", "mme": "reference"})
    status, out, err = command(*args, "circular")
    assert (status, out) == (1, "") and "--protocol circular: none of the benchmarks has it" in err.splitlines()[-1]


def test_files_to_score_with_are_missed_before_questions_are_asked(command, scripted, tmp_path):
    golden_pope(tmp_path)
    (tmp_path / "pope/coco/coco_pope_popular.json").unlink()
    status, out, err = command("--benchmark", "pope", "--data-dir", tmp_path, "--output", tmp_path / "out")
    assert (status, out, scripted.asked) == (1, "", [])
    assert "coco_pope_popular.json: not found (0.4 MB; it is in https://" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("data/testdev_balanced_questions.json", lambda text: text[:300], r"balanced_questions\.json: not JSON"),
        (
            "data/testdev_balanced_questions.json", lambda text: text.replace('"200000004": {', '"300000004": {'),
            r'balanced\.jsonl line 5: the files that it is scored by have no question "200000004" \("What',
        ),
        ("llava_gqa_testdev_balanced.jsonl", lambda text: text, ""),
    ],
)  # fmt: skip
def test_files_to_score_with_are_read_before_questions_are_asked(command, scripted, tmp_path, file, change, says):
    """Those that are invalid or of other questions are not found out when all have been asked."""
    path = write("gqa", tmp_path) / file
    path.write_text(change(path.read_text()))
    status, out, err = command("--benchmark", "gqa", "--data-dir", tmp_path, "--output", tmp_path / "out")
    assert (status, len(scripted.asked)) == ((1, 0) if says else (0, 10))
    if says:
        assert out == "" and re.search(says, err.splitlines()[-1]) and "answers line" not in err


def test_warnings_about_scores_are_not_repeated(command, scripted, tmp_path):
    write("mme", tmp_path)
    status, _, err = command("--benchmark", "mme", "--data-dir", tmp_path, "--output", tmp_path / "out")
    assert status == 0 and err.count("MME has no questions of") == 1


def test_another_process_that_scores_is_left_alone(command, scripted, tmp_path):
    data, output = write_conversations(tmp_path / "data"), tmp_path / "out"
    args = ("--data", data, "--image-folder", tmp_path / "data/images", "--output", output, "--json")
    assert command(*args, "--shard", "0/2")[:2] == (0, "")
    with LockedFile(output / "conversations/.lock"):
        status, out, err = command(*args, "--shard", "1/2")
    assert (status, out) == (0, "") and "in use by a command that scores" in err
    status, out, _ = command(*args)
    assert status == 0 and json.loads(out)["asked"] == 0


def test_the_last_shard_scores_though_questions_failed(command, scripted, tmp_path):
    data, output = write_conversations(tmp_path / "data"), tmp_path / "out"
    args = ("--data", data, "--image-folder", tmp_path / "data/images", "--output", output, "--json")
    (tmp_path / "data/images/1.png").unlink()
    status, out, err = command(*args, "--shard", "1/2")
    assert (status, out) == (1, "") and "conversations: 5 questions left to other shards" in err
    status, out, _ = command(*args, "--shard", "0/2")
    result = json.loads(out)
    assert (status, result["questions"], result["failed"], result["asked"]) == (0, 10, 3, 5)
    assert {path.name for path in (output / "conversations").iterdir()} == {
        ".lock", "answers.jsonl", "results.json", "settings.json", "wrong.html",
    }  # fmt: skip
    status, out, _ = command(*args)  # asks them again
    assert (status, json.loads(out)["asked"], json.loads(out)["failed"]) == (1, 5, 3)


def test_names_of_files_that_are_not_utf_8(command, scripted, tmp_path):
    """Of the checkpoint, the data and the output, which resumes."""
    name = os.fsdecode(b"\xff")
    shutil.copytree(BUNDLED, tmp_path / name)
    write("gqa", tmp_path / name)
    args = ("--benchmark", "gqa", "--data-dir", tmp_path / name, "--checkpoint", tmp_path / name)
    for _ in range(2):
        status, out, err = command(*args, "--output", tmp_path / name / "out", "--json")
        assert (status, json.loads(out)["asked"], len(scripted.asked)) == (0, 10, 10), err
    assert json.loads(out)["model"] == "\N{REPLACEMENT CHARACTER}"


def test_rotations_with_the_same_prompt_are_several_questions(command, scripted, tmp_path):
    """Options may be equal, so that a rotation looks like another one."""
    columns = ("index", "question", "A", "B", "C", "D", "answer", "image")
    row = ("7", "which?", "red", "blue", "red", "blue", "A", "aGVsbG8=")
    (tmp_path / "mmbench_dev_20230712.tsv").write_text("\t".join(columns) + "\n" + "\t".join(row) + "\n")
    args = ("--benchmark", "mmbench", "--data-dir", tmp_path, "--protocol", "circular", "--output", tmp_path / "out")
    for shard in (("--shard", "1/2"), ("--shard", "0/2"), ()):
        status, out, err = command(*args, "--json", *shard)
        assert status == 0 and "without an answer" not in err
    result = json.loads(out)
    assert (result["questions"], result["failed"], len(scripted.asked)) == (1, 0, 4)
    rows = [json.loads(line) for line in (tmp_path / "out/mmbench/answers.jsonl").read_text().splitlines()]
    assert [row["round_id"] for row in rows] == [0, 1, 2, 3] and len({row["prompt"] for row in rows}) == 2


def test_results_of_another_checkpoint_are_left_out(tmp_path, capsys):
    """One in an object store has no fingerprint, and is known by its name."""
    result = {
        "title": "t", "failed": 0, "limit": None, "published": {}, "published_protocol": REFERENCE, "metric": "m",
        "protocol": REFERENCE, "value": 0.5, "stderr": None, "scale": 100, "questions": 1,
    }  # fmt: skip
    settings = {"model": "m", "checkpoint": "gs://a/m", "checkpoint_fingerprint": ""}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        theirs = settings | {"checkpoint": f"gs://{name}/m"}
        (tmp_path / name / "results.json").write_text(json.dumps(result | {"settings": theirs}))
    assert write_summary(tmp_path, settings, [], ["a", "b"]).count("| t ") == 1
    assert "| t " not in write_summary(tmp_path, settings, [], ["b"])
    assert "b/results.json: left out of the table, since another checkpoint answered" in capsys.readouterr().err


def test_conversations_write_nothing_unless_asked(command, scripted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scripted.answer = lambda question: str(len(question))
    data = write_conversations(tmp_path / "data")
    status, out, _ = command("--data", data, "--image-folder", tmp_path / "data/images", "--json")
    result = json.loads(out)
    assert (status, result["accuracy"], result["questions"], result["failed"]) == (0, 0.6, 10, 0)
    assert result["by_kind"]["kind 0"] == {"accuracy": 0.6, "questions": 5}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    status, out, _ = command("--data", data, "--image-folder", tmp_path / "data/images")
    assert [line.split() for line in out.splitlines()] == [
        ["kind", "0", "60.00%", "of", "5"], ["kind", "1", "60.00%", "of", "5"], ["all", "60.00%", "of", "10"],
    ]  # fmt: skip
