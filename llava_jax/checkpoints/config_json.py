"""Reading `config.json`: what a checkpoint says of itself, in whatever dialect, becomes a `LlavaConfig`.

Three dialects are understood:

- ours (`"format": "llava-jax"`), written beside our Orbax checkpoints;
- Hugging Face `LlavaConfig` and `LlavaNextConfig` (a `text_config` inside). Hub files are sparse: what they
  leave out has the default of the transformers class they name, and so it has here (`tests/checkpoints/test_config.py`
  holds the tables against the classes);
- the original's (`mm_vision_tower` and friends beside the fields of the language model).

A checkpoint is believed or refused: model types and decoders that are not listed here are refused by name, and every
key is read, known to make no difference, supported with some values only, or named in a warning (`config_keys`).
`model_type` does not tell the last two dialects apart (both write `llava`), the fields do.
"""

import dataclasses
from typing import Any

from llava_jax.checkpoints.config_keys import Original, Transformers, check_keys
from llava_jax.checkpoints.image_processor import processor_class, read_pinpoints, read_pixels
from llava_jax.config import PINPOINTS, LlavaConfig, RopeScaling, TextConfig, VisionConfig
from llava_jax.console import InputError, shorten
from llava_jax.json_files import check_json

# Hugging Face: model type -> class.
MODEL_TYPES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
# The original: model type, or class, -> family of the decoder. Plain language models are parts of a LLaVA to be.
ORIGINAL_TYPES = {
    "llava": None,  # whatever the class says; LLaMA without one
    "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2",
    "llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "Yi": "llama",
}  # fmt: skip
ORIGINAL_CLASSES = {
    "LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral", "LlavaQwenForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama", "LLaMAForCausalLM": "llama", "YiForCausalLM": "llama",
    "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2",
}  # fmt: skip
# Defaults of the transformers classes (v4 and v5 agree) for fields that sparse files leave out.
_TEXT_DEFAULTS = {
    "llama": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=10000.0, sliding_window=None, bos_token_id=1,
        eos_token_id=2,
    ),
    "mistral": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-6, rope_theta=10000.0,
        sliding_window=4096, bos_token_id=1, eos_token_id=2,
    ),
    "qwen2": dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=10000.0,
        sliding_window=4096, bos_token_id=None, eos_token_id=None,
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
    file: object = "config.json",
) -> LlavaConfig:
    """A `LlavaConfig` from the contents of a `config.json` in any dialect.

    Args:
      config: the parsed `config.json`, whose types are checked here, by its dialect.
      vision: the vision tower's own `config.json`, for original checkpoints, which only name their tower; a
        `config_keys.Tower`.
      preprocessor: the image processor's settings, where there are any (`read_preprocessor`).
      generation: `generation_config.json`, where there is one, a `config_keys.Generation`; its `eos_token_id` is the
        one that counts.
      name: what to call the checkpoint (its directory or hub name); a hint for the conversation template.
      file: the path of the `config.json`, for errors.

    Raises:
      InputError: the file is no LLaVA configuration, or asks for something that does not exist here.
    """
    file, preprocessor = shorten(file), preprocessor or {}
    if config.get("format") == "llava-jax":
        return _from_ours(config, file)
    if not is_original(config):
        check_json(config, Transformers, file)
        read = _from_hugging_face(config, preprocessor)
    elif any(k in config for k in ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")):
        check_json(config, Original, file)
        read = _from_original(config, vision, preprocessor)
    else:
        raise InputError(
            f"config.json is not LLaVA's (model_type {_shown(config.get('model_type'))}): it has neither a text_config "
            "nor mm_vision_tower"
        )
    eos = (generation or {}).get("eos_token_id")
    if eos is not None:
        ids = tuple(eos) if isinstance(eos, list) else (eos,)
        read = read.replace(text=dataclasses.replace(read.text, eos_ids=ids))
    hints = (str(config.get("_name_or_path") or ""), name)
    template = config.get("conversation_template")
    read = read.replace(template=template, template_from="config.json" if template else "")
    return read.replace(name=" ".join(hint.rstrip("/").rsplit("/", 1)[-1] for hint in hints).strip())


def is_original(config: dict[str, Any]) -> bool:
    """Whether a foreign `config.json` is the original's, and not transformers'."""
    parts = [config.get(key) for key in ("text_config", "vision_config")]  # either may be left out: all defaults
    return "mm_vision_tower" in config or not any(isinstance(part, dict) for part in parts)


def _shown(value: Any) -> str:
    return shorten(repr(value))


def _refuse(field: str, value: Any, known) -> InputError:
    return InputError(f"config.json: {field} {_shown(value)} is not supported, only {', '.join(known)}")


def _contradict(kind: str, architecture: str) -> InputError:
    return InputError(f"config.json: model_type {kind} and architecture {architecture} contradict each other")


def _refuse_quantized(config: dict[str, Any], preposition: str = "") -> None:
    """Raise an InputError if weights are quantized: by which method, with how many bits."""
    settings = config.get("quantization_config")
    if not settings:
        return
    loads = {bits: settings.get(f"load_in_{bits}bit") for bits in (4, 8)}
    method = settings.get("quant_method") or ("bitsandbytes" if any(loads.values()) else "an unnamed method")
    if method == "bitsandbytes" and not any(loads.values()):
        return  # written by a loader that was not asked to quantize
    bits = settings.get("bits") or settings.get("w_bit") or next((b for b, load in loads.items() if load), None)
    for group in (settings.get("config_groups") or {}).values():  # compressed-tensors
        bits = bits or (group.get("weights") or {}).get("num_bits")
    raise InputError(
        f"config.json: quantization_config{preposition}: weights quantized by {shorten(str(method))}"
        f"{f' to {bits} bits' if bits else ''} are not supported; give the model's unquantized weights"
    )


def _from_ours(config: dict[str, Any], file: str) -> LlavaConfig:
    if check_json(config.get("version", 1), int, f"{file}: version") > 1:
        raise InputError(
            f"{file} has version {shorten(config['version'])}; this release reads version 1: upgrade llava-jax"
        )
    top = {k: v for k, v in config.items() if k not in ("format", "version")}
    text = _object(top.get("text"), f"{file}: text")
    scaling = text.get("rope_scaling") or {}
    for part, values, where in (
        (LlavaConfig, top, ""),
        (TextConfig, text, "text."),
        (VisionConfig, _object(top.get("vision"), f"{file}: vision"), "vision."),
        (RopeScaling, _object(scaling, f"{file}: text.rope_scaling"), "text.rope_scaling."),
    ):
        if unknown := sorted(values.keys() - {field.name for field in dataclasses.fields(part)}):
            raise InputError(f"{file}: unknown fields {shorten(', '.join(where + name for name in unknown))}")
    return check_json(top, LlavaConfig, file)


def _object(value: Any, where: str) -> dict[str, Any]:
    return check_json(value, dict[str, Any], where)


def _from_hugging_face(config: dict[str, Any], preprocessor: dict[str, Any]) -> LlavaConfig:
    text, vision = config.get("text_config") or {}, config.get("vision_config")
    classes = config.get("architectures") or []
    kind = config.get("model_type", next((t for t, name in MODEL_TYPES.items() if name in classes), None))
    if kind not in MODEL_TYPES:
        raise _refuse("model_type", kind, MODEL_TYPES)
    if unknown := [name for name in classes if name not in MODEL_TYPES.values()]:
        raise _refuse("architecture", unknown[0], MODEL_TYPES.values())
    if contrary := [name for name in classes if name != MODEL_TYPES[kind]]:
        raise _contradict(kind, contrary[0])
    following = kind == "llava_next"
    for part, where in ((config, ""), (text, " of text_config"), (vision or {}, " of vision_config")):
        _refuse_quantized(part, where)
    check_keys("transformers", config)
    check_keys("text", text)
    layers = config.get("vision_feature_layer", -2)
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise _refuse("vision_feature_select_strategy", strategy, ("default", "full"))
    if (act := config.get("projector_hidden_act", "gelu")) != "gelu":
        raise _refuse("projector_hidden_act", act, ("gelu",))
    pinpoints = read_pinpoints(config.get("image_grid_pinpoints") or PINPOINTS) if following else ()
    # The processor's own padding is off unless its file says otherwise; all v1.5 weights were trained with it.
    aspect = "anyres" if following else config.get("image_aspect_ratio", "pad")
    names_clip = "image_processor_type" in preprocessor and processor_class(preprocessor) == "CLIPImageProcessor"
    pads = preprocessor.get("do_pad", False) and not names_clip  # to a square, which CLIP's own never does
    return LlavaConfig(
        text=_text(text.get("model_type", "llama"), text, tied=_is_tied(config) or _is_tied(text)),
        vision=_vision(
            _CLIP_L_336 if vision is None else vision,
            preprocessor,
            aspect,
            pinpoints,
            feature_layers=tuple(layers) if isinstance(layers, list) else (layers,),
            keep_class_token=strategy == "full",
        ),
        projector="mlp2x_gelu",
        projector_bias=bool(config.get("multimodal_projector_bias", True)),
        aspect_ratio=aspect,
        pads_in_transformers=following or bool(pads),
        merge="spatial_unpad" if following else "flat",
        grid_pinpoints=pinpoints,
        max_length=None,
        image_token_id=config.get("image_token_index", config.get("image_token_id", 32000)),
    )


def _is_tied(config: dict[str, Any]) -> bool:
    """Whether the head is the embeddings, unless the checkpoint has a head of its own (`sources.Found.check`).

    transformers 5 takes either place's word for it (models/llava/configuration_llava.py).
    """
    tied = config.get("tie_word_embeddings")
    if tied not in (None, True, False):
        raise _refuse("tie_word_embeddings", tied, ("true", "false"))
    return bool(tied)


def _from_original(config: dict[str, Any], vision: dict[str, Any] | None, preprocessor: dict[str, Any]) -> LlavaConfig:
    family = _original_family(config)
    _refuse_quantized(config)
    check_keys("original", config)
    tower = config.get("mm_vision_tower")
    if vision is None:
        if tower not in KNOWN_TOWERS:
            raise InputError(
                f"config.json names the vision tower {_shown(tower)}, which is not here: "
                "give its directory with --vision-tower"
            )
        vision = KNOWN_TOWERS[tower]
    aspect = config.get("image_aspect_ratio") or "square"
    pinpoints = config.get("image_grid_pinpoints")
    pinpoints = read_pinpoints(pinpoints) if aspect == "anyres" and pinpoints else ()
    select = config.get("mm_vision_select_feature", "patch")
    if select not in ("patch", "cls_patch"):
        raise _refuse("mm_vision_select_feature", select, ("patch", "cls_patch"))
    return LlavaConfig(
        text=_text(family, config, tied=_is_tied(config)),
        vision=_vision(
            vision,
            preprocessor,
            aspect,
            pinpoints,
            feature_layers=(config.get("mm_vision_select_layer", -2),),
            keep_class_token=select == "cls_patch",
        ),
        projector=config.get("mm_projector_type", "linear"),
        aspect_ratio=aspect,
        merge=config.get("mm_patch_merge_type", "flat"),
        grid_pinpoints=pinpoints,
        use_im_start_end=bool(config.get("mm_use_im_start_end", False)),
        use_im_patch=bool(config.get("mm_use_im_patch_token", True)),
        max_length=config.get("tokenizer_model_max_length"),
        padding_side=config.get("tokenizer_padding_side", "right"),
        vision_tower=tower,
    )


def _original_family(config: dict[str, Any]) -> str:
    """The decoder's family. Model type and class must be known, and must not contradict each other."""
    kind, classes = config.get("model_type", "llava"), config.get("architectures") or []
    if kind not in ORIGINAL_TYPES:
        raise _refuse("model_type", kind, ORIGINAL_TYPES)
    if unknown := [name for name in classes if name not in ORIGINAL_CLASSES]:
        raise _refuse("architecture", unknown[0], (name for name in ORIGINAL_CLASSES if name.startswith("Llava")))
    families = {ORIGINAL_TYPES[kind], *(ORIGINAL_CLASSES[name] for name in classes)} - {None} or {"llama"}
    if len(families) > 1:
        raise _contradict(kind, classes[0])
    return families.pop()


def _text(family: str, fields: dict[str, Any], *, tied: bool) -> TextConfig:
    if family not in _TEXT_DEFAULTS:
        raise InputError(
            f"config.json: decoder {_shown(family)} is not supported, only {', '.join(_TEXT_DEFAULTS)} "
            "(Vicuna and Yi are llama)"
        )
    get = (_TEXT_DEFAULTS[family] | fields).get
    width, heads = get("hidden_size"), get("num_attention_heads")
    eos = get("eos_token_id")
    rope = get("rope_scaling") or get("rope_parameters") or {}  # of both, transformers 5 takes nothing from the latter
    check_keys("rope", rope)
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
        sliding_window=_sliding_window(family, get),
        qkv_bias=bool(get("attention_bias", False)) or family == "qwen2",
        o_bias=bool(get("attention_bias", False)),
        mlp_bias=bool(get("mlp_bias", False)),
        tied_head=tied,
        family=family,
        bos_id=get("bos_token_id"),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_id=get("pad_token_id"),
    )


