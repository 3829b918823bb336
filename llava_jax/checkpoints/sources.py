"""Open foreign checkpoints lazily: a configuration, and tensors that are read on demand.

`open_source` reads headers only, checks that every tensor of the model occurs once and has the right shape, and
returns a `Source` whose tensors have our paths, layouts and shapes. Conversion streams a `Source` to Orbax;
`Checkpoint.load` shards it over a mesh. `Found` collects the tensors of an incomplete LLaVA (a language model, an
adapter, a projector), which `convert` completes.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import TypedDict

import jax
import ml_dtypes
import numpy as np

from llava_jax.checkpoints import safetensors_files, tensor_names, torch_files
from llava_jax.checkpoints.chat_template import with_chat_template
from llava_jax.checkpoints.config_json import Generation, is_original, read_config
from llava_jax.checkpoints.config_parts import read_tower
from llava_jax.checkpoints.families import TOWERS
from llava_jax.checkpoints.image_processor import read_preprocessor
from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, note, shorten
from llava_jax.json_files import read_json
from llava_jax.models.llava import param_shapes
from llava_jax.sharding.partition import path_of

MAX_LISTED = 8  # tensors named for one kind of problem
MAX_LISTED_CHARS = 190  # of all names in an error
# Tensors that accompany quantized weights (bitsandbytes, GPTQ, AWQ, compressed-tensors, FP8, HQQ, AQLM, EETQ, quanto).
QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_format|W_q|codes|codebooks|input_scale|weight_(packed|scale|zero_point).*"
    r"|weight\.(absmax|quant_map|nested_|quant_state|_data|_scale).*)$"
)
FLOATS = {np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)}
INDEXES = (safetensors_files.INDEX, "pytorch_model.bin.index.json")
AHEAD = 2  # threads that read tensors while another is being written
AHEAD_BYTES = 256 * 2**20  # the most that they hold


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that has not been read yet, in our layout."""

    name: str  # the name in its file
    file: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint whose tensors have our paths.

    tensors  path -> tensor, exactly the parameters of the model
    unused   path -> tensor that LLaVA does not need but foreign formats expect (the tower's last layer and norm)
    files    the files and directories that it is read from
    """

    directory: Path
    config: LlavaConfig
    tensors: dict[str, Tensor]
    unused: dict[str, Tensor]
    files: frozenset[str]


def open_source(directory: Path, *, vision_tower: Path | None = None, name: str = "") -> Source:
    """Open a directory of safetensors or `.bin` files in the original's or transformers' dialect.

    Args:
      directory: contains `config.json` and the tensors' files.
      vision_tower: a CLIP directory, for original checkpoints without their tower.
      name: the checkpoint's name, if it differs from its directory's.

    Raises:
      InputError: a file is missing, broken or unsupported, or tensors are missing, duplicate, unknown or of the wrong
        shape; the error lists them.
    """
    fields = read_json(directory / "config.json")
    if fields is None:
        raise InputError(f"{directory}: not a checkpoint (it has no config.json)")
    original = is_original(fields)
    tower = find_tower(directory, fields, vision_tower) if original else vision_tower
    config = configure(fields, directory, tower, name=name or directory.resolve().name)
    found = Found(config, "original" if original else "transformers")
    found.add_directory(directory)
    if tower is not None:
        found.add_tower(tower, asked=vision_tower is not None)
    return found.check(directory)


def configure(
    fields: dict, directory: Path, tower: Path | None, *, name: str, decoder: Path | None = None
) -> LlavaConfig:
    """The configuration from the fields of a config.json and the files beside it.

    Args:
      tower: a CLIP directory; the original's tiles follow the preprocessor file in it.
      decoder: the directory of the language model, if it differs from `directory`.
    """
    original = is_original(fields)
    config = read_config(
        fields,
        vision=read_tower(tower) if tower else None,
        preprocessor=read_preprocessor(tower if original and tower else directory),
        generation=read_json((decoder or directory) / "generation_config.json", Generation),
        name=name,
        file=directory / "config.json",
    )
    # The template beside an original is its language model's: it has no images, and LLaVA was not trained with it.
    return config if original else with_chat_template(config, directory)


def find_tower(directory: Path, fields: dict, given: Path | None) -> Path | None:
    """The directory of an original's vision tower: `given`, or the one that config.json names. None: not found."""
    if given is not None:
        if not os.path.exists(given / "config.json"):
            raise InputError(f"--vision-tower {given}: not a CLIP directory (it has no config.json)")
        return given
    tower = fields.get("mm_vision_tower")
    if not isinstance(tower, str) or not tower:
        return None
    beside = directory / tower  # not beside it if the name is an absolute path
    return beside if os.path.exists(beside / "config.json") else None


# ---------------------------------------------------------------- files


AnyFile = safetensors_files.File | torch_files.File


def open_file(path: Path) -> AnyFile:
    """Open a file of tensors: `.safetensors`, or, with any other suffix, the format of `torch.save`."""
    return (safetensors_files if path.suffix == ".safetensors" else torch_files).File(path)


class Index(TypedDict):
    """`model.safetensors.index.json`: the file of each tensor."""

    weight_map: dict[str, str]


def tensor_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that hold a model's tensors, and name -> file from the index, if there is one.

    Raises:
      InputError: there are no such files, or the index names one that is missing or outside the directory.
    """
    safe = sorted(f for f in directory.glob("*.safetensors") if f.stem not in ("adapter_model", "mm_projector"))
    for index in (directory / name for name in INDEXES):
        if not index.exists() or (
            safe and index.name != safetensors_files.INDEX
        ):  # an index of files that were replaced
            continue
        file_of = read_json(index, Index)["weight_map"]
        wanted = sorted(set(file_of.values()))
        if outside := [name for name in wanted if name in ("", "..") or PurePath(name).name != name]:
            raise InputError(f"{shorten(index)}: names {shorten(outside[0])!r}, which is not a file of its directory")
        if missing := [name for name in wanted if not os.path.exists(directory / name)]:
            raise InputError(f"{shorten(directory)}: the index names missing files: {listed(missing, 100)}")
        return [directory / name for name in wanted], file_of
    files = safe or sorted(directory.glob("pytorch_model*.bin"))
    if not files:
        raise InputError(f"{directory}: contains neither *.safetensors nor pytorch_model*.bin")
    return files, {}


def has_tensors(directory: Path) -> bool:
    """Whether a directory holds files of a model's tensors."""
    try:
        return bool(tensor_files(directory))
    except InputError:
        return False


HEAD, EMBEDDING = "decoder/head/kernel", "decoder/embed/embedding"


def listed(names: Sequence[str], max_chars: int = MAX_LISTED_CHARS) -> str:
    """The first few names, in about `max_chars` characters, and the number of the others."""
    named = [shorten(name, max_chars) for name in names[:MAX_LISTED]]
    while len(named) > 1 and sum(map(len, named)) > max_chars:
        named.pop()
    more = f" and {len(names) - len(named)} more" if len(names) > len(named) else ""
    return ", ".join(named) + more


class Found:
    """The tensors found so far, by our paths, and the problems with them."""

    def __init__(self, config: LlavaConfig, dialect: str = "original"):
        self.config, self.dialect = config, dialect
        self.tensors: dict[str, Tensor] = {}
        self.unused: dict[str, Tensor] = {}
        self.unknown: list[str] = []
        self.duplicates: list[str] = []
        self.absent: list[str] = []
        self.files: set[str] = set()

    # The shapes of many layers take seconds, so they are computed only once the files are known to hold as many.

    @functools.cached_property
    def wanted(self) -> dict[str, tuple[int, ...]]:
        """Path -> shape of each required tensor."""
        shapes, _ = jax.tree_util.tree_flatten_with_path(param_shapes(self.config))
        return {path_of(path): leaf.shape for path, leaf in shapes}

    @functools.cached_property
    def optional(self) -> dict[str, tuple[int, ...]]:
        """Path -> shape of each tensor that may be present although the model does not use it."""
        return optional_shapes(self.config)

    def has_tower(self) -> bool:
        return any(path.startswith("vision/") for path in self.tensors)

    def add_directory(self, directory: Path, *, ignore=None) -> None:
        """Add the tensors of all files of a directory, except names that match `ignore`."""
        files, index = tensor_files(directory)
        promised = collections.defaultdict(list)
        for name, file_name in index.items():
            promised[file_name].append(name)
        opened = [open_file(path) for path in files]
        names_there = [name for file in opened for name in file.tensors if not (ignore and ignore.search(name))]
        self._check_layers(directory, names_there)
        for path, file in zip(files, opened, strict=True):
            self.absent += [f"{name} ({path.name})" for name in promised[path.name] if name not in file.tensors]
            for name in file.tensors:
                if not (ignore and ignore.search(name)):
                    self.add(name, file, path.name)

    def _check_layers(self, directory: Path, names_there: Sequence[str]) -> None:
        found = {"decoder": 0, "vision": 0}  # the highest layer number, from 1
        for name in names_there:
            path = (tensor_names.read_name(name, self.config) or [""])[0].split("/")
            if path[0] in found and path[1] == "layers":
                found[path[0]] = max(found[path[0]], int(path[2]) + 1)
        text, vision = self.config.text, self.config.vision
        for part, declared, needed in (
            ("decoder", text.layers, text.layers),
            ("vision", vision.layers, vision.layers_used),
        ):
            if 0 < found[part] < needed:
                what = "decoder" if part == "decoder" else "vision tower"
                raise InputError(
                    f"{shorten(directory)}: config.json says that the {what} has {declared:,} layers, but the files "
                    f"have {found[part]:,}"
                )

    def add_tower(self, directory: Path, *, asked: bool) -> None:
        """Add the vision tower of a CLIP directory, unless one was found already. `asked`: --vision-tower names it."""
        self.files.add(os.fspath(directory))  # its configuration is always read
        if not self.has_tower() and (asked or has_tensors(directory)):
            self.add_directory(directory, ignore=re.compile(TOWERS[self.config.vision.family].other_half))

    def add(self, name: str, file: AnyFile, file_name: str, *, called: str = "", replace: bool = False) -> None:
        """Add one tensor of a file, at the path of its name there or of the name `called`."""
        dtype, shape, *_ = file.tensors[name]
        self.files.add(file.path)
        if tensor_names.is_computed(name, self.config):
            return
        known = tensor_names.read_name(called or name, self.config)
        if known is None:
            self.unknown.append(f"{name} ({file_name})")
            return
        path, (to_ours, _) = known
        try:
            shape = tensor_names.shape_after(to_ours, shape)
        except ValueError:  # too few or too many dimensions for its layout: `check` reports it
            to_ours = lambda x: x  # noqa: E731
        tensor = Tensor(name, file_name, shape, dtype, lambda: contiguous(to_ours(file.read(name))))
        self.put(path, tensor, replace=replace)

    def put(self, path: str, tensor: Tensor, *, replace: bool = False) -> None:
        """Add a tensor at its path."""
        other = self.tensors.get(path) or self.unused.get(path)
        if other and not replace:
            self.duplicates.append(f"{tensor.name} ({tensor.file}) and {other.name} ({other.file})")
        elif path in self.wanted:
            self.tensors[path] = tensor
        elif path in self.optional:
            self.unused[path] = tensor
        else:
            self.unknown.append(f"{tensor.name} ({tensor.file})")

    def check(self, directory: Path) -> Source:
        """The complete checkpoint.

        Raises:
          InputError: it is not complete; the error lists all problems.
        """
        quantized = [name for name in self.unknown if QUANTIZED.search(name.split(" ")[0])]
        quantized += [f"{t.name} {t.dtype} ({t.file})" for t in self.tensors.values() if t.dtype in (np.int8, np.uint8)]
        if quantized:
            raise InputError(
                f"{shorten(directory)}: its weights are quantized ({shorten(quantized[0])}), which is not supported; "
                "use the model's unquantized weights"
            )
        self._resolve_head()
        missing = [path for path in self.wanted if path not in self.tensors]
        if any(path.startswith("vision/") for path in missing) and not self.has_tower():
            raise InputError(
                f"{shorten(directory)}: the checkpoint has no vision tower (config.json names "
                f"{shorten(self.config.vision_tower or 'none')}); pass the CLIP directory with --vision-tower"
            )
        misshapen = [
            f"{t.name} ({t.file}) {self._theirs(path, t.shape)} {t.dtype} should be "
            f"{self._theirs(path, (self.wanted | self.optional)[path])}"
            for path, t in (self.tensors | self.unused).items()
            if t.shape != (self.wanted | self.optional)[path] or t.dtype not in FLOATS
        ]
        problems = [
            (what, which)
            for what, which in [
                ("missing tensors", [tensor_names.write_name(p, self.dialect, self.config)[0] for p in missing]),
                ("tensors in the index but not in their file", self.absent),
                ("unknown tensors", self.unknown),
                ("duplicate tensors", self.duplicates),
                ("tensors of the wrong shape or type", misshapen),
            ]
            if which
        ]
        if problems:
            max_chars = (MAX_LISTED_CHARS - 20 * (len(problems) - 1)) // len(problems)
            message = "; ".join(f"{what}: {listed(which, max_chars)}" for what, which in problems)
            raise InputError(shorten(f"{shorten(directory, 60)}: {message}", 299))
        return Source(directory, self.config, self.tensors, self.unused, frozenset(self.files))

    def _resolve_head(self) -> None:
        """Use the checkpoint's own head even if the configuration ties it to the embeddings, as transformers 5 does
        (modeling_utils.py `tie_weights`), unless it equals them."""
        head, embedding = (self.unused.get(HEAD), self.tensors.get(EMBEDDING))
        if not (self.config.text.tied_head and head and embedding) or head.shape != embedding.shape[::-1]:
            return
        if np.array_equal(head.read(), embedding.read().T):
            return
        note(f"warning: config.json ties the head to the embeddings, but the checkpoint's own ({head.name}) is used")
        self.config = self.config.replace(text=dataclasses.replace(self.config.text, tied_head=False))
        self.wanted[HEAD] = self.optional.pop(HEAD)
        self.tensors[HEAD] = self.unused.pop(HEAD)

    def _theirs(self, path: str, shape: tuple[int, ...]) -> list[int]:
        """A shape as the foreign file has it."""
        _, (_, to_theirs) = tensor_names.write_name(path, self.dialect, self.config)
        try:
            return list(tensor_names.shape_after(to_theirs, shape))
        except ValueError:
            return list(shape)


def optional_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of each tensor that may be present although the model does not use it."""
    vision, text = config.vision, config.text
    whole = config.replace(vision=dataclasses.replace(vision, feature_layers=(-1,)))
    leaves, _ = jax.tree_util.tree_flatten_with_path(param_shapes(whole)["vision"]["layers"])
    shapes = {f"vision/layers/{path_of(path)}": leaf.shape for path, leaf in leaves}
    shapes = {path: shape for path, shape in shapes.items() if int(path.split("/")[2]) >= vision.layers_used}
    shapes |= TOWERS[vision.family].unused(vision)
    if not config.has_newline:
        shapes["newline"] = (text.width,)
    if text.tied_head:
        shapes[HEAD] = (text.width, text.vocab_size)
    return shapes


# ---------------------------------------------------------------- reading


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order. A transposed matrix is copied in strips, several times as fast as NumPy does it."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    out, strip = np.empty(array.shape, array.dtype), 128
    to, bits = (x.view(f"u{array.itemsize}") for x in (out, array))  # NumPy copies integers faster than bfloat16
    for i in range(0, array.shape[1], strip):
        to[:, i : i + strip] = bits[:, i : i + strip]
    return out


def read_ahead(reads: Sequence[tuple[int, Callable[[], np.ndarray]]]) -> Iterator[np.ndarray]:
    """Yield what the functions of `(bytes, function)` pairs return, in order, while threads run the next few.

    Arrays that wait take at most `AHEAD_BYTES`, or there is only one.
    """
    waiting: collections.deque = collections.deque()
    held, todo = 0, collections.deque(reads)
    with concurrent.futures.ThreadPoolExecutor(AHEAD) as pool:
        try:
            while todo or waiting:
                while todo and (not waiting or held + todo[0][0] <= AHEAD_BYTES):
                    nbytes, read = todo.popleft()
                    held += nbytes
                    waiting.append((nbytes, pool.submit(read)))
                nbytes, future = waiting.popleft()
                array = [future.result()]
                del future  # it would keep the array in memory after its use
                yield array.pop()
                held -= nbytes
        finally:
            for _, future in waiting:
                future.cancel()
