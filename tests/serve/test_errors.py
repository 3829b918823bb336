"""What is refused, and how: statuses, bodies of errors, the classes of the official client."""

import json

import httpx
import openai
import pytest

from infer.serve import fields
from scripted_server import Server

HTTP = httpx.Client()
HELLO = [{"role": "user", "content": "hello"}]


def image(url) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def post(server, body, path="/v1/chat/completions", **headers) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    return HTTP.post(server.url + path, content=content, headers=headers)


def refusal(response: httpx.Response) -> tuple[int, str | None, str]:
    """Status, parameter and message of an error."""
    error = response.json()["error"]
    assert error["code"] == response.status_code and error["type"].endswith("Error")
    return response.status_code, error["param"], error["message"]


@pytest.mark.parametrize(
    "param, value, says",
    [
        ("temperature", 2.5, "expected a number <= 2"),
        ("temperature", -1, "expected a number >= 0"),
        ("temperature", "1", "expected a number or null, got a string"),
        ("top_p", 1.5, "<= 1"),
        ("top_k", -2, ">= -1"),
        ("top_k", 1.5, "expected an integer or null"),
        ("min_p", 2, "<= 1"),
        ("n", 0, ">= 1"),
        ("n", 17, "<= 16"),
        ("max_tokens", 0, ">= 1"),
        ("max_completion_tokens", -5, ">= 1"),
        ("presence_penalty", 3, "<= 2"),
        ("frequency_penalty", -3, ">= -2"),
        ("repetition_penalty", 0, "> 0"),
        ("min_tokens", 65, "more than the 64 tokens that an answer may have"),
        ("seed", 2**70, "<= 9,223,372,036,854,775,807"),
        ("seed", True, "expected an integer or null, got a boolean"),
        ("stop", ["a"] * 5, "length <= 4"),
        ("stop", [""], "length >= 1"),
        ("stop_token_ids", [100], "100 is not a token id below 100"),
        ("stop_token_ids", [-1], ">= 0"),
        ("logit_bias", {"100": 1}, "'100' is not a token id below 100"),
        ("logit_bias", {"x": 1}, "'x' is not a token id"),
        ("logit_bias", {"5": 101}, "<= 100"),
        ("logprobs", 1, "expected a boolean or null"),
        ("top_logprobs", 21, "<= 20"),
        ("top_logprobs", 1, "needs logprobs: true"),
        ("stream", "yes", "expected a boolean or null"),
        ("stream_options", {"include_usage": True}, "needs stream: true"),
        ("messages", [], "length >= 1"),
        ("messages", [{"role": "user"}], "content is missing"),
        ("messages", [{"role": "king", "content": ""}], "'king'"),
        ("messages", [{"role": "assistant", "content": "I"}], "begins with an answer"),
        ("messages", [*HELLO, {"role": "assistant", "content": "I"}], "ends with an answer"),
        ("messages", [{"role": "system", "content": "S"}], "has no user message"),
        ("messages", [{"role": "user", "content": [{"type": "input_audio"}]}], "'input_audio'"),
        ("messages", [{"role": "system", "content": image("data:,")[0]["content"]}], "only user messages"),
        ("messages", image("file:///etc/passwd"), "is not a data: URL"),
        ("messages", image("/etc/passwd"), "is not a data: URL"),
        ("messages", image("https://example.com/a.png"), "are not allowed here; send a data: URL"),
        ("messages", image("data:image/png;base64,!!"), "invalid base64"),
        ("messages", image("data:text/html,hello"), "not of an image"),
        ("messages", image("data:image/png;base64,aGVsbG8="), "not an image in a supported format"),
        ("messages", [{"role": "user", "content": image("data:,")[0]["content"] * 17}], "more than 16 images"),
        ("messages", [{"role": "user", "content": "word " * 64}], "the prompt takes 64 positions"),
    ],
)  # fmt: skip
def test_invalid_fields(server, param, value, says):
    status, named, message = refusal(post(server, {"messages": HELLO} | {param: value}))
    assert status == 400 and says in message
    assert named.partition("[")[0].partition(".")[0] == param


@pytest.mark.parametrize("name", fields.REFUSED)
def test_fields_that_are_not_implemented(server, name):
    assert refusal(post(server, {"messages": HELLO, name: {"some": "value"}})) == (
        501, name, f"{name} is not implemented by this server",
    )  # fmt: skip
    for harmless in (None, *fields.REFUSED[name]):
        assert post(server, {"messages": HELLO, name: harmless}).status_code == 200


def test_an_empty_prompt(server):
    assert refusal(post(server, {"prompt": ""}, "/v1/completions")) == (400, "prompt", "the prompt is empty")


def test_roles_that_are_not_implemented(server):
    messages = [*HELLO, {"role": "tool", "content": "1", "tool_call_id": "x"}]
    assert refusal(post(server, {"messages": messages}))[:2] == (501, "messages[1].role")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"nonsense", b"[]", b"null", b'{"messages":', b"\xff\xfe{}", b'{"messages": [{"role": NaN}]}',
        b'{"messages":' + b"[" * 100_000, b'{"a":' * 100_000, b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"x": "' + b"\\u0000" * 10 + b'"}', b'{"messages": [' + b"{}," * 10 + b"{}]}", b'{"seed": 1e999}',
        b'{"temperature": 1' + b"0" * 5000 + b"}", b'{"messages": [' + b'"a",' * 2**20 + b"1]}",
    ],
)  # fmt: skip
def test_bodies_that_are_not_requests(server, body):
    assert refusal(post(server, body))[0] == 400


