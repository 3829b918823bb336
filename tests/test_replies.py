"""The file of replies survives whatever stops a command; batch files hold what engines read and write."""

import json
import os

import pytest

from helpers import contents, files_of_at_most, put_file
from llava_jax import batch_files
from llava_jax.batch_files import Failure, read_results, write_batches
from llava_jax.console import InputError
from llava_jax.json_files import decode_json
from llava_jax.replies import Completion, Replies, Reply

REPLIES = [Reply("a", 'one\n"é"', "stop", 10, 2, "m"), Reply("b", "two", "length", 20, 3, "m"), Reply("c/1", "")]


@pytest.fixture
def path(tmp_path):
    with Replies(tmp_path / "replies.jsonl") as replies:
        for reply in REPLIES:
            replies.append(reply)
    return tmp_path / "replies.jsonl"


def test_replies_are_read_back(path):
    with Replies(path) as replies:
        assert [replies.get(name) for name in replies] == REPLIES
        assert (len(replies), replies.prompt_tokens, replies.completion_tokens) == (3, 30, 5)
        assert [*replies.models] == ["m", ""]
        assert "a" in replies and "d" not in replies and replies.get("d") is None


def test_a_line_that_a_killed_command_left_incomplete_is_dropped(path):
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        with Replies(path) as replies:
            assert [*replies] == ["a", "b"]
            replies.append(REPLIES[2])
        assert path.read_bytes() == whole


def test_a_line_that_is_too_long_is_no_incomplete_one(path, monkeypatch):
    """Nothing after it is dropped."""
    whole = path.read_bytes()
    monkeypatch.setattr("llava_jax.replies.MAX_LINE", 20)
    with pytest.raises(InputError, match="line 1: not JSON"):
        Replies(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"no replies\n", "line 1: not JSON"),
        (b"no replies", "line 1: not JSON"),
        (b'{"id":"a"}\n', "line 1: text is missing"),
        (b'{"id":1,"text":""}\n', "line 1: id: expected a string, got an integer"),
        (b'{"id":"a","text":""}\n[]\n', "line 2: expected an object, got a list"),
        (b'{"id":"a","text":"\xff"}\n', "line 1: not JSON"),
        (b'{"id":"a","x":' + b"[" * 10**5 + b"\n", "line 1: not JSON"),
    ],
)
def test_another_file_is_refused_and_stays(data, says, tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError) as refused:
        Replies(path)
    assert str(refused.value).startswith(f"{path} {says}") and path.read_bytes() == data


def test_where_no_file_can_be(tmp_path):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, says in (
        ("directory", "a directory"),
        ("pipe", "a pipe"),
        ("none/x", "No such file"),
        ("\0", "cannot be"),
    ):
        with pytest.raises(InputError, match=says):
            Replies(tmp_path / name)


def test_one_command_at_a_time(path):
    with Replies(path), pytest.raises(InputError, match="in use by another command"):
        Replies(path)


def test_a_full_disk_leaves_whole_lines(path):
    size = path.stat().st_size
    with Replies(path) as replies, files_of_at_most(size + 20), pytest.raises(InputError, match="File too large"):
        replies.append(Reply("d", "x" * 100))
    assert path.stat().st_size == size


def test_nothing_is_left_of_no_replies(tmp_path):
    with Replies(tmp_path / "replies.jsonl"):
        pass
    assert contents(tmp_path) == {}


