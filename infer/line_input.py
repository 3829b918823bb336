"""Lines from a person at a terminal, with editing, history and completion (readline), or from a pipe."""

import contextlib
import glob
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from llava_jax.console import InputError, note
from llava_jax.files import new_file, read_text

try:
    import readline
except ImportError:  # some systems have none: lines are read without editing
    readline = None  # type: ignore[assignment]

HISTORY_LINES = 1000  # kept between sessions
HISTORY_BYTES = 32 * 2**20
MAX_HISTORY_LINE = 2000  # characters; longer lines are pasted, and not worth keeping
MAX_COMPLETIONS = 200
BLOCK = '"""'  # begins and ends a text of several lines


def is_interactive() -> bool:
    """Whether a person reads and types, in a terminal."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def history_file() -> Path | None:
    """The file of past lines in the user's state directory; None without a home directory."""
    state = os.environ.get("XDG_STATE_HOME", "")
    try:
        root = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return root / "llava-jax" / "chat_history"


class LineInput:
    """Reads texts: a line, lines that end in a backslash and the line after them, or lines between triple quotes."""

    def __init__(self, commands: Sequence[str], take_files: Collection[str], *, history: Path | None = None):
        """
        Args:
          commands: what the first word of a line is completed to.
          take_files: the commands whose other words are completed to file names.
          history: the file of past lines; None keeps none.
        """
        self.interactive = is_interactive()
        self.history = history if self.interactive and readline else None
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # the text is then refused, and the next can be read
        if self.interactive and readline:
            readline.set_completer(_Completer(commands, take_files))
            readline.set_completer_delims(" ")
            is_libedit = "libedit" in (readline.__doc__ or "")
            readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
            self._read_history()

    def read(self, prompt: str) -> str:
        """Read a text; lines are separated by newlines.

        Raises:
          EOFError: there is none.
          InputError: a text between triple quotes has no end.
          KeyboardInterrupt: the person stopped it.
        """
        more = "... " if self.interactive else ""
        text = self._line(prompt)
        if text.lstrip().startswith(BLOCK):
            lines = [text.lstrip().removeprefix(BLOCK)]
            while not lines[-1].rstrip().endswith(BLOCK):
                try:
                    lines.append(self._line(more))
                except EOFError:
                    raise InputError(f"the text that {BLOCK} begins has no {BLOCK} at its end") from None
            return "\n".join(lines).rstrip().removesuffix(BLOCK).strip("\n")
        while re.search(r"(?<!\\)(\\\\)*\\$", text):  # an odd number of backslashes
            text = text[:-1] + "\n"
            with contextlib.suppress(EOFError):
                text += self._line(more)
        return text

    def _line(self, prompt: str) -> str:
        line = input(prompt if self.interactive else "")
        if self.history and line.strip() and len(line) <= MAX_HISTORY_LINE:
            self._append_history(line)
        return line

    # ------------------------------------------------------------ history

    def _read_history(self) -> None:
        """Give readline the last lines of the file, and drop the others from it when they are as many again."""
        if not self.history or not self.history.exists():
            return
        try:
            lines = read_text(self.history, HISTORY_BYTES).splitlines()
            kept = lines[-HISTORY_LINES:]
            if len(lines) > 2 * HISTORY_LINES:
                with new_file(self.history) as file:
                    os.fchmod(file.fileno(), 0o600)
                    file.write("".join(line + "\n" for line in kept).encode())
        except (InputError, OSError) as error:
            note(f"warning: no history: {error}")
            self.history = None
            return
        for line in kept:
            readline.add_history(line)

    def _append_history(self, line: str) -> None:
        assert self.history is not None
        try:
            self.history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(self.history, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)
            with os.fdopen(file, "ab") as out:
                out.write("".join(part + "\n" for part in line.splitlines()).encode(errors="backslashreplace"))
        except OSError as error:
            note(f"warning: no history: {error}")
            self.history = None


# ---------------------------------------------------------------- Ctrl-C


@contextlib.contextmanager
def interrupts(enabled: bool) -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C instead of raising `KeyboardInterrupt`, which could stop the engine in the middle of a step; the
    second ends the program. Yields a function: whether there was one."""
    if not enabled:
        yield lambda: False
        return
    count = 0

    def handle(number, frame):
        nonlocal count
        count += 1
        if count > 1:
            sys.exit(130)
        print(file=sys.stderr)
        note("stopping; Ctrl-C again leaves")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------- completion


class _Completer:
    """Completes the first word of a line to a command, and later ones to file names, with spaces escaped."""

    def __init__(self, commands: Sequence[str], take_files: Collection[str]):
        self.commands, self.take_files = commands, take_files
        self._found: list[str] = []

    def __call__(self, word: str, number: int) -> str | None:
        if number == 0:
            self._found = self.complete(readline.get_line_buffer()[: readline.get_endidx()], len(word))
        return self._found[number] if number < len(self._found) else None

    def complete(self, line: str, length: int) -> list[str]:
        """What the last `length` characters of a line may become."""
        if " " not in line:
            return [f"{command} " for command in self.commands if line and command.startswith(line)]
        if line.partition(" ")[0] not in self.take_files:
            return []
        argument = re.search(r"(?:\\.|[^\\ ])*$", line)
        typed = argument[0] if argument else ""
        return [name[len(typed) - length :] for name in complete_path(typed)]


def complete_path(typed: str) -> list[str]:
    """The files and directories that an escaped beginning of a path may become: escaped, a `/` after a directory."""
    path = re.sub(r"\\(.)", r"\1", typed)
    expanded = os.path.expanduser(path)
    try:
        found = sorted(glob.glob(glob.escape(expanded) + "*"))
    except (OSError, ValueError):
        return []
    names = [path + name[len(expanded) :] + ("/" if os.path.isdir(name) else " ") for name in found[:MAX_COMPLETIONS]]
    return [typed + _escape(name[len(path) :]) for name in names]


def _escape(name: str) -> str:
    kept = name[-1]  # the slash or space at the end
    return re.sub(r"([\s\\'\"])", r"\\\1", name[:-1]) + kept


def bold(text: str) -> str:
    """A prompt in bold where the terminal has colours and the user wants them (no-color.org). The marks around the
    escapes tell readline that they take no space."""
    if not is_interactive() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    start, end = ("\x01\x1b[1m\x02", "\x01\x1b[0m\x02") if readline else ("\x1b[1m", "\x1b[0m")
    return f"{start}{text}{end}"
