"""Locks: a file that is held by one command at a time."""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from llava_jax.console import InputError, note, shorten
from llava_jax.files import kind_of

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # what file systems without locks answer


class InUse(InputError):
    """Somebody else holds a file.

    Attributes:
      owner: who, as far as the file says.
    """

    def __init__(self, name: str, owner: str):
        super().__init__(f"{name}: in use by {owner}")
        self.owner = owner


class LockedFile:
    """A regular file, made where there is none, that nobody else has locked until it is closed or the process ends.

    (`flock`: it holds between threads too, and programs that are started do not inherit it.) A file system without
    locks gives none, which is told.

    Attributes:
      path: of the file itself, links resolved.
      name: what errors call it.
      file: open for reading and for appending, without a buffer.
      is_new: there was no file.
      is_locked: the file system has locks.
    """

    def __init__(self, path: str | os.PathLike, name: str = "", owner: str = "another command"):
        """
        Args:
          name: what errors call it; default: its path.
          owner: what they call whoever else holds it.

        Raises:
          InUse: it is locked.
          InputError: it is no regular file.
          OSError: it cannot be opened.
        """
        self.path, self.name = Path(os.path.realpath(path)), name or shorten(path)
        while True:
            try:
                kind, self.is_new = kind_of(os.stat(path)), False  # not of `self.path`: a pipe in /proc has none
            except FileNotFoundError:
                kind, self.is_new = None, True
            if kind:
                raise InputError(f"{self.name}: {kind}, not a file")
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            self.file = os.fdopen(os.open(self.path, flags, 0o666), "r+b", buffering=0)
            self.is_locked = self._lock(owner)
            if self._is_there():
                return
            self.file.close()  # its holder has removed it

    def _lock(self, owner: str) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in NO_LOCKS:
                note(
                    f"warning: {self.name}: its file system has no locks; that two commands write there is not noticed"
                )
                return False
            signed = self._signed()
            self.file.close()
            who = f" (process {signed['process']} on {shorten(signed['host'], 40)})" if signed else ""
            raise InUse(self.name, owner + who) from None

    def _signed(self) -> dict[str, Any]:
        """What `sign` wrote into it; nothing if it did not."""
        self.file.seek(0)
        try:
            signed = json.loads(self.file.read(4096))
            return signed if type(signed["process"]) is int and type(signed["host"]) is str else {}
        except (OSError, ValueError, RecursionError, TypeError, KeyError):
            return {}

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def sign(self) -> None:
        """Write into a file that is nothing but a lock who holds it.

        Raises:
          InputError: there is something else in it.
          OSError: it cannot be written.
        """
        if os.fstat(self.file.fileno()).st_size and not self._signed():
            raise InputError(f"{self.name}: holds something else than a lock; move it away")
        self.file.truncate(0)
        self.append(json.dumps({"process": os.getpid(), "host": os.uname().nodename}).encode())

    def is_mine(self) -> bool:
        """Whether a process of this machine has signed it."""
        return self._signed().get("host") == os.uname().nodename

    def read(self) -> bytes:
        """All that is in it."""
        self.file.seek(0)
        return self.file.readall()

    def append(self, data: bytes) -> None:
        """Write at the end: all of it, or nothing.

        Raises:
          OSError: it cannot be written.
        """
        end, left = self.file.seek(0, os.SEEK_END), memoryview(data)
        try:
            while left:
                left = left[self.file.write(left) :]
        except OSError:
            self.file.truncate(end)
            raise

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "LockedFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()
