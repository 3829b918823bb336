"""`config.json` of every dialect becomes the model's configuration, or is refused by name."""

import copy
import dataclasses
import json

import pytest

from helpers import GOLDEN, HUB_CONFIG, ORIGINAL_CONFIG
from llava_jax import config as c
from llava_jax.checkpoints.config_json import read_config
from llava_jax.checkpoints.families import DECODERS, TOWERS
from llava_jax.console import InputError


def test_original():
    config = read_config(ORIGINAL_CONFIG)
    assert (config.text.width, config.text.layers, config.text.heads) == (5120, 40, 40)
    assert config.grid_pinpoints == ((336, 672), (672, 336))
    assert config.vision == c.VisionConfig()
    assert (config.aspect_ratio, config.merge, config.projector) == ("anyres", "spatial_unpad", "mlp2x_gelu")


def test_original_called_llava_is_not_taken_for_transformers():
    assert read_config(ORIGINAL_CONFIG | {"model_type": "llava"}).text.width == 5120


def test_original_defaults():
    config = read_config({"mm_vision_tower": "openai/clip-vit-large-patch14"})
    assert (config.projector, config.merge, config.aspect_ratio) == ("linear", "flat", "square")
    assert config.vision.image_size == 224
    assert config.vision.features_per_tile == 256


def test_sparse_hub_file():
    config = read_config(HUB_CONFIG)
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
        read_config(ORIGINAL_CONFIG | changes)


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
        ({"model_type": "llava", "text_config": {"rope_scaling": {"factor": 2.0}}}, "by 2.0 needs a rope_type"),
        (ORIGINAL_CONFIG | {"rope_scaling": {"rope_type": "default", "factor": 4}}, "scaling by 4 needs a rope_type"),
        (ORIGINAL_CONFIG | {"model_type": "llava_gemma"}, "'llava_gemma' is not supported, only llava, llava_llama"),
        (ORIGINAL_CONFIG | {"architectures": ["LlavaGemmaForCausalLM"]}, "LlavaGemmaForCausalLM"),
        (ORIGINAL_CONFIG | {"model_type": "llava_llama", "architectures": ["LlavaMistralForCausalLM"]}, "contradict"),
        (ORIGINAL_CONFIG | {"model_type": "llava_mixtral"}, "llava_mixtral"),
        (
            HUB_CONFIG | {"architectures": ["VipLlavaForConditionalGeneration"]},
            "'VipLlava.*' is not supported, only Llava",
        ),
        (HUB_CONFIG | {"architectures": ["LlavaNextForConditionalGeneration"]}, "contradict"),
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


@pytest.mark.parametrize("family", (*DECODERS.values(), *TOWERS.values()), ids=lambda family: family.name)
def test_a_family_reads_what_it_writes(family):
    config = c.tiny(text=dataclasses.replace(c.tiny().text, eos_ids=(2, 7), rope_scaling=c.RopeScaling("linear", 4.0)))
    part = config.text if family in DECODERS.values() else config.vision
    part = dataclasses.replace(part, family=family.name, **({"qkv_bias": True} if family.name == "qwen2" else {}))
    written = family.write_fields(part)
    assert dataclasses.replace(part, **family.read_fields(written)) == part
    family.check(json.loads(json.dumps(written)), "config.json")


def test_our_own_file_names_its_families():
    fields = json.loads(json.dumps(c.tiny().to_json()))
    for part in ("text", "vision"):
        with pytest.raises(InputError, match=f"{part}.family 'siglip' is not supported, only"):
            read_config(fields | {part: fields[part] | {"family": "siglip"}})
    del fields["vision"]["family"]  # as the first release wrote it
    assert read_config(fields) == c.tiny()


def test_biases_that_no_format_has_are_refused():
    text = dataclasses.replace(c.tiny().text, qkv_bias=True)
    with pytest.raises(InputError, match="biases on some projections"):
        DECODERS["llama"].write_fields(text)


@pytest.mark.parametrize(
    ("family", "biases"), [("llama", (True, True, True)), ("mistral", (False,) * 3), ("qwen2", (True, False, False))]
)
def test_biases_are_those_that_the_transformers_class_has(family, biases):
    """Mistral's and Qwen2's classes ignore these keys."""
    text = read_config(
        {"model_type": "llava_next", "text_config": {"model_type": family, "attention_bias": True, "mlp_bias": True}}
    ).text
    assert (text.qkv_bias, text.o_bias, text.mlp_bias) == biases
