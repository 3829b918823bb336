"""A run's directory: its lock, the configuration of its run, its files.

    config.json           the TrainConfig in force, checksums of its data and checkpoint
    metrics.jsonl         one object for each logged step; events/ has the same for TensorBoard
    metrics.N.jsonl       the same of attempts that ended before their first checkpoint
    checkpoints/          states to resume from (states.py)
    model/ hf/ adapter/   the result (results.py)

Small files are appended to in `files`: the directory itself, or, where it is in an object store (`gs://`), which cannot
append, a copy on this machine that `push` uploads.
"""

import dataclasses
import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from etils import epath

from llava_jax.checkpoints.directories import find_directory
from llava_jax.checkpoints.outputs import DIRECTORIES, check_replaceable, make_directories, write_file
from llava_jax.console import InputError, first_line, note, shorten
from llava_jax.files import open_regular, remote_path
from llava_jax.json_files import read_json
from llava_jax.locks import InUseError, LockedFile
from train import mixture
from train.config import TrainConfig

# A run may resume with other values of these: they change where, how fast and how well watched it runs, not its result.
MAY_CHANGE = {
    "data", "image_folder", "follow_links", "eval_data", "eval_every", "output", "mesh", "remat", "workers", "prefetch",
    "on_bad_sample", "max_bad_share", "save_every", "save_minutes", "keep", "log_every", "profile_steps", "export_hf",
}  # fmt: skip
CHECKSUM = "data_sha256"  # `data` may move, but not change, nor may the share that is taken of each file
FINGERPRINT = "checkpoint_fingerprint"  # nor may `checkpoint`, whose frozen weights are not in the run's checkpoints
RESULTS = ("model", "hf", "adapter")
PLACES, PLACE_BYTES = 16, 4096  # of each of its files that are looked at


class Output:
    """The directory, held by this process until `close`, or until it ends.

    Raises:
      InputError: another run holds it; it cannot be written; it belongs to something else, or to a run with a
        different configuration, whose every difference is named.
    """

    def __init__(self, config: TrainConfig, *, process: int = 0):
        """The first `process` writes; the others only list what is wrong with images of theirs."""
        self.root = remote_path(config.output)
        self.process, self.first = process, process == 0
        self.remote = is_remote(config.output)
        self.held: LockedFile | tempfile.TemporaryDirectory | None = None
        self.files = Path(config.output)
        if self.remote:
            self.held = tempfile.TemporaryDirectory(prefix="train-")
            self.files = Path(self.held.name)
        self.described = describe(config)
        self.warned = False  # that the object store could not be written
        self.resumed = False
        try:
            self.new = not self.root.exists()
            self.before = set() if self.new else {path.name for path in self.root.iterdir()}
        except (OSError, ImportError) as error:  # an object store without its client
            raise self._unusable(error) from None
        try:
            if self.first:
                if self.remote:
                    self.root.mkdir(parents=True, exist_ok=True)
                else:
                    make_directories(self.files)
                self._lock()
            path = self.root / "config.json"
            if path.exists():
                _compare(path, self.described)
                self.resumed = True
            if self.first:  # for the others there may be no directory yet
                self._check_contents()
            if self.resumed:
                self._pull()
        except InUseError:
            raise
        except BaseException as error:
            self.withdraw()
            self.close()
            raise self._unusable(error) if isinstance(error, OSError) else error from None

    def _unusable(self, error: OSError | ImportError) -> InputError:
        return InputError(f"--output {shorten(self.root)}: cannot be used ({first_line(error)})")

    def _check_contents(self) -> None:
        """Refuse a directory in which a run would write over what no run wrote."""
        name = f"--output {shorten(self.root)}"
        if not self.resumed:
            theirs = {path.name for path in self.root.iterdir() if not (path.is_dir() and not any(path.iterdir()))}
            if taken := sorted(theirs & {*RESULTS, "checkpoints", "events", "metrics.jsonl"}):
                raise InputError(f"{name}: holds something else: {taken[0]}, but no run's config.json")
        elif not self.remote:
            for result in RESULTS:
                if (self.files / result).exists():
                    check_replaceable(self.files / result, f"{name}/{result}")

    def is_finished(self, total: int, latest: int | None) -> bool:
        """Whether all steps were made and the result was written."""
        results = RESULTS[: 1 + self.described["export_hf"]]
        return latest == total and all((self.root / name / "config.json").exists() for name in results)

    def write_config(self) -> None:
        """Make the directory this run's. (A run refused before, for its data perhaps, leaves nothing.)"""
        data = (json.dumps(self.described, indent=2) + "\n").encode()
        try:
            if self.remote:
                (self.root / "config.json").write_bytes(data)
            else:
                write_file(self.root / "config.json", data)
        except OSError as error:
            raise InputError(f"{self.root / 'config.json'}: cannot be written ({first_line(error)})") from None

    def withdraw(self) -> None:
        """The run is refused: remove what was made for it, unless an earlier process made some of it."""
        if self.resumed or not self.first or not self.root.is_dir():
            return
        for path in (*self.files.glob("bad_samples*.jsonl"), self.files / ".lock"):
            if path.name not in self.before:
                path.unlink(missing_ok=True)
        made = [self.root / "checkpoints"] * ("checkpoints" not in self.before) + [self.root] * self.new
        for directory in made:
            if directory.exists() and not any(directory.iterdir()):
                directory.rmdir()

    def close(self) -> None:
        """Release the directory."""
        if isinstance(self.held, LockedFile):
            self.held.close()
        elif self.held:
            self.held.cleanup()

    def push(self, *, last: bool = False) -> None:
        """Upload the small files to the object store, if that is where the directory is.

        If that fails, a warning says so, and the next time may succeed.

        Raises:
          InputError: it fails, and there is no next time.
        """
        if not self.remote:
            return
        try:
            for file in filter(self._is_mine, self.files.rglob("*")):
                target = self.root / file.relative_to(self.files)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
            self.warned = False
        except Exception as error:  # whatever the store's client raises
            problem = f"{self.root}: metrics and lists cannot be written ({first_line(error)})"
            if last:
                raise InputError(problem) from None
            if not self.warned:
                note(f"warning: {problem}; the run continues")
            self.warned = True

    def _pull(self) -> None:
        if self.remote:
            for file in filter(self._is_mine, self.root.iterdir()):
                (self.files / file.name).write_bytes(file.read_bytes())

    def _is_mine(self, file: epath.Path | Path) -> bool:
        """Whether this process writes that file: the first all, but for the others' lists of bad samples."""
        listed = re.fullmatch(r"bad_samples\.(\d+)\.jsonl", file.name)
        return file.is_file() and (int(listed[1]) if listed else 0) == self.process

    def _lock(self) -> None:
        """Object stores have no locks: there, two runs in one directory are not noticed."""
        if self.remote:
            return
        self.held = LockedFile(self.files / ".lock", f"--output {shorten(self.root)}", "another run")
        self.held.sign()


