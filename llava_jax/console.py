"""Shared by all commands: one-line errors, notes on standard error, progress bars, and the compilation cache."""

import argparse
import contextlib
import ctypes
import dataclasses
import json
import logging
import multiprocessing
import numbers
import os
import re
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import PIL.Image
import tqdm


class InputError(Exception):
    """The user's input is invalid. The message is one line: what is wrong, where, and what to do."""


class Parser(argparse.ArgumentParser):
    """Reports invalid flags like any other invalid input: one line, status 1."""

    def __init__(self, prog: str, **settings):
        """`prog` is the module's command, `python -m ...`; run as a console script, a parser has the script's name."""
        script = Path(sys.argv[0]).name
        super().__init__(script if prog.startswith("python -m ") and script.startswith("llava-") else prog, **settings)

    def parse_known_args(self, args=None, namespace=None):
        for given in sys.argv[1:] if args is None else args:
            if re.fullmatch("-[^=]*=--", given):  # older argparse parses this as an empty list
                self.error(f"argument {given.removesuffix('=--')}: expected one argument")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        # Shortens argparse's "argument --seed: -1: must be ..." to "--seed -1: must be ...".
        if found := re.fullmatch(r"argument (\S+): (.*: must be .*)", message, re.DOTALL):
            raise InputError(" ".join(found.groups()))
        raise InputError(f"{message} (--help lists all flags)")


# ---------------------------------------------------------------- numbers

MIN_POSITIVE = 1e-30  # smaller numbers are 0 in float32, or overflow as divisors
MAX_INT32 = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """The valid numbers for a flag or a dataclass field: from `minimum` to `maximum`.

    Use it as the flag's `type` and as the field's `metadata["range"]`: `max_length: int = field(default=2048,
    metadata={"range": integer(2, 131072)})`. Then `check_ranges` checks the field, and `ranges(Config)["max_length"]`
    is the `type` of the flag.
    """

    kind: type  # int or float
    minimum: float
    maximum: float
    above: bool = False  # excludes `minimum` itself

    def __str__(self) -> str:
        noun = "a whole number" if self.kind is int else "a number"
        low, high = _plain(self.minimum), _plain(self.maximum)
        return f"{noun} above {low}, at most {high}" if self.above else f"{noun} from {low} to {high}"

    def __call__(self, text: str) -> float:
        """Parse a number in ASCII digits, without spaces and underscores.

        Raises:
          argparse.ArgumentTypeError: the text is not a number, or out of range.
        """
        pattern = r"[+-]?[0-9]{1,100}"
        if self.kind is float:
            pattern = r"[+-]?([0-9]{1,100}(\.[0-9]{0,100})?|\.[0-9]{1,100})([eE][+-]?[0-9]{1,9})?"
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{shorten(text)!r}: must be {self}")
        value = self.kind(text)
        if problem := self._problem(value):
            raise argparse.ArgumentTypeError(f"{shorten(text)}: {problem}")
        return value

    def check(self, name: str, value: Any) -> None:
        """Check a value called `name`.

        Raises:
          InputError: it is not a number in the range.
        """
        real = numbers.Integral if self.kind is int else numbers.Real
        is_number = isinstance(value, real) and not isinstance(value, bool)
        if problem := self._problem(value) if is_number else f"must be {self}":
            raise InputError(f"{name} {show_value(value)}: {problem}")

    def _problem(self, value: float) -> str:
        """The problem with a number; "" if it is in range. NaN never is."""
        if not self.minimum <= value <= self.maximum or (self.above and value == self.minimum):
            return f"must be {self}"
        if 0 < abs(value) < MIN_POSITIVE:
            return f"must be {'' if self.above else '0 or '}at least {MIN_POSITIVE:g}, the limit of float32"
        return ""


def integer(minimum: int, maximum: int) -> Range:
    """Integers from `minimum` to `maximum`."""
    return Range(int, minimum, maximum)


def number(minimum: float, maximum: float, *, above: bool = False) -> Range:
    """Numbers from `minimum` to `maximum`; `above` excludes `minimum` itself."""
    return Range(float, minimum, maximum, above)


