"""Reading `config.json`: what a checkpoint says of itself, in whatever dialect, becomes a `LlavaConfig`.

Three dialects are understood:

- ours (`"format": "llava-jax"`), written beside our Orbax checkpoints;
- Hugging Face `LlavaConfig` and `LlavaNextConfig` (a `text_config` inside). Hub files are sparse: what they
  leave out has the default of the transformers class they name, and so it has here (`tests/test_config.py`
  holds the tables against the classes);
- the original's (`mm_vision_tower` and friends beside the fields of the language model).

`model_type` does not tell the last two apart (both write `llava`), the fields do.
"""

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

from llava_jax.config import CLIP_MEAN, CLIP_STD, PINPOINTS, LlavaConfig, RopeScaling, TextConfig, VisionConfig
from llava_jax.console import InputError

# Defaults of the transformers classes (v4 and v5 agree) for fields that sparse files leave out.
_TEXT_DEFAULTS = {
    "llama": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=10000.0, sliding_window=None,
    ),
    "mistral": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-6, rope_theta=10000.0,
        sliding_window=4096,
    ),
    "qwen2": dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=10000.0,
        sliding_window=None,
    ),
}  # fmt: skip
_CLIP_L_336 = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
    image_size=336,
)  # fmt: skip
_CLIP_DEFAULTS = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32,
    image_size=224, hidden_act="quick_gelu", layer_norm_eps=1e-5,
)  # fmt: skip
# Vision towers that configs name: what their own config.json says.
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": _CLIP_L_336,
    "openai/clip-vit-large-patch14": _CLIP_L_336 | dict(image_size=224),
    "openai/clip-vit-base-patch16": dict(patch_size=16),
    "openai/clip-vit-base-patch32": dict(),
}


def read_config(
    config: dict[str, Any],
    *,
    vision: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    name: str = "",
) -> LlavaConfig:
    """A `LlavaConfig` from the contents of a `config.json` in any dialect.

    Args:
      config: the parsed `config.json`.
      vision: the vision tower's own `config.json`, for original checkpoints, which only name their tower.
      preprocessor: `preprocessor_config.json`, where there is one.
      generation: `generation_config.json`, where there is one; its `eos_token_id` is the one that counts.
      name: what to call the checkpoint (its directory or hub name); a hint for the conversation template.

    Raises:
      InputError: the file is no LLaVA configuration, or asks for something that does not exist here.
    """
    try:
        return _read_config(config, vision, preprocessor or {}, generation or {}, name)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"config.json: a field is not what it should be ({what})") from None


