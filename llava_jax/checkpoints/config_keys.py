"""The keys of foreign configuration files: which are read, which make no difference, which must have certain values.

One table for each kind of object; what is read is the table of its types. Whatever is in none of its three lists is
named in a warning, since it may change what the model computes.
"""

from typing import Annotated, Any, TypedDict

from msgspec import Meta

from llava_jax.config import (
    Epsilon,
    FeatureLayer,
    Heads,
    Layers,
    Pixels,
    Positions,
    Positive,
    TokenId,
    Vocabulary,
    Width,
    Window,
)
from llava_jax.console import InputError, note, shorten

MOST = 10  # unknown keys that are named


# ---------------------------------------------------------------- keys that are read, and what can be under them

Ids = TokenId | Annotated[list[TokenId], Meta(max_length=100)] | None
Grid = list[Annotated[list[Pixels], Meta(min_length=2, max_length=2)]]
Colours = Annotated[list[float], Meta(min_length=3, max_length=3)]


class QuantizedWeights(TypedDict, total=False):
    num_bits: int | None


class QuantizedGroup(TypedDict, total=False):
    weights: QuantizedWeights | None


class Quantization(TypedDict, total=False):
    quant_method: str | None
    bits: int | None
    w_bit: int | None
    load_in_4bit: bool | None
    load_in_8bit: bool | None
    config_groups: dict[str, QuantizedGroup] | None


class Rope(TypedDict, total=False):
    factor: Positive | None
    high_freq_factor: Positive | None
    low_freq_factor: Positive | None
    original_max_position_embeddings: Positions | None
    rope_theta: Positive
    rope_type: str | None
    type: str | None


class Text(TypedDict, total=False):
    """A decoder: `text_config` of transformers' files, beside the original's `mm_...` in its own."""

    attention_bias: bool | None
    bos_token_id: TokenId | None
    eos_token_id: Ids
    head_dim: Width | None
    hidden_act: str
    hidden_size: Width
    intermediate_size: Width
    layer_types: list[str] | None
    max_position_embeddings: Positions
    max_window_layers: Window
    mlp_bias: bool | None
    model_type: str | None
    num_attention_heads: Heads
    num_hidden_layers: Layers
    num_key_value_heads: Heads | None
    pad_token_id: TokenId | None
    quantization_config: Quantization | None
    rms_norm_eps: Epsilon
    rope_parameters: Rope | None
    rope_scaling: Rope | None
    rope_theta: Positive
    sliding_window: Window | None
    tie_word_embeddings: Any  # `config_json._is_tied`
    use_sliding_window: bool | None
    vocab_size: Vocabulary


class Original(Text, total=False):
    _name_or_path: str | None
    architectures: list[str] | None
    conversation_template: str | None
    image_aspect_ratio: str | None
    image_grid_pinpoints: str | Grid | None
    mm_hidden_size: Any  # tells that it is the original's; the tower says what it is
    mm_patch_merge_type: str
    mm_projector_type: str
    mm_use_im_patch_token: bool | None
    mm_use_im_start_end: bool | None
    mm_vision_select_feature: str | None
    mm_vision_select_layer: FeatureLayer
    mm_vision_tower: str | None
    tokenizer_model_max_length: Annotated[int, Meta(ge=1)] | None
    tokenizer_padding_side: str


class Vision(TypedDict, total=False):
    hidden_act: str
    hidden_size: Width
    image_size: Pixels
    intermediate_size: Width
    layer_norm_eps: Epsilon
    model_type: str | None
    num_attention_heads: Heads
    num_hidden_layers: Layers
    patch_size: Pixels
    quantization_config: Quantization | None


class Tower(Vision, total=False):
    """The `config.json` beside a vision tower: of the tower alone, or of a whole CLIP."""

    vision_config: Vision | None


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
    text_config: Text | None
    tie_word_embeddings: Any
    vision_config: Vision | None
    vision_feature_layer: FeatureLayer | Annotated[list[FeatureLayer], Meta(min_length=1, max_length=100)]
    vision_feature_select_strategy: str | None


class Preprocessor(TypedDict, total=False):
    """`preprocessor_config.json`. What is `Any` here has many spellings, which `image_processor` knows."""

    crop_size: Any
    default_to_square: bool | None
    do_center_crop: bool | None
    do_normalize: bool | None
    do_pad: bool | None
    do_rescale: bool | None
    do_resize: bool | None
    feature_extractor_type: str | None
    image_grid_pinpoints: str | Grid | None
    image_mean: Colours | None
    image_processor_type: str | None
    image_std: Colours | None
    rescale_factor: float
    resample: int
    size: Any
    pad_size: Any


