"""Hostile and hasty clients, over plain sockets: half requests, giants, clients that leave or stop reading; the queue;
and the end of the server."""

import asyncio
import contextlib
import json
import re
import socket
import threading
import time

import httpx
import openai
import pytest

from infer.serve.answers import Reply
from infer.serve.server import _Protocol
from scripted_server import Server, answer_of

HTTP = httpx.Client()


def body(text="hello", **fields) -> dict:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0} | fields


def request(value: dict, **headers) -> bytes:
    """The bytes of a request."""
    data = json.dumps(value).encode()
    lines = {"Host": "x", "Content-Type": "application/json", "Content-Length": len(data)} | headers
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + data


@contextlib.contextmanager
def connection(server, data: bytes = b""):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(data)
        yield client


def read_all(client) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(2**16):
            data += part
    return data


def until(condition, seconds=5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


def idle(server) -> bool:
    """Whether nothing is taken any more: no slot, no place in the queue, no memory for bodies."""
    service = server.service
    return not (server.scheduler.waiting or server.scheduler.running or service._places or service._bytes)


# ---------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots(stream, capfd):
    with Server(slots=2, context=2000, pace=0.002) as server:
        with connection(server, request(body("long", n=3, stream=stream))):
            until(lambda: server.scheduler.running == 2 and server.scheduler.waiting == 1)
        until(lambda: idle(server))
        assert server.scheduler.ended == {"cancelled": 3} and "error" not in capfd.readouterr().err
        assert HTTP.post(f"{server.url}/v1/chat/completions", json=body()).status_code == 200


def test_clients_that_leave_while_they_send(server):
    data = request(body("hello " * 1000))
    for length in (1, 30, 100, 200, len(data) - 1):
        with connection(server, data[:length]):
            pass
    until(lambda: idle(server))


def test_a_client_that_stops_reading_is_left():
    with Server(slots=1, context=4000, pace=0, stall_seconds=0.3) as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            fields = {"n": 16, "stream": True, "logprobs": True, "top_logprobs": 2}
            client.sendall(request(body("long", **fields)))
            until(lambda: sum(server.scheduler.ended.values()) == 16)  # the engine does not wait for it
            until(lambda: idle(server))
        assert set(server.scheduler.ended) <= {"end", "cancelled"}


def test_a_client_that_reads_nothing_does_not_keep_its_connection(monkeypatch):
    """Less than a buffer is left to send when its connection is closed, which waits for that."""
    monkeypatch.setattr("infer.serve.server.IDLE_SECONDS", 0.1)
    lost, end = [], _Protocol.connection_lost
    monkeypatch.setattr(_Protocol, "connection_lost", lambda self, error: (lost.append(self.client), end(self, error)))
    with Server(stall_seconds=0.3) as server, socket.socket() as client:
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", server.port))
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: client.getsockname() in lost)


def test_a_slow_reader_gets_all(server):
    with connection(server, request(body(stream=True), Connection="close")) as client:
        time.sleep(0.3)
        data = b""
        while part := client.recv(100):
            data += part
    assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


# ---------------------------------------------------------------- sizes and times


def test_bodies_are_bounded():
    with Server(max_body_mb=1) as server:
        exact = json.dumps(body()).encode().ljust(2**20)
        post = lambda data: HTTP.post(  # noqa: E731
            f"{server.url}/v1/chat/completions", content=data, headers={"content-type": "application/json"}
        )
        assert post(exact).status_code == 200
        assert post(exact + b" ").status_code == 413
        with connection(server, request({}, **{"Content-Length": 2**40})) as client:  # declared, not sent
            assert b" 413 " in client.recv(1000)
        with connection(server, request({}, **{"Content-Length": "9" * 5000})) as client:
            assert b" 400 " in read_all(client)
        chunks = b"10000\r\n" + b" " * 2**16 + b"\r\n"
        headers = {"Transfer-Encoding": "chunked"}
        start = request({}, **headers).replace(b"Content-Length: 2\r\n", b"").removesuffix(b"{}")
        with connection(server, start) as client:
            with contextlib.suppress(OSError):
                for _ in range(64):
                    client.sendall(chunks)
            assert b" 413 " in client.recv(1000)
        until(lambda: idle(server))


