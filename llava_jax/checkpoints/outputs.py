"""Where commands write: what may be replaced, and files and directories that appear whole or not at all.

A directory is replaced only if all that is in it is part of a checkpoint, and nothing in it is read meanwhile: paths
are compared with their links resolved. Everything is checked before anything is touched, and once more before the old
goes. The new one is written beside its place, under a name that nobody else uses, and then moved there. A lock beside
it (`.NAME.KEY.lock`) lets the next command tell what a killed one has left from what another is writing.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from etils import epath

from llava_jax.console import InputError, first_line, note, shorten
from llava_jax.files import kind_of, read_bytes, remote_path
from llava_jax.locks import InUseError, LockedFile

# What directories of checkpoints hold: ours, the original's, transformers' and PEFT's.
CHECKPOINT_FILES = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "mm_projector.bin", "adapter_model.bin",
    "non_lora_trainables.bin", "training_args.bin", "pytorch_model.bin.index.json",
    "config.json", "generation_config.json", "adapter_config.json", "trainer_state.json",
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "preprocessor_config.json", "processor_config.json", "chat_template.*",
    "README.md", "LICENSE*", "USE_POLICY.md", ".gitattributes", ".DS_Store",
)  # fmt: skip
DATA_FILE = "d/" + 32 * "[0-9a-f]"
ORBAX_FILES = (  # below `params` and `unused`
    "_METADATA", "_CHECKPOINT_METADATA", "_sharding", "commit_success.txt", "array_metadatas/process_*",
    "descriptor/descriptor.pbtxt", "manifest.ocdbt", DATA_FILE, "ocdbt.process_*/manifest.ocdbt",
    f"ocdbt.process_*/{DATA_FILE}",
)  # fmt: skip
DIRECTORIES = {
    "params": ORBAX_FILES,
    "unused": ORBAX_FILES,
    "vision_tower": CHECKPOINT_FILES,
    ".cache": ("huggingface/*",),
}
WEIGHTS = ("*.safetensors", "*.bin")


# ---------------------------------------------------------------- what may be replaced


def check_replaceable(directory: Path, name: str) -> None:
    """Complain unless a directory is empty, or a checkpoint as a whole.

    Raises:
      InputError: naming what is no part of one.
    """
    if directory.is_symlink() or not directory.is_dir():
        raise InputError(f"{name}: a file, not a checkpoint, so it is not replaced")
    stranger = _stranger(directory, CHECKPOINT_FILES, DIRECTORIES)
    if stranger:
        raise InputError(f"{name}: is not replaced: it holds {shorten(stranger, 60)}, which is no part of a checkpoint")
    if any(directory.iterdir()) and not _is_model(directory):
        raise InputError(f"{name}: is not replaced: it is no checkpoint, with the config.json of a model and weights")


def _stranger(directory: Path, files: Sequence[str], directories: Mapping[str, Sequence[str]]) -> str | None:
    """The first thing in a directory that is not one of these files, nor in one of these directories."""
    for entry in sorted(directory.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            patterns = directories.get(entry.name)
            inner = entry.name if patterns is None else _stranger_below(entry, patterns)
            if inner:
                return inner
        elif not (_matches(entry.name, files) and (entry.is_file() or not entry.exists())):
            return entry.name
    return None


def _stranger_below(directory: Path, patterns: Sequence[str]) -> str | None:
    for path in sorted(directory.rglob("*")):
        if not path.is_dir() and not _matches(path.relative_to(directory).as_posix(), patterns):
            return path.relative_to(directory.parent).as_posix()
    return None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_model(directory: Path) -> bool:
    """Whether it has weights, and a configuration of a model or an adapter."""
    names = [path.name for path in directory.iterdir()]
    if not any(_matches(name, (*WEIGHTS, "params")) for name in names):
        return False
    try:
        file = next(directory / name for name in ("config.json", "adapter_config.json") if name in names)
        fields = json.loads(read_bytes(file, 64 * 2**20))
        return any(key in fields for key in ("format", "model_type", "architectures", "peft_type"))
    except (StopIteration, InputError, ValueError, RecursionError, TypeError):
        return False


def check_apart(target: Path, name: str, sources: Sequence[str | os.PathLike]) -> None:
    """Complain if what is to be replaced is, holds, or lies in something that is read meanwhile.

    Raises:
      InputError: it does.
    """
    if not target.exists():
        return
    target_id, around = _identity(target), set(map(_identity, target.parents))
    for source in filter(os.path.exists, (s for s in sources if "://" not in os.fspath(s))):
        real = Path(os.path.realpath(source))
        inside = [Path(os.path.realpath(path)) for path in _links(real)]  # such as a hub cache's
        if _identity(real) in around or any(
            target_id in map(_identity, (path, *path.parents)) for path in (real, *inside) if path.exists()
        ):
            raise InputError(f"{name}: holds what is to be read; write elsewhere")


def _identity(path: Path) -> tuple[int, int]:
    """Of a file or directory, under whatever name: mounts and case-insensitive file systems give it several."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _links(directory: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(directory):
        yield from filter(os.path.islink, (os.path.join(folder, name) for name in (*folders, *files)))


# ---------------------------------------------------------------- directories