SEED = integer(0, MAX_INT32)  # valid for the generators of NumPy, grain and JAX


def ranges(config: Any) -> dict[str, Range]:
    """The ranges of the fields of a dataclass or an instance, by field name."""
    return {f.name: f.metadata["range"] for f in dataclasses.fields(config) if "range" in f.metadata}


def check_ranges(config: Any) -> None:
    """Check the fields of a dataclass that have a range. Those with default None may be None.

    Raises:
      InputError: a field is out of range; the error names it as a flag, `--max-length`.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "range" in field.metadata and (value is not None or field.default is not None):
            field.metadata["range"].check(flag_of(field.name), value)


def show_value(value: Any) -> str:
    """Format a number plainly and anything else as its `repr`, shortened."""
    if isinstance(value, int) and abs(value) >= 10**100:  # Python refuses to print thousands of digits in decimal
        return shorten(hex(value))
    return shorten(str(value) if isinstance(value, numbers.Number) else repr(value))


def flag_of(name: str) -> str:
    """The flag of a field: `--max-length` for `max_length`."""
    return "--" + name.replace("_", "-")


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


# ---------------------------------------------------------------- running a command


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command and exit with its status; an `InputError` prints one line on standard error and exits with 1."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    silence_pillow()
    _open_streams()
    try:
        status = main() or 0
        if sys.stdout:
            sys.stdout.flush()
    except InputError as error:
        status = 1
        print("error: " + _readable(error), file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _end_at_once(130)
    except BrokenPipeError:  # the reader of standard output has exited, e.g. `| head`
        status = 141
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MemoryError:
        status = 1
        print("error: not enough memory", file=sys.stderr)
    except OSError as error:  # for example a full disk or a missing permission
        status = 1
        print("error: " + _readable(error), file=sys.stderr)
        with contextlib.suppress(OSError):  # not a file, as in a notebook
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _end_at_once(status: int) -> NoReturn:
    """End the process without Python's own end, which threads of libraries that still compile or load may crash."""
    for child in multiprocessing.active_children():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _interrupt(_: int, frame: types.FrameType | None) -> None:
    """Ctrl-C raises `KeyboardInterrupt`, except within an import: extension modules may crash, or swallow it."""
    while frame:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def silence_pillow() -> None:
    """Silence Pillow's warnings and logs about broken images, which we report ourselves, and, if its handlers can be
    found, libtiff's lines on standard error."""
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with contextlib.suppress(OSError, AttributeError):
        libtiff = ctypes.CDLL(PIL.Image.core.__file__)
        libtiff.TIFFSetErrorHandler(None)
        libtiff.TIFFSetWarningHandler(None)


def _open_streams() -> None:
    """Make standard streams accept any text, and open missing ones, whose descriptors other files would get."""
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
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")


def _readable(error: Exception) -> str:
    """The message of an error on one line, with command-line arguments in it shortened to 100 characters."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{shorten(error.filename)}: {error.strerror}"
    for argument in sys.argv[1:]:
        for given in (argument, argument.partition("=")[2]):
            text = text.replace(given, shorten(given)).replace(repr(given)[1:-1], shorten(given))
    return shorten_words(printable(text))


def enable_compilation_cache() -> None:
    """Cache compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache directory."""
    import jax

    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]  # options are set at run time
        try:
            root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError:  # no home directory
            return
        jax.config.update("jax_compilation_cache_dir", str(root / "llava-jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


_silenced = False


def silence_notes() -> None:
    """Stop printing notes and progress, since another process of the run prints them. Errors remain."""
    global _silenced
    _silenced = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Print no notes and progress while the body runs."""
    global _silenced
    before, _silenced = _silenced, True
    try:
        yield
    finally:
        _silenced = before


