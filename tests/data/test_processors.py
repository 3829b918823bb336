"""Pixels as transformers' image processors make them from the same settings (no torch needed)."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from helpers import load_golden
from llava_jax.checkpoints.config_json import read_config
from llava_jax.checkpoints.image_processor import read_preprocessor
from llava_jax.data.images import tile_image, tile_layout
from llava_jax.models.clip import normalise

SIDE = 28
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "image_size": SIDE, "patch_size": 7,
}  # fmt: skip
PLAIN = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
CLASSES = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
    "LlavaNextImageProcessor": LlavaNextImageProcessorPil,
}
SIZES = ((40, 30), (30, 40), (28, 28), (61, 23), (25, 97), (200, 150))

COLOURS = (
    {},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5},
    {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    {"resample": 2},
    {"resample": 1},
    {"resample": 4},
)
GEOMETRY = (
    {"size": {"shortest_edge": 32}},
    {"size": {"shortest_edge": 21}},  # smaller than the crop: black around
    {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False},
    {"size": {"height": 40, "width": 33}},
    {"size": SIDE, "crop_size": SIDE},
    {"size": SIDE, "crop_size": SIDE, "default_to_square": True},
    {"do_resize": False},
    {"do_pad": True},
    {"do_pad": True, "size": {"shortest_edge": 35}, "resample": 2, "image_mean": [0.2, 0.4, 0.6]},
    {"do_pad": True, "do_normalize": False},
)


def random_image(size: tuple[int, int]) -> Image.Image:
    random = np.random.default_rng(size[0])
    return Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def compare(kind: str, settings: dict, directory, nested: bool) -> None:
    settings = PLAIN | {"image_processor_type": kind} | settings
    following = kind == "LlavaNextImageProcessor"
    model = {"model_type": "llava_next" if following else "llava", "text_config": {}, "vision_config": VISION}
    if following:
        settings["image_grid_pinpoints"] = model["image_grid_pinpoints"] = PINPOINTS
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (directory / name).write_text(json.dumps({"image_processor": settings} if nested else settings))
    config = read_config(model, preprocessor=read_preprocessor(directory)).with_image_rules("transformers")
    theirs = CLASSES[kind](**{key: value for key, value in settings.items() if key != "image_processor_type"})
    for size in SIZES:
        image = random_image(size)
        made = tile_image(image, tile_layout(size, config), config)
        ours = np.asarray(normalise(jax.numpy.asarray(made), config.vision))
        want = theirs(image, return_tensors="np")["pixel_values"][0]
        want = want if following else want[None]
        np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), want, atol=2e-6, rtol=2e-6, err_msg=f"{settings} {size}")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("settings", [*COLOURS, *GEOMETRY], ids=str)
def test_pixels_are_those_of_transformers(settings, nested, tmp_path):
    kinds = ["LlavaImageProcessor"] if "do_pad" in settings else ["CLIPImageProcessor", "LlavaImageProcessor"]
    for kind in kinds:
        compare(kind, settings, tmp_path, nested)


@pytest.mark.parametrize("settings", COLOURS, ids=str)
def test_grids_are_those_of_transformers(settings, tmp_path):
    compare("LlavaNextImageProcessor", settings, tmp_path, nested=True)


def test_the_originals_grids_are_bicubic_whatever_the_processor_says():
    model = {
        "model_type": "llava_next", "text_config": {}, "vision_config": VISION, "image_grid_pinpoints": PINPOINTS,
    }  # fmt: skip
    image = random_image((61, 23))
    cut = lambda config: tile_image(image, tile_layout(image.size, config), config)  # noqa: E731
    bicubic, bilinear = (read_config(model, preprocessor=PLAIN | {"resample": n}) for n in (3, 2))
    assert (cut(bicubic) == cut(bilinear)).all()
    assert (cut(bicubic) != cut(bilinear.with_image_rules("transformers"))).any()


def test_transformers_rules_agree_with_its_processors():
    """Pixels, chosen resolution and number of features, over sizes on both sides of every rule."""
    random = np.random.default_rng(0)
    config = load_golden("v1.6-mistral")[0].config.replace(image_rules="transformers")
    size = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, return_tensors="np")
    pinpoints = [list(p) for p in config.grid_pinpoints]
    for _ in range(40):
        w, h = (int(x) for x in random.integers(8, 120, 2))
        image = Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8))
        theirs = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints)(image, **size)["pixel_values"][0]
        place = tile_layout((w, h), config)
        ours = normalise(tile_image(image, place, config), config.vision).transpose(0, 3, 1, 2)
        assert ours.shape == theirs.shape, (w, h)
        np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=str((w, h)))

        padded = config.replace(aspect_ratio="pad", merge="flat")
        theirs = LlavaImageProcessorPil(do_pad=True)(image, **size)["pixel_values"][0]
        ours = normalise(tile_image(image, tile_layout((w, h), padded), padded), config.vision)[0].transpose(2, 0, 1)
        np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=str((w, h)))