def is_remote(path: str) -> bool:
    """Whether it is in an object store."""
    return "://" in path


def describe(config: TrainConfig) -> dict[str, Any]:
    """What `config.json` holds."""
    checksums = {
        CHECKSUM: mixture.checksum(mixture.read_parts(config.data)),
        FINGERPRINT: fingerprint(config.checkpoint),
    }
    return json.loads(json.dumps(dataclasses.asdict(config) | checksums))


def fingerprint(checkpoint: str) -> str:
    """Of names, sizes and some bytes of a checkpoint's files: cheap, and another for another training's weights. What
    else is in its directory, such as runs, does not count.

    Empty for one in an object store, which is known by its name alone.
    """
    if is_remote(checkpoint):
        return ""
    directory, digest = find_directory(checkpoint), hashlib.sha256()
    inner = (path for name in DIRECTORIES for path in (directory / name).rglob("*"))
    for path in sorted(path for path in (*directory.iterdir(), *inner) if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory)} {size}\n".encode())
        with open_regular(path) as file:
            for at in range(0, size, -(-size // PLACES) or 1):
                file.seek(at)
                digest.update(file.read(PLACE_BYTES))
    return digest.hexdigest()


def _compare(path: epath.Path, wanted: dict[str, Any]) -> None:
    try:
        there = read_json(path)
    except InputError as error:
        raise InputError(f"{error}: --output holds something else than a run; name another directory") from None
    if CHECKSUM not in there:
        raise InputError(f"--output {shorten(path.parent)}: holds something else (its config.json is not of a run)")
    moved = {"checkpoint"} if wanted[FINGERPRINT] and there.get(FINGERPRINT) == wanted[FINGERPRINT] else set()
    if found := differences(
        there, {name: wanted[name] for name in (FINGERPRINT, CHECKSUM, *wanted) if name not in MAY_CHANGE | moved}
    ):
        named = list(found)
        while len(named) > 1 and sum(map(len, named)) > 140:  # so that it is a line
            named.pop()
        more = [f"{len(found) - len(named)} more"] * (len(found) > len(named))
        raise InputError(
            f"--output {shorten(path.parent, 60)}: holds a run of another configuration: "
            f"{'; '.join([*named, *more])}; resume with its values, or name another directory"
        )


def differences(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Which of the values wanted, as JSON has them, are others there: "steps is 3 there and 4 here"."""
    return [
        f"{name} is {_shown(there.get(name))} there and {_shown(value)} here"
        for name, value in wanted.items()
        if there.get(name) != value
    ]


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value[:12] + "..." if len(value) == 64 else shorten(json.dumps(value), 40)
    return shorten(json.dumps(value), 40)
