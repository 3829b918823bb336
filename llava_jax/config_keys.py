"""The keys of foreign configuration files: which are read, which make no difference, which must have certain values.

One table for each kind of object. Whatever is in none of its three lists is named in a warning, since it may change
what the model computes.
"""

from typing import Any

from llava_jax.console import InputError, note, shorten

MOST = 10  # unknown keys that are named

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
_TEXT = """
    attention_bias bos_token_id eos_token_id head_dim hidden_act hidden_size intermediate_size layer_types
    max_position_embeddings max_window_layers mlp_bias model_type num_attention_heads num_hidden_layers
    num_key_value_heads pad_token_id quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta
    sliding_window tie_word_embeddings use_sliding_window vocab_size
""".split()

READ: dict[str, frozenset[str]] = {
    "transformers": frozenset(
        """_name_or_path architectures conversation_template image_aspect_ratio image_grid_pinpoints image_token_id
        image_token_index model_type multimodal_projector_bias projector_hidden_act quantization_config text_config
        tie_word_embeddings vision_config vision_feature_layer vision_feature_select_strategy""".split()
    ),
    "text": frozenset(_TEXT),
    "original": frozenset(
        """_name_or_path architectures conversation_template image_aspect_ratio image_grid_pinpoints
        mm_hidden_size mm_patch_merge_type mm_projector_type mm_use_im_patch_token mm_use_im_start_end
        mm_vision_select_feature mm_vision_select_layer mm_vision_tower tokenizer_model_max_length
        tokenizer_padding_side""".split()
        + _TEXT
    ),
    "vision": frozenset(
        """hidden_act hidden_size image_size intermediate_size layer_norm_eps model_type num_attention_heads
        num_hidden_layers patch_size quantization_config vision_config""".split()
    ),
    "rope": frozenset(
        """factor high_freq_factor low_freq_factor original_max_position_embeddings rope_theta rope_type
        type""".split()
    ),
    "preprocessor": frozenset(
        """crop_size default_to_square do_center_crop do_normalize do_pad do_rescale do_resize
        feature_extractor_type image_grid_pinpoints image_mean image_processor_type image_std
        rescale_factor resample size pad_size""".split()
    ),
}
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
