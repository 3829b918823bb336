"""Files of one directory, on a local disk or in an object store (`gs://`), read and written through the same calls.

Object stores are fsspec's. A read that fails for a reason that may pass is repeated. A file appears whole or not at
all.
"""

import contextlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import fsspec

from llava_jax.checkpoints.outputs import make_directories, write_file
from llava_jax.console import InputError, first_line, note, shorten
from llava_jax.files import open_regular, read_bytes

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each repetition of a read
PATIENCE = 30.0  # seconds after which a read is not repeated: some clients repeat it themselves
T = TypeVar("T")


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Errors of reading and writing, unlike those of opening, do not name the file: add it."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


class Store:
    """A directory and the names of files in it.

    Attributes:
      path: as given.
      local: the directory as a path; None in an object store.
    """

    def __init__(self, path: str | os.PathLike):
        """
        Raises:
          InputError: the path is empty, the object store is not supported, or its client is not installed.
        """
        if not os.fspath(path):
            raise InputError("the name of the directory is empty")
        self.path = os.fspath(path).rstrip("/") or "/"
        scheme, separator, _ = self.path.partition("://")
        self.local = None if separator else Path(self.path)
        if self.local:
            return
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # prints errors that are raised anyway
        name = shorten(self.path)
        if scheme in ("file", "local", "http", "https"):
            raise InputError(f"{name}: {scheme}:// is not a supported object store; give a path, or gs://...")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.path, use_listings_cache=False)
        except ImportError as error:
            raise InputError(f"{name}: its client is not installed ({first_line(error)})") from None
        except Exception as error:  # an unknown scheme, or whatever the client raises without credentials
            raise InputError(f"{name}: cannot be opened ({first_line(error)})") from None

    def name_of(self, name: str) -> str:
        """The path of a file, for errors and logs."""
        return f"{self.path}/{name}"

    def sizes(self) -> dict[str, int]:
        """The names and sizes in bytes of the files in the directory; none if it is missing.

        Raises:
          OSError: the directory cannot be listed.
        """
        if self.local:
            if not self.local.exists():
                return {}
            return {entry.name: entry.stat().st_size for entry in os.scandir(self.local) if entry.is_file()}

        def listed() -> dict[str, int]:
            self._files.invalidate_cache()
            try:
                entries = self._files.ls(self._root, detail=True)
            except FileNotFoundError:
                return {}
            return {os.path.basename(one["name"]): one["size"] for one in entries if one["type"] == "file"}

        return self._repeated("", listed)

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Read a file; None if it is missing.

        Raises:
          InputError: it has more than `max_bytes`, or is not a regular file.
          OSError: it cannot be read.
        """
        if self.local:
            path = self.local / name
            return read_bytes(path, max_bytes) if path.exists() else None
        try:
            size = self._repeated(name, lambda: self._files.info(f"{self._root}/{name}"))["size"]
        except FileNotFoundError:
            return None
        if size > max_bytes:
            raise InputError(f"{shorten(self.name_of(name))}: has {size:,} bytes; it may have at most {max_bytes:,}")
        return self.read_range(name, 0, size)

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """Read `size` bytes of a file, from byte `start`. Threads may call this at the same time.

        Raises:
          OSError: they cannot be read, or the file is shorter.
        """
        if self.local:
            with open_regular(self.local / name, buffering=0) as file:
                data = os.pread(file.fileno(), size, start)
                while len(data) < size and (more := os.pread(file.fileno(), size - len(data), start + len(data))):
                    data += more
        elif size:
            data = self._repeated(name, lambda: self._files.cat_file(f"{self._root}/{name}", start, start + size))
        else:
            data = b""
        if len(data) < size:
            raise OSError(f"{shorten(self.name_of(name))}: ends before byte {start + size:,}")
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, atomically.

        Raises:
          OSError: it cannot be written.
        """
        if self.local:
            write_file(self.local / name, data)
        else:
            self._stored(name, lambda: self._files.pipe_file(f"{self._root}/{name}", data))

    def publish(self, file: Path, name: str) -> None:
        """Move a complete local file to `name`, atomically: on a local disk from the same file system.

        Raises:
          OSError: it cannot be written.
        """
        if self.local:
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
            os.replace(file, self.local / name)
        else:
            self._stored(name, lambda: self._files.put_file(os.fspath(file), f"{self._root}/{name}"))
            file.unlink()

    def create(self) -> None:
        """Create the directory; object stores have none.

        Raises:
          OSError: it cannot be created.
        """
        if self.local:
            make_directories(self.local)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            if self.local:
                (self.local / name).unlink()
            else:
                self._files.rm_file(f"{self._root}/{name}")

    def _stored(self, name: str, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:
            raise OSError(f"{shorten(self.name_of(name))}: cannot be written ({first_line(error)})") from None

    def _repeated(self, name: str, read: Callable[[], T]) -> T:
        """The result of `read`, which is repeated if it fails, other than for a missing file."""
        start, where = time.monotonic(), shorten(self.name_of(name).rstrip("/"))
        for wait in (*WAITS, None):
            try:
                return read()
            except FileNotFoundError:
                raise
            except Exception as error:  # clients raise exceptions of their own
                if wait is None or time.monotonic() > start + PATIENCE:
                    raise OSError(f"{where}: cannot be read ({first_line(error)})") from None
                if wait == WAITS[-1]:
                    note(f"warning: {where}: cannot be read ({first_line(error)}); trying again")
                time.sleep(wait * random.uniform(0.75, 1.25))
        raise AssertionError
