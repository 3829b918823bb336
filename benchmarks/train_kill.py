"""Kill a training run repeatedly, and check that it computes the same as an uninterrupted run.

    python benchmarks/train_kill.py                 # 10 kills: a minute or a few
    python benchmarks/train_kill.py --kills 3 --seed 7 --json report.json
    python benchmarks/train_kill.py --kills 20 --moment export

Trains a tiny model on one device twice: once uninterrupted, once killed at random moments, by SIGKILL and every other
time by Ctrl-C: during startup, between steps, while a checkpoint is written, and once while the result is written. Each
time the same command resumes. The losses of all steps and the exported model must be equal bit for bit, and no
temporary files may remain. Otherwise the exit status is 1.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "tests/golden/checkpoints/v1.5-llama"
MOMENTS = ("start", "update", "save")


def write_data(directory: Path, rows: int = 24) -> None:
    """Write images of noise, and conversations of different lengths about them."""
    rng = np.random.default_rng(0)
    (directory / "images").mkdir()
    data = []
    for i in range(rows):
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(directory / "images" / f"{i}.png")
        answer = " ".join(rng.choice(["cat", "dog", "tree", "house", "street"], 2 + i % 5))
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": answer}]
        data.append({"id": i, "image": f"{i}.png", "conversations": turns})
    (directory / "data.json").write_text(json.dumps(data))


class Runs:
    def __init__(self, directory: Path, preset: str, steps: int):
        self.directory, self.preset, self.steps = directory, preset, steps
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # one device; compilation dominates here
            "JAX_COMPILATION_CACHE_DIR": str(directory / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, name: str) -> subprocess.Popen:
        """Start a run in the output directory `name`, or resume it."""
        command = [
            sys.executable, "-m", "train", "--preset", self.preset, "--checkpoint", CHECKPOINT,
            "--data", self.directory / "data.json", "--image-folder", self.directory / "images",
            "--output", self.directory / name, "--steps", self.steps, "--global-batch-size", 4, "--max-length", 128,
            "--dtype", "float32", "--learning-rate", 1e-3, "--save-every", 3, "--keep", 2, "--workers", 1,
        ]  # fmt: skip
        with open(self.directory / f"{name}.log", "a") as log:
            return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=self.environment, stderr=log)

    def finish(self, name: str) -> None:
        if status := self.start(name).wait():
            raise SystemExit(f"the run ended with status {status}:\n" + (self.directory / f"{name}.log").read_text())

    def losses(self, name: str) -> list[tuple[int, float]]:
        path = self.directory / name / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # without an incomplete last line
        return [(line["step"], line["loss"]) for line in map(json.loads, lines)]

    def model(self, name: str) -> dict[str, np.ndarray]:
        from llava_jax.checkpoints.orbax_files import open_ours

        tensors = open_ours(self.directory / name / "model").tensors
        return {path: tensor.read() for path, tensor in tensors.items()}

    def kill(self, name: str, moment: str, steps: int, by: signal.Signals, rng: random.Random) -> dict:
        """Start a run, wait for `steps` steps and then for the moment, and kill it. Returns the state that it left."""
        output = self.directory / name
        folder, pattern, seconds = {
            "save": (output / "checkpoints", "*tmp*", 0.02), "export": (output, ".model.*.incomplete", 0.5),
        }.get(moment, (output, "", 0))  # fmt: skip
        before = set(folder.glob(pattern)) if moment == "export" else set()  # left by earlier kills
        process = self.start(name)

        def wait(condition) -> None:
            while process.poll() is None and not condition():
                time.sleep(0.001)

        if moment == "start":
            time.sleep(rng.uniform(0, 4))
        else:
            wait(lambda: len(self.losses(name)) >= steps)
        if moment == "update":
            time.sleep(rng.uniform(0, 0.2))
        elif moment != "start":
            wait(lambda: set(folder.glob(pattern)) - before)
            time.sleep(rng.uniform(0, seconds))
        ended = process.poll() is not None
        process.send_signal(by)
        status = process.wait()
        left = sorted(path.name for path in (output / "checkpoints").glob("*"))
        result = sorted(path.name for path in output.glob("*model*"))
        return {
            "moment": moment, "by": by.name, "status": status, "updates": len(self.losses(name)), "checkpoints": left,
            "result": result, "too late": ended,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--moment", choices=(*MOMENTS, "export"), help="kill at this moment only")
    parser.add_argument("--preset", default="v1.5-finetune")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    moments = [MOMENTS[(i + 1) % 3] for i in range(args.kills - 1)] + ["export"]
    if args.moment:
        moments = [args.moment] * args.kills
    with tempfile.TemporaryDirectory() as directory:
        runs = Runs(Path(directory), args.preset, args.steps)
        write_data(runs.directory)
        runs.finish("undisturbed")
        kills = []
        for i, moment in enumerate(moments, 1):
            steps = min(args.steps, rng.randint(args.steps * i // len(moments) - 2, args.steps * i // len(moments)))
            by = signal.SIGINT if moments[:i].count(moment) % 2 == 0 else signal.SIGKILL
            kills.append(runs.kill("killed", moment, args.steps if moment == "export" else steps, by, rng))
            print(json.dumps(kills[-1]), file=sys.stderr, flush=True)
        runs.finish("killed")
        expected, got = runs.losses("undisturbed"), runs.losses("killed")
        one, other = runs.model("undisturbed"), runs.model("killed")
        report = {
            "kills": kills,
            "updates": len(expected),
            "losses_equal": expected == got and [step for step, _ in got] == list(range(1, args.steps + 1)),
            "nothing_beside": not [*(runs.directory / "killed").glob(".*model*")],
            "models_equal": one.keys() == other.keys() and all(np.array_equal(one[path], other[path]) for path in one),
        }
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    sys.exit(0 if report["losses_equal"] and report["models_equal"] and report["nothing_beside"] else 1)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
