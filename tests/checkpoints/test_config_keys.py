"""Every key of a `config.json` is used, known to make no difference, or named."""

from pathlib import Path

import pytest

from helpers import HUB_CONFIG, ORIGINAL_CONFIG
from llava_jax.checkpoints import (
    config_json,
    config_keys,
    config_parts,
    image_processor,
    original_config,
    transformers_config,
)
from llava_jax.checkpoints.config_json import read_config
from llava_jax.checkpoints.config_keys import Keys
from llava_jax.checkpoints.families import DECODERS, TOWERS, rope
from llava_jax.console import InputError

# As published, but for sizes: keys of the reference's releases, of LLaVA-NeXT's, and of conversions by transformers 4.
PUBLISHED = {
    "liuhaotian/llava-v1.5": {
        **ORIGINAL_CONFIG, "_name_or_path": "llava-v1.5-13b", "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1, "eos_token_id": 2, "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False,
        "initializer_range": 0.02, "max_length": 4096, "mm_hidden_size": 1024, "mm_resampler_type": None,
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
        "model_type": "llava", "num_key_value_heads": 40, "pad_token_id": 0, "pretraining_tp": 1, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False, "unfreeze_mm_vision_tower": False,
        "use_cache": True, "use_mm_proj": True,
    },
    "liuhaotian/llava-v1.6": {
        **ORIGINAL_CONFIG, "architectures": ["LlavaMistralForCausalLM"], "attention_dropout": 0.0,
        "image_crop_resolution": 224, "image_split_resolution": 224, "mm_projector_lr": None,
        "mm_vision_tower_lr": 2e-06,
        "model_type": "llava_mistral", "sliding_window": None, "tokenizer_model_max_length": 4096,
        "tokenizer_padding_side": "right", "unfreeze_mm_vision_tower": True, "rope_theta": 1e6,
    },
    "lmms-lab/llava-next": {
        **ORIGINAL_CONFIG, "architectures": ["LlavaQwenForCausalLM"], "max_window_layers": 21,
        "mm_resampler_type": None,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model", "model_type": "llava_qwen",
        "sliding_window": 32768, "use_sliding_window": False, "use_pos_skipping": False, "pos_skipping_range": 4096,
        "vision_tower_pretrained": None, "mm_spatial_pool_mode": "bilinear", "mm_newline_position": "grid",
    },
    "llava-hf/llava-1.5": HUB_CONFIG | {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "pad_token_id": 32001,
        "projector_hidden_act": "gelu", "torch_dtype": "float16", "transformers_version": "4.36.0.dev0",
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
    },
    "llava-hf/llava-v1.6": HUB_CONFIG | {
        "model_type": "llava_next", "image_grid_pinpoints": [[336, 672], [672, 336]], "tie_word_embeddings": False,
        "use_image_newline_parameter": True, "image_token_index": 32000,
        "text_config": {
            "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2", "architectures": ["MistralForCausalLM"],
            "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1e6, "sliding_window": None,
            "torch_dtype": "bfloat16", "vocab_size": 32064,
        },
        "vision_config": HUB_CONFIG["vision_config"] | {"projection_dim": 768, "vocab_size": 32000},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_of_published_files_is_known(name, capsys):
    read_config(PUBLISHED[name])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("decoder", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_every_key_that_transformers_writes_is_known(kind, decoder, capsys):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    read_config(CONFIG_MAPPING[kind](text_config={"model_type": decoder}).to_dict())
    assert capsys.readouterr().err == ""


def assert_apart(keys: Keys) -> None:
    general = {"_name_or_path", "architectures"}  # of a part they make no difference
    lists = keys.read - general, keys.ignored, keys.only.keys()
    assert sum(map(len, lists)) == len(set().union(*lists))


def test_the_lists_of_keys_that_are_read_are_true():
    """What is listed as read is looked at by the code, and no key is in two lists."""
    others = config_json, config_keys, config_parts
    for module in (original_config, transformers_config, image_processor, rope):
        source = "".join(Path(part.__file__).read_text() for part in (module, *others))
        for key in module.KEYS.read:
            assert f'"{key}"' in source, (module, key)
        assert_apart(module.KEYS)


@pytest.mark.parametrize("family", (*DECODERS.values(), *TOWERS.values()), ids=lambda family: family.name)
def test_the_fields_that_a_family_reads_are_read(family):
    asked = set()
    defaults = {field.theirs: field.default for field in family.fields}
    window = {"use_sliding_window": True, "max_window_layers": 0}
    family.read(lambda key: asked.add(key) or (defaults | window).get(key))
    assert family.more.keys() <= asked
    assert_apart(family.keys)


def test_a_key_that_nothing_is_known_of_is_named(capsys):
    parts = {"text_config": {"logit_softcap": 30.0}, "vision_config": {"use_head": False}}
    read_config({"model_type": "llava", "x" * 300: 1, **parts})
    err = capsys.readouterr().err
    assert "logit_softcap" in err and "use_head" in err
    assert all(len(line) < 300 for line in err.splitlines())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type 'qformer' is not supported"),
        ({"s2": True}, "s2 True"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"mm_vision_select_feature": "slicefour_patch"}, "slicefour_patch"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_values_that_would_change_the_result_are_refused(changes, says):
    with pytest.raises(InputError, match=says):
        read_config(ORIGINAL_CONFIG | changes)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes to 4 bits"),
        ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "bitsandbytes to 8 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq to 4 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq to 4 bits"),
        ({"quant_method": "fp8"}, "by fp8 are not supported"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
            "compressed-tensors to 8 bits",
        ),
    ],
)
def test_quantized_weights_are_refused_by_method_and_bits(settings, says):
    hub = {"model_type": "llava", "text_config": {}}
    for config in (
        ORIGINAL_CONFIG | {"quantization_config": settings},
        hub | {"quantization_config": settings},
        hub | {"text_config": {"quantization_config": settings}},
        hub | {"vision_config": {"quantization_config": settings}},
    ):
        with pytest.raises(InputError, match=f"quantization_config.*{says}") as error:
            read_config(config)
        assert len(str(error.value)) < 200


def test_a_loader_that_was_not_asked_to_quantize():
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    assert read_config(ORIGINAL_CONFIG | {"quantization_config": settings}) == read_config(ORIGINAL_CONFIG)
