"""Export checkpoints in transformers' format, or the original's.

Weights are streamed tensor by tensor into safetensors shards. The other files are those that foreign loaders need:
configuration, generation configuration, tokenizer and, for transformers, processor and chat template.

A model that a format cannot express raises `InputError`: transformers' LLaVA supports only a two-layer projector, and
merges tiles only as `flat` (v1, v1.5) or `spatial_unpad` (v1.6).
"""

import collections
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from llava_jax.checkpoints import original_config, safetensors_files, tensor_names, transformers_config
from llava_jax.checkpoints.config_keys import write_ids
from llava_jax.checkpoints.config_parts import PUBLISHED
from llava_jax.checkpoints.families import TOWERS
from llava_jax.checkpoints.image_processor import LLAVA, NEXT, write_pixels
from llava_jax.checkpoints.outputs import new_directory
from llava_jax.checkpoints.safetensors_files import Pending
from llava_jax.checkpoints.sources import EMBEDDING, HEAD, Source, Tensor, contiguous, optional_shapes, read_ahead
from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, Progress
from llava_jax.data.prompts import end_ids
from llava_jax.data.templates import IMAGE_TOKEN, choose_template, get_template, to_jinja
from llava_jax.data.tokenizer import Tokenizer

PAD = "<pad>"
ROUND_VOCAB = 64  # published conversions pad the vocabulary to a multiple of this
SHARD_BYTES = 5 * 10**9


def write_hf(
    destination: str | os.PathLike,
    source: Source,
    tokenizer: Tokenizer,
    *,
    form: str = "transformers",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    sources: Sequence[str | os.PathLike] = (),
) -> None:
    """Write a checkpoint in the format of `transformers` or of the `original`. It appears whole, or not at all.

    In transformers' format the vocabulary grows by `<image>` and `<pad>` and is padded to a multiple of 64, unless
    it already has an `<image>`. Published conversions draw the new rows at random; here each is the mean of the
    old ones, so that the same input gives the same files (and no new token is ever the likeliest).

    Args:
      shard_bytes: the largest size of a file; a larger tensor has a file of its own.
      overwrite, sources: as in `new_directory`.

    Raises:
      InputError: the format cannot express the model, or the destination exists or cannot be written.
    """
    config = source.config
    if form == "transformers":
        transformers_config.check_expressible(config)
        extra = _Vocabulary.plan(config, tokenizer)
        files = _transformers_files(config, tokenizer, extra)
    else:
        extra = None
        files = _original_files(config, tokenizer)
    tensors = _named_tensors(source, form, extra)
    common = collections.Counter(tensor.dtype.name for tensor in tensors.values()).most_common(1)[0][0]
    files["config.json"]["torch_dtype"] = common
    with new_directory(destination, overwrite=overwrite, sources=sources) as staged:
        _write_tensors(staged, tensors, shard_bytes)
        if form == "original" and config.vision_tower not in PUBLISHED:
            _write_tower(staged / "vision_tower", source)
        for name, contents in files.items():
            if isinstance(contents, bytes):
                (staged / name).write_bytes(contents)
            else:
                text = contents if isinstance(contents, str) else json.dumps(contents, indent=2, ensure_ascii=False)
                (staged / name).write_text(text + "\n")


def write_projector(
    destination: str | os.PathLike,
    source: Source,
    *,
    overwrite: bool = False,
    sources: Sequence[str | os.PathLike] = (),
) -> None:
    """Write `mm_projector.safetensors` (and `config.json`) as the original's first stage names them.

    Raises:
      InputError: the model has no projector, or the destination exists or cannot be written.
    """
    tensors = {
        name: pending
        for name, pending in _named_tensors(source, "original", None).items()
        if "mm_projector" in name or "image_newline" in name
    }
    if not tensors:
        raise InputError(f"{source.directory}: has no projector")
    with new_directory(destination, overwrite=overwrite, sources=sources) as staged:
        safetensors_files.write(staged / "mm_projector.safetensors", tensors)
        (staged / "config.json").write_text(json.dumps(original_config.write(source.config), indent=2) + "\n")


# ---------------------------------------------------------------- tensors


def _named_tensors(source: Source, form: str, extra: "_Vocabulary | None") -> dict[str, Pending]:
    """Foreign name -> tensor to write, including the layers that LLaVA does not use."""
    config = source.config
    tensors = source.tensors | _whole_tower(source)
    tensors |= {path: tensor for path, tensor in source.unused.items() if not path.startswith("vision/")}
    named = {}
    for path, tensor in tensors.items():
        name, (_, to_theirs) = tensor_names.write_name(path, form, config)
        shape = tensor_names.shape_after(to_theirs, tensor.shape)
        grown = extra if path in (EMBEDDING, HEAD) else None
        if grown:
            shape = (grown.rows, *shape[1:])
        named[name] = Pending(shape, tensor.dtype, functools.partial(_read, tensor, to_theirs, grown))
    return named


def _read(tensor: Tensor, to_theirs: Callable[[np.ndarray], np.ndarray], extra: "_Vocabulary | None") -> np.ndarray:
    """A tensor as it is written."""
    array = contiguous(to_theirs(tensor.read()))
    return extra.grow(array) if extra else array


