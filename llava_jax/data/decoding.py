"""Decoding token by token: the text of each token as soon as no later token can change it.

A stream's `add` returns the text that became certain, `rest` what would follow if no other token came, and `finish` the
same at the end. What they return is exactly what decoding all ids at once gives, at a cost that does not grow with
their number.
"""

import codecs
from collections.abc import Callable, Container
from typing import Protocol

REPLACEMENT = "\ufffd"  # in place of what is not UTF-8


class Stream(Protocol):
    def add(self, token_id: int) -> str: ...
    def rest(self) -> str: ...
    def finish(self) -> str: ...


class ByteStream:
    """For tokenizers whose tokens are bytes of UTF-8: byte-level BPE."""

    def __init__(self, token_bytes: Callable[[int], bytes], skips: Callable[[int], bool]):
        self._token_bytes, self._skips = token_bytes, skips
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        return "" if self._skips(token_id) else self._utf8.decode(self._token_bytes(token_id))

    def rest(self) -> str:
        return self._utf8.getstate()[0].decode(errors="replace")

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class PieceStream:
    """For tokenizers whose tokens have the same text everywhere but at the beginning.

    Once there is text, that of further ids is what they add to the text of one or two, the `word`. Before, and after an
    added token if that is a new beginning, they are decoded with all ids from there on.

    Args:
      decode: the text of ids.
      byte: the byte that an id stands for; None for other ids.
      skips: whether an id is left out before the others are decoded.
      beginnings: ids of added tokens after which text begins anew.
      whole_runs: bytes that follow each other are text only if all of them together are UTF-8. Otherwise each of them
        is text once its character is complete, and a replacement character if it is not part of one.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        byte: Callable[[int], int | None],
        skips: Callable[[int], bool],
        *,
        beginnings: Container[int] = (),
        whole_runs: bool = False,
    ):
        self._decode, self._byte, self._skips = decode, byte, skips
        self._beginnings, self._whole_runs = beginnings, whole_runs
        self._word = list[int]()
        self._head, self._length = list[int](), 0  # the ids before, and the length of their text
        self._begun = False
        self._run, self._bytes = list[int](), bytearray()  # bytes whose text is not certain

    def add(self, token_id: int) -> str:
        if self._skips(token_id):
            return ""
        if (byte := self._byte(token_id)) is not None:
            self._run.append(token_id)
            self._bytes.append(byte)
            certain = 0 if self._whole_runs else len(self._bytes) - unfinished(self._bytes)
            return self._pop(certain)
        text = self._pop(len(self._run)) + self._settle([token_id])
        if token_id in self._beginnings:
            if self._word or not self._length:
                self._head = [*self._word, token_id]
            self._length, self._begun = len(self._decode(self._head)), False
        return text

    def rest(self) -> str:
        if self._whole_runs:
            try:
                return self._bytes.decode()
            except UnicodeDecodeError:
                pass
        return REPLACEMENT * len(self._bytes)

    def finish(self) -> str:
        return self._pop(len(self._run))

    def _pop(self, n: int) -> str:
        """The text of the first `n` bytes."""
        if not n:
            return ""
        text = self._settle(self._run[:n])
        del self._run[:n], self._bytes[:n]
        return text

    def _settle(self, ids: list[int]) -> str:
        """The text of ids behind those of the head."""
        text = self._decode(self._head + ids)[self._length :]
        if not self._begun:
            self._head, self._length = self._head + ids, self._length + len(text)
            for word in (ids, self._head[-2:]):
                if not self._begun and self._is_word(word):
                    self._word, self._head, self._length, self._begun = word, word, len(self._decode(word)), True
        return text

    def _is_word(self, ids: list[int]) -> bool:
        """Whether ids have a text, behind which that of others does not depend on theirs."""
        data = bytes(byte for i in ids if (byte := self._byte(i)) is not None)
        if any(i in self._beginnings for i in ids) or (data and self._whole_runs) or unfinished(data):
            return False
        return bool(self._decode(ids))


class WholeStream:
    """For tokenizers in which any token may change the text before it: no text is certain before the end."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode, self._ids = decode, list[int]()

    def add(self, token_id: int) -> str:
        self._ids.append(token_id)
        return ""

    def rest(self) -> str:
        return self._decode(self._ids)

    def finish(self) -> str:
        rest, self._ids = self.rest(), []
        return rest


def unfinished(data: bytes | bytearray) -> int:
    """The number of bytes at the end that begin an incomplete UTF-8 character."""
    for n in range(1, min(3, len(data)) + 1):
        first = data[-n]
        if first >= 0xC0:
            return n if n < 2 + (first >= 0xE0) + (first >= 0xF0) else 0
        if first < 0x80:
            break
    return 0
