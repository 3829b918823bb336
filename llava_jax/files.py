"""Files that are read: regular ones, and no more of them than their kind can hold.

A pipe or a device given as a file would be waited for, or read, for ever; a file of another kind would fill the memory.
All that reads a local file of the user's, or of a checkpoint, opens it here.
"""

import contextlib
import os
import stat
from typing import BinaryIO

from etils import epath

from llava_jax.console import InputError, first_line, shorten

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def kind_of(status: os.stat_result) -> str | None:
    """What there is instead of a regular file: "a pipe"; None for a regular file."""
    return _KINDS.get(stat.S_IFMT(status.st_mode))


def open_regular(path: str | os.PathLike, *, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading; links are followed. Never waits for whoever may write.

    Raises:
      InputError: it is no regular file.
      OSError: it is not there, or cannot be opened.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if kind := kind_of(os.fstat(file)):
            raise InputError(f"{shorten(path)}: {kind}, not a file")
        return os.fdopen(file, "rb", buffering)
    except BaseException:
        os.close(file)
        raise


def read_bytes(path: str | os.PathLike, most: int) -> bytes:
    """The contents of a file: a local one that is regular, or one in an object store (`gs://`).

    Args:
      most: bytes that a file of its kind can have.

    Raises:
      InputError: it cannot be read, is no regular file, or is larger.
    """
    try:
        if "://" in os.fspath(path):  # an `epath.Path`
            size = path.stat().length
            data = path.read_bytes() if size <= most else b""
        else:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                data = file.read(size) if size <= most else b""  # no memory for more than there is
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"{shorten(path)}: cannot be read ({first_line(error)})") from None
    if size > most:
        raise InputError(f"{shorten(path)}: has {size:,} bytes; a file of its kind has at most {most:,}")
    return data


def read_text(path: str | os.PathLike, most: int) -> str:
    """The same of a text in UTF-8, with or without a byte order mark; lines end in a newline, however they do there.

    Raises:
      InputError: as `read_bytes`, or it is no UTF-8.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{shorten(path)}: not UTF-8 ({first_line(error)})") from None


def remote_path(where: str | os.PathLike) -> epath.Path:
    """The path of a `gs://...`, or of what else object stores are called; also of a local path.

    Raises:
      InputError: it is a URL of another kind (`file://`, `http://`).
    """
    try:
        return epath.Path(where)
    except KeyError:
        scheme = os.fspath(where).partition("://")[0]
        raise InputError(
            f"{shorten(where)}: {shorten(scheme, 20)}:// is no object store that is known; give a path, or gs://..."
        ) from None


def check_tree(directory: str | os.PathLike) -> None:
    """Look through a local directory whose files a library is going to open, and would wait for a pipe among them.

    Raises:
      InputError: there is something in it that is neither a regular file nor a directory of its own.
    """
    if "://" in os.fspath(directory):
        return
    for folder, folders, files in os.walk(directory):
        for path in (os.path.join(folder, name) for name in (*folders, *files)):
            with contextlib.suppress(OSError):  # a link that leads nowhere: the library misses the file
                kind = kind_of(os.stat(path))
                if os.path.isdir(path):
                    kind = "a link to a directory" if os.path.islink(path) else None
                if kind:
                    raise InputError(f"{shorten(path)}: {kind}, not a file")


def memory_bytes() -> int:
    """How much memory this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