@contextlib.contextmanager
def new_directory(
    directory: str | os.PathLike, *, overwrite: bool = False, sources: Sequence[str | os.PathLike] = ()
) -> Iterator[epath.Path]:
    """A directory to write into that appears under its name when the block ends, whole or not at all.

    It is written beside its place and then moved there. Object stores (`gs://`) cannot move a directory: there it is
    written in its place, and whoever writes `config.json` last, and reads it first, knows that it is whole.

    Args:
      overwrite: replace what is there, if it is a checkpoint and nothing else.
      sources: files and directories that are read meanwhile, and must not be replaced.

    Raises:
      InputError: the directory exists and is not to be replaced, was written by another command meanwhile, or cannot
        be written.
    """
    name = shorten(os.fspath(directory))
    try:
        target = Path(os.path.realpath(directory))
    except ValueError as error:
        raise InputError(f"{name}: no name of a directory ({first_line(error)})") from None
    try:
        if "://" in os.fspath(directory):
            with _remote_directory(remote_path(directory), name, overwrite, sources) as staged:
                yield staged
        else:
            with _local_directory(target, name, overwrite, sources) as staged:
                yield epath.Path(staged)
    except OSError as error:
        raise InputError(f"{name}: cannot be written ({first_line(error)})") from None


@contextlib.contextmanager
def _remote_directory(
    directory: epath.Path, name: str, overwrite: bool, sources: Sequence[str | os.PathLike]
) -> Iterator[epath.Path]:
    try:
        exists = directory.exists()
    except Exception as error:  # an object store without its client, without permission
        raise InputError(f"{name}: cannot be reached ({first_line(error)})") from None
    if exists:
        if not overwrite:
            raise InputError(f"{name}: exists already; --overwrite replaces it")
        for source in map(epath.Path, sources):
            if source == directory or source in directory.parents or directory in source.parents:
                raise InputError(f"{name}: holds what is to be read; write elsewhere")
        if any(directory.iterdir()) and not (directory / "config.json").exists():
            raise InputError(f"{name}: no checkpoint (there is no config.json), so it is not replaced")
    try:
        directory.rmtree(missing_ok=True)
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
    except BaseException:
        directory.rmtree(missing_ok=True)
        raise


@contextlib.contextmanager
def _local_directory(target: Path, name: str, overwrite: bool, sources: Sequence[str | os.PathLike]) -> Iterator[Path]:
    def check() -> tuple[int, int] | None:
        if not os.path.lexists(target):
            return None
        if not overwrite:
            raise InputError(f"{name}: exists already; --overwrite replaces it")
        check_apart(target, name, sources)
        check_replaceable(target, name)
        return _identity(target)

    check()
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        make_directories(target.parent)
        with _Staging(target, name) as staging:
            before = check()  # once more: a killed command's work may have been undone
            staging.new.mkdir()
            yield staging.new
            if check() != before:
                raise InputError(f"{name}: was written by another command meanwhile, and is not replaced")
            staging.move()
    finally:
        with contextlib.suppress(OSError):  # of the first that holds something: the new directory
            for parent in made:
                os.rmdir(parent)


def make_directories(directory: Path) -> None:
    """Make a directory and those above it, however many: the library's way calls itself for each.

    Raises:
      OSError: it cannot be made. Where its name is too long, or it would lie below a file, none is made.
    """
    with contextlib.suppress(FileNotFoundError):
        directory.stat()
    for path in reversed([path for path in (directory, *directory.parents) if not path.exists()]):
        path.mkdir(exist_ok=True)


class _Staging:
    """Names beside a directory that nobody else uses, for its new contents and its old ones.

    A lock beside them says that somebody is at work. Where one is free its command was killed: its work is undone.
    """

    def __init__(self, target: Path, name: str):
        self.target = target
        short = re.escape(_short(target.name))
        for path in target.parent.iterdir():
            if found := re.fullmatch(rf"\.{short}\.([0-9a-f]{{8}})\.lock", path.name):
                self._look_at(path, found[1], name)
        key = secrets.token_hex(4)
        self.lock = LockedFile(self._path(key, "lock"))
        try:
            self.lock.sign()
        except BaseException:
            self._unlock()
            raise
        self.new, self.old = self._path(key, "incomplete"), self._path(key, "replaced")

    def _path(self, key: str, kind: str) -> Path:
        return _beside(self.target, key, kind)

    def _look_at(self, path: Path, key: str, name: str) -> None:
        try:
            with LockedFile(path) as lock:
                if lock.is_locked and (lock.is_new or lock.is_mine()):  # new: its holder has just removed it
                    self._settle(self._path(key, "incomplete"), self._path(key, "replaced"))
                    lock.path.unlink()
        except InUseError as error:
            note(f"warning: {name}: is being written by {error.owner} too; the later one will be refused")
        except (InputError, OSError):
            pass  # no lock of ours, or not ours to remove

    def __enter__(self) -> "_Staging":
        return self

    def __exit__(self, *_) -> None:
        try:
            self._settle(self.new, self.old)
        finally:
            self._unlock()

    def _unlock(self) -> None:
        self.lock.path.unlink(missing_ok=True)
        self.lock.close()

    def _settle(self, new: Path, old: Path) -> None:
        """Leave what was there before, or what was put in its place, and nothing else."""
        if old.exists() and not self.target.exists():
            old.rename(self.target)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)

    def move(self) -> None:
        """Put the new contents into their place."""
        if self.target.exists():
            self.target.rename(self.old)
        self.new.rename(self.target)


def _beside(target: Path, key: str, kind: str) -> Path:
    return target.parent / f".{_short(target.name)}.{key}.{kind}"


def _short(name: str) -> str:
    """A name, or what stands for it where it is so long that nothing can be added."""
    data = os.fsencode(name)
    return name if len(data) <= 200 else os.fsdecode(data[:150]) + hashlib.sha256(data).hexdigest()[:32]


# ---------------------------------------------------------------- files


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Write a file that appears under its name whole or not at all; one that is there is replaced, a link's target.

    Raises:
      InputError: there is something else than a file.
      OSError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and (kind := kind_of(target.stat())):
        raise InputError(f"{shorten(path)}: {kind}, not a file")
    staged = _beside(target, secrets.token_hex(4), "incomplete")
    try:
        staged.write_bytes(data)
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)