class Generation(TypedDict, total=False):
    """`generation_config.json`."""

    eos_token_id: Ids


READ: dict[str, frozenset[str]] = {
    "transformers": frozenset(Transformers.__annotations__),
    "text": frozenset(Text.__annotations__),
    "original": frozenset(Original.__annotations__),
    "vision": frozenset(Tower.__annotations__),
    "rope": frozenset(Rope.__annotations__),
    "preprocessor": frozenset(Preprocessor.__annotations__),
}

# ---------------------------------------------------------------- the others

# What transformers' PretrainedConfig writes, of version 4 and 5, and nothing here needs.
_GENERAL = """
    _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures auto_map bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder label2id length_penalty max_length
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores prefix problem_type remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16
    use_cache attention_dropout pretraining_tp
""".split()
NO_DIFFERENCE: dict[str, frozenset[str]] = {
    "transformers": frozenset(
        """bos_token_id eos_token_id hidden_size ignore_index image_seq_length pad_token_id use_image_newline_parameter
        vocab_size""".split()
        + _GENERAL
    ),
    "text": frozenset(_GENERAL),
    "original": frozenset(
        """freeze_mm_mlp_adapter freeze_mm_vision_resampler image_crop_resolution image_split_resolution
        mm_projector_lr mm_tunable_parts mm_vision_tower_lr pretrain_mm_mlp_adapter tune_mm_mlp_adapter
        tune_mm_vision_resampler unfreeze_language_model unfreeze_mm_vision_tower use_mm_proj use_pos_skipping
        pos_skipping_range vision_tower_pretrained mm_newline_position mm_spatial_pool_mode mm_spatial_pool_stride
        mm_spatial_pool_out_channels add_faster_video faster_token_stride force_sample add_time_instruction""".split()
        + _GENERAL
    ),
    "vision": frozenset(
        """bos_token_id dropout eos_token_id initializer_factor logit_scale_init_value pad_token_id projection_dim
        text_config text_config_dict tie_word_embeddings vision_config_dict vocab_size""".split()
        + _GENERAL
    ),
    "rope": frozenset(),
    "preprocessor": frozenset(
        """_processor_class _valid_processor_keys aspect_ratio_setting auto_map data_format device
        disable_grouping do_convert_rgb image_seq_length input_data_format num_additional_image_tokens
        patch_size processor_class return_tensors use_fast vision_feature_select_strategy""".split()
    ),
}
# Keys that are supported with these values only: with others the model would compute something else.
_CAUSAL = {"is_encoder_decoder": (None, False), "pruned_heads": (None, {}), "partial_rotary_factor": (None, 1, 1.0)}
ONLY: dict[str, dict[str, tuple]] = {
    "transformers": {"is_encoder_decoder": (None, False), "pruned_heads": (None, {})},
    "text": _CAUSAL,
    "original": _CAUSAL | {"mm_resampler_type": (None, "", "none"), "s2": (None, False)},
    "vision": {"num_channels": (None, 3), "is_encoder_decoder": (None, False), "pruned_heads": (None, {})},
    "rope": {"partial_rotary_factor": (None, 1, 1.0), "attention_factor": (None,)},
    "preprocessor": {},
}


def check_keys(kind: str, fields: dict[str, Any], *, file: str = "config.json") -> None:
    """Warn of the keys of an object that nothing is known about.

    Raises:
      InputError: a key has a value that is not supported.
    """
    for key, values in ONLY[kind].items():
        if key in fields and fields[key] not in values:
            supported = ", ".join(str(value) for value in values if value is not None) or "none"
            raise InputError(f"{file}: {key} {shorten(repr(fields[key]))} is not supported, only {supported}")
    unknown = sorted(set(fields) - READ[kind] - NO_DIFFERENCE[kind] - set(ONLY[kind]))
    if unknown:
        more = f" and {len(unknown) - MOST} more" if len(unknown) > MOST else ""
        names = ", ".join(shorten(name, 40) for name in unknown[:MOST])
        note(f"warning: {file}: keys that are not known here, and not used: {names}{more}")