def test_the_last_of_equal_keys_counts(server):
    body = b'{"messages": [{"role": "user", "content": "hello", "content": "bye"}], "n": 3, "n": 1}'
    assert post(server, body).status_code == 200
    assert server.engine.prepared[-1].turns == ("bye",)


def test_other_types_of_bodies(server):
    body = {"messages": HELLO}
    for headers in ({"content_type": "text/plain"}, {"content_type": ""}, {"content_encoding": "gzip"}):
        assert refusal(post(server, body, **headers))[0] == 415
    assert post(server, body, content_type="Application/JSON; charset=utf-8").status_code == 200


def test_models_routes_and_methods(server):
    assert refusal(post(server, {"messages": HELLO, "model": "gpt-4"})) == (
        404, "model", "The model `gpt-4` does not exist.",
    )  # fmt: skip
    assert refusal(HTTP.get(f"{server.url}/v1/nothing"))[0] == 404
    assert refusal(HTTP.get(f"{server.url}/v1/models/"))[0] == 404
    response = HTTP.get(f"{server.url}/v1/chat/completions")
    assert refusal(response)[0] == 405 and response.headers["allow"] == "POST"
    assert HTTP.head(f"{server.url}/health").status_code == 200
    assert refusal(HTTP.options(f"{server.url}/v1/models"))[0] == 405
    assert "access-control-allow-origin" not in HTTP.get(f"{server.url}/health", headers={"origin": "http://x"}).headers


def test_request_ids(server):
    assert HTTP.get(f"{server.url}/health", headers={"x-request-id": "my-id"}).headers["x-request-id"] == "my-id"
    for bad in ("a b", "x" * 129, "é".encode()):
        echoed = HTTP.get(f"{server.url}/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert len(echoed) == 32 and echoed.isalnum()


def test_bugs_are_logged_without_the_prompt(server, capfd):
    status, _, message = refusal(
        post(server, {"messages": [{"role": "user", "content": "crash on the words"}]}, x_request_id="r1")
    )
    assert status == 500 and message == "an error of the server; its log has more about r1"
    log = capfd.readouterr().err
    assert "error: r1: ZeroDivisionError" in log and "prepare" in log
    assert "the words" not in log


def test_errors_of_one_generation(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    ask = dict(model="scripted", messages=[{"role": "user", "content": "fail"}])
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(**ask)
    stream = client.chat.completions.create(**ask, stream=True)
    with pytest.raises(openai.APIError, match="an error of the server"):
        for _ in range(4):  # the role and three tokens
            next(stream)
        next(stream)


def test_keys(capfd):
    with Server(keys=fields_keys("secret-1", "secret-2")) as server:
        for key, allowed in [("secret-1", 1), ("secret-2", 1), ("secret-3", 0), ("", 0), ("s" * 10000, 0)]:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key or "none", max_retries=0)
            if allowed:
                assert client.models.list().data[0].id == "scripted"
            else:
                with pytest.raises(openai.AuthenticationError):
                    client.models.list()
        for path in ("/health", "/metrics", "/version", "/ping", "/"):
            assert HTTP.get(server.url + path).status_code == 200
        for path in (
            "/v1/models", "/v1/nothing", "/v1", "/tokenize", "/v1/chat/completions", "/v1/models%0A", "/health%0A",
            "//v1/models", "/nothing",
        ):  # fmt: skip
            response = HTTP.get(server.url + path, headers={"authorization": "Basic secret-1"})
            assert refusal(response)[0] == 401 and response.headers["www-authenticate"] == "Bearer"
        for host in ("x/health?", "x/#", "x?", "[", "a@b/version#"):  # the path is not what a URL with this host has
            assert HTTP.get(f"{server.url}/v1/models", headers={"host": host}).status_code == 401
    assert "secret" not in capfd.readouterr().err and "secret" not in repr(server.settings)


def fields_keys(*keys):
    from infer.serve.settings import digest_key

    return tuple(map(digest_key, keys))


def test_prompts_are_logged_only_if_asked(server, capfd):
    body = {"messages": [{"role": "user", "content": "private words"}], "temperature": 0}
    post(server, body)
    log = capfd.readouterr().err
    assert "POST /v1/chat/completions 200 2+13 tokens" in log and "private" not in log
    with Server(log_prompts=True) as open_server:
        post(open_server, body)
    assert '"turns": ["private words"]' in capfd.readouterr().err


def test_origins():
    with Server(origins=("http://page.example",)) as server:
        ask = {"origin": "http://page.example", "access-control-request-method": "POST"}
        preflight = HTTP.options(f"{server.url}/v1/chat/completions", headers=ask)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "http://page.example"
        own = HTTP.get(f"{server.url}/v1/models", headers={"origin": "http://page.example"})
        assert "Retry-After" in own.headers["access-control-expose-headers"]
        other = HTTP.get(f"{server.url}/v1/models", headers={"origin": "http://evil.example"})
        assert "access-control-allow-origin" not in other.headers
