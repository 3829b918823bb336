"""What commands share: one-line errors, notes on standard error, progress, compiled programs kept between runs."""

import argparse
import contextlib
import ctypes
import dataclasses
import json
import logging
import numbers
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import tqdm


class InputError(Exception):
    """Something that the user gave is wrong. The message is one line: what, where, and what to do about it."""


class Parser(argparse.ArgumentParser):
    """Wrong flags are wrong input like any other: one line, status 1."""

    def parse_known_args(self, args=None, namespace=None):
        for given in sys.argv[1:] if args is None else args:
            if re.fullmatch("-[^=]*=--", given):  # of which older argparse makes an empty list
                self.error(f"argument {given.removesuffix('=--')}: expected one argument")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        # argparse writes "argument --seed: ", and what a `Range` says begins with the value: "--seed -1: must be ..."
        if found := re.fullmatch(r"argument (\S+): (.*: must be .*)", message, re.DOTALL):
            raise InputError(" ".join(found.groups()))
        raise InputError(f"{message} (--help lists all flags)")


# ---------------------------------------------------------------- numbers

TINY = 1e-30  # what is nearer to 0 than this is 0, or divides to infinity, in float32
MOST_INT = 2**31 - 1  # of an int32


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a flag, or a field of a dataclass, may have: from `least` to `most`.

    It is the flag's `type`, and the field's `metadata["range"]`: `max_length: int = field(default=2048,
    metadata={"range": integer(2, 131072)})`. Then `check_ranges` checks the field, and the flag is added with
    `type=ranges(Config)["max_length"]`.
    """

    kind: type  # int or float
    least: float
    most: float
    above: bool = False  # `least` itself is not in the range

    def __str__(self) -> str:
        noun = "a whole number" if self.kind is int else "a number"
        least, most = _plain(self.least), _plain(self.most)
        return f"{noun} above {least}, at most {most}" if self.above else f"{noun} from {least} to {most}"

    def __call__(self, text: str) -> float:
        """The number that a text is, in ASCII digits, without spaces and underscores.

        Raises:
          argparse.ArgumentTypeError: it is none, or one out of range.
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
        """Raises:
        InputError: `value`, called `name`, is no such number.
        """
        real = numbers.Integral if self.kind is int else numbers.Real
        is_number = isinstance(value, real) and not isinstance(value, bool)
        if problem := self._problem(value) if is_number else f"must be {self}":
            raise InputError(f"{name} {show_value(value)}: {problem}")

    def _problem(self, value: numbers.Real) -> str:
        """What is wrong with a number; "" if it is in range. NaN is in none."""
        if not self.least <= value <= self.most or (self.above and value == self.least):
            return f"must be {self}"
        if 0 < abs(value) < TINY:
            return f"must be {'' if self.above else '0 or '}at least {TINY:g}, as float32 has no number so near to 0"
        return ""


def integer(least: int, most: int) -> Range:
    """Whole numbers from `least` to `most`."""
    return Range(int, least, most)


def number(least: float, most: float, *, above: bool = False) -> Range:
    """Numbers from `least` to `most`; with `above`, without `least` itself."""
    return Range(float, least, most, above)


SEED = integer(0, MOST_INT)  # NumPy's, grain's and JAX's generators all take it


def ranges(config: Any) -> dict[str, Range]:
    """The ranges of the fields of a dataclass, or of an instance of it, by the names of the fields."""
    return {f.name: f.metadata["range"] for f in dataclasses.fields(config) if "range" in f.metadata}


def check_ranges(config: Any) -> None:
    """Check the fields of a dataclass that have a range. Those whose default is None may be None.

    Raises:
      InputError: one is out of its range; the line names the field as a flag, `--max-length`.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "range" in field.metadata and (value is not None or field.default is not None):
            field.metadata["range"].check(flag_of(field.name), value)


def show_value(value: Any) -> str:
    """A number as it is written, anything else as Python writes it, shortened."""
    if isinstance(value, int) and abs(value) >= 10**100:  # of thousands of digits Python writes none in decimal
        return shorten(hex(value))
    return shorten(str(value) if isinstance(value, numbers.Number) else repr(value))


def flag_of(name: str) -> str:
    """`--max-length`, of the field `max_length`."""
    return "--" + name.replace("_", "-")


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


# ---------------------------------------------------------------- running a command


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command and exit with its status; an `InputError` is one line on standard error and status 1."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that it has no torch, which nobody misses
    _silence_pillow()
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


def _silence_pillow() -> None:
    """What matters about an image is an error or a note of ours. Of a broken one Pillow warns and logs, and libtiff
    writes lines to standard error, unless it is linked where its handlers cannot be found."""
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with contextlib.suppress(OSError, AttributeError):
        libtiff = ctypes.CDLL(PIL.Image.core.__file__)
        libtiff.TIFFSetErrorHandler(None)
        libtiff.TIFFSetWarningHandler(None)


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
    return shorten_words(printable(text))


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
    if isinstance(error, OSError) and isinstance(error.strerror, str):
        return shorten_words(error.strerror)
    text = str(error).strip().split("\n")[0]
    if found := re.search(r"os_error_code='([0-9]{1,4})'", text):  # of TensorStore: all else is which file, many times
        return os.strerror(int(found[1]))
    return shorten(shorten_words(text), 150) or type(error).__name__


def printable(text: str) -> str:
    """Text on one line that a terminal shows as it is, and does nothing else with."""
    return "".join(c if c.isprintable() else " " if c == "\n" else ascii(c)[1:-1] for c in text)


def shown(text: str) -> str:
    """Text of several lines for standard output: as it is, but on a terminal without what would control that."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)


def print_json(value: object) -> None:
    """Print a value as a line of JSON, readable if standard output can show it, and is not controlled by it."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
        is_safe = text.isprintable() or not sys.stdout.isatty()
    except UnicodeEncodeError:
        is_safe = False
    print(text if is_safe else json.dumps(value))


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
    if _hushed or sys.stderr is None:
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


class Progress(tqdm.tqdm):
    """tqdm's bar on a terminal, a plain line every few seconds elsewhere; nothing if all is done in `quiet` seconds.

    `done` is what had been done before. `advance` may say more about how it goes.

    >>> with Progress("reading", total=10**9, unit="B") as bar:
    ...     bar.advance(2**20)
    """

    monitor_interval = 0  # no thread that adjusts `miniters`, which is fixed here

    def __init__(self, what: str, total: int, unit: str = "", *, every: float = 5.0, quiet: float = 1.0, done: int = 0):
        terminal = sys.stderr is not None and sys.stderr.isatty()
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
            dynamic_ncols=terminal,
            disable=_hushed,
        )

    def advance(self, amount: int = 1, more: str = "") -> None:
        self.set_postfix_str(printable(more), refresh=False)
        self.update(amount)


class _Lines:
    """A file that gets lines where tqdm draws over its bar."""

    def write(self, text: str) -> None:
        if line := text.strip():
            note(line)

    def flush(self) -> None:
        pass


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
