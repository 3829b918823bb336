"""The fuzzer finds what it is to find."""

import os
import random
import sys
from pathlib import Path

import pytest

from helpers import GOLDEN, ROOT
from llava_jax.console import InputError

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    import fuzz

    return fuzz


def fail(error: BaseException):
    raise error


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (InputError("data.json: no such file"), ""),
        (OSError("a full disk"), ""),
        (SystemExit(1), ""),
        (SystemExit(2), "ends with status 2"),
        (InputError("data.json: no such file\n" + "x" * 200), ""),  # `run_main` makes a short line of it
        (InputError("x " * 150), "an error of 307 characters: "),
        (KeyError("x"), "KeyError at test_fuzz.py:"),
        (RecursionError("deep"), "RecursionError at test_fuzz.py:"),
    ],
)
def test_how_an_attempt_ends(error, found, fuzz):
    what, _ = fuzz.judge(lambda: fail(error))
    assert what.startswith(found) and bool(what) == bool(found)


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("reading 5%\nerror: /scratch/" + "x" * 280 + "\n", ""),
        ("error: one\ntwo\n", "an error of several lines: error: one"),
        ("warning: " + "x" * 300, "an error of 309 characters: "),
        ("Traceback (most recent call last):\n  File\nKeyError: 1\n", "a traceback: KeyError: 1"),
        ("opened \x1b[31mred\n", "not printable: opened "),
    ],
)
def test_what_an_attempt_writes(written, found, fuzz):
    what = fuzz.judge_output(written, "/scratch")
    assert what.startswith(found) and bool(what) == bool(found)


def test_what_an_attempt_changes(fuzz, tmp_path):
    for name in ("work/a", "tmp/b", "home/.cache/c"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("before")
    os.mkfifo(tmp_path / "work" / "pipe")
    before = fuzz.contents(tmp_path)
    (tmp_path / "work" / "a").write_text("after!")
    (tmp_path / "tmp" / "new").symlink_to("b")
    (tmp_path / "home" / ".cache" / "c").write_text("after")
    after = fuzz.contents(tmp_path)
    changed = {Path(path).name for path in before | after if before.get(path) != after.get(path)}
    assert changed == {"a", "new"}


def test_changes_are_many_and_the_same_again(fuzz, tmp_path):
    from fuzz_inputs import change

    original = (GOLDEN / "checkpoints/v1.5-llama/config.json").read_bytes()

    def changed(seed: int, where: Path) -> bytes | None:
        path = where / f"{seed}.json"
        path.write_bytes(original)
        change(path, random.Random(seed))
        return path.read_bytes() if path.is_file() else None

    for name in "ab":
        (tmp_path / name).mkdir()
    made = [changed(seed, tmp_path / "a") for seed in range(100)]
    assert made == [changed(seed, tmp_path / "b") for seed in range(100)]
    assert len(set(made)) > 80 and original not in made
