"""SentencePiece with the rules of transformers' slow `LlamaTokenizer` (4.37.2), which the reference uses.

Text is split at added tokens (tokenization_utils.py `PreTrainedTokenizer.tokenize`), and `legacy` determines where the
dummy prefix goes (models/llama/tokenization_llama.py): before each piece of text, or before the first one only.
"""

import dataclasses
import functools
import re
import tempfile
from pathlib import Path
from typing import Required, TypedDict

import sentencepiece
import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers

from llava_jax.console import InputError, first_line, shorten
from llava_jax.data.decoding import PieceStream, Stream, WholeStream

SPACE = "▁"
BREAK = "\ufdd0"  # a noncharacter of Unicode, in guarded text a boundary between tokens (`Tokenizer.guard`)
LLAMA_SPECIAL_TOKENS = ("<s>", "</s>", "<unk>")  # defaults that a checkpoint's files may omit

MAX_GAP = 10_000  # unused ids that an export may fill with placeholder tokens

Offsets = list[tuple[int, int]]


class Token(TypedDict, total=False):
    """A token with its flags, as `tokenizer_config.json` stores it."""

    content: Required[str]
    lstrip: bool
    normalized: bool
    rstrip: bool
    single_word: bool
    special: bool


def content_of(token: str | Token | None) -> str | None:
    """The text of a token, which files store as a string or with flags."""
    return token.get("content") if isinstance(token, dict) else token


