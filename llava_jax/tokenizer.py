"""The tokenizer of a checkpoint: text to ids with character offsets, and back.

A tokenizer is the checkpoint's own engine, never rebuilt:

    tokenizer.model   SentencePiece itself, whatever the model's type and normalization. Around it, the rules of the
                      class that the reference runs (the slow `LlamaTokenizer` of transformers 4.37.2): text is split at
                      added tokens, and `legacy` says where the dummy prefix goes.
    tokenizer.json    `tokenizers`, as the file stands.

`tokenizer.model` is preferred where a directory has both, since the reference trains and runs with it.

`legacy` is the key of that name in `tokenizer_config.json`, absent meaning true. SentencePiece puts a space in front of
a text. The legacy tokenizer does so for each piece of text between added tokens (`</s>USER` gives `▁USER`), the
corrected one at the beginning of the text only (`USER`). Weights want the setting that they were trained with.
"""

import dataclasses
import functools
import itertools
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from llava_jax.config_json import read_json
from llava_jax.console import InputError, first_line, note

FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
SPACE = "▁"
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # the first line of what Llama 3 calls tokenizer.model

Offsets = list[tuple[int, int]]


class Tokenizer:
    """Text to ids, and back.

    Attributes:
      bos_id: begins a prompt; None where the tokenizer adds none.
      eos_id, unk_id, pad_id: None where there is none.
      files: the files it was read from, by name, to go along with a checkpoint.
    """

    def __init__(self, engine: "_SentencePiece | _Json", settings: dict[str, Any], files: dict[str, bytes]):
        self._engine, self._settings, self.files = engine, settings, files
        token = {key: _content(settings.get(f"{key}_token")) for key in ("bos", "eos", "unk", "pad")}
        ids = self._ids = {key: engine.token_id(t) if t else None for key, t in token.items()}
        self.bos_id = ids["bos"] if settings["add_bos_token"] else None
        self.eos_id, self.unk_id = ids["eos"], ids["unk"]
        self.pad_id = ids["pad"] if ids["pad"] is not None else ids["unk"]

    def __len__(self) -> int:
        """One more than the highest id."""
        return len(self._engine)

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        """Ids of a text, added tokens in it recognised but no BOS or EOS added, and each one's (start, end) in it."""
        return self._engine.encode(text)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ids; special tokens are left out unless `special`."""
        return self._engine.decode([int(i) for i in ids], special)

    def decode_settled(self, ids: Sequence[int]) -> str:
        """The part of the text of ids that no id after them can change: it ends before an unfinished character."""
        n = len(ids)
        while n and re.fullmatch(r"<0x[0-9A-F]{2}>", self._engine.token(int(ids[n - 1])) or ""):
            n -= 1
        return self.decode(ids[:n]).rstrip("\ufffd")

    def token_id(self, token: str) -> int | None:
        return self._engine.token_id(token)

    def token(self, i: int) -> str | None:
        return self._engine.token(i)

    def add_special(self, tokens: list[str]) -> None:
        """Add special tokens that the vocabulary lacks, at its end."""
        self._engine.add_special([token for token in tokens if self.token_id(token) is None])

    def transformers_files(self, new_tokens: Sequence[str] = (), *, pad: str | None = None) -> dict[str, Any]:
        """This tokenizer for transformers, by file name: `tokenizer.json` holds all of it, and is used as it stands.

        A whole prompt gets the ids there that `prompts.encode` gives it piece by piece. If the tokenizer is not legacy,
        that holds for prompts that begin with no space and have a newline after each image, as all templates do.

        Args:
          new_tokens: special tokens to add at the end.
          pad: the token to pad with; None for the tokenizer's own.
        """
        engine = self._engine.for_transformers()
        name = {key: i if i is None else self.token(i) for key, i in self._ids.items()}
        if self.bos_id is not None and engine.encode("a").ids[:1] != [self.bos_id]:
            bos = name["bos"]
            engine.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, self.bos_id)]
            )
        engine.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in new_tokens])
        settings = json.loads(self.files.get("tokenizer_config.json", b"{}"))
        for gone in ("auto_map", "chat_template", "add_prefix_space", "extra_special_tokens", "use_fast", "backend"):
            settings.pop(gone, None)
        settings |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {
                str(i): {
                    "content": token.content, "lstrip": token.lstrip, "normalized": token.normalized,
                    "rstrip": token.rstrip, "single_word": token.single_word, "special": token.special,
                }
                for i, token in sorted(engine.get_added_tokens_decoder().items())
            },
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": self.bos_id is not None,
        }  # fmt: skip
        name["pad"] = pad or name["pad"]
        settings |= {f"{key}_token": token for key, token in name.items() if token is not None}
        if isinstance(self._engine, _SentencePiece):
            settings["legacy"] = self._engine.legacy
        kept = {file: self.files[file] for file in ("tokenizer.model",) if file in self.files}
        return {**kept, "tokenizer.json": engine.to_str(pretty=True), "tokenizer_config.json": settings}


def _content(token) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _added(token: str | dict, special: bool) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=special, normalized=not special)
    flags = {key: token.get(key, False) for key in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(token["content"], special=token.get("special", special), **flags)


# ---------------------------------------------------------------- reading


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """Read the tokenizer of a checkpoint directory.

    Raises:
      InputError: there is none, or its files cannot be read.
    """
    directory = Path(directory)
    try:
        files = {name: (directory / name).read_bytes() for name in FILES if (directory / name).exists()}
    except OSError as error:
        raise InputError(f"{directory}: its tokenizer cannot be read ({error.strerror or error})") from None
    config = read_json(directory / "tokenizer_config.json") or {}
    settings = (read_json(directory / "special_tokens_map.json") or {}) | {
        key: value for key, value in config.items() if value is not None
    }
    added = read_json(directory / "added_tokens.json") or {}
    if "tokenizer.json" in files and TIKTOKEN.match(files.get("tokenizer.model", b"")):
        files.pop("tokenizer.model")
    if "tokenizer.model" in files:
        plain = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
        engine = _SentencePiece(
            files["tokenizer.model"],
            directory / "tokenizer.model",
            legacy=bool(settings.get("legacy", True)),
            unk=_content((plain | settings)["unk_token"]),
            special=_special_tokens(settings) + [token for key, token in plain.items() if key in SPECIAL],
            added=_added_tokens(settings, added),
        )
    elif "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files.keys():
        engine = _Json(_read_engine(files, settings, directory), _added_tokens(settings, added), settings, directory)
        first = engine.first_token
        plain = {"bos_token": first, "add_bos_token": first is not None}
        if str(settings.get("tokenizer_class", "")).startswith(("LlamaTokenizer", "CodeLlamaTokenizer")):
            # What this class of transformers has by default, whatever the file says.
            usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            plain |= {key: token for key, token in usual.items() if engine.token_id(token) is not None}
            plain["add_bos_token"] = True
    else:
        raise InputError(f"{directory}: no tokenizer (neither tokenizer.model nor tokenizer.json)")
    return Tokenizer(engine, plain | settings, files)


def _special_tokens(settings: dict[str, Any]) -> list[str | dict]:
    """The special tokens that a checkpoint's files name."""
    more = [settings.get(key) or [] for key in ("additional_special_tokens", "extra_special_tokens")]
    more = [list(tokens.values()) if isinstance(tokens, dict) else tokens for tokens in more]
    return [settings[key] for key in SPECIAL if settings.get(key)] + list(itertools.chain(*more))


