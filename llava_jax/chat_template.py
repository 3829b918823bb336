"""The chat template that a checkpoint carries, a Jinja program of transformers: read, and compared with ours."""

from pathlib import Path
from typing import Any

from llava_jax.config import LlavaConfig
from llava_jax.config_json import read_json
from llava_jax.console import InputError, note, shorten
from llava_jax.templates import MARK, TEMPLATES, render, render_chat
from llava_jax.tokenizer import load_tokenizer

# Conversations that two templates must write alike to be the same: one question, several, without an image.
PROBES = (
    (f"{MARK}\nWhat is it?", None),
    (f"{MARK}\nWhat is it?", "A cat.", "Why?", None),
    ("Is it?", "Yes.", "And now?", "No.", "Why?", None),
)


def read_chat_template(directory: Path) -> tuple[str, str] | None:
    """The chat template of a checkpoint, and the file that holds it; None where there is none.

    transformers' processors look in this order (processing_utils.py). The tokens that the program may name are set in
    front of it, so that it can be run by itself: BOS to nothing if the tokenizer adds one anyway. What it writes for an
    image becomes `<image>`.

    Raises:
      InputError: a file cannot be read.
    """
    found = _find(directory)
    if found is None:
        return None
    program, file = found
    settings = (read_json(directory / "special_tokens_map.json") or {}) | (
        read_json(directory / "tokenizer_config.json") or {}
    )
    tokens = {key: settings.get(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    tokens = {key: token.get("content") if isinstance(token, dict) else token for key, token in tokens.items()}
    if "bos_token" in program and load_tokenizer(directory).bos_id is not None:
        tokens["bos_token"] = ""
    processor = read_json(directory / "processor_config.json") or {}
    image = processor.get("image_token") or settings.get("image_token") or MARK
    image = image.get("content", MARK) if isinstance(image, dict) else str(image)
    given = "".join(
        f"{{%- set {key} = {_quoted(token)} -%}}" for key, token in tokens.items() if isinstance(token, str)
    )
    return given + program.replace(image, MARK), file


def _quoted(token: str) -> str:
    return "'" + token.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _find(directory: Path) -> tuple[str, str] | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8"), path.name
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        program = _default((read_json(directory / name) or {}).get("chat_template"))
        if program:
            return program, name
    return None


def _default(template: Any) -> str | None:
    """Of several templates by name, the one that is used without a name."""
    if isinstance(template, list):
        template = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template.strip() else None


def with_chat_template(config: LlavaConfig, found: tuple[str, str] | None) -> LlavaConfig:
    """The configuration with the template that its checkpoint carries: a named one if that writes the same, else the
    checkpoint's own. What `config.json` names stands."""
    if found is None or config.template:
        return config
    program, file = found
    try:
        written = [render_chat(program, probe) for probe in PROBES]
    except InputError as error:
        note(f"warning: {file}: not used: {shorten(str(error), 200)}")
        return config
    for name, template in TEMPLATES.items():
        if written == [render(template, probe)[0] for probe in PROBES]:
            return config.replace(template=name, template_from=file)
    return config.replace(template=program, template_from=file)
