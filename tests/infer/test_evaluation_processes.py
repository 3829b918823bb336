"""Several processes of JAX that answer one benchmark, as on a pod: each its own questions, and one of them scores."""

import json
import os
import socket
import subprocess
import sys

from helpers import ROOT
from infer.benchmarks.answers import read_answers
from scripted_answers import write_conversations

PROCESS = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import jax
from infer import benchmark_run, evaluate
from scripted_answers import ScriptedEngine

def load(args):
    assert len(jax.local_devices()) == 2 and len(jax.devices()) == 4
    return ScriptedEngine(lambda question: str(jax.process_index()), delay=0.3 * jax.process_index())

benchmark_run.load_engine = load
evaluate.run()
"""


def test_each_process_asks_its_shard(tmp_path):
    """The first to end waits for the other, which scores."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    data, output = write_conversations(tmp_path / "data"), tmp_path / "out"
    flags = ["--data", data, "--image-folder", tmp_path / "data/images", "--output", output, "--json"]
    flags += ["--coordinator", f"localhost:{port}", "--processes", "2", "--process-id"]
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *map(str, flags), str(i)],
            env=os.environ | devices, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    (first, err), (second, _) = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], err
    assert first == "" and "conversations: 5 questions left to other shards" in err
    result = json.loads(second)
    assert (result["questions"], result["failed"], result["asked"]) == (10, 0, 5)
    answers = read_answers(output / "conversations/answers.jsonl")
    assert [one.text for one in answers] == ["0", "1"] * 5  # images are dealt out in turn
    assert not list((output / "conversations").glob("answers-*"))
