"""Checkpoints for the rest of the world: transformers' format, or the original's.

Weights are streamed tensor by tensor into safetensors shards. Around them go the files that others' loaders want:
configuration, generation configuration, tokenizer and, for transformers, processor and chat template.

What a format cannot say is an error: transformers' LLaVA has a two-layer projector, and of the ways to merge tiles
only `flat` (v1, v1.5) and `spatial_unpad` (v1.6).
"""

import collections
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from llava_jax.checkpoints import safetensors_files, tensor_names
from llava_jax.checkpoints.config_json import KNOWN_TOWERS
from llava_jax.checkpoints.outputs import new_directory
from llava_jax.checkpoints.safetensors_files import Pending
from llava_jax.checkpoints.sources import Source, Tensor, contiguous, optional_shapes, read_ahead
from llava_jax.config import LlavaConfig, RopeScaling, TextConfig, VisionConfig
from llava_jax.console import InputError, Progress
from llava_jax.data.prompts import end_ids
from llava_jax.data.templates import IMAGE_TOKEN, choose_template, get_template, is_jinja, to_jinja
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
    sources: Sequence[Path] = (),
) -> None:
    """Write a checkpoint in the format of `transformers` or of the `original`. It appears whole, or not at all.

    In transformers' format the vocabulary grows by `<image>` and `<pad>` and is padded to a multiple of 64, unless
    it has its `<image>` already. Published conversions draw the new rows at random; here each is the mean of the
    old ones, so that the same input gives the same files (and no new token is ever the likeliest).

    Args:
      shard_bytes: of a file, at most; a larger tensor has one of its own.
      overwrite, sources: as in `new_directory`.

    Raises:
      InputError: the format cannot express the model, or the destination exists or cannot be written.
    """
    config = source.config
    if form == "transformers":
        check_expressible(config)
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
        if form == "original" and config.vision_tower not in KNOWN_TOWERS:
            _write_tower(staged / "vision_tower", source)
        for name, contents in files.items():
            if isinstance(contents, bytes):
                (staged / name).write_bytes(contents)
            else:
                text = contents if isinstance(contents, str) else json.dumps(contents, indent=2, ensure_ascii=False)
                (staged / name).write_text(text + "\n")


