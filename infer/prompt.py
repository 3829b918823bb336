"""Prompts: a question with its images, tokenized and laid out on the host. Nothing here runs on a device."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError
from llava_jax.data.images import TileLayout, image_size, read_tiles, tile_layout
from llava_jax.data.prompts import add_image_tokens, encode_prompt
from llava_jax.data.splice import IMAGE, NEWLINE, TEXT, image_indices, merge_rows
from llava_jax.data.templates import IMAGE_PART, Template, Turn
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.data.urls import NamedBytes, fetch

BLOCK = 2**20  # bytes of a file that are hashed at a time
_SALT = os.urandom(16)  # nobody outside can make two images with one key


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt. `turns` is question, answer, ..., question, each a text or a sequence of texts and `IMAGE_PART`s;
    `images` are paths, URLs, bytes or Pillow images."""

    turns: tuple[Turn, ...]
    images: tuple = ()
    system: str | None = None
    name: str = ""  # for errors
    number: int = 0  # selects the row's random key
    trust_special_tokens: bool = True  # whether special tokens in the text are control rather than text


@dataclasses.dataclass(eq=False)
class PromptImage:
    """An image of a prompt. Equal keys mean equal features."""

    source: Any
    name: str  # of the request, for errors
    layout: TileLayout
    key: bytes
    config: LlavaConfig = dataclasses.field(repr=False)

    def read(self) -> np.ndarray:
        """Its tiles, uint8 [T, H, W, 3].

        Raises:
          InputError: the image cannot be read.
        """
        try:
            return read_tiles(self.source, self.layout, self.config)
        except MemoryError:
            raise InputError(f"{self.name or 'image'}: not enough memory for its pixels") from None
        except InputError as error:
            raise _named(error, self.name) from None

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The row of its feature table for each of its positions, int32 [n]; the newline's is the last."""
        rows = merge_rows(self.layout, self.config)
        return np.where(rows == NEWLINE, self.layout.tiles * self.config.vision.features_per_tile, rows)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A tokenized request. Arrays have an entry for each of its n positions.

    ids     int32, 0 at images
    places  int32, the number of the position's image, or `TEXT`
    rows    int32, the row of that image's feature table, or `TEXT`
    keys    int64, equal for equal tokens and for equal rows of equal images: prompts with a common prefix of keys have
            that prefix of their cache in common
    """

    request: Request
    images: tuple[PromptImage, ...]
    ids: np.ndarray
    places: np.ndarray
    rows: np.ndarray
    keys: np.ndarray

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def image_tokens(self) -> int:
        return int((self.places != TEXT).sum())

    def images_in(self, start: int, end: int) -> list[int]:
        """The numbers of the images that have features among positions `start` to `end`."""
        return [int(i) for i in np.unique(self.places[start:end]) if i != TEXT]


def turn_of(parts: Sequence[str]) -> Turn:
    """A turn of the parts of messages, texts and `IMAGE_PART`s.

    Parts are on lines of their own, an image where its part is. If all images come after the text, as some clients send
    them, they are put in front of it, as in the conversations that models are trained on.
    """
    texts = [part for part in parts if part is not IMAGE_PART]
    images = parts[len(texts) :]
    if all(part is IMAGE_PART for part in images):
        parts = [*images, *texts]
    turn: list[str] = []
    for part in parts:
        if any(before is not IMAGE_PART for before in turn):
            turn.append("\n")  # images in front get theirs from `add_image_tokens`
        turn.append(part)
    return tuple(turn) if images else "".join(turn)


def prepare(
    request: Request, config: LlavaConfig, tokenizer: Tokenizer, template: Template, *, reply: bool = True
) -> Prompt:
    """Fetch and hash a request's images, lay out their tiles, and tokenize it.

    Args:
      reply: end the prompt where an answer begins; otherwise the last turn is an answer already.

    Raises:
      InputError: an image cannot be read, the numbers of marks and images differ, or the prompt is too long.
    """
    try:
        images = tuple(prompt_image(source, config, request.name) for source in request.images)
        trust = dict(trust_special_tokens=request.trust_special_tokens)
        turns = add_image_tokens(request.turns, len(images), config, **trust)
        ids = encode_prompt(template, [*turns, None] if reply else turns, tokenizer, system=request.system, **trust)
        if (highest := int(ids.max(initial=0))) >= config.text.vocab_size:
            raise InputError(
                f"the tokenizer returns the id {highest}, but the model has {config.text.vocab_size} "
                "embeddings: the tokenizer is not the model's"
            )
        prompt = place_images(request, images, ids)
        check_length(prompt, config.text.max_positions, "the model's context", reply=reply)
        return prompt
    except InputError as error:
        raise _named(error, request.name) from None


def check_length(prompt: Prompt, context: int, name: str, *, reply: bool = True) -> None:
    """Check that a prompt fits a context, if `reply` with one position to answer.

    Raises:
      InputError: it does not.
    """
    room = context - (1 if reply else 0)
    if prompt.length > room:
        raise InputError(
            f"the prompt takes {prompt.length} positions ({prompt.image_tokens} of them for images); at most {room} "
            f"fit {name} of {context}{', which leaves one to answer' * reply}"
        )


def _named(error: InputError, name: str) -> InputError:
    return InputError(f"{name}: {error}") if name else error


def prompt_image(source: Any, config: LlavaConfig, name: str = "") -> PromptImage:
    """Fetch and hash an image, and lay out its tiles.

    Args:
      name: of the request, for errors.

    Raises:
      InputError: it cannot be fetched, or is not an image.
    """
    source = fetch(source)
    return PromptImage(source, name, tile_layout(image_size(source), config), _hash(source), config)


def _hash(source: Any) -> bytes:
    digest = hashlib.blake2b(key=_SALT, digest_size=16)
    if isinstance(source, Image.Image):
        digest.update(f"{source.mode} {source.size} {source.getexif().get(0x0112)}".encode())
        digest.update(source.tobytes())
        if source.palette:
            digest.update(source.palette.tobytes())
    elif isinstance(source, (bytes, NamedBytes)):
        digest.update(source)
    else:  # `image_size` has opened it
        with open(source, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.digest()


def place_images(request: Request, images: tuple[PromptImage, ...], ids: np.ndarray) -> Prompt:
    """A prompt of token ids, with the positions of each image where its `IMAGE` is.

    Raises:
      InputError: the numbers of image tokens and images differ.
    """
    tokens = image_indices(ids, len(images), request.name)
    counts = np.ones(len(ids), np.int64)
    counts[tokens] = [len(image.rows) for image in images]
    number = np.full(len(ids), TEXT, np.int32)
    number[tokens] = np.arange(len(images))
    places = np.repeat(number, counts)
    is_image = places != TEXT
    rows = np.full(len(places), TEXT, np.int32)
    spliced = np.repeat(np.where(ids == IMAGE, 0, ids), counts).astype(np.int32)
    keys = spliced.astype(np.int64)
    if images:
        rows[is_image] = np.concatenate([image.rows for image in images])
        keys[is_image] = np.concatenate([_feature_keys(image) for image in images])
    return Prompt(request, images, spliced, places, rows, keys)


def _feature_keys(image: PromptImage) -> np.ndarray:
    """A negative key for each position of an image: a hash of the image, different for each row of its features."""
    base = np.frombuffer(image.key[:8], np.uint64)
    mixed = base + image.rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # wraps around
    return -(1 + (mixed >> np.uint64(2)).astype(np.int64))
