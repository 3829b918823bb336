"""The requests of `train.datasets.instruct`: system messages and worked examples from files, and an image in words.

A folder of prompts has a folder for each kind, in the layout of the reference's `playground/data/prompts`:

    conversation/system_message.txt                 what to write, and in which form
    conversation/000_caps.txt, 000_conv.txt, ...    worked examples: an image in words, and what to write about it
    detail/..., reasoning/...                       (or detail_description/..., complex_reasoning/...)
    detail/questions.txt                            the questions that a description answers, one a line
    image.txt                                       added to the system message if the image itself goes along

The last two may be missing; then this package's own are used.
"""

import base64
import dataclasses
import hashlib
import io
from pathlib import Path

from PIL import Image

from llava_jax.console import InputError, shorten
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.images import open_image
from llava_jax.endpoints import Messages
from llava_jax.files import read_text
from train.datasets.instruct.coco import Record

FOLDERS = {
    "conversation": ("conversation",),
    "detail": ("detail", "detail_description"),
    "reasoning": ("reasoning", "complex_reasoning"),
}
KINDS = tuple(FOLDERS)
OWN = Path(__file__).parent / "prompts"
MAX_PROMPT_BYTES = 2**20
JPEG_QUALITY = 90


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The fixed part of the requests for a kind of answer. `examples` are images in words, and answers."""

    system: str
    examples: tuple[tuple[str, str], ...]

    def messages(self, text: str, image: str | None = None) -> Messages:
        """The messages that ask about an image: it in words, and its URL (`data:`) if the image itself goes along."""
        messages: Messages = [{"role": "system", "content": self.system}]
        for caps, answer in self.examples:
            messages += [{"role": "user", "content": caps}, {"role": "assistant", "content": answer}]
        parts = [{"type": "text", "text": text}] if text else []
        if image:
            content = [*parts, {"type": "image_url", "image_url": {"url": image}}]
            return [*messages, {"role": "user", "content": content}]
        return [*messages, {"role": "user", "content": text}]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.system, self.examples)).encode()).hexdigest()[:16]

    @property
    def answer_characters(self) -> int:
        """The mean length of the worked examples' answers."""
        return sum(len(answer) for _, answer in self.examples) // max(len(self.examples), 1)

    @property
    def characters(self) -> int:
        return len(self.system) + sum(len(caps) + len(answer) for caps, answer in self.examples)


def read_prompt(folder: Path | None, kind: str, *, with_image: bool = False) -> Prompt:
    """Read the prompt of a kind.

    Args:
      folder: default: this package's prompts.
      with_image: the image itself goes along.

    Raises:
      InputError: a file is missing or cannot be read.
    """
    found = _folder_of(folder or OWN, kind)
    system = _read(found / "system_message.txt")
    if with_image:
        system = f"{system}\n\n{_read(_given_or_own(folder, 'image.txt'))}"
    examples = []
    for caps in sorted(found.glob("*_caps.txt")):
        answer = caps.with_name(caps.name.removesuffix("_caps.txt") + "_conv.txt")
        examples.append((_read(caps), _read(answer)))
    return Prompt(system, tuple(examples))


def read_questions(folder: Path | None) -> list[str]:
    """Read the questions that a description answers.

    Raises:
      InputError: the file cannot be read, or has none.
    """
    given = [folder / name / "questions.txt" for name in FOLDERS["detail"]] if folder else []
    path = next((path for path in given if path.exists()), OWN / "detail" / "questions.txt")
    questions = [line.strip() for line in _read(path).split("\n") if line.strip()]
    if not questions:
        raise InputError(f"{shorten(path)}: has no questions")
    return questions


def _folder_of(folder: Path, kind: str) -> Path:
    for name in FOLDERS[kind]:
        if (folder / name).is_dir():
            return folder / name
    raise InputError(f"--prompts {shorten(folder)}: has no folder {' or '.join(FOLDERS[kind])}")


def _given_or_own(folder: Path | None, name: str) -> Path:
    return folder / name if folder and (folder / name).exists() else OWN / name


def _read(path: Path) -> str:
    if not path.exists():
        raise InputError(f"{shorten(path)}: no such file")
    if not (text := read_text(path, MAX_PROMPT_BYTES).strip()):
        raise InputError(f"{shorten(path)}: is empty")
    return text


# ---------------------------------------------------------------- an image


def describe(record: Record, *, boxes: bool) -> str:
    """An image in words: its captions, a line each; then after an empty line its boxes, `class: [x1, y1, x2, y2]`."""
    parts = ["\n".join(record.captions)]
    if boxes and record.boxes:
        parts.append("\n".join(f"{box.category}: {list(box.bbox)}" for box in record.boxes))
    return "\n\n".join(filter(None, parts))


def image_url(folder: ImageFolder, name: str, side: int) -> str:
    """An image as a `data:` URL of a JPEG, downscaled so that no side is longer than `side` pixels.

    Raises:
      InputError: the image cannot be read.
    """
    image = open_image(folder.find(name))
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
