"""Messages of a request -> the turns, the images and the system message of a prompt."""

import dataclasses
from collections.abc import Sequence

from infer.prompt import turn_of
from infer.serve.errors import ApiError, not_implemented
from infer.serve.fields import ImagePart, Message
from llava_jax.data.templates import IMAGE_PART, Turn


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation as the engine takes it.

    Attributes:
      turns: question, answer, ..., question; each a text, or texts and `IMAGE_PART`s.
      images: the URL of each image, and its name in errors, in the order of the turns.
    """

    turns: tuple[Turn, ...]
    images: tuple[tuple[str, str], ...]
    system: str | None

    @property
    def characters(self) -> int:
        """The length of all texts."""
        texts = (turn if isinstance(turn, str) else "".join(turn or ()) for turn in self.turns)
        return len(self.system or "") + sum(map(len, texts))


def read_messages(messages: Sequence[Message], max_images: int) -> Conversation:
    """Convert messages.

    System and developer messages, wherever they are, become one system message, with a blank line between them: the
    templates have a single one. Consecutive messages of a role become one turn, as `turn_of` joins their parts.

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
        parts = _read_parts(message, where, images)
        if len(images) > max_images:
            raise ApiError(400, f"more than {max_images} images in a request", "messages")
        if message.role in ("system", "developer"):
            system.append("\n".join(parts))
            continue
        is_answer = message.role == "assistant"
        if is_answer and not turns:
            raise ApiError(400, "the conversation begins with an answer; begin with a user message", f"{where}.role")
        if is_answer == bool(len(turns) % 2):
            turns.append([])
        turns[-1] += parts
    if len(turns) % 2 == 0:
        reason = "ends with an answer, which this server does not continue" if turns else "has no user message"
        raise ApiError(400, f"the conversation {reason}; end with a user message", "messages")
    return Conversation(tuple(map(turn_of, turns)), tuple(images), "\n\n".join(system) if system else None)


def _read_parts(message: Message, where: str, images: list[tuple[str, str]]) -> list[str]:
    """The parts of a message: texts, and `IMAGE_PART` for the images, whose URLs and names are added to `images`."""
    if message.content is None and message.role != "assistant":
        raise ApiError(400, f"{where}.content is missing", f"{where}.content")
    if not isinstance(message.content, list):
        return [message.content or ""]
    parts: list[str] = []
    for number, part in enumerate(message.content):
        if isinstance(part, ImagePart):
            if message.role != "user":
                raise ApiError(400, f"{where}: only user messages may have images", f"{where}.content[{number}]")
            images.append((part.url, f"{where}.content[{number}]"))
        parts.append(IMAGE_PART if isinstance(part, ImagePart) else part.text)
    return parts
