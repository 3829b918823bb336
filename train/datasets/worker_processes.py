"""Run jobs in worker processes that end when the process that started them ends, however it ends.

`concurrent.futures` would leave its workers waiting for jobs forever if their parent is killed.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from llava_jax.console import InputError, silence_pillow

REPORT_SECONDS = 0.25  # between reports of a worker's progress

Report = Callable[[int, int], None]  # images or rows, and bytes, that are done since the last call
Function = Callable[[Any, Report], Any]


def run_jobs(function: Function, jobs: Iterable[Any], workers: int, advance: Report) -> Iterator[Any]:
    """Call `function(job, report)` for each job in worker processes: yields the results in the order of their ends.

    A job is taken from `jobs` when a worker is free. If one fails, or the caller stops, the workers are killed.

    Args:
      function: a function of a module.
      advance: called in this process with what the function reports.

    Raises:
      whatever a job raises. InputError: a worker was killed.
    """
    left = iter(jobs)
    first = list(itertools.islice(left, workers))
    processes: dict[Connection, SpawnProcess] = {}
    try:
        for _ in first:
            _start(function, processes)
        for connection, job in zip(processes, first, strict=True):
            _send(connection, job)
        busy = set(processes)
        while busy:
            for connection in [one for one in wait(busy) if isinstance(one, Connection)]:
                kind, value = _receive(connection)
                if kind == "report":
                    advance(*value)
                elif kind == "error":
                    raise value
                else:
                    for job in itertools.islice(left, 1):
                        _send(connection, job)
                        break
                    else:
                        busy.remove(connection)
                    yield value
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join()


def _start(function: Function, processes: dict[Connection, SpawnProcess]) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, function), daemon=True)
    with _ignored(signal.SIGINT):  # which a worker inherits: Ctrl-C interrupts this process alone
        process.start()
    processes[ours] = process
    theirs.close()


def _send(connection: Connection, job: Any) -> None:
    with contextlib.suppress(OSError):  # the worker was killed, which `_receive` reports
        connection.send(job)


def _receive(connection: Connection) -> tuple[str, Any]:
    try:
        return connection.recv()
    except (EOFError, OSError):
        raise InputError(
            "a worker process was killed; if memory ran out, repeat the command with fewer --workers"
        ) from None


@contextlib.contextmanager
def _ignored(number: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may change it
        yield
        return
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


def _work(connection: Connection, function: Function) -> None:
    """A worker: run the jobs that arrive."""
    end_with_parent()
    silence_pillow()
    done, reported = [0, 0], time.monotonic()

    def report(count: int, size: int) -> None:
        nonlocal done, reported
        done = [done[0] + count, done[1] + size]
        if time.monotonic() >= reported + REPORT_SECONDS:
            connection.send(("report", done))
            done, reported = [0, 0], time.monotonic()

    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            result = "result", function(job, report)
            connection.send(("report", done))
            done = [0, 0]
        except Exception as error:
            error.add_note(traceback.format_exc())
            result = "error", error
        connection.send(result)


def end_with_parent() -> None:
    """End this worker process when its parent ends, even if that is killed."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)