def _read_config(config, vision, preprocessor, generation, name) -> LlavaConfig:
    if config.get("format") == "llava-jax":
        return _from_ours(config)
    if isinstance(config.get("text_config"), dict):
        read = _from_hugging_face(config, preprocessor)
    elif any(k in config for k in ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")):
        read = _from_original(config, vision, preprocessor)
    else:
        raise InputError(
            f"config.json is not LLaVA's (model_type {config.get('model_type')!r}): it has neither a text_config "
            "nor mm_vision_tower"
        )
    eos = generation.get("eos_token_id")
    if eos is not None:
        ids = tuple(eos) if isinstance(eos, list) else (eos,)
        read = read.replace(text=dataclasses.replace(read.text, eos_ids=ids))
    hints = (str(config.get("_name_or_path") or ""), name)
    read = read.replace(template=config.get("conversation_template"))
    return read.replace(name=" ".join(hint.rstrip("/").rsplit("/", 1)[-1] for hint in hints).strip())


def _from_ours(config: dict[str, Any]) -> LlavaConfig:
    if config.get("version", 0) > 1:
        raise InputError(
            f"config.json has version {config['version']}; this release reads version 1: upgrade llava-jax"
        )

    def build(cls, values):
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := set(values) - known:
            raise InputError(f"config.json: unknown fields {', '.join(sorted(unknown))}")
        return cls(**{k: _tuples(v) for k, v in values.items()})

    top = {k: v for k, v in config.items() if k not in ("format", "version")}
    text = dict(top["text"])
    if text.get("rope_scaling"):
        text["rope_scaling"] = build(RopeScaling, text["rope_scaling"])
    return build(LlavaConfig, top | {"text": build(TextConfig, text), "vision": build(VisionConfig, top["vision"])})


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _from_hugging_face(config: dict[str, Any], preprocessor: dict[str, Any]) -> LlavaConfig:
    text, vision = config["text_config"], config.get("vision_config")
    following = config.get("model_type") == "llava_next"
    layers = config.get("vision_feature_layer", -2)
    strategy = config.get("vision_feature_select_strategy", "default")
    vision = _vision(
        _CLIP_L_336 if vision is None else vision,
        preprocessor,
        feature_layers=tuple(layers) if isinstance(layers, list) else (layers,),
        keep_class_token=strategy == "full",
    )
    if (act := config.get("projector_hidden_act", "gelu")) != "gelu":
        raise InputError(f"config.json: projector_hidden_act {act!r} is not supported, only gelu")
    return LlavaConfig(
        text=_text(text.get("model_type", "llama"), text, {"tie_word_embeddings": _tied(config, text)}),
        vision=vision,
        projector="mlp2x_gelu",
        projector_bias=config.get("multimodal_projector_bias", True),
        # The processor's own padding is off unless its file says otherwise; all v1.5 weights were trained with it.
        aspect_ratio="anyres" if following else config.get("image_aspect_ratio", "pad"),
        pads_in_transformers=following or bool(preprocessor.get("do_pad", False)),
        merge="spatial_unpad" if following else "flat",
        grid_pinpoints=_pinpoints(config.get("image_grid_pinpoints") or PINPOINTS) if following else (),
        max_length=None,
        image_token_id=config.get("image_token_index", config.get("image_token_id", 32000)),
    )


def _tied(config: dict[str, Any], text: dict[str, Any]) -> bool:
    """Hugging Face models tie what the outer configuration says; old files say it inside only."""
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


def _from_original(config: dict[str, Any], vision: dict[str, Any] | None, preprocessor: dict[str, Any]) -> LlavaConfig:
    kind = " ".join([config.get("model_type", ""), *(config.get("architectures") or [])]).lower()
    if "mpt" in kind:
        raise InputError("config.json: MPT decoders are not supported, only LLaMA, Mistral, Yi and Qwen2")
    decoder = config.get("model_type", "llama").lower()
    if "llava" not in decoder and decoder not in ("llama", "mistral", "qwen2", "yi"):
        raise InputError(f"config.json: decoder {decoder!r} is not supported, only LLaMA, Mistral, Yi and Qwen2")
    family = "mistral" if "mistral" in kind else "qwen2" if "qwen" in kind else "llama"
    tower = config.get("mm_vision_tower")
    if vision is None:
        if tower not in KNOWN_TOWERS:
            raise InputError(
                f"config.json names the vision tower {tower!r}, which is not here: "
                "give its directory with --vision-tower"
            )
        vision = KNOWN_TOWERS[tower]
    aspect = config.get("image_aspect_ratio") or "square"
    pinpoints = config.get("image_grid_pinpoints")
    return LlavaConfig(
        text=_text(family, config, {}),
        vision=_vision(
            vision,
            preprocessor,
            feature_layers=(config.get("mm_vision_select_layer", -2),),
            keep_class_token=config.get("mm_vision_select_feature", "patch") == "cls_patch",
        ),
        projector=config.get("mm_projector_type", "linear"),
        aspect_ratio=aspect,
        merge=config.get("mm_patch_merge_type", "flat"),
        grid_pinpoints=_pinpoints(pinpoints) if aspect == "anyres" and pinpoints else (),
        use_im_start_end=config.get("mm_use_im_start_end", False),
        use_im_patch=config.get("mm_use_im_patch_token", True),
        max_length=config.get("tokenizer_model_max_length"),
        padding_side=config.get("tokenizer_padding_side", "right"),
        vision_tower=tower,
    )


def _pinpoints(value) -> tuple[tuple[int, int], ...]:
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise InputError(f"config.json: image_grid_pinpoints {value!r} is not a list of sizes") from None
    return tuple((int(a), int(b)) for a, b in value)


def _text(family: str, fields: dict[str, Any], more: dict[str, Any]) -> TextConfig:
    if family not in _TEXT_DEFAULTS:
        raise InputError(
            f"config.json: decoder {family!r} is not supported, only {', '.join(_TEXT_DEFAULTS)} "
            "(Vicuna and Yi are llama)"
        )
    get = (_TEXT_DEFAULTS[family] | fields | more).get
    width, heads = get("hidden_size"), get("num_attention_heads")
    window = get("sliding_window")
    if family == "llama" or (family == "qwen2" and not get("use_sliding_window", False)):
        window = None
    if window and family == "qwen2" and (first := get("max_window_layers", 28)) > 0:
        if first < get("num_hidden_layers"):
            raise InputError("config.json: a sliding window in some layers only (max_window_layers) is not supported")
        window = None
    eos = get("eos_token_id", 2)
    rope = dict(get("rope_parameters") or get("rope_scaling") or {})
    return TextConfig(
        vocab_size=get("vocab_size"),
        width=width,
        ffn_width=get("intermediate_size"),
        layers=get("num_hidden_layers"),
        heads=heads,
        kv_heads=get("num_key_value_heads") or heads,
        head_width=get("head_dim") or width // heads,
        norm_eps=get("rms_norm_eps"),
        activation=get("hidden_act", "silu"),
        rope_theta=float(rope.get("rope_theta", get("rope_theta"))),
        rope_scaling=_rope_scaling(rope),
        max_positions=get("max_position_embeddings"),
        sliding_window=window,
        qkv_bias=get("attention_bias", False) or family == "qwen2",
        o_bias=get("attention_bias", False),
        mlp_bias=get("mlp_bias", False),
        tied_head=bool(get("tie_word_embeddings", False)),
        family=family,
        bos_id=get("bos_token_id", 1),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_id=get("pad_token_id"),
    )


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise InputError(f"config.json: rope scaling {kind!r} is not supported, only linear and llama3")


def _vision(vision: dict[str, Any], preprocessor: dict[str, Any], **more) -> VisionConfig:
    vision = vision.get("vision_config", vision) if vision.get("model_type") == "clip" else vision
    if (kind := vision.get("model_type", "clip_vision_model")) != "clip_vision_model":
        raise InputError(f"config.json: vision tower {kind!r} is not supported, only CLIP (clip_vision_model)")
    get = (_CLIP_DEFAULTS | vision).get
    return VisionConfig(
        image_size=get("image_size"),
        patch_size=get("patch_size"),
        width=get("hidden_size"),
        ffn_width=get("intermediate_size"),
        layers=get("num_hidden_layers"),
        heads=get("num_attention_heads"),
        norm_eps=get("layer_norm_eps"),
        activation=get("hidden_act"),
        image_mean=tuple(preprocessor.get("image_mean") or CLIP_MEAN),
        image_std=tuple(preprocessor.get("image_std") or CLIP_STD),
        **more,
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """The contents of a JSON file, None where there is no such file.

    Raises:
      InputError: the file is no JSON object.
    """
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: no JSON object")
    return value
