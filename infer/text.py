"""The text of an answer while its tokens arrive: decoded, truncated at a stop string, without whitespace around it."""

from collections.abc import Iterable

from llava_jax.data.tokenizer import Tokenizer


class AnswerText:
    """The text of one answer, token by token.

    The pieces that `add` and `finish` return make up `tokenizer.decode(token_ids)`, truncated at the first stop string
    and stripped. A piece is returned once no later token can change it: held back are incomplete characters, what may
    be the beginning of a stop string, and whitespace that nothing follows yet. Time is linear in the answer's length.

    Attributes:
      text: the text so far, all pieces joined.
      token_ids: the ids so far; the last one completed the stop string if one was found.
      stopped: the stop string that was found, or None.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str | None] = ()):
        """Of several stop strings, the first one in the text is found, of several there the shortest."""
        self.text, self.token_ids = "", list[int]()
        self.stopped: str | None = None
        self._stream = tokenizer.stream()
        self._stops = sorted({stop for stop in stops if stop}, key=len)
        self._held = ""  # decoded text that may begin a stop string
        self._space = ""  # whitespace behind `text`

    def add(self, token_id: int, *, may_stop: bool = True) -> str:
        """Add a token: the text that became certain. Once a stop string was found, further tokens are ignored.

        Args:
          may_stop: False if a stop string that this token completes is text like any other.
        """
        if self.stopped is not None:
            return ""
        self.token_ids.append(token_id)
        text = self._held + self._stream.add(token_id)
        if self._stops and may_stop:
            shown = text + self._stream.rest()
            if found := [(at, stop) for stop in self._stops if (at := shown.find(stop)) >= 0]:
                at, self.stopped = min(found, key=lambda item: item[0])
                return self._emit(shown[:at])
        certain = min((_beginning(stop, text) for stop in self._stops), default=len(text))
        self._held = text[certain:]
        return self._emit(text[:certain])

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        if self.stopped is not None:
            return ""
        rest, self._held = self._held + self._stream.finish(), ""
        return self._emit(rest)

    def _emit(self, text: str) -> str:
        stripped = text.rstrip()
        if not stripped:
            self._space += text
            return ""
        piece = self._space + stripped if self.text else stripped.lstrip()
        self._space = text[len(stripped) :]
        self.text += piece
        return piece


def _beginning(stop: str, text: str) -> int:
    """Where at the end of a text the stop string may begin: the text's length if nowhere."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) if at < 0 else at
