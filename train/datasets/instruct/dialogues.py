"""Dialogues with a language model about images, one for each image and kind: what to ask next, and what came of it.

All state is the file of replies. A dialogue is a request, and for each reply that cannot be used another one with the
reason, up to a number of attempts.
"""

import dataclasses
import functools
import hashlib
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from llava_jax.console import InputError, shorten
from llava_jax.data.image_folder import ImageFolder
from llava_jax.endpoints import Messages, Request
from llava_jax.replies import Replies, Reply
from train.datasets.instruct.answers import BadAnswer, Checker, Turn, retry_message
from train.datasets.instruct.coco import Record
from train.datasets.instruct.messages import Prompt, describe, image_url

HOPELESS = 20  # dialogues that end in rejection before one succeeds: then the model cannot do it


class Dialogue(NamedTuple):
    """A dialogue about an image. Its id has a hash of the image in words, so that it is another one if these change."""

    id: str
    record: Record
    kind: str


class State(NamedTuple):
    """What came of a dialogue so far.

    Attributes:
      turns: questions and answers, once a reply can be used.
      rejected: each reply that cannot, and the reason.
    """

    turns: list[Turn] | None
    rejected: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Images:
    """Images that go along with the requests, no side longer than `side` pixels."""

    folder: ImageFolder
    side: int


class Dialogues:
    """The dialogues about some images, in their order, by id."""

    def __init__(
        self,
        records: Iterable[Record],
        prompts: Mapping[str, Prompt],
        replies: Replies,
        *,
        attempts: int,
        boxes_for: Collection[str],
        language: str | None = "en",
        images: Images | None = None,
    ):
        """
        Args:
          prompts: by kind; each image has a dialogue of each.
          attempts: requests of a dialogue.
          boxes_for: the kinds that are asked for with the boxes of the objects.
          language: as `Checker`.

        Raises:
          InputError: there is nothing to tell the model about an image.
        """
        self.prompts, self.replies, self.attempts, self.images = prompts, replies, attempts, images
        self.boxes_for = boxes_for
        self.checkers = {kind: Checker(kind, prompt, language) for kind, prompt in prompts.items()}
        self.by_id: dict[str, Dialogue] = {}
        self.accepted = self.rejected = 0  # by `follow_up`
        for record in records:
            for kind in prompts:
                text = self.text(record, kind)
                if not text and not images:
                    raise InputError(
                        f"id {shorten(record.id)}: has nothing to ask for {kind} with: no captions; --image-folder "
                        "sends the image itself"
                    )
                name = f"{record.id}/{kind}/{hashlib.sha256(text.encode()).hexdigest()[:8]}"
                self.by_id[name] = Dialogue(name, record, kind)

    def text(self, record: Record, kind: str) -> str:
        """What a request for a kind says about an image."""
        return describe(record, boxes=kind in self.boxes_for)

    def state(self, dialogue: Dialogue) -> State:
        """Read what came of a dialogue so far."""
        rejected: list[tuple[str, str]] = []
        while len(rejected) < self.attempts and (reply := self.replies.get(_attempt(dialogue, len(rejected)))):
            try:
                return State(self.checkers[dialogue.kind].turns(reply.text, reply.finish_reason), rejected)
            except BadAnswer as error:
                rejected.append((reply.text, str(error)))
        return State(None, rejected)

    def request(self, dialogue: Dialogue, state: State) -> Request | None:
        """The next request of a dialogue; None if it has ended."""
        if state.turns or len(state.rejected) >= self.attempts:
            return None
        messages = functools.partial(self.messages, dialogue, state.rejected)
        return Request(_attempt(dialogue, len(state.rejected)), messages)

    def messages(self, dialogue: Dialogue, rejected: Sequence[tuple[str, str]] = ()) -> Messages:
        """The messages of a request, after replies that were rejected.

        Raises:
          InputError: the image cannot be read.
        """
        record, url = dialogue.record, None
        if self.images:
            url = image_url(self.images.folder, record.image, self.images.side)
        messages = self.prompts[dialogue.kind].messages(self.text(record, dialogue.kind), url)
        for text, reason in rejected:
            messages.append({"role": "assistant", "content": text or "(empty)"})
            messages.append({"role": "user", "content": retry_message(reason)})
        return messages

    def of(self, request: str) -> Dialogue | None:
        """The dialogue that a request belongs to, by its id."""
        return self.by_id.get(request.rpartition("/")[0])

    def follow_up(self, reply: Reply) -> Request | None:
        """The request after a reply; None if the dialogue has ended.

        Raises:
          InputError: many dialogues end in rejection, and none otherwise.
        """
        dialogue = self.of(reply.id)
        assert dialogue
        state = self.state(dialogue)
        following = self.request(dialogue, state)
        self.accepted += state.turns is not None
        self.rejected += following is None and state.turns is None
        if not self.accepted and self.rejected >= HOPELESS:
            reason = state.rejected[-1][1] if state.rejected else "?"
            raise InputError(
                f"all of the first {HOPELESS} dialogues were rejected, the last one because {reason}; try another "
                f"model or other --prompts ({self.replies.name} has the replies)"
            )
        return following


def _attempt(dialogue: Dialogue, rejected: int) -> str:
    return f"{dialogue.id}/{rejected + 1}"


def to_row(dialogue: Dialogue, turns: Sequence[Turn], questions: Sequence[str], seed: int) -> dict[str, Any]:
    """A conversation in the original's format. `<image>` is before or after the first question, at random.

    Args:
      questions: those that a description answers, of which one is drawn.
    """
    rng = random.Random(f"{seed}/{dialogue.record.id}/{dialogue.kind}")
    is_first, drawn = rng.random() < 0.5, rng.choice(questions)
    conversations = []
    for i, (question, answer) in enumerate(turns):
        question = question or drawn
        if i == 0:
            question = f"<image>\n{question}" if is_first else f"{question}\n<image>"
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": dialogue.record.id, "image": dialogue.record.image, "conversations": conversations}
