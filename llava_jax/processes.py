"""Several processes as one run: connect, agree, and stop them. JAX is imported only where it is needed.

On a pod each host runs the same command. JAX's coordination service monitors the processes: when one dies it aborts the
others, whose collectives would wait forever. An aborted process cannot report why, so each process of such a run works
in a child process, and the parent reports in one line how the child ended.
"""

import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from llava_jax.console import InputError, first_line, note, shorten

T = TypeVar("T")

MAX_PORT = 2**16 - 1
GRACE_SECONDS = 15  # that processes wait for each other at exit
RESTART = "restart all processes with the same command to resume"


def are_several(arguments: list[str]) -> bool:
    """Whether this process may be one of several, by its flags or because it runs on a Cloud TPU."""
    return any(argument.split("=")[0] == "--coordinator" for argument in arguments) or _on_cloud_tpu()


def _on_cloud_tpu() -> bool:
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return chips and "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu")


# ---------------------------------------------------------------- parent and child


def watched(main: Callable[[], int | None]) -> int | None:
    """Run `main` in a child process, and return its exit status; report how the child ended, if it could not.

    The parent forwards signals. The child ends with its parent.
    """
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # so that Ctrl-C reaches the child only through its parent
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)
        return main()
    signals: list[int] = []

    def forward(number: int, _) -> None:
        # The first Ctrl-C stops the run like preemption, after a step and with a checkpoint; the second one at once.
        first = number == signal.SIGINT and not signals
        signals.append(number)
        os.kill(child, signal.SIGTERM if first else number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, forward)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    if -code == signal.SIGABRT:
        note(f"error: another process of this run died or is unreachable (details above); {RESTART}")
    else:
        why = ", perhaps by the system, as memory ran out" if -code == signal.SIGKILL else ""
        note(f"error: this process of the run was killed by {signal.Signals(-code).name}{why}; {RESTART}")
    return 128 - code


# ---------------------------------------------------------------- one run


def connect(
    coordinator: str | None, process: int | None, processes: int | None, heartbeat: int, grace: int = GRACE_SECONDS
) -> None:
    """Connect to the other processes of the run, if any. Must be called before the first use of a device.

    Args:
      heartbeat: seconds of silence after which a process counts as dead.
      grace: seconds that a process waits for the others at exit.

    Raises:
      InputError: a flag is missing or invalid, or the other processes cannot be reached.
    """
    import jax

    given = [value is not None for value in (coordinator, process, processes)]
    if any(given) and not all(given):
        raise InputError("--coordinator HOST:PORT, --process-id and --processes go together")
    if process is not None and processes is not None and not 0 <= process < processes:
        raise InputError(f"--process-id {process}: must be 0 to {processes - 1}, one for each of --processes")
    port = re.fullmatch(r".+:([0-9]{1,5})", coordinator) if coordinator is not None else None
    if coordinator is not None and not (port and 1 <= int(port[1]) <= MAX_PORT):
        raise InputError(f"--coordinator {shorten(coordinator)}: write HOST:PORT, the port from 1 to {MAX_PORT}")
    if not any(given) and not _on_cloud_tpu():
        return
    if "cpu" in (jax.config.jax_platforms or ""):  # type: ignore[attr-defined]  # options are set at run time
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=grace,
        )
    except ValueError as error:
        if any(given):
            raise InputError(f"--coordinator {shorten(coordinator)}: {first_line(error)}") from None
        # A TPU outside any cluster that JAX knows: a single host.
    except RuntimeError as error:
        raise InputError(f"the other processes of the run cannot be reached ({first_line(error)})") from None


def together(what: str, work: Callable[[], T], *, same: Callable[[T], str]) -> T:
    """Call `work` on every process; if it raises `InputError` or `OSError` on one, or the results differ, raise on all.

    Args:
      what: names the result in the error.
      same: maps the result to a text that must be the same on all processes.

    Raises:
      InputError: this process's error, or that of the first process with one.
    """
    import jax

    if jax.process_count() == 1:
        return work()
    problem, text = "", ""
    try:
        result = work()
        text = same(result)
    except InputError as error:
        problem = str(error)
    except OSError as error:  # for example an object store that cannot be reached
        problem = first_line(error) if error.filename is None else f"{shorten(error.filename)}: {first_line(error)}"
    problems = share(problem)
    if problem:
        raise InputError(problem)
    for process, theirs in enumerate(problems):
        if theirs:
            raise InputError(f"process {process}: {theirs}")
    for process, theirs in enumerate(share(text)):
        if theirs != text:
            raise InputError(
                f"process {process} has {what} different from this one's: all processes need the same flags and files"
            )
    return result


def share(text: str) -> list[str]:
    """Gather the texts of all processes, in order."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data))).ravel()
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


class StopSignal:
    """Records a signal to stop the run: SIGTERM (preemption) or, in a single process, Ctrl-C.

    With several processes a SIGTERM to one suffices: JAX's preemption service finds a step at which all can stop.
    """

    def __init__(self):
        import jax

        self.number = 0
        self.several = jax.process_count() > 1
        self.before = {}

    def __enter__(self) -> "StopSignal":
        for number in () if self.several else (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _) -> None:
        self.number = number
        signal.signal(number, self.before[number])  # a second signal takes effect at once

    def at(self, step: int) -> int:
        """The signal for which all processes stop at this step; 0 for none. Called once per step, in order."""
        if self.several:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.number = signal.SIGTERM
        return self.number
