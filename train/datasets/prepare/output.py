"""The output directory of a preparation: whether it may be written, resumed, or is complete already.

prepare.json   the settings and the digest of the images, from the first shard until the dataset is complete
*.incomplete   files that a killed command has left; in an object store they are in a local directory instead
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from llava_jax.console import InputError, shorten
from llava_jax.json_files import parse_json
from llava_jax.locks import LockedFile
from train.datasets.prepare.image_shards import MAX_PART, ImagePart, part_name
from train.prepared import DATASET, INDEX, MAX_DATASET, UNFINISHED, Description, Index, images_name
from train.stores import Store

LEFT_OUT = "left_out.jsonl"
SETTINGS = "prepared"  # the key of the settings in `dataset.json`
LOCK = ".lock"
OURS = (
    DATASET, INDEX, UNFINISHED, LEFT_OUT, LOCK, "images-?????*", "conversations-?????*.jsonl", "lengths-*.safetensors",
    "*.incomplete",
)  # fmt: skip
NAMES = {  # of settings, in errors
    "data": "the data files", "images": "the images (their files, or their number)", "seed": "--seed",
    "shard_bytes": "--max-shard-size", "max_side": "--max-side", "quality": "--quality",
}  # fmt: skip

Settings = dict[str, Any]


class Preparation:
    """A dataset that is being prepared.

    Attributes:
      store: the output directory.
      folder: a local directory for files that are not complete; set by `begin`.
      is_complete: whether the dataset is complete already, with the same settings.
    """

    def __init__(self, output: str, settings: Settings):
        """Look at the output directory, and write nothing.

        Raises:
          InputError: it has other files, or a preparation with other settings.
          OSError: it cannot be read.
        """
        self.store, self._name, self._settings = Store(output), f"--output {shorten(output)}", settings
        self.folder = Path()
        self._lock: LockedFile | None = None
        self.is_complete = self._check()

    def _check(self) -> bool:
        if self.store.local and os.path.lexists(self.store.local) and not self.store.local.is_dir():
            raise InputError(f"{self._name}: is not a directory")
        local = self.store.local and self.store.local.is_dir() and os.listdir(self.store.local)
        files = self.store.sizes()
        for name in sorted({*files, *(local or ())}):
            if not any(fnmatch.fnmatchcase(name, ours) for ours in OURS):
                raise InputError(f"{self._name}: holds {shorten(name, 60)}, which is not part of a prepared dataset")
        for name in (DATASET, UNFINISHED):
            if name in files:
                self._compare(name)
                return name == DATASET
        if any(name not in (LOCK, LEFT_OUT) and not name.endswith(".incomplete") for name in files):
            raise InputError(f"{self._name}: holds parts of a prepared dataset, but neither {DATASET} nor {UNFINISHED}")
        return False

    def _compare(self, file: str) -> None:
        data = self.store.read(file, MAX_DATASET)
        try:
            found = parse_json(data or b"")
            before = found[SETTINGS] if file == DATASET else found
            different = [name for name in self._settings if before[name] != self._settings[name]]
        except (InputError, KeyError, TypeError):
            raise InputError(f"{self._name}: its {file} is not one that this command has written") from None
        if different:
            what = "a prepared dataset" if file == DATASET else "a preparation that is not complete,"
            name = different[0]
            values = "" if name in ("data", "images") else f" ({before[name]}, now {self._settings[name]})"
            raise InputError(
                f"{self._name}: has {what} with other settings: {NAMES.get(name, name)}{values} differ; give another "
                "--output"
            )

    def begin(self, images: str) -> None:
        """Lock the directory, and write the settings, or compare them with those of the command that is resumed.

        Args:
          images: the digest of the images.

        Raises:
          InputError: another command is writing, or the images differ.
          OSError: the directory cannot be written.
        """
        self.folder = self.store.local or _scratch(self.store.path)
        self.store.create()
        self._lock = LockedFile(self.folder / LOCK, self._name)
        self._lock.sign()
        self._settings = self._settings | {"images": images}
        for path in self.folder.glob("*.incomplete"):
            path.unlink()
        if self._check():
            raise InputError(f"{self._name}: another command has just completed it")
        if UNFINISHED not in self.store.sizes():
            self.store.write(UNFINISHED, _json(self._settings))

    def parts(self, shards: int) -> list[ImagePart | None]:
        """The shards of images that are complete; None for the others.

        Raises:
          InputError, OSError: a part cannot be read.
        """
        files, found = self.store.sizes(), []
        for number in range(shards):
            name, part = part_name(number), None
            if name in files and (data := self.store.read(name, MAX_PART)) is not None:
                part = ImagePart.load(data, shorten(self.store.name_of(name)))
                if files.get(images_name(number)) != part.shard["bytes"]:
                    part = None
            found.append(part)
        return found

    def complete(self, index: Index, description: Description, counts: dict[str, int]) -> None:
        """Write the index, and then `dataset.json`, which makes the dataset complete; remove the parts.

        Raises:
          OSError: they cannot be written.
        """
        data = index.save()
        assert hashlib.sha256(data).hexdigest() == description["index"]
        self.store.write(INDEX, data)
        self.store.write(DATASET, _json(description | {"counts": counts, SETTINGS: self._settings}))
        self.tidy()

    def tidy(self) -> None:
        """Remove what only a preparation needs."""
        for name in self.store.sizes():
            if name == UNFINISHED or fnmatch.fnmatchcase(name, "images-*.part.safetensors"):
                self.store.remove(name)

    def close(self) -> None:
        """Release the directory."""
        if self._lock:
            self._lock.path.unlink(missing_ok=True)
            self._lock.close()
        if self._lock and not self.store.local:
            with contextlib.suppress(OSError):  # a killed worker may have left a file
                self.folder.rmdir()

    def __enter__(self) -> "Preparation":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _scratch(output: str) -> Path:
    """A local directory that all commands with this output and user share."""
    key = hashlib.sha256(f"{os.getuid()} {output}".encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"prepare-{key}"
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not path.is_dir() or path.is_symlink() or status.st_uid != os.getuid():
        raise InputError(f"{path}: is in the way; remove it, or set TMPDIR")
    return path


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