def _added_tokens(settings: dict[str, Any], added: dict[str, int]) -> dict[int, AddedToken]:
    """Tokens beyond the model's own pieces: `added_tokens_decoder` (new) and `added_tokens.json` (old)."""
    special = {_content(token) for token in _special_tokens(settings)}
    old = {int(i): _added(content, content in special) for content, i in added.items()}
    new = settings.get("added_tokens_decoder") or {}
    return old | {int(i): _added(token, False) for i, token in new.items()}


def _read_engine(files: dict[str, bytes], settings: dict[str, Any], directory: Path) -> tokenizers.Tokenizer:
    try:
        if "tokenizer.json" not in files:  # the two files of GPT-2's kind: their class in transformers reads them
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(
                directory, tokenizer_type=None, trust_remote_code=False
            ).backend_tokenizer
        fields = json.loads(files["tokenizer.json"])
        fields |= {"truncation": None, "padding": None}  # of whoever saved it; neither is part of a prompt
        return tokenizers.Tokenizer.from_str(json.dumps(fields))
    except Exception as error:
        name = "tokenizer.json" if "tokenizer.json" in files else "vocab.json"
        raise InputError(f"{directory / name}: cannot be read ({first_line(error)})") from None


# ---------------------------------------------------------------- SentencePiece


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A stretch of a text: what it says, where it begins, and its id if it is an added token."""

    text: str
    start: int
    id: int | None = None


class _SentencePiece:
    """SentencePiece, inside the rules of transformers 4.37.2 (tokenization_utils.py `PreTrainedTokenizer.tokenize`,
    models/llama/tokenization_llama.py)."""

    def __init__(
        self,
        proto: bytes,
        path: Path,
        *,
        legacy: bool,
        unk: str,
        special: list[str | dict],
        added: dict[int, AddedToken],
    ):
        self.legacy, self._proto, self._unk = legacy, proto, unk
        try:
            self._model = sentencepiece.SentencePieceProcessor(
                model_proto=proto if self.legacy else _without_dummy_prefix(proto)
            )
            self._size = self._model.get_piece_size()
        except Exception as error:
            raise InputError(f"{path}: no SentencePiece model ({first_line(error)})") from None
        self._unk_length = len(self._model.encode(unk))
        self._special = {_content(token) for token in special}
        self.added = dict(added)
        contents = {token.content for token in added.values()}
        for token in special:
            # A usual one that the checkpoint neither names nor has is none.
            usual = token in ("<s>", "</s>", "<unk>") and self._piece_id(token) is None
            if _content(token) not in contents and not usual:
                contents.add(_content(token))
                self._add(_added(token, True))
        self._index()

    def __len__(self) -> int:
        return max(self._size, *(i + 1 for i in self.added))

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
        return i if self._model.id_to_piece(i) == token else None

    def token_id(self, token: str) -> int | None:
        return self._ids[token] if token in self._ids else self._piece_id(token)

    def token(self, i: int) -> str | None:
        if i in self.added:
            return self.added[i].content
        return self._model.id_to_piece(i) if 0 <= i < self._size else None

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        shift = 0
        if not self.legacy and text:
            text, shift = SPACE + text.replace(SPACE, " "), 1
        ids, offsets = [], []
        for piece in self._split(text):
            if piece.id is not None:
                if shift and piece.text in self._special and [self.token(i) for i in ids] == [SPACE]:
                    ids, offsets = [], []  # no space before a text that begins with a special token
                ids.append(piece.id)
                offsets.append((piece.start, piece.start + len(piece.text)))
            else:
                found, spans = self._encode_text(piece.text)
                ids += found
                offsets += [(piece.start + a, piece.start + b) for a, b in spans]
        return ids, [(max(a - shift, 0), max(b - shift, 0)) for a, b in offsets]

    def _split(self, text: str) -> list[_Piece]:
        """The text at its added tokens, each of which may take spaces beside it along, or want to be a word."""
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

    def _encode_text(self, text: str) -> tuple[list[int], Offsets]:
        skip = ""
        if not self.legacy and text.startswith((SPACE, " ")):
            skip = self._unk  # SentencePiece would strip the space at the beginning of a text
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
                if 0 <= i < self._size:  # not a row that only pads the embeddings
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

    def for_transformers(self) -> tokenizers.Tokenizer:
        """What transformers' own converter makes of it."""
        from transformers import PreTrainedTokenizerFast

        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "tokenizer.model").write_bytes(self._proto)
            engine = PreTrainedTokenizerFast.from_pretrained(directory, legacy=self.legacy).backend_tokenizer
        for i, token in sorted(self.added.items()):
            while engine.get_vocab_size() < i:  # ids there have no gaps
                engine.add_special_tokens([f"<|reserved_{engine.get_vocab_size()}|>"])
            flags = {key: getattr(token, key) for key in ("single_word", "lstrip", "rstrip", "special")}
            engine.add_tokens([AddedToken(token.content, normalized=False, **flags)])
            if engine.token_to_id(token.content) != i:
                raise InputError(
                    f"the added token {token.content!r} has id {i}, which transformers' tokenizer cannot give it"
                )
        spec = _parse(self._proto).normalizer_spec
        if spec.precompiled_charsmap:
            note("warning: transformers' normalization differs from SentencePiece's in some combined characters")
        if not self.legacy:
            if not spec.add_dummy_prefix:
                first = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
                others = [engine.pre_tokenizer] if engine.pre_tokenizer else []
                engine.pre_tokenizer = pre_tokenizers.Sequence([first, *others])
            # A piece of text that begins with a newline stands behind an image, and is a text of its own here.
            after_image = normalizers.Replace(tokenizers.Regex(r"\A\n"), SPACE + "\n")
            engine.normalizer = normalizers.Sequence([after_image, *([engine.normalizer] if engine.normalizer else [])])
        return engine