def _sliding_window(family: str, get) -> int | None:
    """The window that all layers look back at, None if they see everything."""
    window, layers = get("sliding_window"), get("num_hidden_layers")
    if not window or family == "llama" or (family == "qwen2" and not get("use_sliding_window", False)):
        return None
    kinds = get("layer_types") if family == "qwen2" else None  # of transformers 5
    if kinds is None:
        first = get("max_window_layers", 28) if family == "qwen2" else 0  # layers before it see everything
        kinds = ["full_attention"] * min(first, layers) + ["sliding_attention"] * (layers - first)
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise _refuse("layer_types", unknown.pop(), ("full_attention", "sliding_attention"))
    if len(set(kinds)) > 1:
        raise InputError(
            "config.json: a sliding window in some layers only (layer_types, max_window_layers) is not supported"
        )
    return window if "sliding_attention" in kinds else None


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        if rope.get("factor") not in (None, 1):
            raise InputError(f"config.json: rope scaling by {_shown(rope['factor'])} without a rope_type that says how")
        return None
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in needed:
        raise InputError(f"config.json: rope scaling {_shown(kind)} is not supported, only linear and llama3")
    if missing := [key for key in needed[kind] if rope.get(key) is None]:
        raise InputError(f"config.json: rope scaling {kind} needs {', '.join(missing)}")
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    return RopeScaling(
        "llama3",
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        rope["original_max_position_embeddings"],
    )


def _vision(
    vision: dict[str, Any],
    preprocessor: dict[str, Any],
    aspect_ratio: str,
    pinpoints: tuple[tuple[int, int], ...],
    **more,
) -> VisionConfig:
    vision = (vision.get("vision_config") or vision) if vision.get("model_type") == "clip" else vision
    if (kind := vision.get("model_type", "clip_vision_model")) != "clip_vision_model":
        raise InputError(f"config.json: vision tower {_shown(kind)} is not supported, only CLIP (clip_vision_model)")
    check_keys("vision", vision)
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
        **read_pixels(preprocessor, get("image_size"), aspect_ratio, pinpoints),
        **more,
    )
