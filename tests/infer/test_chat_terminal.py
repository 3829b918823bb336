"""`python -m infer.chat` in a terminal: keys, history, completion. A scripted engine answers; no model is loaded."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import GOLDEN, ROOT
from infer import line_input

SCRIPT = r"""
import os, time, types
os.close(os.open(os.ttyname(0), os.O_RDWR))  # becomes the controlling terminal of the new session
from infer import chat

class Engine:
    context = 512
    def stream(self, turns, images, **options):
        if turns[-1] == "long":
            for n in range(10_000):
                yield f"word{n} "
                time.sleep(0.01)
        yield f"<{len(turns)}: {turns[-1]} {len(images)}>\x1b]0;title\x07"
        yield types.SimpleNamespace(prompt_tokens=1, image_tokens=0, token_ids=[1], decode_tokens_per_second=1.0,
                                    stopped_by="end")

chat.load_engine = lambda args: Engine()
chat.run()
"""


class Terminal:
    """A process in a pseudo-terminal, to type into and to read from."""

    def __init__(self, tmp_path, *flags, **environment):
        self.screen, self.read_to = "", 0
        self.master, slave = pty.openpty()
        names = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, "--checkpoint", "DIR", *flags], stdin=slave, stdout=slave, stderr=slave,
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), **names, **environment}, start_new_session=True,
        )  # fmt: skip
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, text: str) -> str:
        """Wait for a text after what was read before; returns what came before it."""
        deadline = time.monotonic() + 30
        while (at := self.screen.find(text, self.read_to)) < 0:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self.screen[self.read_to :]!r}"
            try:
                self.screen += os.read(self.master, 4096).decode()
            except OSError:
                raise AssertionError(f"ended without {text!r}: {self.screen[self.read_to :]!r}") from None
        before, self.read_to = self.screen[self.read_to : at], at + len(text)
        return before

    def interrupt(self) -> None:
        """Ctrl-C at a prompt, once the process waits for a key: Python may miss it just before."""
        while Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.01)
        time.sleep(0.2)
        self.type("\x03")

    def status(self) -> int:
        return self.process.wait(timeout=60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def open_terminal(tmp_path):
    opened = []

    def open_one(*flags, **environment):
        opened.append(Terminal(tmp_path, *flags, **environment))
        return opened[-1]

    yield open_one
    for terminal in opened:
        terminal.close()


def test_a_session(open_terminal, tmp_path):
    (tmp_path / "my photo.png").write_bytes((GOLDEN / "images/0_64x48.png").read_bytes())
    there = open_terminal()
    there.expect("Ctrl-D leaves")
    there.expect("\x1b[1m> \x1b[0m")  # in bold
    there.type("Hi\n")
    there.expect("<1: Hi 0>\\x1b]0;title\\x07")  # the model's escapes are shown, not obeyed
    there.expect("> ")

    there.type("/ima\t my\t\n")  # completes the command and the name, and escapes its space
    there.expect("ge my\\ photo.png ")
    there.expect("[1 image] > ")
    there.type('"""one\ntwo"""\n')
    there.expect("<3: <image>")
    there.expect("two 1>")

    there.expect("> ")
    there.type("long\n")
    there.expect("word3 ")
    there.type("\x03")  # Ctrl-C
    there.expect("the answer so far is kept")
    there.expect("> ")
    there.type("Next\n")
    there.expect("<7: Next 1>")

    there.expect("> ")
    there.type("\x10\x10\x0a")  # up, up: the history
    there.expect("word3 ")
    there.type("\x03")
    there.expect("> ")
    there.type("half a line")
    there.expect("half a line")
    there.interrupt()
    there.expect("press Ctrl-C again to leave")
    there.expect("> ")
    there.type("More\n")  # the line is gone, and the count begins again
    there.expect(": More 1>")
    there.expect("> ")
    there.interrupt()
    there.expect("press Ctrl-C again to leave")
    there.interrupt()
    assert there.status() == 0

    history = tmp_path / "state/llava-jax/chat_history"
    assert history.read_text().splitlines() == [
        "Hi", "/image my\\ photo.png ", '"""one', 'two"""', "long", "Next", "long", "More"
    ]  # fmt: skip
    assert history.stat().st_mode & 0o777 == 0o600


def test_the_next_session_has_the_history(open_terminal, tmp_path):
    history = tmp_path / "state/llava-jax/chat_history"
    history.parent.mkdir(parents=True)
    lines = [f"line {n}" for n in range(2 * line_input.HISTORY_LINES + 1)]
    history.write_text("\n".join(lines) + "\n")
    there = open_terminal(NO_COLOR="1")
    there.expect("> ")
    there.type("\x10\n")
    there.expect(f"<1: {lines[-1]} 0>")
    assert "\x1b[1m" not in there.screen
    there.expect("> ")
    there.type("\x04")  # Ctrl-D
    assert there.status() == 0
    assert history.read_text().splitlines() == [*lines[-line_input.HISTORY_LINES :], lines[-1]]


def test_without_history(open_terminal, tmp_path):
    there = open_terminal("--no-history")
    there.expect("> ")
    there.type("Hi\n")
    there.expect("Hi 0>")
    there.expect("> ")
    there.type("long\n")
    there.expect("word3 ")
    there.type("\x03")
    there.expect("Ctrl-C again leaves")
    there.expect("> ")
    there.type("/exit\n")
    assert there.status() == 0
    assert not (tmp_path / "state").exists()


def test_history_that_cannot_be_kept_is_a_warning(open_terminal, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state/llava-jax").write_text("a file")
    there = open_terminal()
    there.expect("> ")
    there.type("Hi\n")
    there.expect("warning: no history: ")
    there.expect("Hi 0>")
    there.expect("> ")
    there.type("Ho\n")
    assert "warning" not in there.expect("Ho 0>")


# ---------------------------------------------------------------- completion


def test_paths_are_completed_as_a_shell_would(tmp_path, monkeypatch):
    for name in ("a b.png", "a'c.png", "ab.png", ".hidden", "d/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    complete = line_input.complete_path
    assert complete("a") == ["a\\ b.png ", "a\\'c.png ", "ab.png "]
    assert complete("a\\ ") == ["a\\ b.png "]
    assert complete("d") == ["d/"] and complete("d/") == ["d/e.png "]
    assert complete("~/ab") == ["~/ab.png "] and complete(".h") == [".hidden "]
    assert complete("[a") == [] and complete("none/") == []
    assert len(complete("")) == 4


def test_what_of_a_line_is_completed():
    completer = line_input._Completer(["/image", "/images", "/set"], {"/image"})
    assert completer.complete("/im", 3) == ["/image ", "/images "]
    assert completer.complete("", 0) == completer.complete("What", 4) == completer.complete("/set a", 1) == []
    [found] = completer.complete(f"/image x {GOLDEN}/pro", len(f"{GOLDEN}/pro"))
    assert found == f"{GOLDEN}/prompts.json "
    assert re.fullmatch("[^ ]+ ", found)
