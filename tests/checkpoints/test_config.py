import copy
import dataclasses
import json
from pathlib import Path

import pytest

from helpers import GOLDEN
from llava_jax import config as c
from llava_jax.checkpoints import config_json, config_keys, image_processor, sources
from llava_jax.checkpoints.config_json import read_config
from llava_jax.console import InputError

ORIGINAL = {
    "model_type": "llava_llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": "[[336, 672], [672, 336]]",
}
SPARSE_15 = {  # as on the hub
    "model_type": "llava",
    "text_config": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "patch_size": 14, "image_size": 336,
    },
    "image_token_index": 32000,
}  # fmt: skip


def test_original():
    config = read_config(ORIGINAL)
    assert (config.text.width, config.text.layers, config.text.heads) == (5120, 40, 40)
    assert config.grid_pinpoints == ((336, 672), (672, 336))
    assert config.vision == c.VisionConfig()
    assert (config.aspect_ratio, config.merge, config.projector) == ("anyres", "spatial_unpad", "mlp2x_gelu")


def test_original_called_llava_is_not_taken_for_transformers():
    assert read_config(ORIGINAL | {"model_type": "llava"}).text.width == 5120


def test_original_defaults():
    config = read_config({"mm_vision_tower": "openai/clip-vit-large-patch14"})
    assert (config.projector, config.merge, config.aspect_ratio) == ("linear", "flat", "square")
    assert config.vision.image_size == 224
    assert config.vision.features_per_tile == 256


def test_sparse_hub_file():
    config = read_config(SPARSE_15)
    assert config.text == dataclasses.replace(c.PRESETS["v1.5-7b"].text, vocab_size=32064)
    assert config.vision == c.VisionConfig()
    assert (config.aspect_ratio, config.merge) == ("pad", "flat")


def test_mistral_window_is_4096_when_missing_and_none_when_null():
    text = {"model_type": "mistral"}
    assert read_config({"model_type": "llava_next", "text_config": text}).text.sliding_window == 4096
    text = text | {"sliding_window": None}
    assert read_config({"model_type": "llava_next", "text_config": text}).text.sliding_window is None


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_theta": 1e6}, 1e6, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 1e4, c.RopeScaling("linear", 4.0)),
        (
            {
                "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
                "rope_theta": 7e5,
            },
            7e5,
            c.RopeScaling("linear", 4.0),
        ),
        (
            {
                "rope_parameters": {
                    "rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
                }
            },
            5e5,
            c.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        ),
    ],
)  # fmt: skip
def test_rope_old_and_new_fields(rope, theta, scaling):
    text = read_config({"model_type": "llava", "text_config": rope}).text
    assert (text.rope_theta, text.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_defaults_are_those_of_the_transformers_classes(family):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    theirs = CONFIG_MAPPING["llava_next"](text_config={"model_type": family})
    ours = read_config({"model_type": "llava_next", "text_config": {"model_type": family}})
    spelt_out = read_config(theirs.to_dict())
    assert ours.text == spelt_out.text
    assert ours.vision == spelt_out.vision
    assert ours.grid_pinpoints == spelt_out.grid_pinpoints


@pytest.mark.parametrize(
    "text",
    [
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0, "sliding_window": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 3e5}},
        {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 2e4}},
        None,
    ],
)
def test_sparse_and_doubled_fields_mean_what_they_mean_to_transformers(text):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {"model_type": "llava", "text_config": text, "vision_config": {"hidden_size": 384}}
    assert read_config(fields).text == read_config(CONFIG_MAPPING["llava"](**copy.deepcopy(fields)).to_dict()).text


def test_partial_vision_config_has_the_defaults_of_clip_b32():
    from transformers import CLIPVisionConfig

    theirs = CLIPVisionConfig(hidden_size=384).to_dict()
    read = lambda vision: read_config({"model_type": "llava", "text_config": {}, "vision_config": vision}).vision  # noqa: E731
    ours = read({"hidden_size": 384})
    assert ours == read(theirs)
    assert (ours.width, ours.patch_size, ours.image_size) == (384, 32, 224)


