"""Decoding token by token: each token's text as soon as no later token can change it."""

from collections.abc import Callable


class WholeStream:
    """Decodes all ids at every token, and no text is certain before the last one.

    For tokenizers whose later tokens may change all text before them.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode, self._ids = decode, list[int]()

    def add(self, token_id: int) -> str:
        """Add a token: the text that became certain."""
        self._ids.append(token_id)
        return ""

    def rest(self) -> str:
        """The text beyond what is certain, if no other token follows."""
        return self._decode(self._ids)

    def finish(self) -> str:
        """The same, and forget it."""
        rest, self._ids = self.rest(), []
        return rest
