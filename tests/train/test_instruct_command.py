"""The command line of `train.datasets.instruct`: what it asks for, batches, images, settings, and wrong input."""

import base64
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from helpers import GOLDEN, contents, files_of_at_most, put_file
from llava_jax import endpoints
from scripted_endpoint import ScriptedEndpoint, read_request
from train.datasets.instruct import __main__ as instruct
from train.datasets.instruct import dialogues as instruct_dialogues
from train.datasets.instruct.coco import read_records
from train.datasets.instruct.messages import OWN

CAPTIONS = GOLDEN / "coco80.jsonl"
NOBODY = "http://127.0.0.1:9/v1"


@pytest.fixture
def few(tmp_path):
    """Four of the records."""
    path = tmp_path / "few.jsonl"
    path.write_text("".join(CAPTIONS.read_text().splitlines(keepends=True)[:4]))
    return path


@pytest.fixture
def run(run_cli, monkeypatch, few, tmp_path):
    """Run the command on the four records: (exit status, standard error). A later flag wins."""
    monkeypatch.setattr(endpoints, "WAITS", (0.01,) * 4)

    def run(*more):
        flags = ("--captions", few, "--model", "m", "--output", tmp_path / "out", *more)
        status, out, err = run_cli(instruct.main, *flags)
        assert out == ""
        return status, err

    return run


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- what is asked for


def test_kinds_and_images_are_added_in_later_runs(run, tmp_path):
    output = tmp_path / "out"
    with ScriptedEndpoint() as script:
        asks = ("--endpoint", script.url)
        assert run(*asks, "--kinds", "detail", "--limit", 2)[0] == 0
        two = {row["id"] for row in read(output / "instruct.json")}
        assert len(script.log) == 2 == len(two)
        _, err = run(*asks, "--kinds", "conversation", "--limit", 3)
        rows = read(output / "instruct.json")
        assert len(script.log) == 5 == len(rows) and two < {row["id"] for row in rows}
        assert "2 detail" in err and "3 still to ask" in err
        assert not (output / "reasoning.json").exists()
        assert run(*asks)[0] == 0
    assert len(script.log) == 12 == len(read(output / "instruct.json"))
    assert {path.name for path in output.iterdir()} == {
        *("answers.jsonl", "settings.json", "rejected.jsonl"),
        *("instruct.json", "conversation.json", "detail.json", "reasoning.json"),
    }


def test_a_larger_limit_draws_those_of_a_smaller_one():
    records = read_records(CAPTIONS)
    drawn = [instruct.draw(records, limit, seed) for limit, seed in ((10, 0), (20, 0), (None, 0), (10, 1))]
    assert [len(found) for found in drawn] == [10, 20, 80, 10]
    assert drawn[0] < drawn[1] < drawn[2] and drawn[3] != drawn[0] != {record.id for record in records[:10]}


def test_changed_captions_are_asked_about_again(run, few):
    with ScriptedEndpoint() as script:
        run("--endpoint", script.url)
        rows = lines(few)
        rows[1]["captions"][0] = "A mouse sits on a bed."
        few.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert run("--endpoint", script.url)[0] == 0
    assert ["mouse" in asked.record for asked in script.log] == [False] * 12 + [True] * 3


def test_seeds_draw_places_of_the_image_and_questions(run, tmp_path):
    def firsts(seed):
        assert run("--endpoint", NOBODY, "--seed", seed)[0] == 0
        return [row["conversations"][0]["value"] for row in read(tmp_path / "out" / "instruct.json")]

    with ScriptedEndpoint() as script:
        run("--endpoint", script.url)
    assert firsts(0) == firsts(0) != firsts(1)


def test_costs_are_estimated_and_shown(run):
    with ScriptedEndpoint() as script:
        _, err = run("--endpoint", script.url, "--price-in", 1e6, "--price-out", 0)
    asking, summary = err.splitlines()
    tokens = [int(line.split(" tokens read")[0].split()[-1].replace(",", "")) for line in (asking, summary)]
    assert asking.startswith("asking m for 12 conversations, an estimated ") and f": ${tokens[0]:,}.00" in asking
    assert summary.endswith(f": ${tokens[1]:,}.00") and 0.7 < tokens[0] / tokens[1] < 1.4


