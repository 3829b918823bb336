"""A language model writes conversations: asked for each once, resumed at any kill, its answers used or rejected."""

import collections
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from helpers import GOLDEN, ROOT, user_environment
from llava_jax import endpoints
from scripted_endpoint import ScriptedEndpoint
from train import __main__ as training_command
from train import preview
from train.datasets.instruct import __main__ as instruct
from train.datasets.instruct.coco import read_records
from train.datasets.instruct.messages import KINDS, describe
from training import flags

CAPTIONS = GOLDEN / "coco80.jsonl"
RECORDS = read_records(CAPTIONS)
FAULTY = dict(lost=0.1, bad=0.2, stubborn=0.03, seed=7)
RESULTS = [f"{name}.json" for name in (*KINDS, "instruct")] + ["rejected.jsonl"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run makes of the 80 records, with an endpoint that often fails; and the requests."""
    output = tmp_path_factory.mktemp("whole") / "out"
    with ScriptedEndpoint(**FAULTY) as script, pytest.MonkeyPatch.context() as patch:
        patch.setattr(endpoints, "WAITS", (0.01,) * 4)
        command = f"instruct --captions {CAPTIONS} --model m --output {output} --endpoint {script.url}"
        patch.setattr("sys.argv", command.split())
        assert instruct.main() == 0
    return output, script.log


def results(output) -> dict[str, bytes]:
    return {name: (output / name).read_bytes() for name in RESULTS}


def read(output, name="instruct.json") -> list[dict]:
    text = (output / name).read_text()
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


def answered(log) -> collections.Counter:
    return collections.Counter((a.record, a.kind, a.attempt) for a in log if a.arrival in ("ok", "slow"))


# ---------------------------------------------------------------- the 80 records


def test_three_kinds_of_conversations(whole):
    output, _ = whole
    rows, rejected = read(output), read(output, "rejected.jsonl")
    by_kind = {kind: read(output, f"{kind}.json") for kind in KINDS}
    assert len(rows) + len(rejected) == 240 == sum(map(len, by_kind.values())) + len(rejected)
    assert 1 <= len(rejected) <= 20 and min(map(len, by_kind.values())) > 70
    order = [record.id for record in RECORDS]
    assert [order.index(row["id"]) for row in rows] == sorted(order.index(row["id"]) for row in rows)
    for kind, found in by_kind.items():
        for row in found:
            assert row.keys() == {"id", "image", "conversations"} and row["image"] == f"{row['id']}.jpg"
            speakers = [turn["from"] for turn in row["conversations"]]
            assert speakers == ["human", "gpt"] * (len(speakers) // 2)
            assert len(speakers) >= 4 if kind == "conversation" else len(speakers) == 2
            texts = [turn["value"] for turn in row["conversations"]]
            assert texts[0].startswith("<image>\n") != texts[0].endswith("\n<image>")
            assert sum(text.count("<image>") for text in texts) == 1
    first = sum(row["conversations"][0]["value"].startswith("<image>") for row in rows)
    assert 0.35 < first / len(rows) < 0.65
    assert len({row["conversations"][0]["value"].replace("<image>", "") for row in by_kind["detail"]}) >= 16


def test_malformed_answers_are_retried_and_then_rejected_with_reasons(whole):
    output, log = whole
    assert set(answered(log).values()) == {1}
    attempts = collections.Counter(a.attempt for a in log if a.arrival == "ok")
    assert attempts[2] > 20 and attempts[3] > 2 and max(attempts) == 3
    records = {record.id: record for record in RECORDS}
    for row in read(output, "rejected.jsonl"):
        assert len(row["reasons"]) == 3 and all(row["reasons"]) and row["kind"] in KINDS
        text = describe(records[row["id"]], boxes=row["kind"] != "conversation")
        assert answered(log)[text, row["kind"], 3] == 1


def test_conversations_are_asked_for_with_captions_alone(whole):
    captions = {"\n".join(record.captions) for record in RECORDS}
    without_boxes = sum(not record.boxes for record in RECORDS)
    for kind in KINDS:
        records = {asked.record for asked in whole[1] if asked.kind == kind}
        assert len(records & captions) == (80 if kind == "conversation" else without_boxes) and len(records) == 80


def test_a_second_run_asks_nothing_and_writes_the_same(whole, run_cli, tmp_path):
    output = shutil.copytree(whole[0], tmp_path / "out")
    for name in RESULTS:
        (output / name).unlink()
    args = ("--captions", CAPTIONS, "--model", "m", "--output", output, "--endpoint", "http://127.0.0.1:9/v1")
    status, out, err = run_cli(instruct.main, *args)
    assert (status, out) == (0, "") and err.startswith("nothing is left to ask\n")
    assert results(output) == results(whole[0])


def test_killed_at_random_moments_it_asks_nothing_twice(whole, tmp_path):
    output, path, pick = tmp_path / "out", tmp_path / "out" / "answers.jsonl", random.Random(5)
    log, kept, kills = [], set(), [*[signal.SIGKILL] * 3, signal.SIGTERM]
    with ScriptedEndpoint(**FAULTY, delay=0.05) as script:
        command = f"{sys.executable} -m train.datasets.instruct --captions {CAPTIONS} --model m --output {output} "
        command = [*command.split(), "--endpoint", script.url, "--concurrency", "6"]
        for number in [*kills, None]:
            before, size = len(script.log), path.stat().st_size if path.exists() else 0
            process = subprocess.Popen(command, cwd=ROOT, env=user_environment(), stderr=subprocess.PIPE, text=True)
            if number:
                while process.poll() is None and not (path.exists() and path.stat().st_size > size):
                    time.sleep(0.005)
                time.sleep(pick.uniform(0, 0.4))
                process.send_signal(number)
            said = process.communicate()[1]
            assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, None: 0}[number], said
            assert not kept & answered(script.log[before:]).keys()
            kept = kept_by(output)
            log.append(len(kept))
            if number == signal.SIGTERM:
                assert "stopped: " in said and said.count("\n") <= 4
    assert log == sorted(log) and log[0] < log[-2] < log[-1] == len(kept)
    assert results(output) == results(whole[0])
    assert {file.name for file in output.iterdir()} == {file.name for file in whole[0].iterdir()}


def kept_by(output) -> set[tuple[str, str, int]]:
    """The requests that the file of replies has, as the endpoint's log names them."""
    names, kept = {record.id: record for record in RECORDS}, set()
    for line in (output / "answers.jsonl").read_bytes().split(b"\n")[:-1]:
        name, kind, _, attempt = json.loads(line)["id"].split("/")
        kept.add((describe(names[name], boxes=kind != "conversation"), kind, int(attempt)))
    return kept


# ---------------------------------------------------------------- the result trains


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for record in RECORDS:
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(folder / record.image)
    return folder


def test_preview_shows_it(whole, images, run_cli):
    data = ("--data", whole[0] / "instruct.json", "--image-folder", images, "--template", "v1")
    status, out, err = run_cli(preview.main, *data, "--checkpoint", GOLDEN / "checkpoints/v1.5-llama", "-n", 300)
    assert (status, err) == (0, "")
    assert out.count("row ") >= len(read(whole[0])) and "[[ A donut shop is full of different flavors" in out


def test_a_model_trains_on_it(whole, images, run_cli, on_one_device, tmp_path):
    data = ("--data", whole[0] / "instruct.json", "--image-folder", images, "--template", "v1")
    arguments = flags(images, tmp_path / "run", *data, "--preset", "v1.5-finetune", "--global-batch-size", 8)
    status, _, err = run_cli(training_command.main, *arguments, "--max-length", 512, "--steps", 3)
    assert status == 0, err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and lines[-1]["loss"] < lines[0]["loss"]
