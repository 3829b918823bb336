"""The chat template that a checkpoint carries, a Jinja program of transformers: read, and compared with ours."""

from pathlib import Path
from typing import TypedDict

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, note, shorten
from llava_jax.data.sentencepiece_tokenizer import Token, content_of
from llava_jax.data.templates import IMAGE_TOKEN, MAX_CHAT_TEMPLATE, TEMPLATES, render, render_chat
from llava_jax.data.tokenizer import NamedTemplate, Settings, load_tokenizer
from llava_jax.files import read_text
from llava_jax.json_files import read_json

# Conversations that two templates must write alike to be the same: one question, several, without an image, with
# two. (Without a system message: published templates differ from the originals there, and few people give one.)
PROBES = (
    (f"{IMAGE_TOKEN}\nWhat is it?", None),
    (f"{IMAGE_TOKEN}\nWhat is it?", "A cat.", "Why?", None),
    (f"{IMAGE_TOKEN}\n{IMAGE_TOKEN}\nWhich is it?", None),
    ("Is it?", "Yes.", "And now?", "No.", "Why?", None),
)


class Processor(TypedDict, total=False):
    """`processor_config.json`, as far as it is about text, and `chat_template.json`."""

    chat_template: str | list[NamedTemplate] | dict[str, str] | None
    image_token: str | Token | None


def read_chat_template(directory: Path) -> tuple[str, str] | None:
    """The chat template of a checkpoint, and the file that holds it; None where there is none.

    The files are looked at in the order of transformers' processors (processing_utils.py `get_processor_dict`), and the
    tokenizer's last. The tokens that the program may name are set in front of it, so that it can be run by itself. What
    it writes for an image becomes `<image>`.

    Raises:
      InputError: a file cannot be read.
    """
    found = _find(directory)
    if found is None:
        return None
    program, file = found
    tokens = _special_tokens(directory)
    image = content_of((read_json(directory / "processor_config.json", Processor) or {}).get("image_token"))
    image = image or tokens.pop("image_token", None) or IMAGE_TOKEN
    given = "".join(f"{{%- set {key} = {_quoted(token)} -%}}" for key, token in tokens.items())
    return given + program.removeprefix(given).replace(image, IMAGE_TOKEN), file


def _special_tokens(directory: Path) -> dict[str, str]:
    """The special tokens that a tokenizer's files name, which a chat template may use."""
    settings = (read_json(directory / "special_tokens_map.json", Settings) or {}) | (
        read_json(directory / "tokenizer_config.json", Settings) or {}
    )
    keys = ("bos_token", "eos_token", "unk_token", "pad_token", "image_token")
    return {key: token for key in keys if (token := content_of(settings.get(key)))}


def _quoted(token: str) -> str:
    return "'" + token.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _find(directory: Path) -> tuple[str, str] | None:
    for name in ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        path = directory / name
        if path.suffix == ".jinja":
            program = read_text(path, MAX_CHAT_TEMPLATE) if path.exists() else None
        else:
            fields = read_json(path, Settings if path.name == "tokenizer_config.json" else Processor) or {}
            program = _default(fields.get("chat_template"))
        if program:
            return program, name
    return None


def _default(template: str | list[NamedTemplate] | dict[str, str] | None) -> str | None:
    """Of several templates by name, the one that is used without a name."""
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template if template and template.strip() else None


def with_chat_template(config: LlavaConfig, directory: Path) -> LlavaConfig:
    """The configuration with the template that its checkpoint carries: a named one if that writes the same, else the
    checkpoint's own. What `config.json` names stands."""
    found = None if config.template else read_chat_template(directory)
    if found is None:
        return config
    program, file = found
    try:
        written = [render_chat(program, probe) for probe in PROBES]
        bos = _special_tokens(directory).get("bos_token")
        if bos and written[0].startswith(bos) and load_tokenizer(directory).bos_id is not None:  # which adds it anyway
            written = [text.removeprefix(bos) for text in written]
    except InputError as error:
        note(f"warning: {file}: not used: {shorten(str(error), 200)}")
        return config
    for name, template in TEMPLATES.items():
        if written == [render(template, probe)[0] for probe in PROBES]:
            return config.replace(template=name, template_from=file)
    return config.replace(template=program, template_from=file)
