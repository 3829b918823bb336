"""Fuzz the server with requests that schemathesis generates from the description of its API (`/openapi.json`).

    python benchmarks/serve_fuzz.py [--requests 3000] [--clients 4] [--json FILE]

The server runs the bundled model. Half of the requests are valid by the description and half are not, many of them in
few fields. Requirements: no status 500, an error of the description's form for every other status but 200, a stream
that ends, and an answer within 60 seconds. Findings are printed as curl commands, and the exit status is 1.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import itertools
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hypothesis
import requests
import schemathesis
from hypothesis import strategies as st
from serve_load import our_server

DEADLINE = 60.0  # seconds
FLAGS = ("--slots", "8", "--context", "256", "--max-tokens", "8", "--max-body-mb", "1", "--warm-up")
MESSAGES = (
    [{"role": "user", "content": "How many objects are there?"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": [{"type": "text", "text": "<image></s>"}]}],
)
GENERATING = ("/v1/chat/completions", "/v1/completions")
SHARES = {"/v1/chat/completions": 40, "/v1/completions": 20, "/tokenize": 15, "/detokenize": 10}  # others: 1


def cases(url: str, count: int) -> list[schemathesis.Case]:
    """Requests for all endpoints."""
    schema = schemathesis.openapi.from_dict(requests.get(f"{url}/openapi.json").json())
    kinds = list(itertools.product((found.ok() for found in schema.get_all_operations()), schemathesis.GenerationMode))
    shares = [SHARES.get(operation.path, 1) for operation, _ in kinds]
    counts = [max(1, count * share // sum(shares)) for share in shares]
    return [case for kind, n in zip(kinds, counts, strict=True) for case in some(*kind, n)]


def some(operation: Any, mode: schemathesis.GenerationMode, count: int) -> list[schemathesis.Case]:
    """Requests for an endpoint, valid or not."""
    found: list[schemathesis.Case] = []
    settings = hypothesis.settings(
        max_examples=count, database=None, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip

    @settings
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode), choice=st.integers(0, 3))
    def collect(case: schemathesis.Case, choice: int) -> None:
        if operation.path in GENERATING and choice and isinstance(case.body, dict):
            # Otherwise most requests have no valid messages, and their other fields are not looked at.
            valid = {"messages": MESSAGES[choice % 2], "prompt": "How many", "model": None}
            case.body = case.body | {name: valid[name] for name in valid if name in case.body or name != "model"}
        found.append(case)

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # there are no invalid requests of some endpoints
        collect()
    return found[:count]


def try_case(url: str, case: schemathesis.Case) -> tuple[int, float, str | None]:
    """Send a request: its status, seconds, and what is wrong with the response."""
    start = time.perf_counter()
    try:
        response = case.call(base_url=url, timeout=DEADLINE)
    except requests.Timeout:
        return 0, DEADLINE, f"no answer in {DEADLINE:g} seconds"
    except requests.RequestException as error:
        return 0, time.perf_counter() - start, f"no answer: {error}"
    return response.status_code, time.perf_counter() - start, problem(case, response)


def problem(case: schemathesis.Case, response: Any) -> str | None:
    """What is wrong with a response."""
    text = response.content.decode()
    if response.status_code >= 500 and response.status_code != 501:
        return f"status {response.status_code}: {text[:200]}"
    if response.status_code == 200:
        is_stream = response.headers.get("content-type", [""])[0].startswith("text/event-stream")
        return "a stream without its end" if is_stream and not text.endswith("data: [DONE]\n\n") else None
    if case.method == "HEAD":
        return None
    try:
        error = json.loads(text)["error"]
        well_formed = error["code"] == response.status_code and error["message"] and "\n" not in error["message"]
    except (ValueError, KeyError, TypeError):
        well_formed = False
    return None if well_formed else f"status {response.status_code} without an error as described: {text[:200]}"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--requests", type=int, default=3000)
    p.add_argument("--clients", type=int, default=4, help="requests at a time")
    p.add_argument("--json", metavar="FILE", help="write the figures there")
    args = p.parse_args()
    statuses: collections.Counter[str] = collections.Counter()
    findings: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, our_server(Path(folder) / "server.log", *FLAGS) as server:
        url = f"http://127.0.0.1:{server.port}"
        found = cases(url, args.requests)
        random.Random(0).shuffle(found)
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(args.clients) as clients:
            results = list(clients.map(lambda case: try_case(url, case), found))
        seconds = time.perf_counter() - start
        for case, (status, _, wrong) in zip(found, results, strict=True):
            statuses[f"{case.method} {case.operation.path} {status}"] += 1
            if wrong and wrong not in findings:
                findings[wrong] = case.as_curl_command()
        metrics = requests.get(f"{url}/metrics").text
        for gauge in ("num_requests_running", "num_requests_waiting"):
            if not re.search(rf"^vllm:{gauge}{{.*}} 0.0$", metrics, re.MULTILINE):
                findings[f"{gauge} is not 0 at the end"] = ""
        log = server.text()
        if status := server.stop():
            findings[f"the server ended with status {status}"] = ""
    for wrong, command in findings.items():
        print(f"{wrong}\n  {command[:2000]}", file=sys.stderr)
    if findings:
        print("\n".join(line for line in log.splitlines() if line.startswith(("error", "  "))), file=sys.stderr)
    figures = {
        "requests": len(found), "seconds": round(seconds, 1), "slowest": round(max(r[1] for r in results), 2),
        "statuses": dict(sorted(statuses.items())), "findings": len(findings),
    }  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
