"""What commands print, on whatever they print to."""

import io
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from helpers import ROOT
from llava_jax import console
from llava_jax.console import InputError, Progress, note, print_json, run_main, terminal_safe

FORGED = "a\x1b]0;title\x07\x1b[2J\nerror: forged\u202e.png"


def command(*arguments, shell="", **environment):
    """Run a command in a process of its own, its streams arranged by the shell."""
    line = f'"$@" {shell}'
    return subprocess.run(
        ["sh", "-c", line, "sh", sys.executable, "-m", *map(str, arguments)],
        capture_output=True, cwd=ROOT, env=os.environ | environment,
    )  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_notes_and_errors_are_lines_that_control_nothing(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    note(f"error: {FORGED}: no such image")
    with pytest.raises(SystemExit):
        run_main(lambda: (_ for _ in ()).throw(InputError(FORGED)))
    with Progress(FORGED, total=2, quiet=-1.0, every=-1.0) as bar:
        bar.advance(1, more=FORGED)
    written = sys.stderr.getvalue().replace("\r\x1b[K", "")
    assert "\\x1b]0;title\\x07\\x1b[2J error: forged\\u202e" in written
    assert not any(c in written for c in "\x1b\x07\u202e")
    assert not any(line.startswith("error: forged") for line in written.splitlines())


@pytest.mark.parametrize(("encoding", "full"), [("utf-8", "████"), ("ascii", "####")])
def test_a_bar_is_drawn_in_what_the_terminal_shows(encoding, full, monkeypatch):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("reading", 10, "rows", quiet=-1.0) as bar:
        bar.advance(10)
    note("done")
    assert full in raw.getvalue().decode(encoding) and raw.getvalue().endswith(b"\n\r\x1b[Kdone\n")


def test_elsewhere_progress_is_lines_of_their_own(capsys):
    with Progress("reading", 10**9, "B", every=0.0, done=10**8) as bar:
        for _ in range(3):
            note("a note")
            bar.advance(3 * 10**8, "loss 1.0")
    lines = capsys.readouterr().err.splitlines()
    assert lines.count("a note") == 3
    assert lines[-1].startswith("reading: 100%  1.00G of 1.00GB [00:00<00:00, ") and lines[-1].endswith(
        "B/s, loss 1.0]"
    )


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_what_is_quick_or_hushed_has_no_progress(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    with Progress("reading", 2) as bar:
        bar.advance()
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(console, "_silenced", True)
    with Progress("reading", 2, quiet=-1.0, every=-1.0) as bar:
        bar.advance(2, "more")
    assert sys.stderr.getvalue() == ""


def test_without_standard_error_there_is_no_progress(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with Progress("reading", 2, every=-1.0) as bar:
        note("a note")
        bar.advance(2)


def test_on_a_terminal_text_controls_nothing_and_elsewhere_it_is_as_it_is(monkeypatch):
    assert terminal_safe(FORGED) == FORGED
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert terminal_safe("two\nlines\tand \x1b[2J") == "two\nlines\tand \\x1b[2J"


def test_json_is_json_whatever_standard_output_can_show(monkeypatch):
    for encoding, written in (
        ("utf-8", b'["\xe7\x8c\xab"]\n'),
        ("ascii", b'["\\u732b"]\n'),
        ("utf-8", b'["\\ud800"]\n'),
    ):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        print_json(["\ud800"] if b"d800" in written else ["猫"])
        sys.stdout.flush()
        assert raw.getvalue() == written
    monkeypatch.setattr(sys, "stdout", Terminal())
    print_json(["猫"])
    print_json(["\x9b2J\u202e\x7f"])
    assert sys.stdout.getvalue() == '["猫"]\n["\\u009b2J\\u202e\\u007f"]\n'


def test_what_is_written_in_escapes_is_no_longer_than_other_text(capsys):
    with pytest.raises(SystemExit):
        run_main(lambda: (_ for _ in ()).throw(InputError("\U000e0001" * 100 + ": no such image")))
    assert len(capsys.readouterr().err) < 130


def test_streams_that_are_closed_or_take_ascii_only(tmp_path):
    from safetensors.numpy import save_file

    save_file({"猫\x1b[2J": np.zeros(1)}, tmp_path / "m.safetensors")
    inspect = ("convert", "inspect", tmp_path / "m.safetensors")
    done = command(*inspect, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"") and b"\\u732b" in done.stdout
    for streams in ("2>&-", ">&-", "<&-", ">&- 2>&- <&-"):
        assert command(*inspect, shell=streams).returncode == 0
    missing = command("convert", "inspect", tmp_path / "no", shell="2>&-")
    assert (missing.returncode, missing.stdout, missing.stderr) == (1, b"", b"")
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_without_a_home_nothing_is_kept(monkeypatch):
    import jax

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(console.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        console.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_console_script_introduces_itself(monkeypatch):
    from convert.__main__ import parser

    assert parser().format_usage().startswith("usage: python -m convert ")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/llava-convert", "--help"])
    assert parser().format_usage().startswith("usage: llava-convert ")


def test_an_interrupt_waits_for_no_threads():
    lines = """if True:
        import threading, time
        from llava_jax.console import run_main

        def main():
            threading.Thread(target=time.sleep, args=(300,)).start()
            print("answer")
            raise KeyboardInterrupt

        run_main(main)
    """
    run = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (130, "answer\n", "interrupted\n")


def test_an_interrupt_within_an_import(tmp_path):
    """Extension modules that are being imported may crash, or swallow the exception."""
    (tmp_path / "swallows.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    )
    lines = "from llava_jax.console import run_main; run_main(lambda: __import__('swallows') and 0)"
    run = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, restore_signals=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "interrupted\n")