def test_texts_are_bounded_before_they_are_tokenized(server):
    post = lambda path, value: HTTP.post(server.url + path, json=value)  # noqa: E731
    assert post("/v1/chat/completions", body("x" * 32 * 64)).status_code == 200
    prepared = len(server.engine.prepared)
    long = [{"role": "system", "content": "x" * 16 * 64}, *body("x" * 16 * 64 + "y")["messages"]]
    refusals = [
        ("/v1/chat/completions", {"messages": long}, "messages"), ("/tokenize", {"messages": long}, "messages"),
        ("/v1/completions", {"prompt": "x" * 32 * 65}, "prompt"), ("/tokenize", {"prompt": "x" * 32 * 65}, "prompt"),
    ]  # fmt: skip
    for path, value, field in refusals:
        refused = post(path, value)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == field
        assert "at most 2,048 may be asked" in refused.text
    assert len(server.engine.prepared) == prepared


def test_memory_for_bodies_is_bounded(monkeypatch):
    monkeypatch.setattr("infer.serve.settings.Settings.max_bodies", 2**20)
    with Server() as server:
        data = request(body(), **{"Content-Length": 2**25})
        with connection(server, data + b" " * 900_000):
            until(lambda: server.service._bytes > 800_000)
            with connection(server, data + b" " * 300_000) as client:
                assert b" 429 " in client.recv(1000)
        until(lambda: idle(server))


def test_slow_senders():
    with Server(receive_seconds=0.3) as server:
        with connection(server, request(body())[:-5]) as client:
            answer = read_all(client)
        assert b" 408 " in answer and b"did not arrive within 0.3 seconds" in answer
        until(lambda: idle(server))


