"""Lock files, which one command holds at a time.

filelock, which huggingface_hub uses, has files that are only locks, and cannot name their holder. Here the answers file
itself is locked, so that nothing is left behind, and errors name the process that holds it.
"""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from llava_jax.console import InputError, note, shorten
from llava_jax.files import kind_of

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # errors of file systems without locks


class InUseError(InputError):
    """Another process holds a file.

    Attributes:
      owner: the holder, as far as the file names it.
    """

    def __init__(self, name: str, owner: str):
        super().__init__(f"{name}: in use by {owner}")
        self.owner = owner


class LockedFile:
    """A regular file, created if missing, and locked until it is closed or the process ends.

    The lock (`flock`) also excludes other threads, and child processes do not inherit it. If the file system has no
    locks, `LockedFile` warns.

    Attributes:
      path: the path of the file, links resolved.
      name: the name of the file in errors.
      file: the open file, unbuffered, for reading and appending.
      is_new: whether the file was created.
      is_locked: whether the file system supports locks.
    """

    def __init__(self, path: str | os.PathLike, name: str = "", owner: str = "another command"):
        """
        Args:
          name: the name of the file in errors; default: its path.
          owner: the name of another holder in errors.

        Raises:
          InUseError: another process holds the lock.
          InputError: the file is not regular.
          OSError: the file cannot be opened.
        """
        self.path, self.name = Path(os.path.realpath(path)), name or shorten(path)
        while True:
            try:
                kind, self.is_new = kind_of(os.stat(path)), False  # not `self.path`, which a pipe in /proc lacks
            except FileNotFoundError:
                kind, self.is_new = None, True
            if kind:
                raise InputError(f"{self.name}: {kind}, not a file")
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            self.file = os.fdopen(os.open(self.path, flags, 0o666), "r+b", buffering=0)
            self.is_locked = self._lock(owner)
            if self._is_there():
                return
            self.file.close()  # the previous holder removed it

    def _lock(self, owner: str) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in NO_LOCKS:
                note(
                    f"warning: {self.name}: its file system has no locks; make sure that no other command writes there"
                )
                return False
            signed = self._signed()
            self.file.close()
            who = f" (process {signed['process']} on {shorten(signed['host'], 40)})" if signed else ""
            raise InUseError(self.name, owner + who) from None

    def _signed(self) -> dict[str, Any]:
        """The signature that `sign` wrote; empty if there is none."""
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
        """Write the holder into a file that is only used as a lock.

        Raises:
          InputError: the file has other contents.
          OSError: the file cannot be written.
        """
        if os.fstat(self.file.fileno()).st_size and not self._signed():
            raise InputError(f"{self.name}: is not a lock file; move it away")
        self.file.truncate(0)
        self.append(json.dumps({"process": os.getpid(), "host": os.uname().nodename}).encode())

    def is_mine(self) -> bool:
        """Whether a process on this machine signed the file."""
        return self._signed().get("host") == os.uname().nodename

    def read(self) -> bytes:
        """Read the whole file."""
        self.file.seek(0)
        return self.file.readall()

    def append(self, data: bytes) -> None:
        """Append all of the data, or nothing.

        Raises:
          OSError: the file cannot be written.
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
