"""`python -m infer.generate` as people run it: answers, files of questions, and one clear line for bad input."""

import base64
import importlib
import json
import re
import shutil
import subprocess
import sys
import threading

import pytest
from PIL import Image

from helpers import (
    GOLDEN,
    QUESTION,
    ROOT,
    golden_engine,
    golden_json,
    golden_tensors,
    user_environment,
    write_checkpoint,
)
from infer import generate
from llava_jax import console

CHECKPOINT = GOLDEN / "checkpoints/v1.6-mistral"
IMAGE = GOLDEN / "images/0_64x48.png"
MODEL = ("--checkpoint", CHECKPOINT, "--max-new-tokens", "8", "--mesh", "tensor=8")
ONE = (*MODEL, "--prompt", QUESTION)


@pytest.fixture
def answers(run_cli):
    return lambda *args: run_cli(generate.main, *args)


# ---------------------------------------------------------------- one question


def test_as_a_new_user_runs_it():
    """In a process of its own, on one device, without our environment."""
    run = subprocess.run(
        [sys.executable, "-m", "infer.generate", "--checkpoint", CHECKPOINT, "--image", IMAGE, "--prompt", QUESTION,
         "--max-new-tokens", "24"],
        capture_output=True, text=True, env=user_environment(), cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    want = golden_engine("v1.6-mistral").ask(QUESTION, IMAGE, max_new_tokens=24).text
    assert run.stdout.strip("\n") == want
    assert run.stderr.splitlines() == [
        "template mistral_instruct (for a Mistral decoder; --template overrides it); cpu, mesh data=1,fsdp=1,tensor=1"
    ]


def test_json(answers):
    status, out, err = answers(*ONE, "--image", IMAGE, "--json")
    assert status == 0, err
    [line] = out.splitlines()
    got = json.loads(line)
    case = golden_json("checkpoints/v1.6-mistral/expected.greedy.json")[0]
    assert got["token_ids"] == case["output_ids"][1:9]
    assert got["prompt_tokens"] == len(case["input_ids"]) - 1 + got["image_tokens"]
    assert {"text", "cached_tokens", "compilations", "prefill_seconds", "decode_tokens_per_second"} < got.keys()


@pytest.mark.parametrize("flag", ["--stream", "--no-stream"])
def test_streamed_or_not_the_text_is_the_same(answers, flag):
    _, out, _ = answers(*ONE, "--image", IMAGE, flag)
    assert out.strip("\n") == golden_engine("v1.6-mistral").ask(QUESTION, IMAGE, max_new_tokens=8).text


def test_several_images_system_and_template(answers):
    args = (
        "--image",
        IMAGE,
        "--image",
        GOLDEN / "images/3_90x30.png",
        "--template",
        "vicuna_v1",
        "--system",
        "Be brief.",
    )
    status, out, err = answers(*ONE, *args, "--json")
    assert status == 0
    assert "template vicuna_v1 (as requested);" in err
    assert json.loads(out)["image_tokens"] > 70


# ---------------------------------------------------------------- bad input


def make_truncated(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(IMAGE.read_bytes()[:-500])
    return path


def make_image(tmp_path, size, mode="RGB"):
    path = tmp_path / "odd.png"
    Image.new(mode, size).save(path)
    return path


def make_text(tmp_path):
    path = tmp_path / "text.png"
    path.write_text("not a picture")
    return path


BAD = {
    "missing image": (lambda t: ("--image", "nowhere.png"), "nowhere.png: no such image"),
    "truncated image": (lambda t: ("--image", make_truncated(t)), "cut.png: broken image"),
    "no image": (lambda t: ("--image", make_text(t)), "text.png: not an image"),
    "1x1": (lambda t: ("--image", make_image(t, (1, 1))), "1x1 pixels"),
    "1x20000": (lambda t: ("--image", make_image(t, (1, 20000))), "1x20000 pixels"),
    "bomb": (lambda t: ("--image", make_image(t, (20000, 20000), "1")), "pixels; scale it down"),
    "more marks": (lambda t: ("--image", IMAGE, "--prompt", "<image> <image>"), "2 <image> tokens for 1 images"),
    "fewer marks": (
        lambda t: ("--image", IMAGE, "--image", IMAGE, "--prompt", "<image>"), "1 <image> tokens for 2 images",
    ),
    "marks and no image": (lambda t: ("--prompt", "<image> hi"), "1 <image> tokens for 0 images"),
    "too long": (lambda t: ("--prompt", "word " * 900), "at most 511 fit the model's context of 512"),
    "unknown template": (lambda t: ("--template", "v9"), "known: chatml_direct"),
    "no checkpoint": (lambda t: ("--checkpoint", t / "none"), "no such directory"),
    "checkpoint as a URL": (lambda t: ("--checkpoint", "file:///none"), "file:// is not a supported object store"),
    "vision tower of no name": (lambda t: ("--vision-tower", ""), "not a CLIP directory"),
    "broken data URL": (lambda t: ("--image", "data:image/png;base64," + "A" * 9999), "AAA: not an image"),
    "file of a host": (lambda t: ("--image", "file://host/a.png"), "a file on host host"),
    "long flag": (lambda t: ("--top-k", "x" * 9999), "--top-k 'xxx"),
    "mesh": (lambda t: ("--mesh", "data=3"), "needs 3 devices, here are 8"),
    "mesh spelling": (lambda t: ("--mesh", "8"), "write it as data=1,fsdp=8"),
    "temperature": (lambda t: ("--temperature", "-1"), "temperature"),
    "no question": (lambda t: ("--questions", t / "q.jsonl"), "either --prompt or --questions"),
    "two prompts": (lambda t: ("--prompt", "a", "--prompt", "b"), "--prompt is given 2 times"),
    "answers to no file": (lambda t: ("--answers", t / "a.jsonl"), "--answers needs --questions"),
    "folder of no file": (lambda t: ("--image-folder", t), "--image-folder needs --questions"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_status_1(answers, tmp_path, name):
    make, says = BAD[name]
    flags = make(tmp_path)
    status, out, err = answers(*(MODEL if "--prompt" in flags else ONE), *flags)
    lines = [line for line in err.splitlines() if not line.startswith("template ")]
    assert (status, out, len(lines)) == (1, "", 1), err
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert not re.search("x{101}|A{101}", lines[0])


@pytest.mark.parametrize(
    "module",
    ["infer.generate", "infer.evaluate", "convert.__main__", "train.preview", "train.datasets.shapes.__main__"],
)
@pytest.mark.parametrize("flags", [["--image"], ["to-orbax"], ["--nope", "1"]])
def test_wrong_flags_are_one_line(module, flags, run_cli):
    status, out, err = run_cli(importlib.import_module(module).main, *flags)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ") and "--help" in err


def test_bad_checkpoint_is_one_line_too(answers, tmp_path):
    tensors = golden_tensors("v1.6-mistral")
    del tensors["model.norm.weight"]
    directory = write_checkpoint(tmp_path / "c", tensors, "v1.6-mistral")
    status, _, err = answers(*ONE, "--checkpoint", directory)
    assert (status, err.count("\n")) == (1, 1)
    assert "missing tensors: model.norm.weight" in err
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    status, _, err = answers(*ONE, "--checkpoint", directory)
    assert (status, err.count("\n")) == (1, 1)
    assert "truncated" in err


def test_no_traceback_in_a_process_of_its_own():
    run = subprocess.run(
        [sys.executable, "-m", "infer.generate", "--checkpoint", "nowhere", "--prompt", "hi"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (1, "", "error: nowhere: no such directory\n")


def test_what_takes_long_is_noted_while_it_does(monkeypatch):
    noted, lines = threading.Event(), []
    monkeypatch.setattr(console, "note", lambda line: (lines.append(line), noted.set()))
    with console.elapsed("compiling", every=0.001):
        assert noted.wait(60)
    assert lines[0].startswith("compiling: 0:")
    told = len(lines)
    with console.elapsed("compiling"):  # but not what is quick
        pass
    assert len(lines) == told


def test_one_is_singular(capsys):
    assert [console.plural(n, "row") for n in (0, 1, 2048)] == ["0 rows", "1 row", "2,048 rows"]
    for total in (1, 2):
        with console.Progress("training", total, "updates", every=0.0) as bar:
            bar.advance()
    said = capsys.readouterr().err
    assert "1 of 1 update " in said and "1 of 2 updates " in said


# ---------------------------------------------------------------- many questions


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDEN / "images", tmp_path / "images")
    return tmp_path


def write_questions(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def ask_many(answers, folder, *more):
    return answers(
        "--checkpoint", CHECKPOINT, "--questions", folder / "q.jsonl", "--image-folder", folder / "images",
        "--answers", folder / "a.jsonl", "--max-new-tokens", "8", "--batch-size", "4", "--mesh", "tensor=8", *more,
    )  # fmt: skip


def read_answers(folder):
    return [json.loads(line) for line in (folder / "a.jsonl").read_text().split("\n") if line]


def questions():
    rows = [
        {"question_id": i, "image": p.name, "text": f"{QUESTION} {i}"}
        for i, p in enumerate(sorted((GOLDEN / "images").iterdir()))
    ]
    rows.append({"question_id": "text", "text": "Hello"})
    rows.append({"question_id": "two", "image": [rows[0]["image"], rows[3]["image"]], "text": "<image> or <image>?"})
    return rows


def test_questions_are_answered_in_the_reference_format(answers, folder):
    rows = questions()
    write_questions(folder / "q.jsonl", rows)
    status, out, err = ask_many(answers, folder)
    assert (status, out) == (0, ""), err
    got = {a["question_id"]: a for a in read_answers(folder)}
    assert got.keys() == {r["question_id"] for r in rows}
    engine = golden_engine("v1.6-mistral")
    for row in rows:
        names = row.get("image", [])
        image_files = [GOLDEN / "images" / n for n in ([names] if isinstance(names, str) else names)]
        answer = got[row["question_id"]]
        assert answer["text"] == engine.ask(row["text"], image_files, max_new_tokens=8).text
        assert list(answer) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
        assert (answer["prompt"], answer["model_id"], answer["metadata"]) == (row["text"], "v1.6-mistral", {})
    assert len({a["answer_id"] for a in got.values()}) == len(rows)


def test_several_questions_under_one_id(answers, folder):
    """As MME asks them. Separators that only Python takes for line ends, and a byte order mark, are no trouble."""
    rows = [{"question_id": "a.png", "text": text} for text in ("Is it red?", "Is it\u2028blue?", "Is it red?")]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    (folder / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert ask_many(answers, folder)[0] == 0
    assert sorted(a["prompt"] for a in read_answers(folder)) == sorted(row["text"] for row in rows)
    status, _, err = ask_many(answers, folder)
    assert (status, err) == (0, "all 3 questions already have answers\n")


def test_images_of_questions_may_be_urls_of_files_and_data(answers, folder):
    file = folder / "images" / IMAGE.name
    data = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    images = [IMAGE.name, str(file), f"file://{file}", data, [data]]
    rows = [{"question_id": i, "image": image, "text": QUESTION} for i, image in enumerate(images)]
    rows += [{"question_id": 5, "images": [IMAGE.name], "text": QUESTION}]
    bad = ["http://x/a.png", f"file://{folder}/a.jsonl", "data:image/png;base64,?" + "A" * 9999, "../q.jsonl"]
    rows += [{"question_id": 6 + i, "image": image, "text": QUESTION} for i, image in enumerate(bad)]
    rows += [{"question_id": 10, "video": "a.mp4", "text": QUESTION}]
    write_questions(folder / "q.jsonl", rows)
    status, _, err = ask_many(answers, folder)
    assert (status, "error: 5 questions were not answered" in err) == (1, True)
    assert len({answer["text"] for answer in read_answers(folder)}) == 1
    assert sorted(answer["question_id"] for answer in read_answers(folder)) == [0, 1, 2, 3, 4, 5]
    says = [
        "images in data files are not downloaded",
        "is outside the image folder",
        "invalid base64",
        "is outside the image folder",
        "video: video is not supported",
    ]
    for number, what in enumerate(says, 7):
        assert re.search(f"q.jsonl line {number}: .*{what}", err)
    assert "A" * 101 not in err


def test_a_second_run_does_only_what_is_left(answers, folder):
    write_questions(folder / "q.jsonl", questions()[:3])
    ask_many(answers, folder)
    first = (folder / "a.jsonl").read_text()
    (folder / "a.jsonl").write_text(first + '{"question_id": 3, "text": "cut off whi')  # killed while writing
    write_questions(folder / "q.jsonl", questions()[:5])
    status, _, err = ask_many(answers, folder)
    assert status == 0
    assert "3 of 5 already have answers" in err
    assert (folder / "a.jsonl").read_text().startswith(first)
    assert [a["question_id"] for a in read_answers(folder)][:3] == [
        a["question_id"] for a in map(json.loads, first.splitlines())
    ]
    assert sorted(a["question_id"] for a in read_answers(folder)) == [0, 1, 2, 3, 4]


def test_bad_lines_are_named_the_rest_is_answered_and_the_status_says_so(answers, folder):
    rows = [
        *questions()[:2], "{not json", {"question_id": 9}, {"question_id": 10, "text": "x", "image": "missing.jpg"},
        {"question_id": 0, "text": "again"}, {"question_id": 11, "text": "<image><image>", "image": "0_64x48.png"},
        {"question_id": 12, "text": "last"},
    ]  # fmt: skip
    write_questions(folder / "q.jsonl", rows)
    status, _, err = ask_many(answers, folder)
    assert status == 1
    assert sorted(a["question_id"] for a in read_answers(folder)) == [0, 0, 1, 12]
    for n in (3, 4, 5, 7):
        assert f"q.jsonl line {n}: " in err
    assert "error: 4 questions were not answered" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f: (f / "q.jsonl").write_text(""), "has no questions"),
        (lambda f: (f / "q.jsonl").write_text("\n\n"), "has no questions"),
        (lambda f: None, "cannot be read"),
        (lambda f: (f / "q.jsonl").write_bytes(b"\xff\xfe"), "q.jsonl: not UTF-8"),
        (lambda f: (write_questions(f / "q.jsonl", questions()), shutil.rmtree(f / "images")), "no such directory"),
        (
            lambda f: (write_questions(f / "q.jsonl", questions()), (f / "a.jsonl").write_text("thesis\n")),
            "is not an answers file",
        ),
    ],
)
def test_bad_files_stop_before_the_model_is_loaded(answers, folder, make, says):
    make(folder)
    before = (folder / "a.jsonl").read_text() if (folder / "a.jsonl").exists() else None
    status, out, err = ask_many(answers, folder)
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert says in err
    assert ((folder / "a.jsonl").read_text() if (folder / "a.jsonl").exists() else None) == before
