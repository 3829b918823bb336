"""Read the chat template of a checkpoint, a Jinja program of transformers, and compare it with our templates."""

from pathlib import Path
from typing import TypedDict

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, note, shorten
from llava_jax.data.sentencepiece_tokenizer import Token, content_of
from llava_jax.data.templates import IMAGE_TOKEN, MAX_CHAT_TEMPLATE, TEMPLATES, render, render_chat
from llava_jax.data.tokenizer import NamedTemplate, Settings, load_tokenizer
from llava_jax.files import read_text
from llava_jax.json_files import read_json

# Two templates count as equal if they render these conversations alike: one question, several, no image, two images.
# None has a system message: published templates differ from the originals there, and few people pass one.
PROBES = (
    (f"{IMAGE_TOKEN}\nWhat is it?", None),
    (f"{IMAGE_TOKEN}\nWhat is it?", "A cat.", "Why?", None),
    (f"{IMAGE_TOKEN}\n{IMAGE_TOKEN}\nWhich is it?", None),
    ("Is it?", "Yes.", "And now?", "No.", "Why?", None),
)


class Processor(TypedDict, total=False):
    """The fields of `processor_config.json` that concern text, and those of `chat_template.json`."""

    chat_template: str | list[NamedTemplate] | dict[str, str] | None
    image_token: str | Token | None


def read_chat_template(directory: Path) -> tuple[str, str] | None:
    """The chat template of a checkpoint, and the file that holds it; None if the checkpoint has none.

    It searches the files in the order of transformers' processors (processing_utils.py `get_processor_dict`), and the
    tokenizer's last. It prepends definitions of the special tokens that the program may use, so that the program runs
    by itself, and replaces the checkpoint's image token by `<image>`.

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
    """The special tokens in a tokenizer's files that a chat template may use."""
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
    """The template itself, or the one named `default` of several."""
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template if template and template.strip() else None


def with_chat_template(config: LlavaConfig, directory: Path) -> LlavaConfig:
    """The configuration with the template of its checkpoint: one of ours, by name, if that renders the same, else the
    checkpoint's own. A template that `config.json` names takes precedence."""
    found = None if config.template else read_chat_template(directory)
    if found is None:
        return config
    program, file = found
    try:
        written = [render_chat(program, probe) for probe in PROBES]
        bos = _special_tokens(directory).get("bos_token")
        if (
            bos and written[0].startswith(bos) and load_tokenizer(directory).bos_id is not None
        ):  # the tokenizer adds it anyway
            written = [text.removeprefix(bos) for text in written]
    except InputError as error:
        note(f"warning: {file}: is not used: {shorten(str(error), 200)}")
        return config
    for name, template in TEMPLATES.items():
        if written == [render(template, probe)[0] for probe in PROBES]:
            return config.replace(template=name, template_from=file)
    return config.replace(template=program, template_from=file)
