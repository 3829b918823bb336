"""Prepare datasets: images per second and core, the time and the memory of planning, and killed commands.

    python benchmarks/prepare.py --json prepare.json

`speed` prepares JPEGs of COCO's sizes with 1, 2, ... workers, up to the number of CPUs. `plan` plans a file of
`--plan-rows` rows about `--plan-images` different files, in a process of its own. `kill` kills a preparation
(with its workers, or alone) at random moments and starts it again: whole shards have to be left, no worker may go on,
and at the end the dataset has to equal that of an undisturbed command byte for byte; otherwise the exit status is 1.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# ruff: noqa: E402
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # before this directory: `train` is the package, not the file here

import numpy as np
from PIL import Image

from llava_jax.console import silence_notes
from llava_jax.data.image_folder import ImageFolder
from train.datasets.prepare.image_shards import ImagePart
from train.datasets.prepare.plan import Plan
from train.mixture import read_parts

SIZES = ((640, 480), (480, 640), (640, 427), (500, 375))
QUESTION = {"from": "human", "value": "<image>\nWhat is this, and what is beside it? " + "Say more. " * 20}
ANSWER = {"from": "gpt", "value": "A street with two buses. " * 20}


def write_data(folder: Path, rows: int, names: list[str]) -> Path:
    """A data file about images; row i names that of number i, and again from the first."""
    path = folder / "data.jsonl"
    with path.open("w") as file:
        for i in range(rows):
            row = {"id": f"{i:09}", "image": names[i % len(names)], "conversations": [QUESTION, ANSWER]}
            file.write(json.dumps(row) + "\n")
    return path


def write_images(folder: Path, count: int) -> list[str]:
    random = np.random.default_rng(0)
    for i in range(count):
        width, height = SIZES[i % len(SIZES)]
        small = Image.fromarray(random.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    return [f"{i}.jpg" for i in range(count)]


def start(folder: Path, output: Path, *flags: Any) -> subprocess.Popen:
    command = [sys.executable, "-m", "train.datasets.prepare", "--data", folder / "data.jsonl", "--output", output]
    command += ["--image-folder", folder, *flags]
    with open(folder / "log", "a") as log:
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=log, start_new_session=True)


def measure_speed(directory: Path, images: int) -> list[dict[str, float]]:
    folder = directory / "speed"
    folder.mkdir()
    write_data(folder, images, write_images(folder, images))
    size = sum(path.stat().st_size for path in folder.glob("*.jpg"))
    report = []
    for workers in range(1, (os.cpu_count() or 1) + 1):
        shutil.rmtree(folder / "out", ignore_errors=True)
        begin, cpu = time.monotonic(), _cpu_seconds()
        process = start(folder, folder / "out", "--workers", workers, "--max-shard-size", size // (4 * workers))
        assert process.wait() == 0, (folder / "log").read_text()
        seconds = time.monotonic() - begin
        report.append({
            "workers": workers, "images": images, "seconds": seconds, "images_per_second": images / seconds,
            "megabytes_per_second": size / 1e6 / seconds, "images_per_cpu_second": images / (_cpu_seconds() - cpu),
        })  # fmt: skip
    return report


def _cpu_seconds() -> float:
    """Of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure_plan(folder: Path, rows: int, images: int) -> dict[str, float]:
    """In this process, whose memory is measured."""
    names = []
    for i in range(images):
        names.append(f"{i // 10_000}/{i}.jpg")
        if i % 10_000 == 0:
            (folder / names[-1]).parent.mkdir()
        (folder / names[-1]).write_bytes(b"")
    path = write_data(folder, rows, names)
    silence_notes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin, cpu = time.monotonic(), time.process_time()
    plan = Plan(read_parts(str(path)), ImageFolder(folder), 0)
    seconds = time.monotonic() - begin
    assert len(plan) == rows and len(plan.sizes) == images
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "rows": rows, "images": images, "file_gigabytes": path.stat().st_size / 1e9, "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu, "gigabytes": peak * 1024 / 1e9,
        "gigabytes_before": before * 1024 / 1e9,
    }  # fmt: skip


def measure_kills(directory: Path, kills: int, pick: random.Random) -> dict[str, Any]:
    folder = directory / "kill"
    folder.mkdir()
    write_data(folder, 400, write_images(folder, 200))
    flags = ("--workers", 2, "--max-shard-size", "300KB")
    assert start(folder, folder / "whole", *flags).wait() == 0, (folder / "log").read_text()
    out, report = folder / "out", []
    while len(report) < kills:
        process, before, more = start(folder, out, *flags), len(_parts(out)), pick.randrange(8)
        while process.poll() is None and len(_parts(out)) < before + more:
            time.sleep(0.001)
        time.sleep(pick.uniform(0, 0.2 if more else 3))
        workers, alone = _children(process.pid), len(report) % 2 == 0
        if process.poll() is not None:  # complete before it was killed
            shutil.rmtree(out)
            continue
        process.kill() if alone else os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(1)
        loaded = [ImagePart.load(path.read_bytes(), path.name) for path in _parts(out)]
        report.append({
            "alone": alone,
            "shards": len(loaded),
            "orphans": sum(map(_is_running, workers)),
            "halves": sum((out / part.shard["name"]).stat().st_size != part.shard["bytes"] for part in loaded),
        })  # fmt: skip
    assert start(folder, out, *flags).wait() == 0, (folder / "log").read_text()
    equal = {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in (folder / "whole").iterdir()
    }
    return {"kills": report, "equal": equal, "intact": not any(one["orphans"] or one["halves"] for one in report)}


def _parts(out: Path) -> list[Path]:
    return sorted(out.glob("*.part.safetensors"))


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--plan-rows", type=int, default=665_000)
    parser.add_argument("--plan-images", type=int, default=350_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plan-in", metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plan_in:
        print(json.dumps(measure_plan(Path(args.plan_in), args.plan_rows, args.plan_images)))
        return
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if args.images:
            report["speed"] = measure_speed(directory, args.images)
        if args.plan_rows:
            (directory / "plan").mkdir()
            own = ["--plan-in", directory / "plan", "--plan-rows", args.plan_rows, "--plan-images", args.plan_images]
            command = [sys.executable, __file__, *own]
            report["plan"] = json.loads(subprocess.run(list(map(str, command)), check=True, capture_output=True).stdout)
        if args.kills:
            report["kill"] = measure_kills(directory, args.kills, random.Random(args.seed))
    text = json.dumps(report, indent=2)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n")
    if args.kills and not (report["kill"]["equal"] and report["kill"]["intact"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
