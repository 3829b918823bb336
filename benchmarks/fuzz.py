"""Fuzz readers and commands with damaged files and random flags, to find tracebacks, hangs and unwanted writes.

    python benchmarks/fuzz.py [--seed 0] [--seconds 60] [--only N] [--findings DIR] [--json FILE]

Each attempt takes a valid input (`fuzz_inputs.py`), changes it at random, and passes it to a reader (`fuzz_readers.py`)
or command (`fuzz_commands.py`). Requirements: an error is one line of at most 300 printable characters; an attempt ends
within its deadline, uses at most 2 GB, and changes no files but its own. A finding is printed with the command that
reproduces it (similar ones once), its files are kept in `--findings`, and the exit status is 1.

Attempts run one at a time in a child process, which is restarted after a crash, a hang or excessive memory use; one in
400 is a command in a separate process.
"""

import argparse
import collections
import contextlib
import faulthandler
import hashlib
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # this order makes `train` the package, not a file here

DEADLINE, SLOW_DEADLINE = 60, 300  # seconds: ten times what an attempt takes on a busy machine
MAX_MEMORY, MAX_LENGTH, SLOW_EVERY = 2 * 10**9, 300, 400


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--seconds", type=float, default=60.0)
    p.add_argument("--only", type=int, metavar="N", help="repeat attempt N, and print all its output")
    p.add_argument("--findings", default="fuzz-findings", metavar="DIR", help="directory for the files of findings")
    p.add_argument("--json", metavar="FILE", help="write the summary there")
    p.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)  # a scratch directory, and the first attempt
    args = p.parse_args()
    if args.worker:
        return work(Path(args.worker[0]), int(args.worker[1]), args.seed, only=args.only is not None)
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        summary = drive(scratch, args)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if args.json:
        Path(args.json).write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))
    return 1 if summary["findings"] else 0


# ---------------------------------------------------------------- the parent process