def test_connections_that_send_no_request(monkeypatch):
    monkeypatch.setattr("infer.serve.server.GRACE_SECONDS", 0)
    with Server(receive_seconds=0.3) as server:
        for start in (b"", b"G", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-A: "):
            with connection(server, start) as client:
                assert read_all(client) == b""


def test_too_many_connections():
    with Server(connections=2) as server, contextlib.ExitStack() as clients:
        for _ in range(4):
            clients.enter_context(connection(server))
        with connection(server) as client:
            assert read_all(client) == b""
        clients.close()
        until(lambda: HTTP.get(f"{server.url}/health").status_code == 200)
        clients.enter_context(connection(server))
        with connection(server, request(body())) as client:
            assert b" 503 " in client.recv(1000)


@pytest.mark.parametrize(
    "data",
    [
        b"\0\1\2\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: x\r\n\r\n{}",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        "GET /ä HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    ],
)  # fmt: skip
def test_what_is_not_http(server, data):
    with connection(server, data) as client:
        client.shutdown(socket.SHUT_WR)
        assert re.match(rb"HTTP/1.1 (4\d\d|501) |$", read_all(client))


def test_odd_paths(server):
    long = b"/v1/models/" + b"%f0%9f%99%82" * 50
    for path in (b"/%00", b"/%ff%fe", b"/v1/models/%2e%2e/%0a", b"//", long, b"*", b"/%"):
        with connection(server, b"GET " + path + b"?key=secret HTTP/1.1\r\nHost: x\r\n\r\n") as client:
            assert re.match(rb"HTTP/1.1 4\d\d ", client.recv(1000)), path


def test_pipelined_requests(server):
    ask = request(body(max_tokens=2))
    with connection(server, ask * 3 + request(body(), Connection="close")) as client:
        assert read_all(client).count(b"HTTP/1.1 200 OK") == 4


# ---------------------------------------------------------------- queue


def test_a_full_queue():
    with Server(slots=2, queue=2, context=2000, pace=0.002) as server:
        ask = lambda **fields: HTTP.post(f"{server.url}/v1/chat/completions", json=body(**fields))  # noqa: E731
        refused = ask(n=5)  # which waiting would not change
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "n"
        with contextlib.ExitStack() as clients:
            for _ in range(4):
                clients.enter_context(connection(server, request(body("long", stream=True))))
            until(lambda: server.scheduler.running == 2 and server.scheduler.waiting == 2)
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
            with pytest.raises(openai.RateLimitError, match="the queue is full") as full:
                client.chat.completions.create(model="scripted", messages=body()["messages"])
            assert full.value.response.headers["retry-after"] == "2"
            metrics = HTTP.get(f"{server.url}/metrics").text
            assert 'vllm:num_requests_waiting{engine="0",model_name="scripted"} 2.0' in metrics
        until(lambda: idle(server))
        assert ask(n=4).status_code == 200


def test_queued_streams_are_kept_alive(monkeypatch):
    monkeypatch.setattr("infer.serve.answers.KEEP_ALIVE_SECONDS", 0.05)
    with Server(slots=1, context=2000, pace=0.002) as server, connection(server, request(body("long"))):
        until(lambda: server.scheduler.running == 1)
        with connection(server, request(body(stream=True))) as client:
            data = b""
            while b": keep-alive\n\n" not in data:
                data += client.recv(1000)
            assert b"text/event-stream" in data and b"data:" not in data


def test_many_clients(server):
    async def ask(client, i):
        question, stream = f"question {i}", bool(i % 2)
        for _ in range(3):
            reply = await client.chat.completions.create(**body(question), model="scripted", stream=stream)
            if stream:
                text = "".join([chunk.choices[0].delta.content or "" async for chunk in reply])
            else:
                text = reply.choices[0].message.content
            assert text == answer_of((question,))

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            await asyncio.gather(*(ask(client, i) for i in range(32)))

    asyncio.run(ask_all())
    until(lambda: idle(server))


def test_a_long_answer_holds_up_nobody_while_it_is_written(server, monkeypatch):
    written, whole = threading.Event(), Reply.whole

    def write(reply, choices):
        assert written.wait(10)
        return whole(reply, choices)

    monkeypatch.setattr(Reply, "whole", write)
    with connection(server, request(body(), Connection="close")) as client:
        until(lambda: not server.scheduler.running and server.service._places)
        assert HTTP.get(f"{server.url}/health").status_code == 200
        written.set()
        assert b" 200 " in read_all(client)


# ---------------------------------------------------------------- the end


def test_draining():
    server = Server(slots=1, context=2000, pace=0.002)
    with server:
        running = threading.Thread(target=lambda: answers.append(HTTP.post(url, json=body("long"), timeout=20)))
        url, answers = f"{server.url}/v1/chat/completions", []
        running.start()
        until(lambda: server.scheduler.running == 1)
        server.end()
        until(lambda: server.service.draining)
        refused = httpx.post(url, json=body())
        assert refused.status_code == 503 and refused.headers["connection"] == "close"
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert httpx.get(f"{server.url}/metrics").status_code == 200
        running.join()
        assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 1009
        server.thread.join(10)
        assert server.ended is True
        with pytest.raises(OSError):
            connection(server).__enter__()


def test_what_takes_longer_than_draining_is_cancelled():
    server = Server(slots=1, context=2000, pace=0.01, drain_seconds=0.1)
    with server:
        with (
            connection(server, request(body("long", stream=True))) as stream,
            connection(server, request(body("long"))) as waiting,
        ):
            until(lambda: server.scheduler.running == 1 and server.scheduler.waiting == 1)
            server.end()
            assert b'data: {"error":{"message":"the server is shutting down"' in read_all(stream)
            assert b" 503 " in read_all(waiting)
        server.thread.join(10)
        assert server.ended is True


def test_half_a_request_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr("infer.serve.server.GRACE_SECONDS", 0.2)
    server = Server(drain_seconds=0.1)
    with server, connection(server, request(body())[:-5]) as client:
        until(lambda: server.service._bytes)
        server.end()
        assert b"200" not in read_all(client)
        server.thread.join(10)
        assert server.ended is True


def test_an_engine_that_fails(capfd):
    server = Server(slots=1, context=2000, pace=0.002)
    with server:
        with (
            connection(server, request(body("long", stream=True))) as stream,
            connection(server, request(body("long"))) as waiting,
        ):
            until(lambda: server.scheduler.running == 1 and server.scheduler.waiting == 1)
            server.scheduler.dies = True
            assert b'data: {"error":{"message":"the engine has stopped"' in read_all(stream)
            assert b" 503 " in read_all(waiting)
        server.thread.join(10)
        assert server.ended is False
    assert "RuntimeError: the device is gone" in capfd.readouterr().err