def test_a_completion_is_read_as_others_serve_it():
    def reply(**fields) -> Reply:
        return decode_json(json.dumps({"id": "x", "created": 1, **fields}).encode(), Completion, "").reply("r")

    choice = {"index": 0, "message": {"role": "assistant", "content": " A cat.\n"}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    assert reply(choices=[choice], usage=usage, model="m") == Reply("r", "A cat.", "stop", 5, 7, "m")
    assert reply(choices=[choice | {"finish_reason": None}], usage=None) == Reply("r", "A cat.")
    refused = {"message": {"content": None, "refusal": "No."}}
    assert reply(choices=[refused, choice]) == Reply("r", "No.")
    assert reply(choices=[{"message": {"content": None, "reasoning_content": "hm"}}]) == Reply("r", "")
    for wrong in ([], [{"message": {"content": 1}}], [{}], None):
        with pytest.raises(InputError):
            reply(choices=wrong)


# ---------------------------------------------------------------- batch files

BODY = {"model": "m", "messages": [{"role": "user", "content": "é"}]}


def test_batches_are_as_the_api_defines_them(tmp_path):
    assert write_batches(tmp_path / "a.jsonl", [("x/1", BODY)]) == [tmp_path / "a.jsonl"]
    line = {"custom_id": "x/1", "method": "POST", "url": "/v1/chat/completions", "body": BODY}
    assert json.loads((tmp_path / "a.jsonl").read_text()) == line


def test_batches_are_as_large_as_allowed(tmp_path, monkeypatch):
    assert (batch_files.MAX_REQUESTS, batch_files.MAX_BYTES) == (50_000, 200_000_000)
    monkeypatch.setattr(batch_files, "MAX_REQUESTS", 3)
    paths = write_batches(tmp_path / "a.jsonl", [(str(i), BODY) for i in range(7)])
    assert [path.name for path in paths] == ["a.jsonl", "a-2.jsonl", "a-3.jsonl"]
    assert [len(path.read_text().splitlines()) for path in paths] == [3, 3, 1]
    size = len(paths[2].read_bytes())
    monkeypatch.setattr(batch_files, "MAX_BYTES", 2 * size + 1)
    paths = write_batches(tmp_path / "b.jsonl", [(str(i), BODY) for i in range(5)])
    assert [len(path.read_text().splitlines()) for path in paths] == [2, 2, 1]


def test_batches_appear_together_or_not_at_all(tmp_path, monkeypatch):
    def failing():
        yield "a", BODY
        raise InputError("a.jpg: no such image")

    put_file(tmp_path / "there-2.jsonl")
    monkeypatch.setattr(batch_files, "MAX_REQUESTS", 1)
    before = contents(tmp_path)
    for name, asked, says in (
        ("a.jsonl", failing(), "no such image"),
        ("there-2.jsonl", [("a", BODY)], "exists already"),
        ("there.jsonl", [("a", BODY), ("b", BODY)], "exists already"),
        ("none/a.jsonl", [("a", BODY)], "cannot be written"),
        ("\0", [("a", BODY)], "cannot be written"),
    ):
        with pytest.raises(InputError, match=says):
            write_batches(tmp_path / name, asked)
    monkeypatch.setattr(batch_files, "MAX_BYTES", 50)
    with pytest.raises(InputError, match="a batch file may have at most 50"):
        write_batches(tmp_path / "a.jsonl", [("a", BODY)])
    assert contents(tmp_path) == before


def test_results_are_as_the_api_and_vllm_write_them(tmp_path):
    body = {"choices": [{"message": {"content": "A cat."}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}}
    lines = [
        {
            "id": "b",
            "custom_id": "a/1",
            "response": {"status_code": 200, "request_id": "", "body": body},
            "error": None,
        },
        {"custom_id": "b/1", "response": {"status_code": 400, "body": {"error": {"message": "no"}}}, "error": None},
        {"custom_id": "c/1", "response": None, "error": {"code": "batch_expired", "message": "late"}},
        {"custom_id": "d/1", "response": {"status_code": 200, "body": {"choices": []}}},
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    reply, *failures = read_results(path)
    assert reply == Reply("a/1", "A cat.", "stop", 3)
    assert all(isinstance(failure, Failure) for failure in failures)
    assert [failure.id for failure in failures] == ["b/1", "c/1", "d/1"]
    assert failures[0].reason == 'status 400: {"error": {"message": "no"}}' and "batch_expired" in failures[1].reason
    assert failures[2].reason == "the reply has no choices"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{\n", "line 1: not JSON"),
        (b"\n[]\n", "line 2: expected an object"),
        (b'{"custom_id": "a"}', "line 1: has neither a response nor an error"),
        (json.dumps({"custom_id": "a", "body": BODY}).encode(), "is it a file of results?"),
        (b'{"custom_id": 1}', "custom_id: expected a string"),
    ],
)
def test_other_files_are_no_results(data, says, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError) as refused:
        [*read_results(path)]
    assert says in str(refused.value)
    for where in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match=f"{where}: "):
            [*read_results(where)]
