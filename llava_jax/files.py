"""Read regular files of a bounded size, and write files that appear whole or not at all.

Reading a pipe or a device could block or continue forever, and a file of the wrong type could exhaust memory. All local
files of users and checkpoints are opened here.
"""

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
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
    """The kind of a file that is not regular, such as "a pipe"; None for a regular file."""
    return _KINDS.get(stat.S_IFMT(status.st_mode))


def open_regular(path: str | os.PathLike, *, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading, following links, without blocking on a pipe.

    Raises:
      InputError: the file is not regular.
      OSError: the file is missing or cannot be opened.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if kind := kind_of(os.fstat(file)):
            raise InputError(f"{shorten(path)}: {kind}, not a file")
        return os.fdopen(file, "rb", buffering)
    except BaseException:
        os.close(file)
        raise


def read_bytes(path: str | os.PathLike, max_bytes: int) -> bytes:
    """Read a regular local file, or a file in an object store (`gs://`).

    Args:
      max_bytes: the largest size of a file of this type.

    Raises:
      InputError: the file cannot be read, is not regular, or is larger.
    """
    try:
        if "://" in os.fspath(path):
            remote = remote_path(path)
            size = remote.stat().length
            data = remote.read_bytes() if size <= max_bytes else b""
        else:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                data = file.read(size) if size <= max_bytes else b""  # bounded even if the file grows
    except (OSError, ValueError, ImportError) as error:  # an invalid file name; an object store without its client
        raise InputError(f"{shorten(path)}: cannot be read ({first_line(error)})") from None
    if size > max_bytes:
        raise InputError(f"{shorten(path)}: has {size:,} bytes; a file of this type may have at most {max_bytes:,}")
    return data


def read_text(path: str | os.PathLike, max_bytes: int) -> str:
    """Read a text in UTF-8, with or without a byte order mark; line endings become newlines.

    Raises:
      InputError: as `read_bytes`, or the file is not UTF-8.
    """
    try:
        return read_bytes(path, max_bytes).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{shorten(path)}: not UTF-8 ({first_line(error)})") from None


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write that appears under its name when the block ends, whole or not at all. It replaces an existing
    file, or a link's target.

    Raises:
      InputError: the path exists and is not a file, or is a link that leads back to itself.
      OSError: the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():  # realpath resolves all links but those of a loop
        raise InputError(f"{shorten(path)}: a link that leads back to itself, not a file")
    if target.exists() and (kind := kind_of(target.stat())):
        raise InputError(f"{shorten(path)}: {kind}, not a file")
    staged = beside(target, secrets.token_hex(4), "incomplete")
    try:
        with staged.open("xb") as file:
            yield file
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)


def beside(target: Path, key: str, kind: str) -> Path:
    """A hidden name beside a file or directory, unique by `key`."""
    return target.parent / f".{short_name(target.name)}.{key}.{kind}"


def short_name(name: str) -> str:
    """A name, shortened with a hash if it leaves no room for a suffix."""
    data = os.fsencode(name)
    return name if len(data) <= 200 else os.fsdecode(data[:150]) + hashlib.sha256(data).hexdigest()[:32]


def remote_path(where: str | os.PathLike) -> epath.Path:
    """The path object of a location in an object store (`gs://...`) or of a local path.

    Raises:
      InputError: it is a URL with another scheme (`file://`, `http://`).
    """
    try:
        return epath.Path(where)
    except KeyError:
        scheme = os.fspath(where).partition("://")[0]
        raise InputError(
            f"{shorten(where)}: {shorten(scheme, 20)}:// is not a supported object store; give a path, or gs://..."
        ) from None


def check_tree(directory: str | os.PathLike) -> None:
    """Check a local directory before a library opens its files, since the library would block on a pipe.

    Raises:
      InputError: it has something that is neither a regular file nor a real directory.
    """
    if "://" in os.fspath(directory):
        return
    for folder, folders, files in os.walk(os.fspath(directory)):
        for path in (os.path.join(folder, name) for name in (*folders, *files)):
            with contextlib.suppress(OSError):  # a dangling link: the library reports the missing file
                kind = kind_of(os.stat(path))
                if os.path.isdir(path):
                    kind = "a link to a directory" if os.path.islink(path) else None
                if kind:
                    raise InputError(f"{shorten(path)}: {kind}, not a file")


def memory_bytes() -> int:
    """The size of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