def _whole_tower(source: Source) -> dict[str, Tensor]:
    """The tower's tensors that only its own class needs: as the source has them, or neutral ones."""
    wanted = {p: shape for p, shape in optional_shapes(source.config).items() if p.startswith("vision/")}
    norms = [path for path in source.tensors if path.startswith("vision/") and path.endswith("/scale")]
    like = source.tensors[norms[0]].dtype
    neutral = lambda path, shape: Tensor(  # noqa: E731
        path, "", shape, like, lambda: (np.ones if path.endswith("scale") else np.zeros)(shape, like)
    )
    return {path: source.unused.get(path) or neutral(path, shape) for path, shape in wanted.items()}


def _write_tensors(directory: epath.Path, tensors: dict[str, Pending], shard_bytes: int) -> None:
    with Progress("writing", sum(tensor.nbytes for tensor in tensors.values()), "B") as bar:
        arrays = read_ahead([(tensor.nbytes, tensor.read) for tensor in tensors.values()])

        def next_array(tensor: Pending) -> np.ndarray:
            array = next(arrays)
            bar.advance(tensor.nbytes)
            return array

        ordered = {name: t._replace(read=functools.partial(next_array, t)) for name, t in tensors.items()}
        safetensors_files.write_shards(directory, ordered, shard_bytes)


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """What transformers' vocabulary adds to the model's: two tokens, and rows up to a multiple of 64."""

    image_id: int
    pad_id: int | None
    rows: int
    new_tokens: tuple[str, ...]

    @classmethod
    def plan(cls, config: LlavaConfig, tokenizer: Tokenizer) -> "_Vocabulary":
        rows = config.text.vocab_size
        if config.image_token_id is not None:
            return cls(config.image_token_id, config.text.pad_id, rows, ())
        new = [token for token in (IMAGE_TOKEN, PAD) if tokenizer.token_id(token) is None]
        first = len(tokenizer)
        ids = {token: first + i for i, token in enumerate(new)}
        ids |= {token: i for token in (IMAGE_TOKEN, PAD) if (i := tokenizer.token_id(token)) is not None}
        if max(ids.values()) >= rows:
            rows = math.ceil((max(ids.values()) + 1) / ROUND_VOCAB) * ROUND_VOCAB
        return cls(ids[IMAGE_TOKEN], ids[PAD], rows, tuple(new))

    def grow(self, table: np.ndarray) -> np.ndarray:
        """Extend a table [V, D] to `rows`; each new row is the mean of the old ones."""
        if self.rows <= len(table):
            return table
        total = np.zeros(table.shape[1], np.float64)
        for i in range(0, len(table), 1024):
            total += table[i : i + 1024].astype(np.float64).sum(axis=0)
        grown = np.empty((self.rows, *table.shape[1:]), table.dtype)
        grown[: len(table)] = table
        grown[len(table) :] = (total / len(table)).astype(table.dtype)
        return grown


# ---------------------------------------------------------------- other files


def _transformers_files(config: LlavaConfig, tokenizer: Tokenizer, extra: _Vocabulary) -> dict[str, Any]:
    model = transformers_config.write(config, extra.image_id, extra.pad_id, extra.rows)
    following = model["model_type"] == "llava_next"
    kind = "LlavaNextProcessor" if following else "LlavaProcessor"
    pixels = {
        "image_processor_type": NEXT if following else LLAVA, "processor_class": kind,
        "do_pad": config.aspect_ratio in ("anyres", "pad"), **write_pixels(config.vision),
    }  # fmt: skip
    if following:
        pixels["image_grid_pinpoints"] = model["image_grid_pinpoints"]
    processor = {
        "processor_class": kind, "image_token": IMAGE_TOKEN, "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": model["vision_feature_select_strategy"], "num_additional_image_tokens": 1,
    }  # fmt: skip
    template = get_template(choose_template(config))
    return {
        **tokenizer.transformers_files(extra.new_tokens, pad=PAD if extra.pad_id is not None else None),
        "preprocessor_config.json": pixels,
        "processor_config.json": processor,
        "chat_template.jinja": to_jinja(template, config),
        "generation_config.json": _generation_fields(config, tokenizer) | {"pad_token_id": extra.pad_id},
        "config.json": model,
    }


def _original_files(config: LlavaConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        **tokenizer.files,
        "generation_config.json": _generation_fields(config, tokenizer),
        "config.json": original_config.write(config),
    }


def _generation_fields(config: LlavaConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The end tokens are all that end an answer in our decoding, including the template's."""
    ends = end_ids(config, tokenizer, get_template(choose_template(config)))
    return {"bos_token_id": config.text.bos_id, "eos_token_id": write_ids(ends), "pad_token_id": config.text.pad_id}


def _write_tower(directory: epath.Path, source: Source) -> None:
    """Write the directory of a vision tower that the original cannot fetch by name."""
    directory.mkdir()
    tensors = {
        name.removeprefix(tensor_names.TOWER_PREFIX): pending
        for name, pending in _named_tensors(source, "original", None).items()
        if name.startswith(tensor_names.TOWER_PREFIX)
    }
    _write_tensors(directory, tensors, SHARD_BYTES)
    vision = source.config.vision
    tower = TOWERS[vision.family]
    fields = tower.write_fields(vision) | {"architectures": [*tower.classes]}
    pixels = {"image_processor_type": tower.processor, **write_pixels(vision)}
    (directory / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