def test_requests_have_the_fields_that_were_asked_for(run, tmp_path):
    def body(*more):
        path = tmp_path / f"{len(more)}.jsonl"
        assert run("--write-batch", path, "--kinds", "detail", *more)[0] == 0
        found = lines(path)[0]["body"]
        assert [message["role"] for message in found["messages"]] == ["system", *["user", "assistant"] * 3, "user"]
        return {name: value for name, value in found.items() if name != "messages"}

    assert body() == {"model": "m", "max_tokens": 1024}
    extra = '{"max_tokens": null, "max_completion_tokens": 5, "chat_template_kwargs": {"a": 1}}'
    assert body("--temperature", 0.5, "--max-tokens", 9, "--extra-body", extra) == {
        "model": "m", "temperature": 0.5, "max_completion_tokens": 5, "chat_template_kwargs": {"a": 1},
    }  # fmt: skip


def test_a_model_that_cannot_do_it_is_not_asked_for_long(run, monkeypatch, tmp_path):
    monkeypatch.setattr(instruct_dialogues, "HOPELESS", 3)
    with ScriptedEndpoint(bad=1.0) as script:
        status, err = run("--endpoint", script.url, "--concurrency", 1)
    assert status == 1 and "error: all of the first 3 dialogues were rejected, the last one because it " in err
    assert len(script.log) == 9 and len(lines(tmp_path / "out" / "answers.jsonl")) == 9


def test_requests_that_fail_are_listed_with_the_reason(run, tmp_path):
    with ScriptedEndpoint() as script:
        script.status, script.error = 400, "too long"
        status, err = run("--endpoint", script.url, "--limit", 1)
        assert status == 0 and "3 rejected (rejected.jsonl)" in err
        found = lines(tmp_path / "out" / "rejected.jsonl")
        assert [row["reasons"] for row in found] == [["400 too long"]] * 3
        script.status = 200
        status, err = run("--endpoint", script.url)
    assert status == 0 and "rejected" not in err and len(read(tmp_path / "out" / "instruct.json")) == 12


# ---------------------------------------------------------------- batches


def test_batches_make_the_same_conversations(run, tmp_path):
    """Requests through files, as often as there is something to ask again, against the endpoint."""
    faulty = ScriptedEndpoint(bad=0.4, stubborn=0.1, seed=2)
    with ScriptedEndpoint(bad=0.4, stubborn=0.1, seed=2) as script:
        run("--endpoint", script.url, "--captions", CAPTIONS, "--limit", 20, "--output", tmp_path / "online")
    read_back = ()
    for i in range(5):
        asked, answers = tmp_path / f"asked{i}.jsonl", tmp_path / f"answers{i}.jsonl"
        more = ("--captions", CAPTIONS, "--limit", 20, "--write-batch", asked)
        status, err = run(*more, *read_back)
        assert status == 0, err
        if not asked.exists():
            break
        answers.write_text("".join(json.dumps(offline(line, faulty)) + "\n" for line in lines(asked)))
        read_back = ("--read-batch", answers)
    assert i == 3 and "nothing is left to ask" in err
    for name in ("instruct.json", "rejected.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "online" / name).read_bytes()


def offline(line: dict, script: ScriptedEndpoint) -> dict:
    """A request of a batch, answered."""
    messages = line["body"]["messages"]
    record, kind, _ = read_request(messages)
    text, finish_reason = script.reply(messages, record, kind)
    body = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}]}
    return {"custom_id": line["custom_id"], "response": {"status_code": 200, "body": body}, "error": None}


def test_results_that_failed_or_are_of_others(run, tmp_path):
    path = tmp_path / "answers.jsonl"
    run("--write-batch", tmp_path / "asked.jsonl")
    asked = lines(tmp_path / "asked.jsonl")
    found = [offline(line, ScriptedEndpoint()) for line in asked]
    found[0] = {"custom_id": asked[0]["custom_id"], "response": None, "error": {"message": "expired"}}
    found[1] |= {"custom_id": "other/detail/0/1"}
    path.write_text("".join(json.dumps(line) + "\n" for line in found))
    for added, left in ((10, "2 still to ask"), (0, "2 still to ask")):
        status, err = run("--read-batch", path)
        assert status == 0 and err.startswith(f"{added} replies added\n") and left in err
        assert "1 request failed, to be asked again; the first is" in err and "expired" in err
        assert "warning: 1 result ignored: not about these captions" in err


