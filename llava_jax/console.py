"""What commands share: one-line errors, notes on standard error, progress, compiled programs kept between runs."""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path


class InputError(Exception):
    """Something that the user gave is wrong. The message is one line: what, where, and what to do about it."""


class Parser(argparse.ArgumentParser):
    """Wrong flags are wrong input like any other: one line, status 1."""

    def error(self, message: str):
        raise InputError(f"{message} (--help lists all flags)")


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command and exit with its status; an `InputError` is one line on standard error and status 1."""
    warnings.filterwarnings("ignore", module="PIL")  # what matters about an image is an error or a note of ours
    _open_streams()
    try:
        status = main() or 0
        if sys.stdout:
            sys.stdout.flush()
    except InputError as error:
        status = 1
        print("error: " + _readable(error), file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
        print("interrupted", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output has gone, e.g. `| head`
        status = 141
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MemoryError:
        status = 1
        print("error: not enough memory", file=sys.stderr)
    except OSError as error:  # a full disk, a permission
        status = 1
        print("error: " + _readable(error), file=sys.stderr)
        with contextlib.suppress(OSError):  # no file, as in a notebook
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _open_streams() -> None:
    """Standard streams that take any text, and are there: without them other files would get their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not that of a notebook
            stream.reconfigure(errors="backslashreplace")


def _readable(error: Exception) -> str:
    """Its message on a line, with no more than 100 characters of any argument, whoever repeats it."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{shorten(error.filename)}: {error.strerror}"
    for argument in sys.argv[1:]:
        for given in (argument, argument.partition("=")[2]):
            text = text.replace(given, shorten(given)).replace(repr(given)[1:-1], shorten(given))
    return printable(shorten_words(text))


def enable_compilation_cache() -> None:
    """Keep compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache directory."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        try:
            root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError:  # no home
            return
        jax.config.update("jax_compilation_cache_dir", str(root / "llava-jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


_hushed = False


def hush() -> None:
    """From now on no notes and no progress: another process of the same run tells them. Errors remain."""
    global _hushed
    _hushed = True


def first_line(error: BaseException) -> str:
    """What an error of somebody else's library says, as part of a line of ours: of the system's, without the path."""
    text = error.strerror if isinstance(error, OSError) and isinstance(error.strerror, str) else str(error)
    return shorten_words(text.strip().split("\n")[0])[:300] or type(error).__name__


def printable(text: str) -> str:
    """Text on one line that a terminal shows as it is, and does nothing else with."""
    return "".join(c if c.isprintable() else " " if c == "\n" else ascii(c)[1:-1] for c in text)


def shown(text: str) -> str:
    """Text of several lines for standard output: as it is, but on a terminal without what would control that."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)


def print_json(value: object) -> None:
    """Print a value as a line of JSON, readable if standard output can show it."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text)


def shorten(text: object, limit: int = 100) -> str:
    """Something that the user gave, as part of a line of ours: at most `limit` characters, the middle left out."""
    text = str(text)
    tail = limit // 3
    return text if len(text) <= limit else f"{text[: limit - tail - 3]}...{text[-tail:]}"


def shorten_words(text: str) -> str:
    """A line whose words have at most 100 characters each: a longer one is an input, repeated as it was given."""
    return re.sub(r"\S{101,}", lambda found: shorten(found[0]), text)


def note(message: str) -> None:
    """A line for the user that is not the result."""
    if _hushed:
        return
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # a bar that may stand there, and will be drawn anew
    print(clear + printable(message), file=sys.stderr, flush=True)


def plural(n: int, noun: str) -> str:
    """`1 row`, `2,048 rows`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


@contextlib.contextmanager
def elapsed(what: str, every: float = 10.0) -> Iterator[None]:
    """While the body runs, note every few seconds that it does: for what cannot say how far it is."""
    done, start = threading.Event(), time.monotonic()

    def tell():
        while not done.wait(every):
            note(f"{what}: {_clock(time.monotonic() - start)}")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Progress:
    """A progress bar on a terminal, a plain line every few seconds elsewhere; nothing if all is done in `quiet` s.

    `done` is what had been done before. `advance` may say more about how it goes.

    >>> with Progress("reading", total=10**9, unit="B") as bar:
    ...     bar.advance(2**20)
    """

    def __init__(self, what: str, total: int, unit: str = "", *, every: float = 5.0, quiet: float = 1.0, done: int = 0):
        self.what, self.total, self.unit = what, total, unit
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        self.every = 0.1 if self.terminal else every
        self.done = self.first = done
        self.more = ""
        self.start = time.monotonic()
        self.next = self.start + (quiet if self.terminal else every)
        self.shown = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.shown:
            self._show(last=True)

    def advance(self, amount: int = 1, more: str = "") -> None:
        self.done += amount
        self.more = more
        now = time.monotonic()
        if now >= self.next:
            self.next = now + self.every
            self._show()

    def _amount(self, n: float) -> str:
        if self.unit != "B":
            return f"{n:.0f}"
        for unit in ("B", "kB", "MB", "GB", "TB"):
            if n < 1000 or unit == "TB":
                return f"{n:.1f} {unit}" if unit != "B" else f"{n:.0f} B"
            n /= 1000

    def _show(self, last: bool = False) -> None:
        if _hushed:
            return
        self.shown = True
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = (self.done - self.first) / seconds
        share = self.done / max(self.total, 1)
        left = (self.total - self.done) / rate if rate else 0.0
        tail = f"{_clock(seconds)}" if last else f"{_clock(left)} left"
        unit = "" if self.unit == "B" else f" {self.unit.removesuffix('s') if self.total == 1 else self.unit}"
        text = (
            f"{self.what} {share:4.0%}  {self._amount(self.done)} of {self._amount(self.total)}{unit}"
            f"  {self._amount(rate) if self.unit == 'B' else f'{rate:.2f}'}/s  {tail}"
            f"{'  ' + self.more if self.more else ''}"
        )
        text = printable(text)
        if self.terminal:
            width = 24
            text = text[: max(shutil.get_terminal_size().columns - width - 2, 0)]  # a line of its own, never two
            full = min(width, int(share * width))
            print(
                f"\r\x1b[K{'█' * full}{'░' * (width - full)} {text}",
                end="\n" if last else "",
                file=sys.stderr,
            )
            sys.stderr.flush()
        else:
            note(text)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
