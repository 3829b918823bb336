"""Combine parts, adapters and deltas into complete models, lazily, one tensor at a time.

parts    a language model, a CLIP directory, a trained or new projector            for training
LoRA     a base, and a PEFT adapter with the original's non_lora_trainables        llava/model/builder.py
delta    a base, and a model's difference from it                                  llava/model/apply_delta.py
"""

import dataclasses
import functools
import math
import re
import time
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np
from msgspec import Meta

from llava_jax import sandbox
from llava_jax.checkpoints import tensor_names
from llava_jax.checkpoints.config_json import has_vision_fields, is_original
from llava_jax.checkpoints.sources import (
    EMBEDDING,
    HEAD,
    Found,
    Source,
    Tensor,
    configure,
    find_tower,
    has_tensors,
    listed,
    open_file,
    open_source,
)
from llava_jax.config import PINPOINTS, LlavaConfig, projector_depth
from llava_jax.console import InputError, first_line, shorten
from llava_jax.json_files import read_json

PEFT = re.compile(r"^base_model\.model\.")
LORA = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)"
    r"\.lora_(?:(?P<side>[AB])(?:\.\w+)?\.weight|embedding_(?P<embedding_side>[AB])(?:\.\w+)?)$"
)
PATTERN_SECONDS = 30  # for all patterns of an adapter
OTHER_STARTS = ("pissa", "olora", "loftq", "corda")  # initialisations of the factors that change the base too


def combine(
    source: Path,
    *,
    base: Path | None = None,
    delta: Path | None = None,
    vision_tower: Path | None = None,
    projector: Path | None = None,
    projector_type: str | None = None,
    aspect_ratio: str | None = None,
    seed: int = 0,
    name: str = "",
) -> tuple[Source, Path]:
    """Open the inputs of `to-orbax`.

    Returns:
      The checkpoint, and the directory of its tokenizer.

    Raises:
      InputError: the inputs do not form a complete LLaVA.
    """
    fields = read_json(source / "config.json") or {}
    fresh = projector or projector_type or aspect_ratio
    if fresh and (delta or (source / "adapter_config.json").exists()):
        raise InputError("--projector, --projector-type and --aspect-ratio cannot be used with an adapter or a delta")
    if base and delta:
        return add_delta(base, delta, vision_tower), delta
    if (source / "adapter_config.json").exists():
        if base is None:
            raise InputError(f"{source}: is a LoRA adapter; pass the model that it was trained on with --base")
        return merge_lora(base, source, vision_tower), _with_tokenizer(source, base)
    if base and has_tensors(source):
        raise InputError(f"{source}: is a complete model, which needs no --base; pass a delta with --delta")
    trained = [source / f"mm_projector{suffix}" for suffix in (".safetensors", ".bin")]
    if base and (found := [file for file in trained if file.exists()]):  # an output of the original's first stage
        return from_parts(base, vision_tower, projector or found[0], fields=fields), base
    if base:
        raise InputError(f"{source}: contains neither an adapter nor a projector for --base {base}")
    if fields and is_original(fields) and not has_vision_fields(fields):  # a plain language model
        options = _mm_fields(vision_tower, projector, projector_type, aspect_ratio)
        return from_parts(source, vision_tower, projector, fields=options, seed=seed), source
    if projector_type or aspect_ratio:
        raise InputError(
            f"{source}: is a complete LLaVA; --projector-type and --aspect-ratio are for plain language models"
        )
    opened = open_source(source, vision_tower=vision_tower, name=name)
    return (_with_projector(opened, projector) if projector else opened), source


def _with_tokenizer(*directories: Path) -> Path:
    files = ("tokenizer.model", "tokenizer.json")
    return next((d for d in directories if any((d / file).exists() for file in files)), directories[-1])


# ---------------------------------------------------------------- parts


def _mm_fields(tower: Path | None, projector: Path | None, projector_type: str | None, aspect: str | None) -> dict:
    """The fields of the original's config.json that add vision to a plain language model."""
    aspect = aspect or "pad"
    anyres = aspect == "anyres"
    return {
        "mm_vision_tower": str(tower) if tower else None,
        "mm_projector_type": projector_type or (_read_type(projector) if projector else "mlp2x_gelu"),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": aspect,
        "mm_patch_merge_type": "spatial_unpad" if anyres else "flat",
        "image_grid_pinpoints": list(PINPOINTS) if anyres else None,
    }