def write_projector(
    destination: str | os.PathLike, source: Source, *, overwrite: bool = False, sources: Sequence[Path] = ()
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
        (staged / "config.json").write_text(json.dumps(_original_config(source.config), indent=2) + "\n")


# ---------------------------------------------------------------- tensors


def _named_tensors(source: Source, form: str, extra: "_Vocabulary | None") -> dict[str, Pending]:
    """Their name -> what is to be written, layers that LLaVA does not use included."""
    config = source.config
    tensors = source.tensors | _whole_tower(source)
    tensors |= {path: tensor for path, tensor in source.unused.items() if not path.startswith("vision/")}
    named = {}
    for path, tensor in tensors.items():
        name, (_, to_theirs) = tensor_names.write_name(path, form, config)
        shape = tensor_names.shape_after(to_theirs, tensor.shape)
        read = lambda tensor=tensor, to_theirs=to_theirs: contiguous(to_theirs(tensor.read()))  # noqa: E731
        if extra and path in ("decoder/embed/embedding", "decoder/head/kernel"):
            shape, read = (extra.rows, *shape[1:]), lambda read=read: extra.grow(read())
        named[name] = Pending(shape, tensor.dtype, read)
    return named


def _whole_tower(source: Source) -> dict[str, Tensor]:
    """The tower's tensors that LLaVA does not need but CLIP's own class wants: as they came, or neutral ones."""
    wanted = {p: shape for p, shape in optional_shapes(source.config).items() if p.startswith("vision/")}
    like = source.tensors["vision/pre_norm/scale"].dtype
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

        ordered = {name: t._replace(read=lambda t=t: next_array(t)) for name, t in tensors.items()}
        safetensors_files.write_shards(directory, ordered, shard_bytes)


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """How transformers' vocabulary differs from the model's: two more tokens, and rows up to a multiple of 64."""

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
        ids |= {token: tokenizer.token_id(token) for token in (IMAGE_TOKEN, PAD) if token not in ids}
        if max(ids.values()) >= rows:
            rows = math.ceil((max(ids.values()) + 1) / ROUND_VOCAB) * ROUND_VOCAB
        return cls(ids[IMAGE_TOKEN], ids[PAD], rows, tuple(new))

    def grow(self, table: np.ndarray) -> np.ndarray:
        """A table [V, D] with its mean for every row that is new."""
        if self.rows <= len(table):
            return table
        total = np.zeros(table.shape[1], np.float64)
        for i in range(0, len(table), 1024):
            total += table[i : i + 1024].astype(np.float64).sum(axis=0)
        grown = np.empty((self.rows, *table.shape[1:]), table.dtype)
        grown[: len(table)] = table
        grown[len(table) :] = (total / len(table)).astype(table.dtype)
        return grown


# ---------------------------------------------------------------- transformers' files


def check_expressible(config: LlavaConfig) -> None:
    """Raise an InputError if transformers' classes cannot hold the model."""
    anyres = config.aspect_ratio == "anyres"
    merge = "spatial_unpad" if anyres else "flat"
    text = config.text
    for bad, what in (
        (config.projector != "mlp2x_gelu", f"a {config.projector} projector (only mlp2x_gelu)"),
        (config.merge != merge, f"mm_patch_merge_type {config.merge} with image_aspect_ratio {config.aspect_ratio}"),
        (
            text.family == "llama" and text.qkv_bias != text.o_bias,
            "a LLaMA decoder with biases on some of its projections only",
        ),
    ):
        if bad:
            raise InputError(f"transformers' LLaVA has no {what}; --format original writes it")


def _transformers_files(config: LlavaConfig, tokenizer: Tokenizer, extra: _Vocabulary) -> dict[str, Any]:
    anyres = config.aspect_ratio == "anyres"
    kind = "LlavaNext" if anyres else "Llava"
    vision = config.vision
    layers = list(vision.feature_layers) if len(vision.feature_layers) > 1 else vision.feature_layers[0]
    strategy = "full" if vision.keep_class_token else "default"
    model = {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "model_type": "llava_next" if anyres else "llava",
        "ignore_index": -100,
        "image_token_index": extra.image_id,
        "image_seq_length": vision.features_per_tile,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": config.projector_bias,
        "vision_feature_layer": layers,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": config.text.tied_head,
        "image_aspect_ratio": config.aspect_ratio,  # ours, for the way back, as conversation_template is
        "text_config": _text_fields(config.text) | {"vocab_size": extra.rows, "pad_token_id": extra.pad_id},
        "vision_config": _vision_fields(vision),
    }
    if not is_jinja(choose_template(config)):
        model["conversation_template"] = choose_template(config)
    if anyres:
        model["image_grid_pinpoints"] = [list(pair) for pair in config.grid_pinpoints]
    pixels = {
        "image_processor_type": f"{kind}ImageProcessor",
        "processor_class": f"{kind}Processor",
        "do_pad": anyres or config.aspect_ratio == "pad", **_pixel_fields(vision),
    }  # fmt: skip
    if anyres:
        pixels["image_grid_pinpoints"] = model["image_grid_pinpoints"]
    processor = {
        "processor_class": f"{kind}Processor", "image_token": IMAGE_TOKEN, "patch_size": vision.patch_size,
        "vision_feature_select_strategy": strategy, "num_additional_image_tokens": 1,
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


def _generation_fields(config: LlavaConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """With every token that ends an answer here, the template's among them."""
    ends = end_ids(config, tokenizer, get_template(choose_template(config)))
    return _special_ids(config.text) | {"eos_token_id": _one_or_all(ends)}


def _special_ids(text: TextConfig) -> dict[str, Any]:
    return {"bos_token_id": text.bos_id, "eos_token_id": _one_or_all(text.eos_ids), "pad_token_id": text.pad_id}


def _one_or_all(ids: tuple[int, ...]) -> int | list[int] | None:
    return ids[0] if len(ids) == 1 else list(ids) or None


def _text_fields(text: TextConfig) -> dict[str, Any]:
    """A decoder in the words of its class in transformers (version 4's, which version 5 reads too)."""
    fields = {
        "model_type": text.family, "vocab_size": text.vocab_size, "hidden_size": text.width,
        "intermediate_size": text.ffn_width, "num_hidden_layers": text.layers, "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads, "head_dim": text.head_width, "hidden_act": text.activation,
        "max_position_embeddings": text.max_positions, "rms_norm_eps": text.norm_eps, "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tied_head, **_special_ids(text),
    }  # fmt: skip
    if text.rope_scaling:
        fields["rope_scaling"] = _scaling_fields(text.rope_scaling)
    if text.family == "llama":
        fields |= {"attention_bias": text.o_bias, "mlp_bias": text.mlp_bias}
    else:
        fields["sliding_window"] = text.sliding_window
    if text.family == "qwen2":
        fields |= {"use_sliding_window": text.sliding_window is not None, "max_window_layers": 0}
    return fields


def _scaling_fields(scaling: RopeScaling) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_type": scaling.kind, "type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        fields |= {
            "low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }  # fmt: skip
    return fields


def _vision_fields(vision: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model", "hidden_size": vision.width, "intermediate_size": vision.ffn_width,
        "num_hidden_layers": vision.layers, "num_attention_heads": vision.heads, "image_size": vision.image_size,
        "patch_size": vision.patch_size, "hidden_act": vision.activation, "layer_norm_eps": vision.norm_eps,
        "projection_dim": 768,
    }  # fmt: skip


def _pixel_fields(vision: VisionConfig) -> dict[str, Any]:
    """What an image processor does to pixels, in transformers' words."""
    side = vision.image_size
    resize = (side,) if vision.resize is None else vision.resize
    fields = {
        "do_convert_rgb": True, "do_resize": bool(resize), "do_center_crop": vision.center_crop, "do_rescale": True,
        "do_normalize": vision.normalize, "crop_size": {"height": side, "width": side}, "resample": vision.resample,
        "rescale_factor": vision.rescale_factor,
        "image_mean": list(vision.image_mean), "image_std": list(vision.image_std),
    }  # fmt: skip
    if resize:
        fields["size"] = {"shortest_edge": resize[0]} if len(resize) == 1 else {"height": resize[0], "width": resize[1]}
    return fields


# ---------------------------------------------------------------- the original's files


def _original_files(config: LlavaConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        **tokenizer.files,
        "generation_config.json": _generation_fields(config, tokenizer),
        "config.json": _original_config(config),
    }


def _original_config(config: LlavaConfig) -> dict[str, Any]:
    text, vision = config.text, config.vision
    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen"}[text.family]
    known = config.vision_tower in KNOWN_TOWERS
    fields = _text_fields(text) | {
        "architectures": [f"Llava{kind}ForCausalLM"],
        "model_type": f"llava_{kind.lower()}",
        "mm_vision_tower": config.vision_tower if known else "vision_tower",
        "mm_hidden_size": vision.width,
        "mm_vision_select_layer": vision.feature_layers[0],
        "mm_vision_select_feature": "cls_patch" if vision.keep_class_token else "patch",
        "mm_projector_type": config.projector,
        "mm_patch_merge_type": config.merge,
        "image_aspect_ratio": config.aspect_ratio,
        "mm_use_im_start_end": config.use_im_start_end,
        "mm_use_im_patch_token": config.use_im_patch,
        "unfreeze_mm_vision_tower": True,  # the tower's weights are here: take them, not the published ones
        "tokenizer_padding_side": config.padding_side,
        "use_mm_proj": True,
        "conversation_template": choose_template(config),  # ours, for the way back
    }
    if config.aspect_ratio == "anyres":
        fields["image_grid_pinpoints"] = [list(pair) for pair in config.grid_pinpoints]
    if config.max_length:
        fields["tokenizer_model_max_length"] = config.max_length
    if len(vision.feature_layers) > 1 or not config.projector_bias:
        raise InputError("the original takes features of one layer, and its projector has biases; use transformers'")
    return fields


def _write_tower(directory: epath.Path, source: Source) -> None:
    """A CLIP directory, for a tower that is not one of those that the original fetches by name."""
    directory.mkdir()
    prefix = "model.vision_tower.vision_tower."
    tensors = {
        name.removeprefix(prefix): pending
        for name, pending in _named_tensors(source, "original", None).items()
        if name.startswith(prefix)
    }
    _write_tensors(directory, tensors, SHARD_BYTES)
    vision = source.config.vision
    fields = _vision_fields(vision) | {"architectures": ["CLIPVisionModel"]}
    pixels = {
        "image_processor_type": "CLIPImageProcessor", **_pixel_fields(vision)
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
