"""Conversations as tokens: the template of a run applied to the rows of its data."""

import dataclasses

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError
from llava_jax.data.conversations import Conversation
from llava_jax.data.prompts import encode_conversation, prepare_tokenizer
from llava_jax.data.splice import image_indices
from llava_jax.data.templates import choose_template, get_template, is_jinja
from llava_jax.data.tokenizer import Tokenizer
from train.lengths import lengths_key, lengths_name


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation as tokens, before truncation."""

    ids: np.ndarray  # int32 [n], `IMAGE` for each image
    labels: np.ndarray  # int32 [n]
    names: tuple[str, ...]  # of the images


class Encoder:
    """Tokenizes conversations for training.

    Attributes:
      name: the name of the template.
      template: the template.
    """

    def __init__(self, model: LlavaConfig, tokenizer: Tokenizer, template: str | None = None):
        """
        Args:
          template: None for the model's own.

        Raises:
          InputError: the template cannot be used for training, or not with this tokenizer.
        """
        self._model, self._tokenizer = model, tokenizer
        self.name = template or choose_template(model)
        if is_jinja(self.name):
            raise InputError(
                f"the checkpoint has a chat template of its own ({model.template_from}), which does not mark "
                f"what is trained: choose one with --template ({choose_template(model.replace(template=None))} suits "
                f"its decoder)"
            )
        self.template = get_template(self.name)
        stop = self.template.stop or ""
        if stop.startswith("<") and tokenizer.token_id(stop) is None:
            raise InputError(
                f"--template {self.name}: its answers end in {stop}, which is not a token of this "
                "checkpoint's tokenizer; choose a template that fits the model"
            )
        prepare_tokenizer(tokenizer, model)

    def encode(self, conversation: Conversation, order: int) -> Encoded:
        """
        Args:
          order: the place of a single image in its turn: 0 for in front of the text, 1 for after it.

        Raises:
          InputError: its turns or its image tokens are invalid.
        """
        images = len(conversation.images)
        ids, labels = encode_conversation(
            conversation.turns,
            self.template,
            self._tokenizer,
            self._model,
            system=conversation.system,
            images=images,
            image_last=bool(order),
        )
        if len(ids) and ids.max() >= self._model.text.vocab_size:
            raise InputError(f"token {ids.max()} is beyond the model's vocabulary of {self._model.text.vocab_size}")
        image_indices(ids, images)
        return Encoded(ids, labels, conversation.images)

    def lengths_name(self, orders: int) -> str:
        """The file of a prepared dataset that has the lengths of these tokens; `orders` as in `lengths_key`."""
        return lengths_name(lengths_key(self.template, self._tokenizer, self._model, orders))