# ---------------------------------------------------------------- images


def test_images_go_along_downscaled(run, few, tmp_path):
    rows = lines(few)
    for i, row in enumerate(rows):
        Image.new("RGB", (64, 32), (250, 10, 10)).save(tmp_path / f"{i}.png")
        row |= {"image": f"{i}.png", "captions": row["captions"] if i else [], "instances": []}
    rows[3]["image"] = "none.png"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--image-folder", tmp_path, "--kinds", "detail")
    status, err = run(*more, "--image-side", 32, "--write-batch", tmp_path / "asked.jsonl")
    assert status == 0 and ", not counting images" in err
    asked = [line["body"]["messages"] for line in lines(tmp_path / "asked.jsonl")]
    assert len(asked) == 3  # without the one whose image is missing
    assert [[part["type"] for part in messages[-1]["content"]] for messages in asked] == [
        ["image_url"],
        *[["text", "image_url"]] * 2,
    ]
    url = asked[0][-1]["content"][-1]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
    assert (
        image.size == (32, 16)
        and max(abs(a - b) for a, b in zip(image.getpixel((5, 5)), (250, 10, 10), strict=True)) < 9
    )
    assert asked[0][0]["content"].endswith((OWN / "image.txt").read_text().strip())
    assert "none.png: no such image" in lines(tmp_path / "out" / "rejected.jsonl")[0]["reasons"][0]
    status, err = run(*more, "--write-batch", tmp_path / "again.jsonl")
    assert status == 1 and "was made with images of 32 pixels, not images of 768 pixels; give a new" in err
    shutil.rmtree(tmp_path / "out")
    status, err = run("--kinds", "detail", "--write-batch", tmp_path / "again.jsonl")
    assert status == 1 and "has nothing to ask for detail with: no captions; --image-folder sends" in err


# ---------------------------------------------------------------- prompts and settings


def own_prompts(folder: Path, *, detail="detail_description") -> Path:
    """A folder of prompts in the reference's layout, with its names."""
    for name, kind in (("conversation", "conversation"), (detail, "detail"), ("complex_reasoning", "reasoning")):
        put_file(folder / name / "system_message.txt", f"You write {kind}s.\r\n")
        for i in range(2):
            put_file(folder / name / f"{i:03}_caps.txt", f"A {kind} {i}.")
            put_file(folder / name / f"{i:03}_conv.txt", f"Question:\nIs it {i}?\n===\nAnswer:\nYes.\n===")
    return folder


