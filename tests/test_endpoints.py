"""Requests to a language model are answered, asked again or given up, as the failure deserves; and replies are kept."""

import collections
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from helpers import ROOT
from llava_jax import endpoints
from llava_jax.console import InputError
from llava_jax.endpoints import Endpoint, Request, request_body
from llava_jax.replies import Prices, Replies, Reply
from scripted_endpoint import LOSSES, ScriptedEndpoint


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoints, "WAITS", (0.01,) * 4)


@pytest.fixture
def replies(tmp_path):
    with Replies(tmp_path / "replies.jsonl") as replies:
        yield replies


def requests(number: int, *, first: int = 0) -> list[Request]:
    def messages(i: int) -> list:
        return [{"role": "system", "content": ""}, {"role": "user", "content": f"A cat on {i} chairs."}]

    return [Request(f"r{i}", lambda i=i: messages(i)) for i in range(first, first + number)]


def ask(url: str, replies: Replies, asked: list[Request], *, follow_up=lambda reply: None, **settings):
    endpoint = Endpoint(url, "m", **{"concurrency": 4, "timeout": 5.0} | settings)
    return endpoint.ask(asked, replies, total=len(asked), follow_up=follow_up)


def test_all_are_answered_once(replies):
    with ScriptedEndpoint() as script:
        outcome = ask(script.url, replies, requests(40))
    assert (outcome.answered, outcome.failed, outcome.signal) == (40, {}, None)
    assert set(replies) == {f"r{i}" for i in range(40)}
    assert collections.Counter(asked.record for asked in script.log) == {f"A cat on {i} chairs.": 1 for i in range(40)}
    reply = replies.get("r7")
    assert "A cat on 7 chairs." in reply.text and reply.finish_reason == "stop" and reply.model == "scripted-1"
    assert replies.prompt_tokens == sum(replies.get(name).prompt_tokens for name in replies) > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_what_may_pass_is_asked_again(loss, replies, monkeypatch):
    monkeypatch.setattr("scripted_endpoint.LOSSES", (loss,))
    with ScriptedEndpoint(lost=1.0, slow=3.0) as script:
        outcome = ask(script.url, replies, requests(4), timeout=1.0 if loss == "slow" else 30.0)
    assert (outcome.answered, outcome.failed) == (4, {})
    # An answer that came too late is logged too, but not by the time that the third one came in time.
    assert collections.Counter(a.record for a in script.log if a.arrival == "ok") == {
        f"A cat on {i} chairs.": 1 for i in range(4)
    }


def test_an_endpoint_is_asked_when_it_says(replies, monkeypatch):
    monkeypatch.setattr("scripted_endpoint.LOSSES", ("429",))
    with ScriptedEndpoint(lost=1.0, retry_after=0.3) as script:
        ask(script.url, replies, requests(1))
    assert len(script.log) == 3 and script.last - script.first >= 2 * 0.3
    assert endpoints._retry_after({"retry-after": "7"}) == 7
    assert (
        50
        < endpoints._retry_after(
            {"retry-after": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))}
        )
        <= 60
    )
    for text in ("", "soon", "-1", "1e9", "9" * 5000, "Mon, 99 Foo"):
        assert endpoints._retry_after({"retry-after": text}) == 0


def test_no_more_are_in_flight_than_asked_for(replies):
    flying, most, lock = 0, 0, threading.Lock()

    class Counting(ScriptedEndpoint):
        def reply(self, *args):
            nonlocal flying, most
            with lock:
                flying += 1
                most = max(most, flying)
            time.sleep(0.01)
            with lock:
                flying -= 1
            return super().reply(*args)

    with Counting() as script:
        ask(script.url, replies, requests(30), concurrency=3)
    assert most == 3


# ---------------------------------------------------------------- what is given up


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (401, "no such key", "401 no such key; OPENAI_API_KEY sets the key"),
        (403, "not for you", "403 not for you"),
        (404, "no model m", "404 no model m; does it serve m, and end in /v1?"),
        (429, "insufficient_quota", "429 insufficient_quota"),
        (400, "max_tokens?", "the first 8 requests failed: 400 max_tokens?"),
        (500, "\x1b[31m" + "x " * 500, "500 \x1b[31mx x"),
    ],
)
def test_what_no_retry_mends_stops_with_one_line(status, error, says, replies):
    with ScriptedEndpoint() as script, pytest.raises(InputError) as stopped:
        script.status, script.error = status, error
        ask(script.url, replies, requests(1000))
    message = str(stopped.value)
    assert message.startswith(f"{script.url}: ") and says in message and len(message) < 350 and "\n" not in message
    assert len(script.log) <= (5 * 5 if status == 500 else 12)  # not thousands
    assert len(replies) == 0


def test_one_that_is_refused_does_not_stop_the_others(replies):
    class Refusing(ScriptedEndpoint):
        def reply(self, messages, record, kind):
            if record == "A cat on 3 chairs.":
                raise ValueError
            return super().reply(messages, record, kind)

    def unreadable():
        raise InputError("a.jpg: no such image")

    with Refusing() as script:
        outcome = ask(script.url, replies, [*requests(6), Request("image", unreadable)], concurrency=1)
    assert outcome.failed["image"] == "a.jpg: no such image"
    assert outcome.failed["r3"].startswith("the connection broke (") and outcome.failed["r3"].endswith(", 5 times")
    assert set(replies) == {"r0", "r1", "r2", "r4", "r5"}


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (
            "http://127.0.0.1:9/v1",
            "http://127.0.0.1:9/v1: cannot be reached (All connection attempts failed), 3 times; the",
        ),
        ("http://no.invalid/v1", "cannot be reached ("),
        ("127.0.0.1:9", "127.0.0.1:9: is not the URL of an endpoint"),
        ("file:///dev/zero", "is not the URL"),
        ("http://", "is not the URL"),
        ("http://[", "is not the URL"),
        ("http://a:b/", "is not the URL"),
        ("http://127.0.0.1:99999/v1", "is not the URL"),
        ("http://127.0.0.1:0/v1", "is not the URL"),
        ("", "is not the URL"),
    ],
)
def test_an_endpoint_that_is_none(url, says, replies):
    with pytest.raises(InputError) as stopped:
        ask(url, replies, requests(20))
    assert says in str(stopped.value) and len(str(stopped.value)) < 250


