"""A conversation with a model: its turns and images, saved and loaded in the format of data files (docs/data.md)."""

import base64
import dataclasses
import io
import json
import os
from pathlib import Path

import PIL.Image

from infer.benchmarks.conversations import questions_of
from llava_jax.console import InputError, first_line, shorten
from llava_jax.data.data_files import read_rows
from llava_jax.data.images import MAX_FILE, image_size
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.data.urls import NamedBytes, fetch, is_url
from llava_jax.files import new_file, read_bytes


@dataclasses.dataclass(frozen=True)
class Image:
    """An image file, read once: what happens to the file later does not change the conversation.

    Attributes:
      name: an absolute path, or a URL; what a saved conversation names.
      file: the bytes of the file.
    """

    name: str
    file: NamedBytes


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A question, with an `<image>` for each of its images, and its answer."""

    question: str
    images: tuple[Image, ...] = ()
    answer: str = ""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Exchanges, and a system message instead of the template's; None for the template's own."""

    exchanges: tuple[Exchange, ...] = ()
    system: str | None = None

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(image for exchange in self.exchanges for image in exchange.images)

    @property
    def turns(self) -> list[str]:
        """Question, answer, ..., question, answer."""
        return [text for exchange in self.exchanges for text in (exchange.question, exchange.answer)]

    def add(self, exchange: Exchange) -> "Conversation":
        return dataclasses.replace(self, exchanges=(*self.exchanges, exchange))

    def without_last(self) -> "Conversation":
        return dataclasses.replace(self, exchanges=self.exchanges[:-1])


def read_image(source: str) -> Image:
    """Read an image from a path, in which `~` is the home directory, or from an `http(s):`, `data:` or `file:` URL.

    Raises:
      InputError: it cannot be read, or is not an image.
    """
    name, file = source, fetch(source)
    if not isinstance(file, NamedBytes):
        path = os.path.expanduser(file)
        name, file = os.path.abspath(path), NamedBytes(read_bytes(path, MAX_FILE))
        file.name = shorten(source)
    image_size(file)
    return Image(name, file)


def place_images(text: str, images: tuple[Image, ...]) -> str:
    """A question with an `<image>` for each image: where its text has them, or else in front (llava/serve/cli.py).

    Raises:
      InputError: the text has `<image>`, but not one for each image.
    """
    marks = text.count(IMAGE_TOKEN)
    if marks not in (0, len(images)):
        raise InputError(
            f"the question has {marks} {IMAGE_TOKEN} for {len(images)} images; give one for each image, or none"
        )
    return text if marks else f"{IMAGE_TOKEN}\n" * len(images) + text


# ---------------------------------------------------------------- files


def save(conversation: Conversation, path: str | os.PathLike) -> None:
    """Write a data file with one row. Images keep their paths; a downloaded image is written as a `data:` URL, since
    data files name none that need a download.

    Raises:
      InputError: the file cannot be written.
    """
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(conversation.turns)]
    images = [_data_url(image) if is_url(image.name) else image.name for image in conversation.images]
    row = {"id": Path(path).stem, "images": images, "system": conversation.system, "conversations": turns}
    row = {key: value for key, value in row.items() if value}
    try:
        data = json.dumps([row], ensure_ascii=False, indent=1).encode() + b"\n"
        with new_file(path) as file:
            file.write(data)
    except UnicodeEncodeError:
        raise InputError(f"{shorten(path)}: not written: the conversation has an unpaired Unicode surrogate") from None
    except (OSError, ValueError) as error:  # ValueError: an invalid file name
        raise InputError(f"{shorten(path)}: cannot be written ({first_line(error)})") from None


def load(path: str | os.PathLike) -> Conversation:
    """Read the conversation of a data file with one row, and its images; relative names are relative to the current
    directory. A last question without an answer is dropped, as in training.

    Raises:
      InputError: the file or an image cannot be read, or the file has several rows.
    """
    rows, name = read_rows(path), shorten(path)
    if len(rows) != 1:
        raise InputError(f"{name}: has {len(rows):,} conversations; give a file with one")
    try:
        last = questions_of(rows[0], name, _local_image)[-1]
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    texts, images = [*last.turns, last.answer], list(last.images)
    if not any(IMAGE_TOKEN in text for text in texts):
        texts[0] = place_images(texts[0], tuple(images))
    exchanges = []
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        count = question.count(IMAGE_TOKEN)
        exchanges.append(Exchange(question, tuple(images[:count]), answer))
        del images[:count]
    return Conversation(tuple(exchanges), last.system)


def _local_image(name: str) -> Image:
    if is_url(name):
        raise InputError(f"{shorten(name)}: images in data files are not downloaded")
    return read_image(name)


def _data_url(image: Image) -> str:
    kind = PIL.Image.open(io.BytesIO(image.file)).get_format_mimetype()
    return f"data:{kind};base64,{base64.b64encode(image.file).decode()}"