def _parse(proto: bytes):
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(proto)


def _without_dummy_prefix(proto: bytes) -> bytes:
    """The model, as the tokenizer loads it that is not legacy."""
    model = _parse(proto)
    model.normalizer_spec.add_dummy_prefix = False
    return model.SerializeToString()


# ---------------------------------------------------------------- tokenizers


class _Json:
    """`tokenizers`, as `tokenizer.json` stands, and the added tokens that other files of the directory name."""

    def __init__(
        self, engine: tokenizers.Tokenizer, added: dict[int, AddedToken], settings: dict[str, Any], directory: Path
    ):
        self._engine = engine
        for i, token in sorted(added.items()):
            (engine.add_special_tokens if token.special else engine.add_tokens)([token])
            if (found := engine.token_to_id(token.content)) != i:
                raise InputError(
                    f"{directory}: the added token {token.content!r} should have id {i}, but the vocabulary before it "
                    f"makes it {found}"
                )
        for token in _special_tokens(settings):
            if engine.token_to_id(_content(token)) is not None:
                engine.add_special_tokens([_added(token, True)])

    def __len__(self) -> int:
        return self._engine.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def first_token(self) -> str | None:
        """The special token that the file's post-processor puts first."""
        encoded = self._engine.encode("a", add_special_tokens=True)
        return encoded.tokens[0] if encoded.special_tokens_mask[:1] == [1] else None

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        encoding = self._engine.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int], special: bool) -> str:
        return self._engine.decode(ids, skip_special_tokens=not special)

    def token_id(self, token: str) -> int | None:
        return self._engine.token_to_id(token)

    def token(self, i: int) -> str | None:
        return self._engine.id_to_token(i)

    def add_special(self, tokens: list[str]) -> None:
        self._engine.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])

    def for_transformers(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._engine.to_str())
