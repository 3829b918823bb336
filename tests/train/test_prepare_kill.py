"""A preparation that is killed leaves whole shards, no process that goes on writing, and is resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from helpers import ROOT, turns, user_environment
from train.datasets.prepare.image_shards import ImagePart
from training import write_rows

IMAGES = 40


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images, each a shard of its own with `--max-shard-size 1KB`, and a data file."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(IMAGES):
        Image.new("RGB", (2000, 2000), (i, 0, 0)).save(folder / f"{i}.png", compress_level=1)  # slow to decode
    rows = [{"id": i, "image": f"{i}.png", "conversations": turns("<image>\n?", "x")} for i in range(IMAGES)]
    return folder, write_rows(folder.parent / "photos.json", rows)


@pytest.fixture
def start(photos, tmp_path):
    def start(output="out") -> subprocess.Popen:
        folder, data = photos
        command = [
            sys.executable, "-m", "train.datasets.prepare", "--data", data, "--image-folder", folder, "--workers", "2",
            "--output", tmp_path / output, "--max-shard-size", "1KB",
        ]  # fmt: skip
        return subprocess.Popen(
            command, cwd=ROOT, env=user_environment(), start_new_session=True, stderr=subprocess.PIPE, text=True
        )

    return start


def wait(condition) -> None:
    until = time.monotonic() + 120  # workers start slowly on a busy machine
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def parts_of(out: Path) -> list[Path]:
    return sorted(out.glob("*.part.safetensors"))


def complete_parts(out: Path) -> list[Path]:
    """The parts that are there, whose shards are whole."""
    parts = parts_of(out)
    for path in parts:
        part = ImagePart.load(path.read_bytes(), path.name)
        assert (out / part.shard["name"]).stat().st_size == part.shard["bytes"]
    return parts


def test_killed_commands_are_resumed(tmp_path, start):
    out = tmp_path / "out"
    # The command alone: its workers end too, and write nothing more.
    process = start()
    wait(lambda: parts_of(out))
    workers = children(process)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    wait(lambda: not any(map(is_running, workers)))
    left = {path.name for path in out.iterdir()}
    time.sleep(0.2)
    assert {path.name for path in out.iterdir()} == left
    # The whole group.
    process, before = start(), len(complete_parts(out))
    wait(lambda: len(parts_of(out)) > before)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    # Ctrl-C, which a terminal sends to the whole group.
    process, before = start(), len(complete_parts(out))
    wait(lambda: len(parts_of(out)) > before)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate()[1].splitlines()[-1] == "interrupted"
    assert process.returncode == 130 and 0 < len(complete_parts(out)) < IMAGES
    process, done = start(), len(complete_parts(out))
    assert f"resuming: {done} of {IMAGES} shards of images are complete" in process.communicate()[1]
    assert process.returncode == 0
    assert start("whole").wait() == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_a_killed_worker_ends_the_command(tmp_path, start):
    process = start()
    wait(lambda: parts_of(tmp_path / "out"))
    for pid in children(process):  # one of them is multiprocessing's resource tracker
        if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
            break
    assert process.communicate()[1].splitlines()[-1].startswith("error: a worker process was killed; if memory ran out")
    assert process.returncode == 1
