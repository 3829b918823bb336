"""The tokenizer of a checkpoint: text to ids with character offsets, and back.

One engine (`tokenizers`) for both kinds of file. A SentencePiece `tokenizer.model` is turned into the same BPE
with byte fallback, and is preferred where a directory has both, since the reference trains and runs with it.

`legacy` is where LLaMA tokenizers differ. SentencePiece puts a space in front of a text. A legacy tokenizer
does so for each piece of text between special tokens (`</s>USER` gives `▁USER`), the corrected one at the
beginning of the text only (`USER`). Weights want the setting they were trained with, which is the `legacy` key
of `tokenizer_config.json`, absent meaning true (transformers 4.37 `LlamaTokenizer`). We honour it for either
kind of file: newer transformers ignore what `tokenizer.json` says there, older ones ignore the key.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from llava_jax.config_json import read_json
from llava_jax.console import InputError

FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SPACE = "▁"


class Tokenizer:
    """Text to ids, and back.

    Attributes:
      bos_id: begins a prompt; None where the tokenizer adds none.
      eos_id, unk_id, pad_id: None where there is none.
    """

    def __init__(
        self,
        engine: tokenizers.Tokenizer,
        settings: dict[str, Any],
        *,
        legacy: bool | None = None,
        files: dict[str, bytes] | None = None,
    ):
        """`legacy`: where spaces go before text; None for engines that are not LLaMA's, or know by themselves."""
        self._engine = engine
        self._legacy = legacy
        self._prepend = legacy is False  # then `engine` puts none anywhere, and `encode` does
        self.files = files or {}  # the files it was read from, to go along with a checkpoint
        token = {k: _content(settings.get(f"{k}_token")) for k in ("bos", "eos", "unk", "pad")}
        ids = self._ids = {k: engine.token_to_id(t) if t else None for k, t in token.items()}
        self.bos_id = ids["bos"] if settings["add_bos_token"] else None
        self.eos_id, self.unk_id = ids["eos"], ids["unk"]
        self.pad_id = ids["pad"] if ids["pad"] is not None else ids["unk"]

    def __len__(self) -> int:
        return self._engine.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, special tokens in it recognised but none added, and each one's (start, end) in it."""
        shift = 0
        if self._prepend and text:
            text, shift = " " + text.replace(SPACE, " "), 1
        encoding = self._engine.encode(text, add_special_tokens=False)
        ids = encoding.ids
        offsets = [(max(a - shift, 0), max(b - shift, 0)) for a, b in encoding.offsets]
        if shift and len(ids) > 1 and encoding.tokens[0] == SPACE and encoding.special_tokens_mask[1]:
            ids, offsets = ids[1:], offsets[1:]  # no space before a text that begins with a special token
        return ids, offsets

    def decode(self, ids, *, special: bool = False) -> str:
        """The text of ids; special tokens are left out unless `special`."""
        return self._engine.decode([int(i) for i in ids], skip_special_tokens=not special)

    def without_open_bytes(self, ids: Sequence[int]) -> Sequence[int]:
        """Ids up to where more of them could change the text: a run of single bytes may become another character."""
        n = len(ids)
        while n and _is_byte(self._engine.id_to_token(int(ids[n - 1]))):
            n -= 1
        return ids[:n]

    def token_id(self, token: str) -> int | None:
        return self._engine.token_to_id(token)

    def add_special(self, tokens: list[str]) -> None:
        """Add special tokens that the vocabulary lacks, at its end."""
        self._engine.add_special_tokens(
            [tokenizers.AddedToken(t, normalized=False, special=True) for t in tokens if self.token_id(t) is None]
        )

    def transformers_files(self, new_tokens: Sequence[str] = (), *, pad: str | None = None) -> dict[str, Any]:
        """This tokenizer for transformers, by file name: `tokenizer.json` holds all of it, and is taken as it is.

        Whole prompts get the ids there that `prompts.encode` gives them here piece by piece: in legacy style anyway,
        otherwise wherever a newline follows the image, as in every template.

        Args:
          new_tokens: special tokens to add at the end.
          pad: the token to pad with; None for the tokenizer's own.
        """
        engine = tokenizers.Tokenizer.from_str(self._engine.to_str())
        if self._prepend:
            # A space goes before the text, and before a piece that begins with a newline: it stands behind an image.
            engine.normalizer = normalizers.Replace(tokenizers.Regex(r"\A\n"), SPACE + "\n")
            engine.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
        name = {key: i if i is None else engine.id_to_token(i) for key, i in self._ids.items()}
        if self.bos_id is not None and engine.encode("a").ids[:1] != [self.bos_id]:
            bos = name["bos"]
            engine.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, self.bos_id)]
            )
        engine.add_special_tokens([tokenizers.AddedToken(t, normalized=False, special=True) for t in new_tokens])
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
        if self._legacy is not None:
            settings["legacy"] = self._legacy
        kept = {file: self.files[file] for file in ("tokenizer.model",) if file in self.files}
        return {**kept, "tokenizer.json": engine.to_str(pretty=True), "tokenizer_config.json": settings}


