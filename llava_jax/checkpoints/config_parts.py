"""Read the parts of a foreign `config.json`, the decoder's object and the vision tower's, by their families' tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_jax.checkpoints.config_keys import check_keys, refuse, refuse_quantized
from llava_jax.checkpoints.families import DECODERS, TOWERS, Decoder, Tower
from llava_jax.checkpoints.image_processor import read_pixels
from llava_jax.config import TextConfig, VisionConfig
from llava_jax.console import InputError, shorten
from llava_jax.json_files import check_json, read_json

# Name of each published vision tower -> the fields of its own config.json.
PUBLISHED = {name: fields for tower in TOWERS.values() for name, fields in tower.published.items()}
Grids = tuple[tuple[int, int], ...]


def decoder_of(kind: Any) -> Decoder:
    """The decoder's family by its model type in transformers.

    Raises:
      InputError: the model type is not supported.
    """
    found = next((decoder for decoder in DECODERS.values() if decoder.model_type == kind), None)
    if found is None:
        raise InputError(
            f"config.json: decoder {shorten(repr(kind))} is not supported, only "
            f"{', '.join(decoder.model_type for decoder in DECODERS.values())} (Vicuna and Yi are llama)"
        )
    return found


def read_text(decoder: Decoder, fields: Mapping[str, Any], *, tied: bool) -> TextConfig:
    """The decoder's configuration, from an object that `decoder.check` accepts."""
    return TextConfig(**decoder.read_fields(fields) | {"tied_head": tied})


def is_tied(fields: Mapping[str, Any]) -> bool:
    """Whether the head shares the embeddings; a head in the checkpoint takes precedence (`sources.Found.check`)."""
    tied = fields.get("tie_word_embeddings")
    if tied not in (None, True, False):
        raise refuse("tie_word_embeddings", tied, ("true", "false"))
    return bool(tied)


def tower_of(fields: dict[str, Any], file: str, key: str = "") -> tuple[Tower, dict[str, Any]]:
    """The tower's family, and the tower's object: `vision_config` if the directory holds a text model too.

    Args:
      file: the file's name in errors.
      key: the key of `fields` in the file; "" if they are the whole file.

    Raises:
      InputError: the family is not supported, or a field has the wrong type.
    """
    if any(fields.get("model_type") == tower.whole for tower in TOWERS.values()):
        inner = check_json(fields.get("vision_config"), dict[str, Any] | None, f"{file}: vision_config")
        if inner:  # quantization applies to both models
            fields, key = {"quantization_config": fields.get("quantization_config")} | inner, "vision_config"
    kind = fields.get("model_type", "clip_vision_model")
    found = next((tower for tower in TOWERS.values() if tower.model_type == kind), None)
    if found is None:
        known = ", ".join(f"{tower.title} ({tower.model_type})" for tower in TOWERS.values())
        raise InputError(f"{file}: vision tower {shorten(repr(kind))} is not supported, only {known}")
    found.check(fields, file, key)
    return found, fields


def read_vision(
    fields: dict[str, Any],
    preprocessor: dict[str, Any],
    aspect_ratio: str,
    pinpoints: Grids,
    *,
    file: str = "config.json",
    key: str = "",
    **more,
) -> VisionConfig:
    """The tower's configuration, from its object, the image processor's settings and LLaVA's own fields (`more`)."""
    tower, fields = tower_of(fields, file, key)
    refuse_quantized(fields, " of vision_config")
    check_keys(fields, tower.keys)
    values = tower.read_fields(fields)
    return VisionConfig(
        **values, **read_pixels(preprocessor, tower, values["image_size"], aspect_ratio, pinpoints), **more
    )


def read_tower(directory: Path) -> dict[str, Any] | None:
    """The `config.json` of a vision tower's directory; None if there is no such file.

    Raises:
      InputError: the file is broken, or not a supported tower's.
    """
    fields = read_json(directory / "config.json")
    if fields is not None:
        tower_of(fields, shorten(directory / "config.json"))
    return fields
