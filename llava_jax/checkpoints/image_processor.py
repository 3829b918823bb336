"""What a checkpoint's image processor does to pixels, from the files of transformers that say so."""

import json
from pathlib import Path
from typing import Any, TypedDict

from llava_jax.checkpoints.config_keys import Grid, Preprocessor, check_keys
from llava_jax.config import CLIP_MEAN, CLIP_STD
from llava_jax.console import InputError, shorten
from llava_jax.json_files import check_json, parse_json, read_json

PROCESSORS = ("CLIPImageProcessor", "LlavaImageProcessor", "LlavaNextImageProcessor")


class Processor(TypedDict, total=False):
    """`processor_config.json`, as far as it is about pixels."""

    image_processor: Preprocessor | None


def processor_class(preprocessor: dict[str, Any]) -> str:
    """The class of transformers that does it; CLIP's where none is named. Its backends are all the same here."""
    kind = str(preprocessor.get("image_processor_type") or preprocessor.get("feature_extractor_type") or PROCESSORS[0])
    return kind.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")


def read_preprocessor(directory: Path) -> dict[str, Any]:
    """The image processor's settings: those that transformers 5 writes into `processor_config.json`, or those of
    `preprocessor_config.json` (models/auto/image_processing_auto.py `get_image_processor_config`)."""
    nested = (read_json(directory / "processor_config.json", Processor) or {}).get("image_processor")
    return nested or read_json(directory / "preprocessor_config.json", Preprocessor) or {}


def read_pixels(
    preprocessor: dict[str, Any], image_size: int, aspect_ratio: str, pinpoints: tuple[tuple[int, int], ...]
) -> dict[str, Any]:
    """The fields of `VisionConfig` that an image processor's settings make.

    Raises:
      InputError: it makes something of an image that neither the original nor transformers would feed this tower.
    """
    get = preprocessor.get

    def refuse(field: str, why: str) -> InputError:
        value = json.dumps(get(field)) if field in preprocessor else "missing"
        return InputError(f"the image processor's {field} ({shorten(value)}) {why}")

    if processor_class(preprocessor) not in PROCESSORS:
        raise refuse("image_processor_type", f"is not supported, only {', '.join(PROCESSORS)}")
    check_keys("preprocessor", preprocessor, file="the image processor's settings")
    if get("do_pad") and get("pad_size") and processor_class(preprocessor) == "CLIPImageProcessor":
        raise refuse("pad_size", "is not supported: images are padded to squares, if at all")
    crops = get("do_center_crop", True)
    crop = _edges(get("crop_size")) or (image_size,)
    if crops and set(crop) != {image_size}:
        raise refuse("crop_size", f"is not the vision tower's image size, {image_size}")
    resize = (_edges(get("size"), get("default_to_square")) or (image_size,)) if get("do_resize", True) else ()
    if not crops and resize != (image_size, image_size):
        raise refuse("do_center_crop", f"wants a size of height and width {image_size}: tiles are square")
    if aspect_ratio == "anyres":
        if resize and set(resize) != {image_size}:
            raise refuse("size", f"is not the vision tower's image size, {image_size}, which tiles of a grid have")
        resize, crops = (image_size,), True  # tiles are of that size already
        listed = get("image_grid_pinpoints")
        if listed and read_pinpoints(listed) != pinpoints:
            raise refuse("image_grid_pinpoints", "are not those of config.json")
    resample = get("resample", 3)
    if type(resample) is not int or not 1 <= resample <= 5:
        raise refuse("resample", "is not supported, only Pillow's 1 to 5 (Lanczos, bilinear, bicubic, box, Hamming)")
    factor = get("rescale_factor", 1 / 255) if get("do_rescale", True) else 1.0
    if type(factor) not in (int, float) or not 0 < factor <= 1:
        raise refuse("rescale_factor", "must be above 0, and at most 1")
    mean, std = get("image_mean") or CLIP_MEAN, get("image_std") or CLIP_STD
    for field, values in (("image_mean", mean), ("image_std", std)):
        if not isinstance(values, list | tuple) or len(values) != 3 or not all(type(x) in (int, float) for x in values):
            raise refuse(field, "must be three numbers, one for each colour")
    if 0 in std:
        raise refuse("image_std", "must not be 0, since pixels are divided by it")
    return dict(
        resize=None if resize == (image_size,) else resize,
        center_crop=bool(crops),
        resample=resample,
        rescale_factor=float(factor),
        normalize=bool(get("do_normalize", True)),
        image_mean=tuple(map(float, mean)),
        image_std=tuple(map(float, std)),
    )


def _edges(size: Any, square: bool | None = False) -> tuple[int, ...] | None:
    """(shortest edge,) or (height, width) of a `size` in any of its spellings; None where there is none. A number, as
    CLIP's first files have it, is the shortest edge, unless it is to make a `square`."""
    if size is None:
        return None
    if type(size) is int:
        edges = (size, size) if square else (size,)
    elif isinstance(size, dict) and set(size) == {"shortest_edge"}:
        edges = (size["shortest_edge"],)
    elif isinstance(size, dict) and set(size) == {"height", "width"}:
        edges = (size["height"], size["width"])
    else:
        edges = ()
    if not edges or not all(type(edge) is int and 0 < edge <= 10_000 for edge in edges):
        raise InputError(
            f"the image processor's size {shorten(json.dumps(size))} is not supported, only a shortest_edge, or a "
            "height and a width"
        )
    return edges


def read_pinpoints(value) -> tuple[tuple[int, int], ...]:
    """`image_grid_pinpoints`, a list of sizes or such a list written out."""
    if isinstance(value, str):
        try:
            value = parse_json(value.translate(str.maketrans("()", "[]")))
        except InputError:
            raise InputError(
                f"config.json: image_grid_pinpoints {shorten(repr(value))} is not a list of sizes"
            ) from None
    return tuple(map(tuple, check_json(value, Grid, "config.json: image_grid_pinpoints")))
