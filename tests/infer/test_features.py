"""Images that are read ahead."""

import threading
import types

from infer.features import ImageReader


def test_waiting_is_for_images_that_are_still_read():
    """The scheduler waits for the image that it needs, while others may have been read long ago."""
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
