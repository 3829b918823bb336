"""Metrics under vLLM's names, and the page."""

import re

import httpx
from prometheus_client.parser import text_string_to_metric_families

from infer.serve import app
from scripted_server import Server

HISTOGRAMS = (
    "time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds "
    "e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds "
    "request_inference_time_seconds request_prompt_tokens request_generation_tokens request_params_n "
    "request_params_max_tokens"
).split()


def read_metrics(server) -> dict[str, float]:
    """Values by name, and by the label other than the model's if there is one."""
    values = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == "scripted" and sample.labels.pop("engine") == "0"
            values[" ".join([sample.name, *sample.labels.values()])] = sample.value
    return values


def test_metrics():
    def ask(**fields):
        body = {"messages": [{"role": "user", "content": "one two three"}]} | fields
        return httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code

    with Server() as server:
        assert [ask(n=2), ask(max_tokens=3), ask(stream=True), ask(top_p=7)] == [200, 200, 200, 400]
        assert ask(messages=[{"role": "user", "content": "fail"}]) == 500
        metrics = read_metrics(server)
    counters = {
        "prompt_tokens_total": 13, "generation_tokens_total": 3 * 13 + 3 + 3, "num_preemptions_total": 0,
        "request_success_total stop": 3, "request_success_total length": 1, "request_success_total error": 1,
        "num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0,
        "prefix_cache_queries_total": 13, "prefix_cache_hits_total": 0, "mm_cache_queries_total": 0,
    }  # fmt: skip
    assert {name: metrics[f"vllm:{name}"] for name in counters} == counters
    counts = {name: metrics[f"vllm:{name}_count"] for name in HISTOGRAMS}
    assert counts.pop("inter_token_latency_seconds") == 3 * 12 + 2 + 2
    assert set(counts.values()) == {5}
    assert metrics["vllm:request_generation_tokens_sum"] == 45 and metrics["vllm:request_params_n_bucket 1.0"] == 3
    assert metrics["vllm:e2e_request_latency_seconds_sum"] >= metrics["vllm:request_inference_time_seconds_sum"] > 0


def test_the_page_may_run_only_its_own_scripts(server, tmp_path, monkeypatch):
    response = httpx.get(server.url)
    policy = response.headers["content-security-policy"]
    assert response.headers["content-type"].startswith("text/html") and response.content == app.PAGE.read_bytes()
    assert "unsafe" not in policy and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert len(re.findall("'sha256-[A-Za-z0-9+/]{43}='", policy)) >= 2
    (page := tmp_path / "page.html").write_bytes(b"<script>alert(1)</script><style>p {}</style>")
    monkeypatch.setattr(app, "PAGE", page)
    assert "script-src 'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI=';" in app._read_page()[1]
