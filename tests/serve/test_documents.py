"""What docs/serve.md says runs, and names what there is."""

import base64
import json
import re
import shlex

import httpx
import msgspec
import pytest
import yaml

from helpers import ROOT
from infer.chat import COMMANDS
from infer.chat import parser as chat
from infer.evaluate import parser as evaluate
from infer.plan import parser as plan
from infer.serve.__main__ import parser as serve
from infer.serve.fields import REFUSED, ChatBody

PAGE = (ROOT / "docs/serve.md").read_text()
COMMAND_LINES = PAGE.replace("\\\n", " ")
PARSERS = {"serve": serve, "chat": chat, "evaluate": evaluate, "plan": plan}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def table_row(start: str) -> set[str]:
    """The names in code in the table's row that begins with a text."""
    [row] = re.findall(rf"^\| {start}[^|]*\| (.*) \|$", PAGE, re.M)
    return set(re.findall(r"`([a-z_]+)`", row))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the example leaves files to the interpreter
def test_the_python_runs(server, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    [code] = blocks("python")
    exec(code.replace("http://127.0.0.1:8000", server.url), {})
    out = capsys.readouterr().out
    assert re.search(r"^\d+ \+ 13 tokens$", out, re.M) and out.endswith("stop\n")


def test_the_request_of_curl_is_answered(server):
    [body] = re.findall(r"curl .*? -d @- << END\n(.*?)\nEND", PAGE, re.S)
    body = body.replace("$image", base64.b64encode((ROOT / "infer/shapes/example.png").read_bytes()).decode())
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=json.loads(body))
    assert reply.status_code == 200, reply.text


def test_commands_can_be_given():
    found = re.findall(r"^python -m infer\.(\w+)\b([^<>\n]*)", COMMAND_LINES, re.M)
    assert {name for name, _ in found} == {"serve", "chat"}
    for name, flags in found:
        PARSERS[name]().parse_args(shlex.split(flags))


def test_flags_exist():
    """Those in the text and in tables; in blocks of commands there are others' too."""
    known = {flag for parser in PARSERS.values() for flag in re.findall(r"--[a-z][a-z-]+", parser().format_help())}
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"^```.*?^```", "", PAGE, flags=re.M | re.S)):
        assert flag in known, flag


def test_fields_are_implemented_or_refused():
    fields = {field.name for field in msgspec.structs.fields(ChatBody)}
    assert table_row("implemented") - {"image_url", "detail"} == fields
    refused = {name for name in table_row("refused") if name not in ("tool", "function")}
    assert refused <= REFUSED.keys()


def test_endpoints_and_metrics_exist(server):
    for method, path in re.findall(r"`(GET|POST) (/[\w./]+)", PAGE):
        url, body = server.url + path.replace("NAME", "scripted"), None if method == "GET" else {}
        assert httpx.request(method, url, json=body).status_code == (200 if method == "GET" else 400), path
    metrics = httpx.get(f"{server.url}/metrics").text
    for name in set(re.findall(r"`(vllm:\w+)`", PAGE)):
        assert f"\n# TYPE {name} " in metrics or re.search(rf"^{name}\b", metrics, re.M), name


def test_commands_of_the_terminal_are_listed():
    assert set(re.findall(r"`(/[a-z]+)(?: [^`]*)?`", PAGE.partition("## In the terminal")[2])) >= COMMANDS.keys()


def test_a_request_as_of_librechat(server):
    """Its configuration names our path; it streams, and sends images as base64 with `detail`."""
    [block] = blocks("yaml")
    [endpoint] = yaml.safe_load(block)["endpoints"]["custom"]
    url = endpoint["baseURL"].replace("http://127.0.0.1:8000", server.url)
    pixel = "data:image/gif;base64,R0lGODlhBAAEAIAAAP///wAAACwAAAAABAAEAAACBISPCQUAOw=="
    image = {"type": "image_url", "image_url": {"url": pixel, "detail": "auto"}}
    body = {
        "model": httpx.get(f"{url}/models").json()["data"][0]["id"],
        "stream": True,
        "user": "650000000000000000000000",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}],
    }
    reply = httpx.post(f"{url}/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream") and reply.text.endswith("data: [DONE]\n\n")
