"""Programs that come with checkpoints (regular expressions, chat templates), run within limits of time and memory.

Nothing inside a process can stop a call into C that takes hours, so they run in a process of their own
(`limited_worker`), which is started when the first of them is needed and kept for the next ones. It ends when it goes
beyond a limit, and with this process.
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

SECONDS = 3  # of the processor, for one task
MEMORY = 2**29
PATIENCE = 10  # times as many seconds may pass, on a machine that has other things to do


class LimitError(Exception):
    """A task went beyond a limit; the message says which, as in `takes more than 3 s`."""


class Worker:
    """A process that runs one task (`limited_worker.TASKS`) after the other.

    Args:
      seconds: of the processor that a task may take.
      memory: bytes of address space of the process.
      setup: a task and its arguments that each new process starts with.
    """

    def __init__(self, seconds: int = SECONDS, memory: int = MEMORY, setup: tuple = ()):
        self._seconds, self._memory, self._setup = seconds, memory, setup
        self._process, self._owner, self._lock = None, 0, threading.Lock()

    def __reduce__(self):  # to be pickled: another process starts one of its own
        return Worker, (self._seconds, self._memory, self._setup)

    def run(self, task: str, *args: Any) -> Any:
        """Run a task; arguments and result are JSON.

        Raises:
          ValueError: what the task raised, as text.
          LimitError: it took more than it may, and the process has ended.
        """
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
                    self._start()
                answer = self._exchange(task, args)
            except BaseException:  # an interrupt too: what is still to come would be taken for the next answer
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
        # Imports come from where this process finds its own; `-P`: and from nowhere else.
        paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths), "RAYON_NUM_THREADS": "1", "RUST_BACKTRACE": "0"
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "llava_jax.limited_worker", str(self._memory)],
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
        alarm = threading.Timer(PATIENCE * self._seconds, process.kill)
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
    process.kill()
    process.wait()
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # a request that it never read
        process.stdin.close()


_shared = Worker()


def run(task: str, *args: Any) -> Any:
    """`Worker.run` of the worker that all tasks without a setup share."""
    return _shared.run(task, *args)