def _read_type(projector: Path) -> str:
    """The type of a trained projector, from its tensors' names."""
    inner = [name.rsplit("mm_projector.", 1)[-1] for name in open_file(projector).tensors]
    layers = sum(name.endswith("weight") for name in inner if name[:1].isdigit())
    return f"mlp{layers}x_gelu" if layers else "linear"


def from_parts(
    language_model: Path, tower: Path | None, projector: Path | None, *, fields: dict, seed: int = 0
) -> Source:
    """A LLaVA from a language model, a CLIP directory and a projector.

    Args:
      projector: `mm_projector.bin` or `.safetensors` as the original's first stage writes it; None for a new one.
      fields: `mm_...` fields as in the original's config.json.
      seed: of a new projector, which equals torch's after `torch.manual_seed(seed)`.
    """
    if tower is None:
        raise InputError(
            f"{language_model}: is a language model without a vision tower; pass a CLIP directory with --vision-tower"
        )
    fields = (read_json(language_model / "config.json") or {}) | fields
    config = configure(fields, language_model, tower, name=language_model.name)
    found = Found(config)
    found.add_directory(language_model)
    found.add_tower(tower, asked=True)
    like = next(iter(found.tensors.values()), None)
    fresh = fresh_tensors(config, seed, like.dtype if like else np.dtype(np.float32))
    if projector:
        _add_projector(found, projector)
    for path, tensor in fresh.items():
        if path not in found.tensors and (path == "newline" or not projector):
            found.put(path, tensor)
    return found.check(language_model)


def _with_projector(source: Source, projector: Path) -> Source:
    found = Found(source.config)
    found.files |= source.files
    for path, tensor in {**source.tensors, **source.unused}.items():
        found.put(path, tensor)
    _add_projector(found, projector)
    return found.check(source.directory)


def _add_projector(found: Found, path: Path) -> None:
    file = open_file(path)
    for name in file.tensors:
        inner = name.rpartition("mm_projector.")[2]
        if "embed_tokens" in name:
            raise InputError(
                f"{path}: holds {name} for the tokens <im_start> and <im_end>, which a plain language model lacks; "
                "convert the complete checkpoint that was trained with it"
            )
        bare = inner in ("weight", "bias") or inner[:1].isdigit()
        found.add(name, file, path.name, called=f"model.mm_projector.{inner}" if bare else name, replace=True)


def fresh_tensors(config: LlavaConfig, seed: int, dtype: np.dtype) -> dict[str, Tensor]:
    """A projector that equals torch's initial one bit for bit (uniform within 1 / sqrt(inputs)), and a newline."""
    random = np.random.RandomState(seed & 0xFFFFFFFF)  # torch's CPU generator is the same, seeded the same way

    def uniform(shape: tuple[int, ...], bound: float) -> np.ndarray:
        bits = random.randint(0, 2**32, math.prod(shape), dtype=np.uint32) & np.uint32(2**24 - 1)
        low, high = np.float32(-bound), np.float32(bound)
        return ((bits * np.float32(2**-24)) * (high - low) + low).reshape(shape)

    made = {}
    inputs, width = config.projector_in, config.text.width
    for i in range(projector_depth(config.projector)):
        made[f"projector/linear_{i}/kernel"] = uniform((width, inputs), 1 / math.sqrt(inputs)).T
        made[f"projector/linear_{i}/bias"] = uniform((width,), 1 / math.sqrt(inputs))
        inputs = width
    if config.has_newline:
        made["newline"] = random.standard_normal(width).astype(np.float32) / np.float32(math.sqrt(width))

    def fresh(path: str, x: np.ndarray) -> Tensor:
        return Tensor(path, f"seed {seed}", x.shape, dtype, lambda: np.ascontiguousarray(x.astype(dtype)))

    return {path: fresh(path, x) for path, x in made.items()}


# ---------------------------------------------------------------- LoRA


Rank = Annotated[int, Meta(ge=1, le=2**16)]
Alpha = Annotated[float, Meta(ge=-1e6, le=1e6)]


class Adapter(TypedDict, total=False):
    """The fields that are read of PEFT's `adapter_config.json`."""

    alpha_pattern: dict[str, Alpha] | None
    init_lora_weights: bool | str | None
    lora_alpha: Alpha
    peft_type: str | None
    r: Rank
    rank_pattern: dict[str, Rank] | None
    use_dora: bool | None
    use_rslora: bool | None


