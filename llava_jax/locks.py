"""Locks: a file that is held by one command at a time."""

import errno
import fcntl
import json
import os
from pathlib import Path

from llava_jax.console import InputError, note, shorten
from llava_jax.files import kind_of

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # what file systems without locks answer


class LockedFile:
    """A regular file, made where there is none, that nobody else has locked until it is closed or the process ends.

    (`flock`: it holds between threads too, and programs that are started do not inherit it.) A file system without
    locks gives none, which is told.

    Attributes:
      path: of the file itself, links resolved.
      file: open for reading and for appending, without a buffer.
      is_new: there was no file.
    """

    def __init__(self, path: str | os.PathLike, name: str = "", holder: str = "another command"):
        """
        Args:
          name: what errors call it; default: its path.
          holder: what they call whoever holds it.

        Raises:
          InputError: it is in use, or is no regular file.
          OSError: it cannot be opened.
        """
        self.path, name = Path(os.path.realpath(path)), name or shorten(path)
        while True:
            try:
                kind, self.is_new = kind_of(self.path.stat()), False
            except FileNotFoundError:
                kind, self.is_new = None, True
            if kind:
                raise InputError(f"{name}: {kind}, not a file")
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            self.file = os.fdopen(os.open(self.path, flags, 0o666), "r+b", buffering=0)
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    owner = self._owner()
                    self.file.close()
                    raise InputError(f"{name}: in use by {holder}{owner}") from None
                note(f"warning: {name}: its file system has no locks; that two commands write there is not noticed")
            if self._is_there():
                return
            self.file.close()  # its holder has removed it

    def _owner(self) -> str:
        """Who has signed the file, as part of an error."""
        try:
            signed = json.loads(self.file.read(4096))
            return f" (process {signed['process']:d} on {shorten(signed['host'], 40)})"
        except (OSError, ValueError, RecursionError, TypeError, KeyError):
            return ""

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

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

    def sign(self, **more: str) -> None:
        """Write into a file that is nothing but a lock who holds it, and what its next holder has to know."""
        self.file.truncate(0)
        self.append(json.dumps({"process": os.getpid(), "host": os.uname().nodename} | more).encode())

    def remove(self) -> None:
        """Remove the file, then let it go."""
        self.path.unlink(missing_ok=True)
        self.file.close()

    def close(self) -> None:
        self.file.close()