def test_prompts_may_be_ones_own(run, tmp_path):
    prompts = own_prompts(tmp_path / "prompts")
    assert run("--prompts", prompts, "--write-batch", tmp_path / "asked.jsonl")[0] == 0
    messages = lines(tmp_path / "asked.jsonl")[1]["body"]["messages"]
    assert [message["content"] for message in messages[:3]] == [
        "You write details.", "A detail 0.", "Question:\nIs it 0?\n===\nAnswer:\nYes.\n==="
    ]  # fmt: skip
    put_file(prompts / "detail_description" / "questions.txt", "\nWhat is it?\n")
    put_file(prompts / "conversation" / "system_message.txt", "Changed.")
    status, err = run("--prompts", prompts, "--write-batch", tmp_path / "again.jsonl")
    assert status == 1 and "was made with other prompts of conversation, not these; give a new directory" in err
    shutil.rmtree(prompts / "detail_description")
    more = ("--prompts", prompts, "--kinds", "reasoning", "--output", tmp_path / "other")
    assert run(*more, "--write-batch", tmp_path / "reasoning.jsonl")[0] == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: shutil.rmtree(folder / "complex_reasoning"), "has no folder reasoning or complex_reasoning"),
        (lambda folder: (folder / "conversation/system_message.txt").unlink(), "system_message.txt: no such file"),
        (lambda folder: (folder / "conversation/001_conv.txt").unlink(), "001_conv.txt: no such file"),
        (lambda folder: (folder / "conversation/001_conv.txt").write_text(" \n"), "001_conv.txt: is empty"),
        (lambda folder: (folder / "conversation/001_caps.txt").write_bytes(b"\xff"), "001_caps.txt: not UTF-8"),
        (lambda folder: put_file(folder / "detail_description/questions.txt", "\n"), "questions.txt: is empty"),
        (lambda folder: os.mkfifo(folder / "detail_description/questions.txt"), "questions.txt: a pipe, not a file"),
        (lambda folder: shutil.rmtree(folder), "has no folder"),
    ],
)
def test_prompts_that_are_wrong(change, says, run, tmp_path):
    change(own_prompts(tmp_path / "prompts"))
    status, err = run("--prompts", tmp_path / "prompts", "--endpoint", NOBODY)
    assert status == 1 and says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused(run, tmp_path):
    with ScriptedEndpoint() as script:
        run("--endpoint", script.url)
    before = contents(tmp_path / "out")
    status, err = run("--endpoint", NOBODY, "--model", "other")
    assert status == 1 and err.endswith("was made with m, not other; give a new directory\n") and err.count("\n") == 1
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "give --endpoint, --write-batch or --read-batch"),
        (("--endpoint", NOBODY, "--write-batch", "a"), "leave out --endpoint"),
        (("--endpoint", NOBODY, "--kinds", "detail,poem"), "--kinds 'detail,poem': must be some of conversation,"),
        (("--endpoint", NOBODY, "--kinds", ""), "--kinds '': must be some of"),
        (("--endpoint", NOBODY, "--kinds", "none"), "there is nothing to ask for"),
        (("--endpoint", NOBODY, "--price-in", "1"), "--price-in and --price-out go together"),
        (("--endpoint", NOBODY, "--extra-body", "[]"), "--extra-body '[]': must be a JSON object without model"),
        (("--endpoint", NOBODY, "--extra-body", '{"model": "x"}'), "must be a JSON object without model, messages"),
        (("--endpoint", NOBODY, "--extra-body", "{"), "must be a JSON object: not JSON"),
        (("--endpoint", NOBODY, "--concurrency", "0"), "--concurrency 0: must be a whole number from 1"),
        (("--endpoint", NOBODY, "--output", "gs://a/b"), "--output gs://a/b: must be a local directory"),
        (("--endpoint", NOBODY, "--captions", "none.json"), "none.json: cannot be read"),
        (("--endpoint", NOBODY, "--image-folder", "none"), "--image-folder none: no such directory"),
        (("--endpoint", "nowhere"), "nowhere: is not the URL of an endpoint"),
        (("--endpoint", NOBODY), f"{NOBODY}: cannot be reached (All connection attempts failed), 3 times"),
        (("--write-batch", "none/a.jsonl"), "none/a.jsonl: cannot be written"),
        (("--read-batch", "none.jsonl"), "none.jsonl: cannot be read"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(more, says, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    status, err = run("--output", "a/b/out", *more)
    *notes, error = err.splitlines()
    assert status == 1 and error.startswith("error: ") and says in error and len(error) < 300
    asks = ("asking m for 12 conversations, ", "writing requests to m for 12 conversations, ")
    assert all(line.startswith(asks) for line in notes)
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_the_results_that_were_there(run, tmp_path):
    with ScriptedEndpoint() as script:
        run("--endpoint", script.url)
    before = contents(tmp_path / "out")
    with files_of_at_most(1000):
        status, err = run("--endpoint", NOBODY, "--seed", 1)
    assert (status, err.splitlines()[-1]) == (1, f"error: --output {tmp_path}/out: cannot be written (File too large)")
    assert contents(tmp_path / "out") == before


def test_an_output_directory_with_something_else_is_refused(run, tmp_path):
    put_file(tmp_path / "out" / "thesis.txt")
    status, err = run("--endpoint", NOBODY)
    assert status == 1 and "out: holds something else; give a new directory" in err
    put_file(tmp_path / "file")
    assert "file: cannot be used" in run("--endpoint", NOBODY, "--output", tmp_path / "file")[1]
    put_file(tmp_path / "half" / "settings.json", '{"model": "m"}')
    assert "settings.json: image_side is missing" in run("--endpoint", NOBODY, "--output", tmp_path / "half")[1]
    assert contents(tmp_path / "half") == {"settings.json": b'{"model": "m"}'}