@dataclasses.dataclass
class _Pair:
    """The two factors of a module's weight difference: A [r, in], B [out, r]; for an embedding A [r, V], B [D, r]."""

    module: str
    scale: float = 0.0
    A: Tensor | None = None
    B: Tensor | None = None


def merge_lora(base: Path, adapter: Path, vision_tower: Path | None) -> Source:
    """Merge a PEFT adapter into its base: W + scale * B A, in float32.

    Args:
      base: the language model that the adapter was trained on, or a complete LLaVA.
      adapter: a directory with `adapter_config.json`, `adapter_model.safetensors` or `.bin`, and, if the original
        trained it, `config.json` and `non_lora_trainables.bin`.
    """
    settings = read_json(adapter / "adapter_config.json", Adapter) or {}
    if settings.get("peft_type", "LORA") != "LORA" or settings.get("use_dora"):
        kind = shorten(settings.get("peft_type"))
        raise InputError(f"{shorten(adapter)}: only plain LoRA adapters can be merged, not {kind} or DoRA")
    if str(settings.get("init_lora_weights", "")).startswith(OTHER_STARTS):
        raise InputError(
            f"{shorten(adapter)}: init_lora_weights {shorten(settings['init_lora_weights'], 40)} changed the base too; "
            "merge it with PEFT, or save it with PEFT as a plain LoRA"
        )
    fields = read_json(adapter / "config.json")
    directory = base if fields is None else adapter
    if fields:
        fields.pop("quantization_config", None)  # describes the base that QLoRA trained on, not `base`
    fields = fields or read_json(base / "config.json") or {}
    original = is_original(fields)
    tower = find_tower(directory, fields, vision_tower) if original else vision_tower
    config = configure(fields, directory, tower, name=adapter.name, decoder=base)
    found = Found(config, "original" if original else "transformers")
    found.add_directory(base)
    if tower is not None:
        found.add_tower(tower, asked=vision_tower is not None)
    weights = [adapter / f"adapter_model{suffix}" for suffix in (".safetensors", ".bin")]
    if not any(file.exists() for file in weights):
        raise InputError(
            f"{adapter}: has adapter_config.json, but neither adapter_model.safetensors nor adapter_model.bin"
        )
    for path in (adapter / "non_lora_trainables.bin", adapter / "non_lora_trainables.safetensors"):
        if path.exists():
            file = open_file(path)
            for name in file.tensors:
                found.add(name, file, path.name, called=PEFT.sub("", name), replace=True)
    path = next(file for file in weights if file.exists())
    for ours, pair in _read_pairs(path, settings, config, found).items():
        found.put(ours, _merged(found.tensors.get(ours) or found.unused[ours], pair), replace=True)
    return found.check(adapter)


def _read_pairs(path: Path, settings: dict, config: LlavaConfig, found: Found) -> dict[str, _Pair]:
    """Path of each trained kernel -> its factors. Complete tensors in the adapter replace the base's."""
    file = open_file(path)
    pairs: dict[str, _Pair] = {}
    problems = []
    for name, (dtype, shape, *_) in file.tensors.items():
        match = LORA.match(name)
        if not match:
            if "lora_" in name:
                problems.append(f"{name}: does not belong to a plain LoRA")
            else:  # `modules_to_save`, biases
                called = PEFT.sub("", name).replace(".base_layer.", ".")
                found.add(name, file, path.name, called=called, replace=True)
            continue
        module = match["module"]
        known = tensor_names.read_name(f"{module}.weight", config)
        if known is None or not (known[0] in found.tensors or known[0] in found.unused):
            problems.append(f"{name}: the base has no such module")
            continue
        pair = pairs.setdefault(known[0], _Pair(module))
        tensor = Tensor(name, path.name, shape, dtype, functools.partial(file.read, name))
        setattr(pair, match["side"] or match["embedding_side"], tensor)
    modules = [pair.module for pair in pairs.values()]
    config_file = path.with_name("adapter_config.json")
    ranks = _by_module(settings, "r", "rank_pattern", modules, config_file)
    alphas = _by_module(settings, "lora_alpha", "alpha_pattern", modules, config_file)
    for (ours, pair), rank, alpha in zip(pairs.items(), ranks, alphas, strict=True):
        kernel = found.tensors.get(ours) or found.unused[ours]
        pair.scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        is_embedding = ours.endswith("embedding")
        wide, narrow = kernel.shape if is_embedding else kernel.shape[:2]
        if pair.A is None or pair.B is None:
            problems.append(f"{pair.module}: one of its two factors is missing")
        elif pair.A.shape != (rank, wide) or pair.B.shape != (narrow, rank):
            problems.append(
                f"{pair.module}: factors of shapes {list(pair.A.shape)} and {list(pair.B.shape)} "
                f"should be {[rank, wide]} and {[narrow, rank]}"
            )
    if problems:
        raise InputError(f"{shorten(path)}: {listed(problems)}")
    return pairs


