"""Read and write LLaVA's `config.json` in transformers' dialect: `LlavaConfig` (v1.5) and `LlavaNextConfig` (v1.6).

Hub files are sparse: a field that they omit has the default of the class that they name, here too
(`tests/checkpoints/test_config.py` compares our tables with the classes).
"""

from typing import Annotated, Any, TypedDict

from msgspec import Meta

from llava_jax.checkpoints.config_keys import (
    GENERAL,
    NEVER,
    Grid,
    Keys,
    Quantization,
    check_keys,
    refuse,
    refuse_quantized,
)
from llava_jax.checkpoints.config_parts import PUBLISHED, decoder_of, is_tied, read_text, read_vision
from llava_jax.checkpoints.families import DECODERS, TOWERS
from llava_jax.checkpoints.image_processor import pads_to_squares, read_pinpoints
from llava_jax.config import PINPOINTS, FeatureLayer, LlavaConfig, TokenId
from llava_jax.console import InputError
from llava_jax.data.templates import choose_template, is_jinja
from llava_jax.json_files import check_json

MODEL_TYPES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
TOWER = "openai/clip-vit-large-patch14-336"  # the default of a file without a vision_config


class Transformers(TypedDict, total=False):
    _name_or_path: str | None
    architectures: list[str] | None
    conversation_template: str | None
    image_aspect_ratio: str
    image_grid_pinpoints: str | Grid | None
    image_token_id: TokenId | None
    image_token_index: TokenId | None
    model_type: str | None
    multimodal_projector_bias: bool | None
    projector_hidden_act: str | None
    quantization_config: Quantization | None
    text_config: dict[str, Any] | None
    tie_word_embeddings: Any
    vision_config: dict[str, Any] | None
    vision_feature_layer: FeatureLayer | Annotated[list[FeatureLayer], Meta(min_length=1, max_length=100)]
    vision_feature_select_strategy: str | None


KEYS = Keys(
    frozenset(Transformers.__annotations__),
    ignored=frozenset(
        """bos_token_id eos_token_id hidden_size ignore_index image_seq_length pad_token_id use_image_newline_parameter
        vocab_size""".split()
        + GENERAL
    ),
    only=NEVER,
)


def read(config: dict[str, Any], preprocessor: dict[str, Any], file: str) -> LlavaConfig:
    """Convert a file in transformers' dialect to a `LlavaConfig`.

    Args:
      preprocessor: the image processor's settings.
      file: the file's name in errors about types.

    Raises:
      InputError: the file uses an unsupported feature.
    """
    check_json(config, Transformers, file)
    following = _model_type(config) == "llava_next"
    text, vision = config.get("text_config") or {}, config.get("vision_config")
    decoder = decoder_of(text.get("model_type", "llama"))
    decoder.check(text, file, "text_config")
    refuse_quantized(config)
    refuse_quantized(text, " of text_config")
    check_keys(config, KEYS)
    check_keys(text, decoder.keys)
    layers = config.get("vision_feature_layer", -2)
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise refuse("vision_feature_select_strategy", strategy, ("default", "full"))
    if (act := config.get("projector_hidden_act", "gelu")) != "gelu":
        raise refuse("projector_hidden_act", act, ("gelu",))
    pinpoints = read_pinpoints(config.get("image_grid_pinpoints") or PINPOINTS) if following else ()
    # The processor does not pad by default, but all v1.5 weights were trained with padding.
    aspect = "anyres" if following else config.get("image_aspect_ratio", "pad")
    return LlavaConfig(
        text=read_text(decoder, text, tied=is_tied(config) or is_tied(text)),
        vision=read_vision(
            PUBLISHED[TOWER] if vision is None else vision,
            preprocessor,
            aspect,
            pinpoints,
            file=file,
            key="vision_config",
            feature_layers=tuple(layers) if isinstance(layers, list) else (layers,),
            keep_class_token=strategy == "full",
        ),
        projector="mlp2x_gelu",
        projector_bias=bool(config.get("multimodal_projector_bias", True)),
        aspect_ratio=aspect,
        pads_in_transformers=following or pads_to_squares(preprocessor),
        merge="spatial_unpad" if following else "flat",
        grid_pinpoints=pinpoints,
        max_length=None,
        image_token_id=config.get("image_token_index", config.get("image_token_id", 32000)),
    )


def _model_type(config: dict[str, Any]) -> str:
    """The key of `MODEL_TYPES`. Model type and class must be known, and must not contradict each other."""
    classes = config.get("architectures") or []
    kind = config.get("model_type", next((t for t, name in MODEL_TYPES.items() if name in classes), None))
    if kind not in MODEL_TYPES:
        raise refuse("model_type", kind, MODEL_TYPES)
    if unknown := [name for name in classes if name not in MODEL_TYPES.values()]:
        raise refuse("architecture", unknown[0], MODEL_TYPES.values())
    if contrary := [name for name in classes if name != MODEL_TYPES[kind]]:
        raise InputError(f"config.json: model_type {kind} and architecture {contrary[0]} contradict each other")
    return kind


def check_expressible(config: LlavaConfig) -> None:
    """Raise an `InputError` if transformers' classes cannot express the model."""
    merge = "spatial_unpad" if config.aspect_ratio == "anyres" else "flat"
    for bad, what in (
        (config.projector != "mlp2x_gelu", f"a {config.projector} projector (only mlp2x_gelu)"),
        (config.merge != merge, f"mm_patch_merge_type {config.merge} with image_aspect_ratio {config.aspect_ratio}"),
    ):
        if bad:
            raise InputError(f"transformers' LLaVA has no {what}; --format original writes it")
    DECODERS[config.text.family].write_fields(config.text)  # raises if the decoder's class has no fields for it


def write(config: LlavaConfig, image_id: int, pad_id: int | None, vocab_size: int) -> dict[str, Any]:
    """The `config.json` of a model that `check_expressible` accepts; its vocabulary may have grown to `vocab_size`."""
    check_expressible(config)
    following = config.aspect_ratio == "anyres"
    kind, vision = "llava_next" if following else "llava", config.vision
    layers = vision.feature_layers
    fields = {
        "architectures": [MODEL_TYPES[kind]],
        "model_type": kind,
        "ignore_index": -100,
        "image_token_index": image_id,
        "image_seq_length": vision.features_per_tile,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": config.projector_bias,
        "vision_feature_layer": list(layers) if len(layers) > 1 else layers[0],
        "vision_feature_select_strategy": "full" if vision.keep_class_token else "default",
        "tie_word_embeddings": config.text.tied_head,
        "image_aspect_ratio": config.aspect_ratio,  # our own field, read back by `read`, as conversation_template is
        "text_config": DECODERS[config.text.family].write_fields(config.text)
        | {"vocab_size": vocab_size, "pad_token_id": pad_id},
        "vision_config": TOWERS[vision.family].write_fields(vision),
    }
    if not is_jinja(choose_template(config)):
        fields["conversation_template"] = choose_template(config)
    if following:
        fields["image_grid_pinpoints"] = [list(pair) for pair in config.grid_pinpoints]
    return fields
