"""A run's directory: lock, configuration, files.

    config.json           the TrainConfig, checksums of its data and checkpoint
    metrics.jsonl         one object per logged step; events/ has the same for TensorBoard
    metrics.N.jsonl       the same for attempts that ended before their first checkpoint
    checkpoints/          states to resume from (states.py)
    model/ hf/ adapter/   the result (results.py)

Small files are appended to in `files`: the directory itself, or, for an object store (`gs://`), which cannot append, a
local copy that `push` uploads.
"""

import dataclasses
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from etils import epath

from llava_jax.checkpoints.directories import fingerprint, is_remote
from llava_jax.checkpoints.outputs import check_replaceable, make_directories, write_file
from llava_jax.console import InputError, first_line, note, shorten
from llava_jax.files import remote_path
from llava_jax.json_files import difference, read_json
from llava_jax.locks import InUseError, LockedFile
from train import mixture
from train.config import TrainConfig

# A run may resume with other values of these: they change its location, speed and monitoring, not its result.
MAY_CHANGE = {
    "data", "image_folder", "follow_links", "eval_data", "eval_every", "eval_benchmarks", "eval_data_dir", "eval_limit",
    "eval_batch_size", "output", "mesh", "remat", "workers", "prefetch", "on_bad_sample", "max_bad_share", "save_every",
    "save_minutes", "keep", "log_every", "profile_steps", "export_hf",
}  # fmt: skip
CHECKSUM = "data_sha256"  # `data` may move, but neither its contents nor the weight of each file may change
FINGERPRINT = "checkpoint_fingerprint"  # nor may those of `checkpoint`: the run's checkpoints lack its frozen weights
RESULTS = ("model", "hf", "adapter")


class Output:
    """A run's directory, locked by this process until `close` or exit.

    Raises:
      InputError: another run holds the lock; the directory cannot be written; it holds other files, or a run with
        another configuration (the error names the differences).
    """

    def __init__(self, config: TrainConfig, *, process: int = 0):
        """Process 0 writes the directory; the others write only their lists of bad samples."""
        self.root = remote_path(config.output)
        self.process, self.first = process, process == 0
        self.remote = is_remote(config.output)
        self.held: LockedFile | tempfile.TemporaryDirectory | None = None
        self.files = Path(config.output)
        if self.remote:
            self.held = tempfile.TemporaryDirectory(prefix="train-")
            self.files = Path(self.held.name)
        self.described = describe(config)
        self.warned = False  # of a failed upload to the object store
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
            if self.first:  # for the others the directory may not exist yet
                self._check_contents()
            if self.resumed:
                self._pull()
        except InUseError:
            raise
        except BaseException as error:
            self.undo()
            self.close()
            raise self._unusable(error) if isinstance(error, OSError) else error from None

    def _unusable(self, error: OSError | ImportError) -> InputError:
        return InputError(f"--output {shorten(self.root)}: cannot be used ({first_line(error)})")

    def _check_contents(self) -> None:
        """Raise `InputError` if the run would overwrite files that no run wrote."""
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
        """Whether all steps are done and the result is written."""
        results = RESULTS[: 1 + self.described["export_hf"]]
        return latest == total and all((self.root / name / "config.json").exists() for name in results)

    def write_config(self) -> None:
        """Write `config.json`, which marks the directory as this run's. (A run refused before that leaves nothing.)"""
        data = (json.dumps(self.described, indent=2) + "\n").encode()
        try:
            if self.remote:
                (self.root / "config.json").write_bytes(data)
            else:
                write_file(self.root / "config.json", data)
        except OSError as error:
            raise InputError(f"{self.root / 'config.json'}: cannot be written ({first_line(error)})") from None

    def undo(self) -> None:
        """Remove the files and directories of a refused run, but none that already existed."""
        if self.resumed or not self.first or not self.root.is_dir():
            return
        for path in (*self.files.glob("bad_samples*.jsonl"), self.files / ".lock"):
            if path.name not in self.before:
                path.unlink(missing_ok=True)
        created = [self.root / "checkpoints"] * ("checkpoints" not in self.before) + [self.root] * self.new
        for directory in created:
            if directory.exists() and not any(directory.iterdir()):
                directory.rmdir()

    def close(self) -> None:
        """Release the directory."""
        if isinstance(self.held, LockedFile):
            self.held.close()
        elif self.held:
            self.held.cleanup()

    def push(self, *, last: bool = False) -> None:
        """Upload the small files if the directory is in an object store. A failure is logged; the next call retries.

        Raises:
          InputError: the `last` upload fails.
        """
        if not self.remote:
            return
        try:
            for file in filter(self._is_written_here, self.files.rglob("*")):
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
            for file in filter(self._is_written_here, self.root.iterdir()):
                (self.files / file.name).write_bytes(file.read_bytes())

    def _is_written_here(self, file: epath.Path | Path) -> bool:
        """Whether this process writes `file`: process 0 writes all except the other processes' lists of bad samples."""
        listed = re.fullmatch(r"bad_samples\.(\d+)\.jsonl", file.name)
        return file.is_file() and (int(listed[1]) if listed else 0) == self.process

    def _lock(self) -> None:
        """Lock the directory. Object stores have no locks, so two runs in one such directory are not detected."""
        if self.remote:
            return
        self.held = LockedFile(self.files / ".lock", f"--output {shorten(self.root)}", "another run")
        self.held.sign()


def describe(config: TrainConfig) -> dict[str, Any]:
    """The contents of `config.json`."""
    checksums = {
        CHECKSUM: mixture.checksum(mixture.read_parts(config.data)),
        FINGERPRINT: fingerprint(config.checkpoint),
    }
    return json.loads(json.dumps(dataclasses.asdict(config) | checksums))


def _compare(path: epath.Path, wanted: dict[str, Any]) -> None:
    try:
        there = read_json(path)
    except InputError as error:
        raise InputError(f"{error}: --output holds something else than a run; name another directory") from None
    if CHECKSUM not in there:
        raise InputError(f"--output {shorten(path.parent)}: holds something else (its config.json is not of a run)")
    moved = {"checkpoint"} if wanted[FINGERPRINT] and there.get(FINGERPRINT) == wanted[FINGERPRINT] else set()
    if found := difference(
        there, {name: wanted[name] for name in (FINGERPRINT, CHECKSUM, *wanted) if name not in MAY_CHANGE | moved}
    ):
        raise InputError(
            f"--output {shorten(path.parent, 60)}: holds a run of another configuration: {found}; resume with its "
            "values, or name another directory"
        )
