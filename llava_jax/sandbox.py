"""Run the programs in checkpoints (regular expressions, chat templates) with limits on time and memory.

Python cannot interrupt a call into C that takes hours, so they run in a separate process (`sandbox_worker`), which
starts with the first task and serves the next ones. It is killed when it exceeds a limit, and when this process ends.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

SECONDS = 3  # CPU time of one task
MEMORY = 2**29  # bytes
WALL_TIME_FACTOR = 10  # wall time over CPU time that a busy machine may need


class LimitError(Exception):
    """A task exceeded a limit; the message names it, as in `takes more than 3 s`."""


class Worker:
    """A process that runs tasks (`sandbox_worker.TASKS`) one at a time.

    Args:
      seconds: the CPU time limit of a task.
      memory: the address space limit of the process, in bytes.
      setup: a task and its arguments, run first in each new process.
    """

    def __init__(self, seconds: int = SECONDS, memory: int = MEMORY, setup: tuple = ()):
        self._seconds, self._memory, self._setup = seconds, memory, setup
        self._process: subprocess.Popen[bytes] | None = None
        self._owner, self._lock = 0, threading.Lock()

    def __reduce__(self):  # pickles as its settings: another process starts its own worker
        return Worker, (self._seconds, self._memory, self._setup)

    def run(self, task: str, *args: Any) -> Any:
        """Run a task; arguments and result are JSON.

        Raises:
          ValueError: the task raised an exception; the message is its text.
          LimitError: the task exceeded a limit, and the process was killed.
        """
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
                    self._start()
                answer = self._exchange(task, args)
            except BaseException:  # also on an interrupt: a late answer would be read as the next one
                self.close()
                raise
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        if self._process and self._owner == os.getpid():
            self._end()
        self._process = None

    def _start(self) -> None:
        # Imports modules from the same paths as this process; `-P` adds no others.
        paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths), "RAYON_NUM_THREADS": "1", "RUST_BACKTRACE": "0"
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "llava_jax.sandbox_worker", str(self._memory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env,
        )  # fmt: skip
        self._owner = os.getpid()
        self._end = weakref.finalize(self, _end, self._process)
        if self._setup:
            answer = self._exchange(self._setup[0], self._setup[1:])
            if "error" in answer:
                raise ValueError(answer["error"])

    def _exchange(self, task: str, args: tuple) -> dict[str, Any]:
        process = self._process
        assert process and process.stdin and process.stdout
        alarm = threading.Timer(WALL_TIME_FACTOR * self._seconds, process.kill)
        alarm.daemon = True
        alarm.start()
        try:
            process.stdin.write(json.dumps([task, self._seconds, args]).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            alarm.cancel()
        if line.endswith(b"\n"):
            answer = json.loads(line)
            if answer.get("memory"):
                raise LimitError(f"takes more than {self._memory // 2**20:,} MB of memory")
            return answer
        status = process.wait()
        if status in (-signal.SIGXCPU, -signal.SIGKILL):
            raise LimitError(f"takes more than {self._seconds} s")
        raise LimitError(f"crashes (status {status})")


def _end(process: subprocess.Popen) -> None:
    assert process.stdin and process.stdout
    process.kill()
    process.wait()
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # a request that it did not read
        process.stdin.close()


_shared = Worker()


def run(task: str, *args: Any) -> Any:
    """Run a task in the worker that all tasks without a setup share."""
    return _shared.run(task, *args)
