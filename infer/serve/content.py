"""Messages of a request -> the turns, the images and the system message of a prompt."""

import dataclasses
from collections.abc import Sequence

from infer.serve.errors import ApiError, not_implemented
from infer.serve.fields import ImagePart, Message
from llava_jax.data.templates import IMAGE_TOKEN


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation as the engine takes it.

    Attributes:
      turns: question, answer, ..., question.
      images: the URL of each image, and its name in errors, in the order of the turns.
    """

    turns: tuple[str, ...]
    images: tuple[tuple[str, str], ...]
    system: str | None


def read_messages(messages: Sequence[Message], max_images: int) -> Conversation:
    """Convert messages.

    System and developer messages, wherever they are, become one system message, with a blank line between them: the
    templates have a single one. Consecutive messages of a role become one turn. The parts of a message are on lines of
    their own, an image where its part is.

    Raises:
      ApiError: the messages do not make a conversation that ends with a question, or have too many images.
    """
    system: list[str] = []
    turns: list[list[str]] = []
    images: list[tuple[str, str]] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if message.role in ("tool", "function"):
            raise not_implemented(f"{where}.role", f"the role {message.role}")
        text, found = _read_content(message, where)
        if message.role in ("system", "developer"):
            system.append(text)
            continue
        is_answer = message.role == "assistant"
        if is_answer and not turns:
            raise ApiError(400, "the conversation begins with an answer; begin with a user message", f"{where}.role")
        if is_answer == bool(len(turns) % 2):
            turns.append([])
        turns[-1].append(text)
        images += found
        if len(images) > max_images:
            raise ApiError(400, f"more than {max_images} images in a request", "messages")
    if len(turns) % 2 == 0:
        reason = "ends with an answer, which this server does not continue" if turns else "has no user message"
        raise ApiError(400, f"the conversation {reason}; end with a user message", "messages")
    joined = tuple("\n".join(turn) for turn in turns)
    return Conversation(joined, tuple(images), "\n\n".join(system) if system else None)


def _read_content(message: Message, where: str) -> tuple[str, list[tuple[str, str]]]:
    """The text of a message with its images, and their URLs and names."""
    if message.content is None and message.role != "assistant":
        raise ApiError(400, f"{where}.content is missing", f"{where}.content")
    if not isinstance(message.content, list):
        return message.content or "", []
    texts, images = [], []
    for number, part in enumerate(message.content):
        if isinstance(part, ImagePart):
            if message.role != "user":
                raise ApiError(400, f"{where}: only user messages may have images", f"{where}.content[{number}]")
            images.append((part.url, f"{where}.content[{number}]"))
            texts.append(IMAGE_TOKEN)
        else:
            texts.append(part.text)
    return "\n".join(texts), images
