"""Read a checkpoint's `config.json`, in any supported dialect, into a `LlavaConfig`.

There are three dialects: ours (`"format": "llava-jax"`), written beside our Orbax checkpoints; that of transformers
(`transformers_config`); and the original's (`original_config`). The fields distinguish the last two; `model_type` does
not, since both write `llava`.

A checkpoint is read faithfully or refused: unlisted model types, decoders and vision towers raise `InputError`, and
every key is read, known to have no effect, supported with certain values only, or named in a warning (`config_keys`).
"""

import dataclasses
from typing import Any, TypedDict

from llava_jax.checkpoints import original_config, transformers_config
from llava_jax.checkpoints.config_keys import Ids, read_ids, refuse
from llava_jax.checkpoints.families import DECODERS, TOWERS
from llava_jax.config import LlavaConfig, RopeScaling, TextConfig, VisionConfig
from llava_jax.console import InputError, shorten
from llava_jax.json_files import check_json


class Generation(TypedDict, total=False):
    """`generation_config.json`."""

    eos_token_id: Ids


def read_config(
    config: dict[str, Any],
    *,
    vision: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    name: str = "",
    file: object = "config.json",
) -> LlavaConfig:
    """Convert the contents of a `config.json` in any dialect to a `LlavaConfig`.

    Args:
      config: the parsed `config.json`; this function checks its types, by its dialect.
      vision: the vision tower's own `config.json`, for original checkpoints, which only name their tower
        (`config_parts.read_tower`).
      preprocessor: the image processor's settings, if any (`read_preprocessor`).
      generation: the contents of `generation_config.json`, if any, a `Generation`; its `eos_token_id` takes
        precedence.
      name: the checkpoint's directory or hub name, a hint for the conversation template.
      file: the path of the `config.json`, for errors.

    Raises:
      InputError: the file is not a LLaVA configuration, or uses an unsupported feature.
    """
    file, preprocessor = shorten(file), preprocessor or {}
    if config.get("format") == "llava-jax":
        return _from_ours(config, file)
    if not is_original(config):
        read = transformers_config.read(config, preprocessor, file)
    elif has_vision_fields(config):
        read = original_config.read(config, vision, preprocessor, file)
    else:
        kind = shorten(repr(config.get("model_type")))
        raise InputError(
            f"config.json is not LLaVA's (model_type {kind}): it has neither text_config nor mm_vision_tower"
        )
    eos = (generation or {}).get("eos_token_id")
    if eos is not None:
        read = read.replace(text=dataclasses.replace(read.text, eos_ids=read_ids(eos)))
    hints = (str(config.get("_name_or_path") or ""), name)
    template = config.get("conversation_template")
    read = read.replace(template=template, template_from="config.json" if template else "")
    return read.replace(name=" ".join(hint.rstrip("/").rsplit("/", 1)[-1] for hint in hints).strip())


def is_original(config: dict[str, Any]) -> bool:
    """Whether a foreign `config.json` is in the original's dialect rather than transformers'."""
    parts = [config.get(key) for key in ("text_config", "vision_config")]  # a file may omit either, for all defaults
    return "mm_vision_tower" in config or not any(isinstance(part, dict) for part in parts)


def has_vision_fields(config: dict[str, Any]) -> bool:
    """Whether a `config.json` in the original's dialect is a LLaVA's rather than a plain language model's."""
    return any(key in config for key in ("mm_vision_tower", "mm_projector_type", "mm_hidden_size"))


def _from_ours(config: dict[str, Any], file: str) -> LlavaConfig:
    if check_json(config.get("version", 1), int, f"{file}: version") > 1:
        raise InputError(
            f"{file} has version {shorten(config['version'])}; this release reads version 1: upgrade llava-jax"
        )
    top = {k: v for k, v in config.items() if k not in ("format", "version")}
    text = _object(top.get("text"), f"{file}: text")
    scaling = text.get("rope_scaling") or {}
    for part, values, where in (
        (LlavaConfig, top, ""),
        (TextConfig, text, "text."),
        (VisionConfig, _object(top.get("vision"), f"{file}: vision"), "vision."),
        (RopeScaling, _object(scaling, f"{file}: text.rope_scaling"), "text.rope_scaling."),
    ):
        if unknown := sorted(values.keys() - {field.name for field in dataclasses.fields(part)}):
            raise InputError(f"{file}: unknown fields {shorten(', '.join(where + name for name in unknown))}")
    read = check_json(top, LlavaConfig, file)
    for key, family, known in (("text", read.text.family, DECODERS), ("vision", read.vision.family, TOWERS)):
        if family not in known:
            raise refuse(f"{key}.family", family, known, file)
    return read


def _object(value: Any, where: str) -> dict[str, Any]:
    return check_json(value, dict[str, Any], where)