def _is_byte(token: str | None) -> bool:
    return token is not None and re.fullmatch(r"<0x[0-9A-F]{2}>", token) is not None


def _content(token) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """Read the tokenizer of a checkpoint directory.

    Raises:
      InputError: there is none, or its files cannot be read.
    """
    directory = Path(directory)
    try:
        files = {name: (directory / name).read_bytes() for name in FILES if (directory / name).exists()}
    except OSError as error:
        raise InputError(f"{directory}: its tokenizer cannot be read ({error})") from None
    settings = (read_json(directory / "special_tokens_map.json") or {}) | {
        k: v for k, v in (read_json(directory / "tokenizer_config.json") or {}).items() if v is not None
    }
    if "tokenizer.model" in files:
        engine = _from_sentencepiece(files["tokenizer.model"], directory / "tokenizer.model")
        legacy = settings.get("legacy", True)
        plain = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
        settings = plain | settings
    elif "tokenizer.json" in files:
        try:
            engine = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        except Exception as error:
            raise InputError(f"{directory / 'tokenizer.json'}: cannot be read ({error})") from None
        is_llama = _is_llama(engine)
        legacy = settings.get("legacy") if is_llama else None
        encoded = engine.encode("a", add_special_tokens=True)
        first = encoded.tokens[0] if encoded.special_tokens_mask[:1] == [1] else None
        plain = {"bos_token": first, "add_bos_token": first is not None}
        if is_llama:
            usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            plain |= {key: token for key, token in usual.items() if engine.token_to_id(token) is not None}
            plain["add_bos_token"] = True
        settings = plain | settings
    else:
        raise InputError(f"{directory}: no tokenizer (neither tokenizer.model nor tokenizer.json)")
    if legacy is not None:
        _set_spaces(engine, legacy)
    _add_tokens(engine, settings, read_json(directory / "added_tokens.json") or {}, directory)
    return Tokenizer(engine, settings, legacy=legacy, files=files)


def _is_llama(engine: tokenizers.Tokenizer) -> bool:
    """Whether it is a SentencePiece BPE in the `tokenizers` format, with its choice of where spaces go."""
    model = json.loads(engine.to_str())["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback"))


def _set_spaces(engine: tokenizers.Tokenizer, legacy: bool) -> None:
    """Spaces become `▁`; in legacy style one more goes before each piece of text between special tokens."""
    replace = normalizers.Replace(" ", SPACE)
    engine.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if legacy else replace
    engine.pre_tokenizer = None


def _add_tokens(engine: tokenizers.Tokenizer, settings: dict[str, Any], added: dict[str, int], directory: Path) -> None:
    """Tokens beyond the model's own pieces: `added_tokens_decoder` (new) and `added_tokens.json` (old)."""
    tokens = {
        int(i): token if isinstance(token, dict) else {"content": token}
        for i, token in (settings.get("added_tokens_decoder") or {}).items()
    }
    for content, i in added.items():
        tokens.setdefault(int(i), {"content": content, "special": True})
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        content = _content(settings.get(key))
        i = content and engine.token_to_id(content)
        if i is not None and content:
            tokens.setdefault(i, {"content": content, "special": True})
    for i, token in sorted(tokens.items()):
        content = token["content"]
        add = engine.add_special_tokens if token.get("special", False) else engine.add_tokens
        flags = {k: token.get(k, False) for k in ("single_word", "lstrip", "rstrip", "normalized")}
        add([tokenizers.AddedToken(content, special=token.get("special", False), **flags)])
        if engine.token_to_id(content) != i:
            raise InputError(
                f"{directory}: the added token {content!r} should have id {i}, but the vocabulary before it "
                f"makes it {engine.token_to_id(content)}"
            )


def _from_sentencepiece(proto: bytes, path: Path) -> tokenizers.Tokenizer:
    """A SentencePiece BPE model as a `tokenizers` one: same pieces, same merges, in the order of their scores."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    except Exception as error:
        raise InputError(f"{path}: no SentencePiece model ({error})") from None
    n = model.get_piece_size()
    pieces = [model.id_to_piece(i) for i in range(n)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    plain = {
        piece: i for i, piece in enumerate(pieces)
        if not (model.is_unknown(i) or model.is_control(i) or model.is_byte(i) or model.is_unused(i))
    }  # fmt: skip
    merges = []
    for piece, i in plain.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [(a, b) for a, b in halves if a in plain and b in plain]
        merges += [(-model.get_score(i), i, plain[a], plain[b], (a, b)) for a, b in pairs]
    merges.sort(key=lambda merge: merge[:4])
    unk = pieces[model.unk_id()]
    engine = tokenizers.Tokenizer(
        models.BPE(vocab, [pair for *_, pair in merges], unk_token=unk, fuse_unk=True, byte_fallback=True)
    )
    engine.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [pieces[i] for i in range(n) if model.is_control(i) or model.is_unknown(i)]
    engine.add_special_tokens([tokenizers.AddedToken(p, normalized=False, special=True) for p in control])
    return engine