@pytest.mark.parametrize("name", c.PRESETS)
def test_our_own_file_round_trips(name):
    config = c.preset("llava-" + name).replace(name="a b", template="v1")
    assert read_config(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("v1.5-7b", 7.06e9), ("v1.5-13b", 13.35e9), ("v1.6-mistral-7b", 7.57e9), ("v1.6-34b", 34.75e9),
        ("llama3-8b-next", 8.35e9),
    ],
)  # fmt: skip
def test_presets_have_the_size_of_the_released_models(name, parameters):
    import jax

    from llava_jax.models.llava import param_shapes

    total = sum(x.size for x in jax.tree.leaves(param_shapes(c.preset(name))))
    assert total == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mm_projector_type": "resampler"}, "projector 'resampler'"),
        ({"image_aspect_ratio": "anyres_max_9"}, "anyres_max_9"),
        ({"mm_patch_merge_type": "maxpool2x2"}, "maxpool2x2"),
        ({"model_type": "llava_mpt"}, "llava_mpt"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "yarn"),
        ({"mm_vision_tower": "google/siglip-so400m"}, "--vision-tower"),
        ({"image_grid_pinpoints": "[[336, 672"}, "image_grid_pinpoints"),
        ({"mm_vision_select_layer": -30}, "feature layer"),
        ({"num_key_value_heads": 7}, "multiple"),
        ({"hidden_act": "relu2"}, "relu2"),
    ],
)
def test_what_does_not_exist_here_is_named(changes, says):
    with pytest.raises(InputError, match=says):
        read_config(ORIGINAL | changes)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "llama"}, "not LLaVA"),
        ({"model_type": "llava", "text_config": {"model_type": "gemma"}}, "gemma"),
        ({"model_type": "llava", "text_config": {}, "vision_config": {"model_type": "siglip_vision_model"}}, "siglip"),
        ({"text_config": {}}, "model_type None"),
        ({"model_type": "llava_next_video", "text_config": {}}, "'llava_next_video' is not supported"),
        ({"model_type": "vipllava", "text_config": {}}, "vipllava"),
        ({"model_type": "llava_onevision", "text_config": {}}, "llava_onevision"),
        ({"model_type": "llava", "text_config": {"rope_scaling": {"factor": 2.0}}}, "by 2.0 without a rope_type"),
        (ORIGINAL | {"rope_scaling": {"rope_type": "default", "factor": 4}}, "scaling by 4 without a rope_type"),
        (ORIGINAL | {"model_type": "llava_gemma"}, "'llava_gemma' is not supported, only llava, llava_llama"),
        (ORIGINAL | {"architectures": ["LlavaGemmaForCausalLM"]}, "LlavaGemmaForCausalLM"),
        (ORIGINAL | {"model_type": "llava_llama", "architectures": ["LlavaMistralForCausalLM"]}, "contradict"),
        (ORIGINAL | {"model_type": "llava_mixtral"}, "llava_mixtral"),
        (
            SPARSE_15 | {"architectures": ["VipLlavaForConditionalGeneration"]},
            "'VipLlava.*' is not supported, only Llava",
        ),
        (SPARSE_15 | {"architectures": ["LlavaNextForConditionalGeneration"]}, "contradict"),
        ({"format": "llava-jax", "version": 9}, "upgrade"),
    ],
)
def test_other_models_are_refused(config, says):
    with pytest.raises(InputError, match=says):
        read_config(config)


def test_projectors():
    assert [c.projector_depth(p) for p in ("identity", "linear", "mlp2x_gelu", "mlp3x_gelu")] == [0, 1, 2, 3]
    for name in ("mlp0x_gelu", "mlpx_gelu", "mlp2x_relu", ""):
        with pytest.raises(InputError):
            c.projector_depth(name)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", None), ("hidden_size", "64"), ("num_attention_heads", 0), ("rope_scaling", {"type": "linear"}),
     ("image_grid_pinpoints", [3]), ("mm_projector_type", None), ("image_grid_pinpoints", "[(1, 2")],
)  # fmt: skip
def test_fields_of_the_wrong_kind_are_one_line(field, value):
    fields = json.loads((GOLDEN / "checkpoints" / "v1.6-mistral" / "config.json").read_text()) | {field: value}
    vision = json.loads((GOLDEN / "checkpoints" / "v1.6-mistral" / "vision_tower" / "config.json").read_text())
    with pytest.raises(InputError, match=r"config"):
        read_config(fields, vision=vision)


def test_what_processors_do_is_done_under_their_rules_only():
    fields = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    config = read_config(fields, preprocessor={"do_pad": False})
    assert config.aspect_ratio == "pad"
    assert config.with_image_rules("transformers").aspect_ratio == "square"
    assert read_config(fields, preprocessor={"do_pad": True}).with_image_rules("transformers").aspect_ratio == "pad"


