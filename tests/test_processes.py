"""What fails on one process fails on all: nobody waits for a process that has stopped."""

import threading

import jax
import pytest

from llava_jax import processes
from llava_jax.console import InputError


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (InputError("row 3: no turns"), "row 3: no turns"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), "a/b: No such file or directory"),
        (OSError("gs://bucket/a: cannot be read (503)"), "gs://bucket/a: cannot be read (503)"),
    ],
)
def test_an_error_of_one_process_is_raised_on_all(monkeypatch, error, says):
    """Threads stand for the processes."""
    texts, meeting, raised = ["", ""], threading.Barrier(2, timeout=20), {}

    def share(text):
        number = int(threading.current_thread().name)
        texts[number] = text
        meeting.wait()
        found = list(texts)
        meeting.wait()
        return found

    def run():
        number = int(threading.current_thread().name)

        def work():
            if number:
                raise error

        with pytest.raises(InputError) as caught:
            processes.together("data", work, same=str)
        raised[number] = str(caught.value)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "share", share)
    threads = [threading.Thread(target=run, name=str(i)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised == {0: f"process 1: {says}", 1: says}