def added_token(token: str | Token, special: bool) -> AddedToken:
    """Convert a token from a file to an `AddedToken`; `special` applies if the file does not specify it."""
    if isinstance(token, str):
        return AddedToken(token, special=special, normalized=not special)
    flags = {key: token.get(key, False) for key in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(token["content"], special=token.get("special", special), **flags)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A substring of a text: its content, its start, and its id if it is an added token."""

    text: str
    start: int
    id: int | None = None


class SentencePieceTokenizer:
    """The tokenizer of a `tokenizer.model`.

    Attributes:
      added: special tokens, and tokens beyond the model's own pieces, by id.
    """

    def __init__(
        self,
        proto: bytes,
        path: Path,
        *,
        legacy: bool,
        unk: str,
        special: list[str | Token],
        added: dict[int, AddedToken],
    ):
        self.legacy, self._proto, self._unk = legacy, proto, unk
        sentencepiece.set_min_log_level(2)  # no warnings about pieces
        try:
            self._model = sentencepiece.SentencePieceProcessor(
                model_proto=proto if self.legacy else _without_dummy_prefix(proto)
            )
            self._size = self._model.get_piece_size()
            self._model.id_to_piece(list(range(self._size)))  # raises if a piece is not UTF-8
        except Exception as error:
            raise InputError(f"{path}: not a SentencePiece model ({first_line(error)})") from None
        self._unk_length = len(self._model.encode(unk))
        self._special = {content_of(token) for token in special}
        self.added = dict(added)
        contents = {token.content for token in added.values()}
        for token in special:
            # Skip defaults that are not in the model's vocabulary.
            is_missing_default = token in LLAMA_SPECIAL_TOKENS and self._piece_id(token) is None
            if content_of(token) not in contents and not is_missing_default:
                new = added_token(token, True)
                contents.add(new.content)
                self._add(new)
        self._index()

    def __len__(self) -> int:
        return max([self._size, *(i + 1 for i in self.added)])

    def _add(self, token: AddedToken) -> None:
        i = self._piece_id(token.content)
        self.added[len(self) if i is None else i] = token

    def _index(self) -> None:
        self._ids = {token.content: i for i, token in self.added.items()}
        by_length = sorted(filter(None, self._ids), key=len, reverse=True)
        self._split_at = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")

    def add_special(self, tokens: list[str]) -> None:
        for token in tokens:
            self._add(AddedToken(token, normalized=False, special=True))
        self._special |= set(tokens)
        self._index()

    def _piece_id(self, token: str) -> int | None:
        i = self._model.piece_to_id(token)
        return i if 0 <= i < self._size and self._model.id_to_piece(i) == token else None

    def token_id(self, token: str) -> int | None:
        return self._ids[token] if token in self._ids else self._piece_id(token)

    def token(self, i: int) -> str | None:
        if i in self.added:
            return self.added[i].content
        return self._model.id_to_piece(i) if 0 <= i < self._size else None

    def encode(self, text: str, breaks: bool = False) -> tuple[list[int], Offsets]:
        shift = 0
        if not self.legacy and text:
            text, shift = SPACE + text.replace(SPACE, " "), 1
        ids: list[int] = []
        offsets: Offsets = []
        for piece in self._split(text):
            if piece.id is not None:
                if shift and len(ids) == 1 and self.token(ids[0]) == SPACE and piece.text in self._special:
                    ids, offsets = [], []  # no dummy prefix before a special token
                ids.append(piece.id)
                offsets.append((piece.start, piece.start + len(piece.text)))
            else:
                found, spans = self._encode_text(piece.text, breaks)
                ids += found
                offsets += [(piece.start + a, piece.start + b) for a, b in spans]
        return ids, [(max(a - shift, 0), max(b - shift, 0)) for a, b in offsets]

    def _split(self, text: str) -> list[_Piece]:
        """Split a text at its added tokens, which may strip adjacent spaces or only match whole words."""
        pieces, end = [], 0
        for match in self._split_at.finditer(text):
            if match.start() > end:
                pieces.append(_Piece(text[end : match.start()], end))
            pieces.append(_Piece(match[0], match.start(), self._ids[match[0]]))
            end = match.end()
        if end < len(text):
            pieces.append(_Piece(text[end:], end))
        for i, piece in enumerate(pieces):
            if piece.id is None:
                continue
            token = self.added[piece.id]
            left = pieces[i - 1] if i else None
            right = pieces[i + 1] if i + 1 < len(pieces) else None
            if token.rstrip and right and right.id is None:
                kept = right.text.lstrip()
                pieces[i + 1] = right = _Piece(kept, right.start + len(right.text) - len(kept))
            if token.lstrip and left and left.id is None:
                pieces[i - 1] = left = _Piece(left.text.rstrip(), left.start)
            if token.single_word and left and left.text and left.text[-1] != " ":
                pieces[i - 1], pieces[i] = _Piece(left.text + piece.text, left.start), _Piece("", piece.start)
            elif token.single_word and right and right.text and right.text[0] != " ":
                pieces[i + 1], pieces[i] = _Piece(piece.text + right.text, piece.start), _Piece("", piece.start)
        return [piece for piece in pieces if piece.text]

    def _encode_text(self, text: str, breaks: bool) -> tuple[list[int], Offsets]:
        """Encode text without added tokens; with `breaks` part by part, of which the first has the dummy prefix."""
        first, *others = text.split(BREAK) if breaks else [text]
        ids, offsets = self._encode_part(first)
        at = len(first)
        for part in others:
            at += len(BREAK)
            found = self._unprefixed.encode(part, return_type="offset_mapping")
            ids += found["ids"]
            offsets += [(at + a, at + b) for a, b in found["offsets"]]
            at += len(part)
        return ids, offsets

    def _encode_part(self, text: str) -> tuple[list[int], Offsets]:
        skip = ""
        if not self.legacy and text.startswith((SPACE, " ")):
            skip = self._unk  # SentencePiece strips a leading space
        found = self._model.encode(skip + text, return_type="offset_mapping")
        ids, offsets = found["ids"], found["offsets"]
        if skip and len(ids) >= self._unk_length:
            ids, offsets = ids[self._unk_length :], offsets[self._unk_length :]
        return ids, [(max(a - len(skip), 0), max(b - len(skip), 0)) for a, b in offsets]

    def decode(self, ids: list[int], special: bool) -> str:
        text, run = "", []
        for i in [*ids, None]:
            token = self.added.get(i) if i is not None else None
            if i is not None and token is None:
                if 0 <= i < self._size:  # skip ids that only pad the embedding table
                    run.append(i)
                continue
            if run:
                decoded = self._model.decode(run)
                first = not text and not self.legacy and self._model.id_to_piece(run[0]).startswith(SPACE)
                text += decoded.removeprefix(" ") if first else decoded
                run = []
            if token and (special or not token.special):
                text += token.content
        return text

    def stream(self) -> Stream:
        decode = functools.partial(self.decode, special=False)
        if self._denormalizes:
            return WholeStream(decode)
        skips = lambda i: i not in self.added and not 0 <= i < self._size  # noqa: E731
        return PieceStream(decode, self._byte, skips, beginnings=self.added)

    def token_bytes(self, i: int) -> bytes:
        if i in self.added:
            return self.added[i].content.encode()
        if (byte := self._byte(i)) is not None:
            return bytes([byte])
        return self._model.id_to_piece(i).replace(SPACE, " ").encode() if 0 <= i < self._size else b""

    @functools.cached_property
    def _unprefixed(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=_without_dummy_prefix(self._proto))

    def control_tokens(self) -> list[str]:
        """Added tokens, and the pieces in brackets that SentencePiece itself matches before all others."""
        pieces = _parse(self._proto).pieces
        defined = [piece.piece for piece in pieces if piece.type == piece.USER_DEFINED]
        return [*self._ids, *filter(re.compile(r"<.+>|\[.+\]").fullmatch, defined)]

    @functools.cached_property
    def _denormalizes(self) -> bool:
        return bool(_parse(self._proto).denormalizer_spec.precompiled_charsmap)

    def _is_byte(self, i: int) -> bool:
        return i not in self.added and 0 <= i < self._size and self._model.is_byte(i)

    def _byte(self, i: int) -> int | None:
        return int(self._model.id_to_piece(i)[3:5], 16) if self._is_byte(i) else None

    def for_transformers(self) -> tokenizers.Tokenizer:
        """Convert with transformers' own converter."""
        from transformers import PreTrainedTokenizerFast

        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "tokenizer.model").write_bytes(self._proto)
            engine = PreTrainedTokenizerFast.from_pretrained(directory, legacy=self.legacy).backend_tokenizer
        for i, token in sorted(self.added.items()):
            if i - engine.get_vocab_size() > MAX_GAP:
                raise InputError(
                    f"the added token {shorten(token.content)!r} has id {i}, too far beyond the "
                    f"{engine.get_vocab_size()} tokens before it"
                )
            while engine.get_vocab_size() < i:  # ids there must be contiguous
                engine.add_special_tokens([f"<|reserved_{engine.get_vocab_size()}|>"])
            flags = {key: getattr(token, key) for key in ("single_word", "lstrip", "rstrip", "special")}
            engine.add_tokens([AddedToken(token.content, normalized=False, **flags)])
            if engine.token_to_id(token.content) != i:
                raise InputError(
                    f"the added token {shorten(token.content)!r} has id {i}, which transformers' tokenizer cannot "
                    "assign"
                )
        if not self.legacy:
            if not _parse(self._proto).normalizer_spec.add_dummy_prefix:
                first = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
                others = [engine.pre_tokenizer] if engine.pre_tokenizer else []
                engine.pre_tokenizer = pre_tokenizers.Sequence([first, *others])
            prefix_after_images(engine)
        return engine


def prefix_after_images(engine: tokenizers.Tokenizer) -> None:
    """Prepend the dummy prefix to text that begins with a newline: such text follows an image, and is tokenized
    separately here."""
    after_image = normalizers.Replace(tokenizers.Regex(r"\A\n"), SPACE + "\n")
    engine.normalizer = normalizers.Sequence([after_image, *([engine.normalizer] if engine.normalizer else [])])


def _parse(proto: bytes):
    try:
        from sentencepiece import sentencepiece_model_pb2 as schema
    except Exception:  # it needs the protobuf of its release, and wandb, for one, an older one
        from transformers.utils import sentencepiece_model_pb2_new as schema  # type: ignore[no-redef]
    return schema.ModelProto.FromString(proto)  # type: ignore[attr-defined]  # protobuf makes it at run time


def _without_dummy_prefix(proto: bytes) -> bytes:
    """The model without its dummy prefix, as the non-legacy tokenizer loads it."""
    model = _parse(proto)
    model.normalizer_spec.add_dummy_prefix = False
    return model.SerializeToString()
