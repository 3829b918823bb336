"""Read and write LLaVA's `config.json` in the original's dialect: `mm_...` fields beside those of the decoder.

The file only names its vision tower (llava/model/multimodal_encoder/builder.py).
"""

from typing import Annotated, Any, TypedDict

from msgspec import Meta

from llava_jax.checkpoints.config_keys import GENERAL, Grid, Keys, check_keys, refuse, refuse_quantized
from llava_jax.checkpoints.config_parts import PUBLISHED, is_tied, read_text, read_vision
from llava_jax.checkpoints.families import DECODERS, Decoder
from llava_jax.checkpoints.image_processor import read_pinpoints
from llava_jax.config import FeatureLayer, LlavaConfig
from llava_jax.console import InputError, shorten
from llava_jax.data.templates import choose_template
from llava_jax.json_files import check_json

# Model type, or class -> the decoder's family. Both include plain language models, from which a LLaVA is assembled.
MODEL_TYPES = {"llava": None} | {kind: decoder for decoder in DECODERS.values() for kind in decoder.originals}
CLASSES = {name: decoder for decoder in DECODERS.values() for name in decoder.classes}
TOWER = "vision_tower"  # beside config.json: the directory of a tower that the original cannot fetch by name


class Original(TypedDict, total=False):
    """The original's fields; the decoder's are in the same object."""

    _name_or_path: str | None
    architectures: list[str] | None
    conversation_template: str | None
    image_aspect_ratio: str | None
    image_grid_pinpoints: str | Grid | None
    mm_hidden_size: Any  # marks the original's dialect; its value comes from the tower
    mm_patch_merge_type: str
    mm_projector_type: str
    mm_use_im_patch_token: bool | None
    mm_use_im_start_end: bool | None
    mm_vision_select_feature: str | None
    mm_vision_select_layer: FeatureLayer
    mm_vision_tower: str | None
    model_type: str | None
    tokenizer_model_max_length: Annotated[int, Meta(ge=1)] | None
    tokenizer_padding_side: str


KEYS = Keys(
    frozenset(Original.__annotations__),
    ignored=frozenset(
        """freeze_mm_mlp_adapter freeze_mm_vision_resampler image_crop_resolution image_split_resolution
        mm_projector_lr mm_tunable_parts mm_vision_tower_lr pretrain_mm_mlp_adapter tune_mm_mlp_adapter
        tune_mm_vision_resampler unfreeze_language_model unfreeze_mm_vision_tower use_mm_proj use_pos_skipping
        pos_skipping_range vision_tower_pretrained mm_newline_position mm_spatial_pool_mode mm_spatial_pool_stride
        mm_spatial_pool_out_channels add_faster_video faster_token_stride force_sample add_time_instruction""".split()
        + GENERAL
    ),
    only={"mm_resampler_type": (None, "", "none"), "s2": (None, False)},
)


def read(config: dict[str, Any], vision: dict[str, Any] | None, preprocessor: dict[str, Any], file: str) -> LlavaConfig:
    """Convert a file in the original's dialect to a `LlavaConfig`.

    Args:
      vision: the vision tower's own `config.json`, if present.
      preprocessor: the image processor's settings.
      file: the file's name in errors about types.

    Raises:
      InputError: the file uses an unsupported feature, or names an unknown tower without `vision`.
    """
    check_json(config, Original, file)
    decoder = _decoder(config)
    decoder.check(config, file)
    refuse_quantized(config)
    check_keys(config, KEYS, decoder.keys)
    tower = config.get("mm_vision_tower")
    if vision is None and tower not in PUBLISHED:
        raise InputError(
            f"config.json names the vision tower {shorten(repr(tower))}, which is not in the checkpoint; pass its "
            "directory with --vision-tower"
        )
    aspect = config.get("image_aspect_ratio") or "square"
    pinpoints = config.get("image_grid_pinpoints")
    pinpoints = read_pinpoints(pinpoints) if aspect == "anyres" and pinpoints else ()
    select = config.get("mm_vision_select_feature", "patch")
    if select not in ("patch", "cls_patch"):
        raise refuse("mm_vision_select_feature", select, ("patch", "cls_patch"))
    return LlavaConfig(
        text=read_text(decoder, config, tied=is_tied(config)),
        vision=read_vision(
            PUBLISHED[str(tower)] if vision is None else vision,
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


def _decoder(config: dict[str, Any]) -> Decoder:
    """The decoder's family. Model type and class must be known, and must not contradict each other."""
    kind, classes = config.get("model_type", "llava"), config.get("architectures") or []
    if kind not in MODEL_TYPES:
        raise refuse("model_type", kind, MODEL_TYPES)
    if unknown := [name for name in classes if name not in CLASSES]:
        raise refuse("architecture", unknown[0], [name for name in CLASSES if name.startswith("Llava")])
    named = (MODEL_TYPES[kind], *(CLASSES[name] for name in classes))
    found = {family for family in named if family is not None} or {DECODERS["llama"]}
    if len(found) > 1:
        raise InputError(f"config.json: model_type {kind} and architecture {classes[0]} contradict each other")
    return found.pop()


def write(config: LlavaConfig) -> dict[str, Any]:
    """The `config.json` of a model.

    Raises:
      InputError: the original's format cannot express the model.
    """
    vision, decoder = config.vision, DECODERS[config.text.family]
    if len(vision.feature_layers) > 1 or not config.projector_bias:
        raise InputError(
            "the original's format needs features of one layer and a projector with biases; use transformers'"
        )
    fields = decoder.write_fields(config.text) | {
        "architectures": [decoder.classes[0]],
        "model_type": decoder.originals[0],
        "mm_vision_tower": config.vision_tower if config.vision_tower in PUBLISHED else TOWER,
        "mm_hidden_size": vision.width,
        "mm_vision_select_layer": vision.feature_layers[0],
        "mm_vision_select_feature": "cls_patch" if vision.keep_class_token else "patch",
        "mm_projector_type": config.projector,
        "mm_patch_merge_type": config.merge,
        "image_aspect_ratio": config.aspect_ratio,
        "mm_use_im_start_end": config.use_im_start_end,
        "mm_use_im_patch_token": config.use_im_patch,
        "unfreeze_mm_vision_tower": True,  # loads the checkpoint's tower, not the published one
        "tokenizer_padding_side": config.padding_side,
        "use_mm_proj": True,
        "conversation_template": choose_template(config),  # our own field, read back by `read_config`
    }
    if config.aspect_ratio == "anyres":
        fields["image_grid_pinpoints"] = [list(pair) for pair in config.grid_pinpoints]
    if config.max_length:
        fields["tokenizer_model_max_length"] = config.max_length
    return fields