def test_a_model_whose_name_is_not_utf_8(replies):
    endpoint = Endpoint("http://127.0.0.1:9/v1", "m\udcff")
    with pytest.raises(InputError, match="is not the name of a model: it is not UTF-8"):
        endpoint.ask(requests(2), replies, total=2)


def test_a_silent_endpoint_times_out(replies):
    with ScriptedEndpoint(delay=0.4) as script, pytest.raises(InputError, match="no reply in 0.1 seconds, 5 times"):
        ask(script.url, replies, requests(2), timeout=0.1)


@pytest.mark.parametrize("status", [200, 500])
def test_an_endless_reply_is_given_up(replies, monkeypatch, status):
    """Before it fills the memory, and without a retry."""
    monkeypatch.setattr("scripted_endpoint.LOSSES", (f"endless {status}",))
    with ScriptedEndpoint(lost=1.0) as script:
        outcome = ask(script.url, replies, requests(2))
    assert outcome.failed == dict.fromkeys(("r0", "r1"), "the reply has more than 16,777,216 bytes")
    assert len(script.log) == 2


def test_openai_is_named_when_it_is_missing(replies, monkeypatch):
    endpoints._openai.cache_clear()
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"needs openai: pip install 'llava-jax\[data\]'"):
        ask("http://127.0.0.1:9/v1", replies, requests(1))
    endpoints._openai.cache_clear()


def test_the_key_is_of_the_environment(replies, monkeypatch):
    seen = []

    with ScriptedEndpoint() as script:
        handler = script._server.RequestHandlerClass
        post = handler.do_POST
        monkeypatch.setattr(
            handler, "do_POST", lambda self: (seen.append(self.headers["Authorization"]), post(self))[1]
        )
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        ask(script.url, replies, requests(1))
        monkeypatch.delenv("OPENAI_API_KEY")
        ask(f"{script.url}/chat/completions", replies, requests(1, first=1))
        monkeypatch.setenv("OPENAI_API_KEY", "s\u00e9cret")
        with pytest.raises(InputError, match="OPENAI_API_KEY: is not a key"):
            ask(script.url, replies, requests(1, first=2))
    assert seen == ["Bearer secret", "Bearer none"] and len(replies) == 2


# ---------------------------------------------------------------- conversations, bodies, costs


def test_a_reply_may_be_followed_by_another_request(replies):
    def follow_up(reply: Reply) -> Request | None:
        name, _, turn = reply.id.partition("/")
        return None if turn == "2" else Request(f"{name}/{int(turn or 0) + 1}", requests(1)[0].messages)

    with ScriptedEndpoint(lost=0.2) as script:
        outcome = ask(script.url, replies, requests(5), follow_up=follow_up)
    assert outcome.answered == 15 and {"r0", "r0/1", "r0/2"} < set(replies)


def test_bodies_and_prices():
    endpoint = Endpoint("http://a/v1", "m", body={"max_tokens": None, "temperature": 0.5, "seed": 1})
    assert request_body(endpoint, []) == {"model": "m", "messages": [], "temperature": 0.5, "seed": 1}
    assert Prices(2.5, 10).cost(1e6, 2e6) == 22.5


# ---------------------------------------------------------------- signals

SCRIPT = """
import sys
from llava_jax.endpoints import Endpoint, Request
from llava_jax.replies import Replies
message = [{"role": "system", "content": ""}, {"role": "user", "content": "A cat."}]
with Replies(sys.argv[2]) as replies:
    requests = [Request(f"r{i}", lambda i=i: [*message, {"role": "user", "content": str(i)}]) for i in range(999)]
    outcome = Endpoint(sys.argv[1], "m", concurrency=2).ask(requests, replies, total=999)
    assert len(replies) == outcome.answered
    print(outcome.answered, outcome.failed, outcome.signal)
"""


@pytest.mark.parametrize(("number", "times", "seconds"), [(signal.SIGINT, 1, 2.0), (signal.SIGTERM, 2, 60.0)])
def test_a_signal_stops_after_the_requests_in_flight_or_at_once(number, times, seconds, tmp_path):
    with ScriptedEndpoint(delay=seconds) as script:
        command = [sys.executable, "-c", SCRIPT, script.url, tmp_path / "replies.jsonl"]
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while script._times.total() < 2:
            time.sleep(0.01)
        os.kill(run.pid, number)
        first = run.stderr.readline()  # so that the signals are not taken for one
        if times == 2:
            os.kill(run.pid, number)
        out, err = run.communicate(timeout=30)
    err = first + err
    assert run.returncode == 0, err
    assert out == f"{2 if times == 1 else 0} {{}} {number}\n".replace(str(number), str(int(number)))
    assert err == "stopping: waiting for 2 requests in flight; repeat the signal to stop at once\n"
