"""Images that are read ahead."""

import threading
import types

from infer import features
from infer.features import ImageReader


def test_waiting_is_for_images_that_are_still_read(monkeypatch):
    """The scheduler waits for the image that it needs, while others may have been read long ago."""
    monkeypatch.setattr(features, "WAIT_SECONDS", 60)
    release, reader = threading.Event(), ImageReader()
    read = types.SimpleNamespace(key=b"read", read=lambda: "tiles")
    slow = types.SimpleNamespace(key=b"slow", read=release.wait)
    reader.want([read])
    reader.wait([read])
    reader.want([read, slow])
    reader.wait([slow, read])
    waiting = threading.Thread(target=reader.wait, args=([slow],))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive() and reader.is_ready(read) and not reader.is_ready(slow)
    release.set()
    waiting.join(10)
    assert not waiting.is_alive() and reader.is_ready(slow)
    reader.wait([])
    reader.close()


def test_waiting_ends_so_that_the_scheduler_sees_what_is_submitted_meanwhile():
    release, reader = threading.Event(), ImageReader()
    slow = types.SimpleNamespace(key=b"slow", read=release.wait)
    reader.want([slow])
    reader.wait([slow])
    assert not reader.is_ready(slow)
    release.set()
    reader.close()


def test_the_first_that_needs_an_image_reads_it():
    """Its name is in the error."""
    reader = ImageReader()
    same = [types.SimpleNamespace(key=b"same", read=lambda i=i: i) for i in range(3)]
    reader.want(same)
    assert reader.take(same[0]) == 0
    reader.close()
