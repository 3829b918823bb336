"""Read and write the settings of a checkpoint's image processor, in the files of transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from llava_jax.checkpoints.config_keys import Grid, Keys, check_keys
from llava_jax.checkpoints.families import TOWERS, Tower
from llava_jax.config import VisionConfig
from llava_jax.console import InputError, shorten
from llava_jax.json_files import check_json, parse_json, read_json

# LLaVA's own image processors; each vision tower has one too.
LLAVA, NEXT = "LlavaImageProcessor", "LlavaNextImageProcessor"
Colours = Annotated[list[float], Meta(min_length=3, max_length=3)]


class Preprocessor(TypedDict, total=False):
    """`preprocessor_config.json`. A field of type `Any` has several spellings."""

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


KEYS = Keys(
    frozenset(Preprocessor.__annotations__),
    ignored=frozenset(
        """_processor_class _valid_processor_keys aspect_ratio_setting auto_map data_format device
        disable_grouping do_convert_rgb image_seq_length input_data_format num_additional_image_tokens
        patch_size processor_class return_tensors use_fast vision_feature_select_strategy""".split()
    ),
)


class Processor(TypedDict, total=False):
    """The fields of `processor_config.json` that concern pixels."""

    image_processor: Preprocessor | None


def processor_class(preprocessor: dict[str, Any]) -> str | None:
    """The class of image processor in transformers, if the settings name one; all its backends count as one."""
    kind = preprocessor.get("image_processor_type") or preprocessor.get("feature_extractor_type")
    return (
        None
        if not kind
        else str(kind).removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    )


def pads_to_squares(preprocessor: dict[str, Any]) -> bool:
    """Whether transformers pads images to squares; the towers' own image processors never do."""
    towers = {tower.processor for tower in TOWERS.values()}
    return bool(preprocessor.get("do_pad", False)) and processor_class(preprocessor) not in towers


def read_preprocessor(directory: Path) -> dict[str, Any]:
    """The image processor's settings, from `processor_config.json` (transformers 5), else from
    `preprocessor_config.json` (models/auto/image_processing_auto.py `get_image_processor_config`)."""
    nested = (read_json(directory / "processor_config.json", Processor) or {}).get("image_processor")
    return nested or read_json(directory / "preprocessor_config.json", Preprocessor) or {}


def read_pixels(
    preprocessor: dict[str, Any],
    tower: Tower,
    image_size: int,
    aspect_ratio: str,
    pinpoints: tuple[tuple[int, int], ...],
) -> dict[str, Any]:
    """Convert an image processor's settings to fields of `VisionConfig`; omitted settings have the tower's defaults.

    Raises:
      InputError: a setting is unsupported: neither the original nor transformers would feed this tower such pixels.
    """
    get: Callable[..., Any] = {**tower.pixels, **preprocessor}.get
    known = (tower.processor, LLAVA, NEXT)
    kind = processor_class(preprocessor) or tower.processor

    def refuse(field: str, why: str) -> InputError:
        value = json.dumps(get(field)) if field in preprocessor else "missing"
        return InputError(f"the image processor's {field} ({shorten(value)}) {why}")

    if kind not in known:
        raise refuse("image_processor_type", f"is not supported, only {', '.join(known)}")
    check_keys(preprocessor, KEYS, file="the image processor's settings")
    if get("do_pad") and get("pad_size") and kind == tower.processor:
        raise refuse("pad_size", "is not supported: images are padded to squares, if at all")
    crops = get("do_center_crop")
    crop = _edges(get("crop_size")) or (image_size,)
    if crops and set(crop) != {image_size}:
        raise refuse("crop_size", f"is not the vision tower's image size, {image_size}")
    resize = (_edges(get("size"), get("default_to_square")) or (image_size,)) if get("do_resize") else ()
    if not crops and resize != (image_size, image_size):
        raise refuse("do_center_crop", f"needs a size of height and width {image_size}, since tiles are square")
    if aspect_ratio == "anyres":
        if resize and set(resize) != {image_size}:
            raise refuse("size", f"is not the vision tower's image size, {image_size}, the size of a grid's tiles")
        resize, crops = (image_size,), True  # tiles already have that size
        listed = get("image_grid_pinpoints")
        if listed and read_pinpoints(listed) != pinpoints:
            raise refuse("image_grid_pinpoints", "differ from those of config.json")
    resample = get("resample")
    if type(resample) is not int or not 1 <= resample <= 5:
        raise refuse("resample", "is not supported, only Pillow's 1 to 5 (Lanczos, bilinear, bicubic, box, Hamming)")
    factor = get("rescale_factor") if get("do_rescale") else 1.0
    if type(factor) not in (int, float) or not 0 < factor <= 1:
        raise refuse("rescale_factor", "must be above 0, and at most 1")
    mean, std = (get(field) or tower.pixels[field] for field in ("image_mean", "image_std"))
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
        normalize=bool(get("do_normalize")),
        image_mean=tuple(map(float, mean)),
        image_std=tuple(map(float, std)),
    )


def _edges(size: Any, square: bool | None = False) -> tuple[int, ...] | None:
    """(shortest edge,) or (height, width) of a `size` in any of its spellings; None if there is none. A number, as in
    CLIP's first files, is the shortest edge, or both edges of a `square`."""
    if size is None:
        return None
    edges: tuple[Any, ...]
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
    """Read `image_grid_pinpoints`: a list of sizes, or such a list as a string."""
    if isinstance(value, str):
        try:
            value = parse_json(value.translate(str.maketrans("()", "[]")))
        except InputError:
            raise InputError(
                f"config.json: image_grid_pinpoints {shorten(repr(value))} is not a list of sizes"
            ) from None
    return tuple(map(tuple, check_json(value, Grid, "config.json: image_grid_pinpoints")))


def write_pixels(vision: VisionConfig) -> dict[str, Any]:
    """The image processor's settings for a configuration, the inverse of `read_pixels`."""
    side = vision.image_size
    resize = (side,) if vision.resize is None else vision.resize
    fields = {
        "do_convert_rgb": True, "do_resize": bool(resize), "do_center_crop": vision.center_crop, "do_rescale": True,
        "do_normalize": vision.normalize, "crop_size": {"height": side, "width": side}, "resample": vision.resample,
        "rescale_factor": vision.rescale_factor,
        "image_mean": list(vision.image_mean), "image_std": list(vision.image_std),
    }  # fmt: skip
    if resize:
        fields["size"] = {"shortest_edge": resize[0]} if len(resize) == 1 else {"height": resize[0], "width": resize[1]}
    return fields
