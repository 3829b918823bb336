"""What the files of an image processor say is done, or refused by name."""

import dataclasses
import json

import pytest

from helpers import HUB_CONFIG
from llava_jax import config as c
from llava_jax.checkpoints import image_processor
from llava_jax.checkpoints.config_json import read_config
from llava_jax.console import InputError

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
    read = read_config(HUB_CONFIG, preprocessor=PROCESSOR | changes).vision
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
        read_config(HUB_CONFIG, preprocessor=PROCESSOR | changes)


def test_tiles_of_a_grid_have_the_size_of_the_tower():
    config = HUB_CONFIG | {"model_type": "llava_next", "image_grid_pinpoints": [[336, 672]]}
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
