"""Write files and directories that appear whole or not at all, and check what may be replaced.

A command replaces a directory only if all its contents are part of a checkpoint, and the command reads none of them;
paths are compared with their links resolved. All checks run before any change, and again before the old directory is
removed. The command writes the new directory beside its target, under a unique name, and then moves it there. A lock
beside it (`.NAME.KEY.lock`) lets the next command distinguish the remains of a killed one from a running one's files.
"""

import contextlib
import fnmatch
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from etils import epath

from llava_jax.console import InputError, first_line, note, shorten
from llava_jax.files import beside, new_file, read_bytes, remote_path, short_name
from llava_jax.locks import InUseError, LockedFile

# The files in directories of checkpoints: ours, the original's, transformers' and PEFT's.
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
    """Check that a directory is empty, or that all of it is a checkpoint.

    Raises:
      InputError: it is neither; the error names the first entry that is not part of a checkpoint, if any.
    """
    if directory.is_symlink() or not directory.is_dir():
        raise InputError(f"{name}: is not replaced: it is a file, not a checkpoint directory")
    foreign = _foreign_entry(directory, CHECKPOINT_FILES, DIRECTORIES)
    if foreign:
        raise InputError(f"{name}: is not replaced: it holds {shorten(foreign, 60)}, which is not part of a checkpoint")
    if any(directory.iterdir()) and not _is_model(directory):
        raise InputError(f"{name}: is not replaced: it is not a checkpoint (no weights, or no config.json of a model)")


def _foreign_entry(directory: Path, files: Sequence[str], directories: Mapping[str, Sequence[str]]) -> str | None:
    """The first entry of a directory that matches neither `files` nor the contents of `directories`."""
    for entry in sorted(directory.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            patterns = directories.get(entry.name)
            inner = entry.name if patterns is None else _foreign_file_below(entry, patterns)
            if inner:
                return inner
        elif not (_matches(entry.name, files) and (entry.is_file() or not entry.exists())):
            return entry.name
    return None


def _foreign_file_below(directory: Path, patterns: Sequence[str]) -> str | None:
    for path in sorted(directory.rglob("*")):
        if not path.is_dir() and not _matches(path.relative_to(directory).as_posix(), patterns):
            return path.relative_to(directory.parent).as_posix()
    return None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_model(directory: Path) -> bool:
    """Whether a directory has weights, and the configuration of a model or an adapter."""
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
    """Check that the target to replace neither is nor contains a source that the command reads, nor is inside one.

    Raises:
      InputError: it is one, contains one or is inside one.
    """
    if not target.exists():
        return
    target_id, around = _identity(target), set(map(_identity, target.parents))
    for source in filter(os.path.exists, (s for s in sources if "://" not in os.fspath(s))):
        real = Path(os.path.realpath(source))
        inside = [Path(os.path.realpath(path)) for path in _links(real)]  # such as those of the hub's cache
        if _identity(real) in around or any(
            target_id in map(_identity, (path, *path.parents)) for path in (real, *inside) if path.exists()
        ):
            raise InputError(f"{name}: overlaps an input of this command; write elsewhere")


def _identity(path: Path) -> tuple[int, int]:
    """Identifies a file or directory: mounts and case-insensitive file systems can give it several names."""
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

    The block writes it beside its target, and it is then moved there. Object stores (`gs://`) cannot move a directory:
    there the block writes it in place, and should write `config.json` last, which then marks a complete directory.

    Args:
      overwrite: replace an existing directory, if it is a checkpoint and nothing else.
      sources: files and directories that the block reads, and that must not be replaced.

    Raises:
      InputError: the directory exists and must not be replaced, another command wrote it in the meantime, or it cannot
        be written.
    """
    name = shorten(os.fspath(directory))
    try:
        target = Path(os.path.realpath(directory))
    except ValueError as error:
        raise InputError(f"{name}: not a valid directory name ({first_line(error)})") from None
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
                raise InputError(f"{name}: overlaps an input of this command; write elsewhere")
        if any(directory.iterdir()) and not (directory / "config.json").exists():
            raise InputError(f"{name}: is not replaced: it is not a checkpoint (it has no config.json)")
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
            before = check()  # again: `_Staging` may have undone a killed command's work
            staging.new.mkdir()
            yield staging.new
            if check() != before:
                raise InputError(f"{name}: is not replaced: another command wrote it in the meantime")
            staging.move()
    finally:
        with contextlib.suppress(OSError):  # at the first that is not empty: it holds the new directory
            for parent in made:
                os.rmdir(parent)


def make_directories(directory: Path) -> None:
    """Make a directory and any number of parents: `Path.mkdir` recurses for each.

    Raises:
      OSError: it cannot be made. If its name is too long, or a parent is a file, no directory is made.
    """
    with contextlib.suppress(FileNotFoundError):
        directory.stat()
    for path in reversed([path for path in (directory, *directory.parents) if not path.exists()]):
        path.mkdir(exist_ok=True)


class _Staging:
    """Unique names beside a directory, for its new contents and its old ones.

    The lock beside them is held while its command runs. If a lock is free, its command was killed, and its work is
    undone.
    """

    def __init__(self, target: Path, name: str):
        self.target = target
        short = re.escape(short_name(target.name))
        for path in target.parent.iterdir():
            if found := re.fullmatch(rf"\.{short}\.([0-9a-f]{{8}})\.lock", path.name):
                self._recover(path, found[1], name)
        key = secrets.token_hex(4)
        self.lock = LockedFile(self._path(key, "lock"))
        try:
            self.lock.sign()
        except BaseException:
            self._unlock()
            raise
        self.new, self.old = self._path(key, "incomplete"), self._path(key, "replaced")

    def _path(self, key: str, kind: str) -> Path:
        return beside(self.target, key, kind)

    def _recover(self, path: Path, key: str, name: str) -> None:
        try:
            with LockedFile(path) as lock:
                if lock.is_locked and (lock.is_new or lock.is_mine()):  # new: its holder has just removed the file
                    self._settle(self._path(key, "incomplete"), self._path(key, "replaced"))
                    lock.path.unlink()
        except InUseError as error:
            note(f"warning: {name}: is also being written by {error.owner}; the command that finishes last will fail")
        except (InputError, OSError):
            pass  # not a lock of ours, or this user may not remove it

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
        """Restore the old contents if no new ones were moved to the target, and remove the rest."""
        if old.exists() and not self.target.exists():
            old.rename(self.target)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)

    def move(self) -> None:
        """Move the new contents to the target."""
        if self.target.exists():
            self.target.rename(self.old)
        self.new.rename(self.target)


# ---------------------------------------------------------------- files


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Write a file with `new_file`; raises as it does."""
    with new_file(path) as file:
        file.write(data)
