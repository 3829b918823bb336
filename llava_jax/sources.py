"""Checkpoints of others, opened lazily: a configuration, a tokenizer, and tensors that are read when asked for.

`open_source` looks at headers only, checks that every tensor of the model is there once and in shape, and hands
out a `Source` whose tensors have our paths, layouts and shapes. Conversion streams it to Orbax, `checkpoint.load`
to its place on a mesh.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from llava_jax import names, safetensors
from llava_jax.config import LlavaConfig, read_config, read_json
from llava_jax.console import InputError
from llava_jax.llava import param_shapes
from llava_jax.sharding import path_of

FLOATS = {np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that has not been read yet, in our layout."""

    name: str  # what it is called in its file
    file: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Source:
    """A foreign checkpoint.

    tensors  path -> tensor, exactly the parameters of the model
    unused   path -> tensor of the vision tower that LLaVA does not need (its last layer and norm)
    """

    directory: Path
    config: LlavaConfig
    tensors: dict[str, Tensor]
    unused: dict[str, Tensor]


def open_source(directory: Path, *, vision_tower: Path | None = None, name: str = "") -> Source:
    """Open a directory of safetensors in the original's or transformers' dialect.

    Args:
      directory: with `config.json` and `*.safetensors`.
      vision_tower: a CLIP directory, for originals that come without their tower.
      name: what the checkpoint is called, if not as its directory.

    Raises:
      InputError: something is missing, broken, doubled, misshapen, or not understood; all such tensors are named.
    """
    config_json = read_json(directory / "config.json")
    if config_json is None:
        raise InputError(f"{directory}: no checkpoint (there is no config.json)")
    original = not isinstance(config_json.get("text_config"), dict)
    tower = _tower_directory(directory, config_json, vision_tower) if original else vision_tower
    config = read_config(
        config_json,
        vision=read_json(tower / "config.json") if tower else None,
        preprocessor=read_json((tower if original and tower else directory) / "preprocessor_config.json"),
        generation=read_json(directory / "generation_config.json"),
        name=name or directory.name,
    )
    found = _Found(config, "original" if original else "transformers")
    for file in tensor_files(directory):
        found.add_file(file)
    if not found.has_tower() and tower is not None and (vision_tower or any(tower.glob("*.safetensors"))):
        for file in tensor_files(tower):
            found.add_file(file, ignore=names.CLIP_TEXT)
    return found.check(directory)


def _tower_directory(directory: Path, config_json: dict, given: Path | None) -> Path | None:
    """Where the vision tower of an original checkpoint is: as given, or where config.json says. None: nowhere here."""
    if given is not None:
        if not (given / "config.json").exists():
            raise InputError(f"--vision-tower {given}: no CLIP directory (there is no config.json)")
        return given
    tower = config_json.get("mm_vision_tower")
    if not isinstance(tower, str) or not tower:
        return None
    beside = directory / tower  # or elsewhere, where the name is an absolute path
    return beside if (beside / "config.json").exists() else None


def tensor_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, by its index where it has one.

    Raises:
      InputError: there are none, or the index names one that is not there.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        listed = (read_json(index) or {}).get("weight_map")
        if not isinstance(listed, dict):
            raise InputError(f"{index}: no weight_map in it")
        files = [directory / name for name in sorted(set(listed.values()))]
        if missing := [file.name for file in files if not file.exists()]:
            raise InputError(f"{directory}: the index names files that are not there: {', '.join(missing)}")
        return files
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise InputError(f"{directory}: no *.safetensors files")
    return files


class _Found:
    """The tensors met so far, and what is wrong with them."""

    def __init__(self, config: LlavaConfig, dialect: str):
        self.config, self.dialect = config, dialect
        shapes, _ = jax.tree_util.tree_flatten_with_path(param_shapes(config))
        self.wanted = {path_of(path): leaf.shape for path, leaf in shapes}
        self.tensors: dict[str, Tensor] = {}
        self.unused: dict[str, Tensor] = {}
        self.unknown: list[str] = []
        self.doubled: list[str] = []

    def has_tower(self) -> bool:
        return any(path.startswith("vision/") for path in self.tensors)

    def add_file(self, path: Path, ignore=None) -> None:
        file = safetensors.File(path)
        for name, (dtype, shape, _, _) in file.tensors.items():
            if names.COMPUTED.search(name) or (ignore and ignore.search(name)):
                continue
            known = names.read_name(name, self.config)
            if known is None:
                self.unknown.append(f"{name} ({path.name})")
                continue
            ours, (to_ours, _) = known
            tensor = Tensor(
                name=name,
                file=path.name,
                shape=_shape_after(to_ours, shape),
                dtype=dtype,
                read=lambda name=name, to_ours=to_ours: to_ours(file.read(name)),
            )
            if ours in self.tensors or ours in self.unused:
                other = self.tensors.get(ours) or self.unused[ours]
                self.doubled.append(f"{name} ({path.name}) and {other.name} ({other.file})")
            elif ours in self.wanted:
                self.tensors[ours] = tensor
            elif _is_optional(ours, self.config):
                self.unused[ours] = tensor
            else:
                self.unknown.append(f"{name} ({path.name})")

    def check(self, directory: Path) -> Source:
        missing = [path for path in self.wanted if path not in self.tensors]
        tower = [path for path in missing if path.startswith("vision/")]
        if tower and not self.has_tower():
            raise InputError(
                f"{directory}: the checkpoint has no vision tower (config.json names "
                f"{self.config.vision_tower or 'none'}); give the CLIP directory with --vision-tower"
            )
        misshapen = [
            f"{t.name} {list(t.shape)} should be {list(self.wanted[path])}"
            for path, t in self.tensors.items()
            if t.shape != self.wanted[path] or t.dtype not in FLOATS
        ]
        problems = [
            f"{what}: {', '.join(which)}"
            for what, which in [
                ("missing tensors", [names.write_name(p, self.dialect, self.config)[0] for p in missing]),
                ("unknown tensors", self.unknown),
                ("tensors twice", self.doubled),
                ("tensors of the wrong shape or type", misshapen),
            ]
            if which
        ]
        if problems:
            raise InputError(f"{directory}: {'; '.join(problems)}")
        return Source(directory, self.config, self.tensors, self.unused)


def _shape_after(to_ours, shape: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return to_ours(np.broadcast_to(np.False_, shape)).shape
    except ValueError:  # too few or too many dimensions for its layout: reported with the misshapen ones
        return shape


def _is_optional(path: str, config: LlavaConfig) -> bool:
    """Whether a tensor may be there although the model has no use for it."""
    if path.startswith("vision/layers/"):
        return config.vision.layers_used <= int(path.split("/")[2]) < config.vision.layers
    return (
        path.startswith("vision/post_norm/")
        or path == "newline"
        or (path == "decoder/head/kernel" and config.text.tied_head)
    )