def test_a_window_in_some_layers_only_is_refused():
    text = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "num_hidden_layers": 4}

    def read(**more):
        return read_config({"model_type": "llava", "text_config": text | more}).text.sliding_window

    assert read(max_window_layers=0) == 64
    assert read(max_window_layers=4) is None
    with pytest.raises(InputError, match="max_window_layers"):
        read(max_window_layers=2)
    full, sliding = "full_attention", "sliding_attention"  # as transformers 5 writes it
    assert read(layer_types=[full] * 4, max_window_layers=0) is None
    assert read(layer_types=[sliding] * 4) == 64
    with pytest.raises(InputError, match="layer_types"):
        read(layer_types=[full, full, sliding, sliding])
    with pytest.raises(InputError, match="'chunked_attention'"):
        read(layer_types=["chunked_attention"] * 4)


def test_the_name_is_the_last_part_of_a_path():
    fields = json.loads((GOLDEN / "checkpoints" / "v1.5-llama" / "config.json").read_text())
    config = read_config(fields | {"_name_or_path": "/m/llama-2/vicuna-7b/"}, vision={}, name="org/llava-7b")
    assert config.name == "vicuna-7b llava-7b"


# ---------------------------------------------------------------- every key is used, known, or named


# As published, but for sizes: keys of the reference's releases, of LLaVA-NeXT's, and of conversions by transformers 4.
PUBLISHED = {
    "liuhaotian/llava-v1.5": {
        **ORIGINAL, "_name_or_path": "llava-v1.5-13b", "architectures": ["LlavaLlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False,
        "initializer_range": 0.02, "max_length": 4096, "mm_hidden_size": 1024, "mm_resampler_type": None,
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
        "model_type": "llava", "num_key_value_heads": 40, "pad_token_id": 0, "pretraining_tp": 1, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False, "unfreeze_mm_vision_tower": False,
        "use_cache": True, "use_mm_proj": True,
    },
    "liuhaotian/llava-v1.6": {
        **ORIGINAL, "architectures": ["LlavaMistralForCausalLM"], "attention_dropout": 0.0,
        "image_crop_resolution": 224, "image_split_resolution": 224, "mm_projector_lr": None,
        "mm_vision_tower_lr": 2e-06,
        "model_type": "llava_mistral", "sliding_window": None, "tokenizer_model_max_length": 4096,
        "tokenizer_padding_side": "right", "unfreeze_mm_vision_tower": True, "rope_theta": 1e6,
    },
    "lmms-lab/llava-next": {
        **ORIGINAL, "architectures": ["LlavaQwenForCausalLM"], "max_window_layers": 21, "mm_resampler_type": None,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model", "model_type": "llava_qwen",
        "sliding_window": 32768, "use_sliding_window": False, "use_pos_skipping": False, "pos_skipping_range": 4096,
        "vision_tower_pretrained": None, "mm_spatial_pool_mode": "bilinear", "mm_newline_position": "grid",
    },
    "llava-hf/llava-1.5": SPARSE_15 | {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "pad_token_id": 32001,
        "projector_hidden_act": "gelu", "torch_dtype": "float16", "transformers_version": "4.36.0.dev0",
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
    },
    "llava-hf/llava-v1.6": SPARSE_15 | {
        "model_type": "llava_next", "image_grid_pinpoints": [[336, 672], [672, 336]], "tie_word_embeddings": False,
        "use_image_newline_parameter": True, "image_token_index": 32000,
        "text_config": {
            "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2", "architectures": ["MistralForCausalLM"],
            "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1e6, "sliding_window": None,
            "torch_dtype": "bfloat16", "vocab_size": 32064,
        },
        "vision_config": SPARSE_15["vision_config"] | {"projection_dim": 768, "vocab_size": 32000},
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


def test_the_table_of_keys_that_are_read_is_true():
    """What the table calls read is looked at by the code, and no key is in two of its lists."""
    source = "".join(Path(module.__file__).read_text() for module in (config_json, image_processor, sources))
    for kind, keys in config_keys.READ.items():
        for key in keys:
            assert f'"{key}"' in source, (kind, key)
    for kind in config_keys.READ:
        general = {"_name_or_path", "architectures"}  # of a part they make no difference
        lists = [config_keys.READ[kind] - general, config_keys.NO_DIFFERENCE[kind], config_keys.ONLY[kind].keys()]
        assert sum(map(len, lists)) == len(set().union(*lists)), kind


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
        read_config(ORIGINAL | changes)


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
        ORIGINAL | {"quantization_config": settings},
        hub | {"quantization_config": settings},
        hub | {"text_config": {"quantization_config": settings}},
        hub | {"vision_config": {"quantization_config": settings}},
    ):
        with pytest.raises(InputError, match=f"quantization_config.*{says}") as error:
            read_config(config)
        assert len(str(error.value)) < 200


def test_a_loader_that_was_not_asked_to_quantize():
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    assert read_config(ORIGINAL | {"quantization_config": settings}) == read_config(ORIGINAL)


# ---------------------------------------------------------------- the image processor

PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}, "resample": 3,
    "crop_size": {"height": 336, "width": 336},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, {}),
        ({"size": 336, "crop_size": 336}, {}),  # CLIP's first files
        ({"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"}, {}),
        ({"image_processor_type": "LlavaImageProcessorFast"}, {}),
        ({"size": {"shortest_edge": 400}}, {"resize": (400,)}),
        (
            {"size": {"height": 336, "width": 336}, "do_center_crop": False},
            {"resize": (336, 336), "center_crop": False},
        ),
        ({"do_resize": False}, {"resize": ()}),
        ({"resample": 2}, {"resample": 2}),
        ({"rescale_factor": 1 / 127.5}, {"rescale_factor": 1 / 127.5}),
        ({"do_rescale": False}, {"rescale_factor": 1.0}),
        ({"do_normalize": False}, {"normalize": False}),
        ({"image_mean": [0.5, 0.5, 0.5]}, {"image_mean": (0.5, 0.5, 0.5)}),
    ],
)  # fmt: skip
def test_what_an_image_processor_does_is_done(changes, want):
    plain = c.VisionConfig()
    read = read_config(SPARSE_15, preprocessor=PROCESSOR | changes).vision
    assert read == dataclasses.replace(plain, **want)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type .*SiglipImageProcessor"),
        ({"crop_size": {"height": 224, "width": 224}}, "crop_size .*336"),
        ({"crop_size": {"height": 336, "width": 224}}, "crop_size"),
        ({"do_center_crop": False}, "do_center_crop"),
        ({"size": {"longest_edge": 336}}, "size"),
        ({"size": {"shortest_edge": 336, "longest_edge": 672}}, "size"),
        ({"size": {"shortest_edge": -1}}, "size"),
        ({"resample": 0}, "resample"),
        ({"resample": "bicubic"}, "resample"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"image_std": [1, 0, 1]}, "image_std"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_mean": 0.5}, "image_mean"),
        ({"do_pad": True, "pad_size": {"height": 400, "width": 400}}, "pad_size"),
    ],
)
def test_what_would_differ_from_both_rules_is_refused_by_name(changes, says):
    with pytest.raises(InputError, match=f"image processor's {says}"):
        read_config(SPARSE_15, preprocessor=PROCESSOR | changes)


def test_tiles_of_a_grid_have_the_size_of_the_tower():
    config = SPARSE_15 | {"model_type": "llava_next", "image_grid_pinpoints": [[336, 672]]}
    grid = {"image_grid_pinpoints": [[336, 672]]}
    assert read_config(config, preprocessor=PROCESSOR | grid).vision == c.VisionConfig()
    with pytest.raises(InputError, match="size .*400"):
        read_config(config, preprocessor=PROCESSOR | {"size": {"shortest_edge": 400}})
    with pytest.raises(InputError, match="image_grid_pinpoints .*config.json"):
        read_config(config, preprocessor=PROCESSOR | {"image_grid_pinpoints": [[672, 672]]})


def test_settings_inside_processor_config_count_first(tmp_path):
    write = lambda name, fields: (tmp_path / name).write_text(json.dumps(fields))  # noqa: E731
    assert image_processor.read_preprocessor(tmp_path) == {}
    write("preprocessor_config.json", {"resample": 2})
    write("processor_config.json", {"patch_size": 14})
    assert image_processor.read_preprocessor(tmp_path) == {"resample": 2}
    write("processor_config.json", {"image_processor": {"resample": 1}})
    assert image_processor.read_preprocessor(tmp_path) == {"resample": 1}