def drive(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run workers until the time is up. Returns the number of attempts by kind, and the findings."""
    counts, found = collections.Counter(), {}
    stop, next_attempt = None, args.only or 0
    while stop is None or (time.monotonic() < stop and args.only is None):
        with worker(scratch, next_attempt, args) as process:
            kind = "starting"
            for message in messages(process):
                if message.get("ready"):
                    stop = stop or time.monotonic() + args.seconds
                if "slow" in message:
                    kind, next_attempt = message["kind"], message["attempt"]
                    counts[kind] += 1
                if message.get("finding"):
                    report(found, message, scratch, args)
                if message.get("done"):
                    next_attempt += 1
                    if time.monotonic() >= stop or args.only is not None:
                        break
            else:
                status = process.wait()
                if kind == "starting" or status == 1:  # the worker has printed the reason
                    raise SystemExit(f"the worker ended with status {status}")
                if status:
                    how = "hangs" if status == -signal.SIGABRT else f"ends the process with status {status}"
                    stack = (scratch / "stacks").read_text().splitlines() if (scratch / "stacks").exists() else []
                    ours = next((line.strip() for line in stack if f'"{ROOT}' in line and "fuzz" not in line), "")
                    message = {"kind": kind, "attempt": next_attempt, "finding": f"{how} {ours}".strip()}
                    report(found, message, scratch, args)
                    next_attempt += 1
    return {"seed": args.seed, "attempts": dict(counts), "findings": list(found.values())}


@contextlib.contextmanager
def worker(scratch: Path, first: int, args: argparse.Namespace) -> Iterator[subprocess.Popen]:
    only = ["--only", str(args.only)] if args.only is not None else []
    command = [sys.executable, __file__, "--seed", str(args.seed), "--worker", str(scratch), str(first), *only]
    for name in ("home", "tmp"):
        (scratch / name).mkdir(exist_ok=True)
    env = os.environ | {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "cache"), "HOME": str(scratch / "home"),
        "TMPDIR": str(scratch / "tmp"), "RUST_BACKTRACE": "0",
    }  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=env, start_new_session=True,
        bufsize=0,  # so that `select` sees all unread output
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the worker, and the commands that it runs
        process.wait()
        process.stdout.close()


def messages(process: subprocess.Popen) -> Iterator[dict[str, Any]]:
    """Yield the messages of a worker until it ends; kill it if it is silent for too long."""
    deadline = SLOW_DEADLINE
    while True:
        if not select.select([process.stdout], [], [], deadline)[0]:
            process.send_signal(signal.SIGABRT)  # makes it write its stacks
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            return
        line = process.stdout.readline()
        if not line:
            return
        message = json.loads(line)
        deadline = SLOW_DEADLINE if message.get("slow") else DEADLINE
        yield message


def report(found: dict[str, dict], message: dict[str, Any], scratch: Path, args: argparse.Namespace) -> None:
    """Print a finding unless a similar one is known, and keep its files."""
    what = message["finding"].replace(str(scratch), "SCRATCH")
    like = f"{message['kind']} {message.get('like') or what}"
    if like in found:
        found[like]["times"] += 1
        return
    number, kind = message["attempt"], message["kind"]
    found[like] = {"attempt": number, "kind": kind, "what": what, "command": message.get("command", ""), "times": 1}
    repeat = f"python benchmarks/fuzz.py --seed {args.seed} --only {number}"
    print(f"{kind}: {what!r} ({repeat})", flush=True)
    if args.only is None:
        kept = Path(args.findings) / f"{args.seed}-{number}"
        shutil.rmtree(kept, ignore_errors=True)
        copy = lambda a, b: os.mkfifo(b) if os.path.exists(a) and not os.path.isfile(a) else shutil.copy(a, b)  # noqa: E731
        with contextlib.suppress(shutil.Error, OSError):
            shutil.copytree(scratch / "work", kept, symlinks=True, copy_function=copy)


# ---------------------------------------------------------------- the worker process


def work(scratch: Path, first: int, seed: int, *, only: bool) -> int:
    """Run attempts, and send a message about each and its findings."""
    resource.setrlimit(resource.RLIMIT_DATA, (4 * MAX_MEMORY, 4 * MAX_MEMORY))  # protects the machine
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps other output off the channel
    out, err = (open(scratch / name, "w+b") for name in ("stdout", "stderr"))  # noqa: SIM115
    terminal = os.dup(2)
    faulthandler.enable(open(scratch / "stacks", "w"))  # noqa: SIM115

    def send(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    import fuzz_commands
    from fuzz_inputs import make
    from fuzz_readers import READERS

    if not (scratch / "base").exists():
        with silent(out, err):
            make(scratch / "making")
        (scratch / "making").rename(scratch / "base")
    send(ready=True)
    number = first
    while True:
        pick = random.Random(f"{seed} {number}")
        slow = number % SLOW_EVERY == SLOW_EVERY - 1
        kind = pick.choice(fuzz_commands.COMMANDS if slow else (*READERS, fuzz_commands.command))
        send(kind=kind.__name__, attempt=number, slow=slow)
        here = scratch / "work" / "here"  # so that `..` is empty otherwise
        shutil.rmtree(scratch / "work", ignore_errors=True)
        here.mkdir(parents=True)
        os.chdir(here)
        attempt = kind(pick)
        before = contents(scratch)
        with silent(out, err):
            finding, like = judge(attempt.run)
        for file in (out, err):
            file.seek(0)
        texts = out.read().decode("utf-8", "replace"), err.read().decode("utf-8", "replace")
        if only:
            os.write(terminal, f"{attempt.command}\n{''.join(texts)}\n".encode("utf-8", "replace"))
        finding = finding or judge_output(texts[1], str(scratch))
        after = contents(scratch)
        own = [os.path.normpath(here / path) for path in attempt.own]
        changed = [path for path in before | after if before.get(path) != after.get(path)]
        changed = [path for path in changed if not any(path == o or path.startswith(o + os.sep) for o in own)]
        if not finding and changed:
            finding, like = f"changes {', '.join(sorted(changed)[:3])}", "changes files"
        memory = (
            max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
        )
        if not finding and memory > MAX_MEMORY:
            finding, like = f"uses {memory / 1e9:.1f} GB", "memory"
        command = " ".join(attempt.command)[:1000]
        send(done=True, kind=kind.__name__, attempt=number, finding=finding, like=like, command=command)
        if only or memory > MAX_MEMORY:
            return 0
        number += 1


@contextlib.contextmanager
def silent(out, err) -> Iterator[None]:
    """Redirect standard output and error to these files, for Python, C, Rust and child processes."""
    kept = os.dup(1), os.dup(2)
    for number, file in ((1, out), (2, err)):
        file.seek(0)
        file.truncate()
        os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        for number, file in ((1, kept[0]), (2, kept[1])):
            os.dup2(file, number)
            os.close(file)


def judge(run: Callable[[], Any]) -> tuple[str, str]:
    """Run an attempt. Returns the problem with how it ends, and a key that similar findings share."""
    from llava_jax.console import InputError, printable, shorten_words

    try:
        run()
    except SystemExit as error:
        if error.code not in (0, 1, 141, None):
            return f"ends with status {error.code}", ""
    except InputError as error:
        return judge_line(f"error: {printable(shorten_words(str(error)))}"), ""  # as `run_main` prints it
    except OSError:
        pass  # `run_main` prints it as one line
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if str(ROOT) in frame.filename and "fuzz" not in frame.filename]
        last = ours[-1] if ours else frames[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return f"{type(error).__name__} at {where}: {str(error)[:200]}", f"{type(error).__name__} {where}"
    return "", ""


def judge_line(line: str) -> str:
    if len(line) > MAX_LENGTH:
        return f"an error of {len(line)} characters: {line[:100]}"
    return f"an error of several lines: {line[:100]}" if "\n" in line else ""


def judge_output(text: str, scratch: str) -> str:
    """The problem with the standard error of an attempt, or ""."""
    lines = text.replace(scratch, "").splitlines()
    if any(line.startswith("Traceback") for line in lines):
        return f"a traceback: {lines[-1][:200]}"
    errors = [line for line in lines if line.startswith("error: ")]
    if errors and lines[-1] != errors[-1]:
        return f"an error of several lines: {errors[-1][:100]}"
    if problem := next(
        filter(None, map(judge_line, [line for line in lines if line.startswith(("error", "warn"))])), ""
    ):
        return problem
    strange = next((line for line in lines if not line.isprintable() and line), None)
    return f"not printable: {strange[:100]}" if strange else ""


def contents(scratch: Path) -> dict[str, str]:
    """Hashes of files, and kinds of other paths, that attempts could change by mistake."""
    found = {}
    for root in ("work", "home", "tmp"):
        for folder, folders, files in os.walk(scratch / root):
            if root == "home":  # where libraries write caches and settings
                folders[:] = [name for name in folders if name not in (".cache", ".config")]
            for name in (*folders, *files):
                path = os.path.join(folder, name)
                if os.path.islink(path):
                    found[path] = os.readlink(path)
                elif os.path.isfile(path):
                    with open(path, "rb") as file:
                        found[path] = hashlib.file_digest(file, "blake2b").hexdigest()
                else:
                    found[path] = "a directory" if os.path.isdir(path) else "no file"
    return found


if __name__ == "__main__":
    sys.exit(main())