def first_line(error: BaseException) -> str:
    """The first line of an error from a library, for an error of ours; the path of an `OSError` is omitted."""
    if isinstance(error, OSError) and isinstance(error.strerror, str):
        return shorten_words(error.strerror)
    text = str(error).strip().split("\n")[0]
    if found := re.search(r"os_error_code='([0-9]{1,4})'", text):  # TensorStore's; the rest repeats the file name
        return os.strerror(int(found[1]))
    return shorten(shorten_words(text), 150) or type(error).__name__


def printable(text: str) -> str:
    """Text on one line with control characters escaped."""
    return "".join(c if c.isprintable() else " " if c == "\n" else ascii(c)[1:-1] for c in text)


def terminal_safe(text: str) -> str:
    """Text of several lines for standard output: unchanged, but with control characters escaped on a terminal."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)


def print_json(value: object) -> None:
    """Print a value as a line of JSON, in ASCII if standard output cannot encode it or it has control characters."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
        is_safe = text.isprintable() or not sys.stdout.isatty()
    except UnicodeEncodeError:
        is_safe = False
    print(text if is_safe else json.dumps(value))


def shorten(text: object, limit: int = 100) -> str:
    """Shorten user input for a message: at most `limit` characters, omitting the middle."""
    text = str(text)
    tail = limit // 3
    return text if len(text) <= limit else f"{text[: limit - tail - 3]}...{text[-tail:]}"


def shorten_words(text: str) -> str:
    """Shorten each word of a line to 100 characters: longer words are repeated user input."""
    return re.sub(r"\S{101,}", lambda found: shorten(found[0]), text)


def note(message: str) -> None:
    """Print a line for the user on standard error."""
    if _silenced or sys.stderr is None:
        return
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # clears a progress bar, which is drawn again later
    print(clear + printable(message), file=sys.stderr, flush=True)


def plural(n: int, noun: str) -> str:
    """`1 row`, `2,048 rows`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


@contextlib.contextmanager
def elapsed(what: str, every: float = 10.0) -> Iterator[None]:
    """Print the elapsed time every few seconds while the body runs, for work without measurable progress."""
    done, start = threading.Event(), time.monotonic()

    def report():
        while not done.wait(every):
            note(f"{what}: {_clock(time.monotonic() - start)}")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Progress(tqdm.tqdm):
    """tqdm's bar on a terminal, a plain line every few seconds elsewhere; nothing if all is done in `quiet` seconds.

    `done` is what had been done before. `advance` may say more about how it goes.

    >>> with Progress("reading", total=10**9, unit="B") as bar:
    ...     bar.advance(2**20)
    """

    monitor_interval = 0  # no thread that adjusts `miniters`, which is fixed here

    def __init__(self, what: str, total: int, unit: str = "", *, every: float = 5.0, quiet: float = 1.0, done: int = 0):
        terminal = sys.stderr is not None and sys.stderr.isatty()
        has_size = terminal and all(_terminal_size())
        before = "{l_bar}{bar}|" if terminal else "{desc}: {percentage:3.0f}% "
        super().__init__(
            desc=printable(what),
            total=total,
            initial=done,
            unit=unit if unit == "B" else f" {unit.removesuffix('s') if total == 1 else unit}",
            unit_scale=unit == "B",
            file=sys.stderr if terminal else _Lines(),
            bar_format=before + " {n_fmt} of {total_fmt}{unit} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]",
            mininterval=0.1 if terminal else every,
            delay=quiet if terminal else every,
            miniters=1,
            dynamic_ncols=has_size,
            ncols=80 if terminal and not has_size else None,
            nrows=24 if terminal and not has_size else None,
            position=0,
            disable=_silenced,
        )

    def advance(self, amount: int = 1, more: str = "") -> None:
        self.set_postfix_str(printable(more), refresh=False)
        self.update(amount)


def _terminal_size() -> tuple[int, int]:
    """Columns and lines; (0, 0) where the terminal reports none, as in some containers."""
    try:
        return os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        return 0, 0


class _Lines:
    """A file that prints lines where tqdm would redraw its bar."""

    def write(self, text: str) -> None:
        if line := text.strip():
            note(line)

    def flush(self) -> None:
        pass


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
