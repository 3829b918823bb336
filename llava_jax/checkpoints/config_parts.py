"""The parts of a foreign `config.json`: the decoder's object and the vision tower's, read by their families' tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_jax.checkpoints.config_keys import check_keys, refuse, refuse_quantized
from llava_jax.checkpoints.families import DECODERS, TOWERS, Decoder, Tower
from llava_jax.checkpoints.image_processor import read_pixels
from llava_jax.config import TextConfig, VisionConfig
from llava_jax.console import InputError, shorten
from llava_jax.json_files import check_json, read_json

# Vision towers that configs name: what their own config.json says.
PUBLISHED = {name: fields for tower in TOWERS.values() for name, fields in tower.published.items()}
Grids = tuple[tuple[int, int], ...]


def decoder_of(kind: Any) -> Decoder:
    """The decoder's family by its model type in transformers.

    Raises:
      InputError: it is not supported.
    """
    found = next((decoder for decoder in DECODERS.values() if decoder.model_type == kind), None)
    if found is None:
        raise InputError(
            f"config.json: decoder {shorten(repr(kind))} is not supported, only "
            f"{', '.join(decoder.model_type for decoder in DECODERS.values())} (Vicuna and Yi are llama)"
        )
    return found


def read_text(decoder: Decoder, fields: Mapping[str, Any], *, tied: bool) -> TextConfig:
    """The decoder's configuration from an object that `decoder.check` has passed."""
    return TextConfig(**decoder.values(fields) | {"tied_head": tied})


def is_tied(fields: Mapping[str, Any]) -> bool:
    """Whether the head is the embeddings, unless the checkpoint has a head of its own (`sources.Found.check`)."""
    tied = fields.get("tie_word_embeddings")
    if tied not in (None, True, False):
        raise refuse("tie_word_embeddings", tied, ("true", "false"))
    return bool(tied)


def tower_of(fields: dict[str, Any], file: str, key: str = "") -> tuple[Tower, dict[str, Any]]:
    """The tower's family, and the object that is about the tower: that inside, of a directory with a text model too.

    Args:
      file: what errors call it.
      key: what it is under in the file, if it is not the whole.

    Raises:
      InputError: the family is not supported, or the object has something else than it should.
    """
    if any(fields.get("model_type") == tower.whole for tower in TOWERS.values()):
        inner = check_json(fields.get("vision_config"), dict[str, Any] | None, f"{file}: vision_config")
        if inner:  # weights are quantized as a whole
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
    """The tower's configuration, from its object and the image processor's settings. `more`: what LLaVA says of it."""
    tower, fields = tower_of(fields, file, key)
    refuse_quantized(fields, " of vision_config")
    check_keys(fields, tower.keys)
    values = tower.values(fields)
    return VisionConfig(
        **values, **read_pixels(preprocessor, tower, values["image_size"], aspect_ratio, pinpoints), **more
    )


def read_tower(directory: Path) -> dict[str, Any] | None:
    """The `config.json` of a vision tower's directory, None where there is none.

    Raises:
      InputError: it is of another kind, or broken.
    """
    fields = read_json(directory / "config.json")
    if fields is not None:
        tower_of(fields, shorten(directory / "config.json"))
    return fields