def _by_module(settings: dict, key: str, pattern_key: str, modules: list[str], file: Path) -> list[float]:
    """PEFT's `r` or `lora_alpha` of each module: that of the first matching pattern in `rank_pattern` or
    `alpha_pattern`, a regular expression for the end of a module's name; else the adapter's own.

    The patterns are untrusted, and run within limits.
    """
    patterns = settings.get(pattern_key) or {}
    values, start = dict.fromkeys(modules, settings.get(key, 8)), time.monotonic()
    left = list(modules)
    for pattern, value in patterns.items():
        try:
            matched = sandbox.run("match", pattern, left)
            if time.monotonic() - start > PATTERN_SECONDS:
                raise sandbox.LimitError(f"and those before it take more than {PATTERN_SECONDS} s")
        except (ValueError, sandbox.LimitError) as error:
            raise InputError(f"{file}: the {pattern_key} {shorten(pattern)}: {first_line(error)}") from None
        values |= {module: value for module, yes in zip(left, matched, strict=True) if yes}
        left = [module for module, yes in zip(left, matched, strict=True) if not yes]
    return [values[module] for module in modules]


def _merged(kernel: Tensor, pair: _Pair) -> Tensor:
    def read() -> np.ndarray:
        assert pair.A and pair.B
        A, B = (factor.read().astype(np.float32) for factor in (pair.A, pair.B))
        merged = A.T @ B.T
        merged *= np.float32(pair.scale)
        merged += kernel.read()
        return merged.astype(kernel.dtype, copy=False)

    return dataclasses.replace(kernel, read=read)


# ---------------------------------------------------------------- deltas


def add_delta(base: Path, delta: Path, vision_tower: Path | None) -> Source:
    """A model that was published as its difference from a base (v0 and v1.1): their sum, in float32.

    If the delta has more rows (new tokens), the base is added to its first ones; tensors that the base lacks (the
    projector) are the delta's.
    """
    fields = read_json(delta / "config.json")
    if fields is None:
        raise InputError(f"{delta}: not a delta (it has no config.json)")
    tower = find_tower(delta, fields, vision_tower)
    config = configure(fields, delta, tower, name=delta.name)
    found, below = Found(config), Found(config)
    found.add_directory(delta)
    below.add_directory(base)
    found.files |= below.files
    if below.unknown:
        raise InputError(f"{base}: unknown tensors: {', '.join(below.unknown)}")
    if missing := [
        tensor.name
        for path, tensor in found.tensors.items()
        if path.startswith("decoder/") and path not in below.tensors
    ]:
        raise InputError(f"{base}: the base lacks tensors of the delta: {', '.join(missing)}")
    for path, tensor in below.tensors.items():
        if path not in found.tensors:
            raise InputError(f"{delta}: the delta lacks {tensor.name}, which the base has")
        found.put(path, _sum(found.tensors[path], tensor, path, base), replace=True)
    if tower is not None:
        found.add_tower(tower, asked=vision_tower is not None)
    return found.check(delta)


def _sum(delta: Tensor, base: Tensor, path: str, directory: Path) -> Tensor:
    grows = path in (EMBEDDING, HEAD)
    fits = base.shape == delta.shape or (grows and all(b <= d for b, d in zip(base.shape, delta.shape, strict=True)))
    if not fits:
        raise InputError(f"{directory}: {base.name} {list(base.shape)} does not fit the delta's {list(delta.shape)}")

    def read() -> np.ndarray:
        total = delta.read().astype(np.float32)
        total[tuple(slice(n) for n in base.shape)] += base.read()
        return total.astype(delta.dtype)

    return dataclasses.replace(delta, read=read)
