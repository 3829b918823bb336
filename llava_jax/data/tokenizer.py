"""The tokenizer of a checkpoint: text to ids with character offsets, and back.

Each file runs in its own engine and is never converted:

    tokenizer.model   SentencePiece, for every model type and normalization, with the rules of the class that the
                      reference uses (the slow `LlamaTokenizer` of transformers 4.37.2): text is split at added tokens,
                      and `legacy` determines where the dummy prefix goes.
    tokenizer.json    `tokenizers`, with the unchanged file.

If a directory has both, `tokenizer.model` is used, since the reference trains and runs with it.

`legacy` is a key of `tokenizer_config.json`, true by default. SentencePiece puts a space in front of a text. The legacy
tokenizer does so for each piece of text between added tokens (`</s>USER` becomes `▁USER`), the corrected one at the
beginning of the text only (`USER`). Weights need the setting that they were trained with.
"""

import functools
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tokenizers
from msgspec import Meta
from tokenizers import AddedToken, processors

from llava_jax.console import InputError, note, shorten
from llava_jax.data.decoding import Stream
from llava_jax.data.json_tokenizer import JsonTokenizer, limit_untrusted
from llava_jax.data.sentencepiece_tokenizer import (
    BREAK,
    SPACE,
    Offsets,
    SentencePieceTokenizer,
    Token,
    added_token,
    content_of,
)
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.files import read_bytes
from llava_jax.json_files import parse_json, read_json

FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
# Prompts on which an exported tokenizer is compared with the original.
PROBES = (
    f"USER: {IMAGE_TOKEN}\nWhat is shown?  It's 2024! ASSISTANT: A cat.</s>",
    f"<|im_start|>user\n{IMAGE_TOKEN}\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    f"USER: {IMAGE_TOKEN}\nnaïve café ﬁne a\u0308\u0323 猫 🙂 ASSISTANT:",
)
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_FILE = 128 * 2**20  # bytes; one of the largest, Gemma's, has 33 MB
MAX_ID = 2**24
TIKTOKEN = re.compile(
    rb"[A-Za-z0-9+/]+=* \d+\r?\n"
)  # the first line of Llama 3's tokenizer.model, which is no SentencePiece model


class NamedTemplate(TypedDict):
    """One of several named chat templates."""

    name: str
    template: str


class Settings(TypedDict, total=False):
    """The supported keys of `tokenizer_config.json`, and of `special_tokens_map.json` in older checkpoints."""

    add_bos_token: bool | None
    add_eos_token: bool | None
    added_tokens_decoder: dict[Annotated[str, Meta(pattern=r"^[0-9]{1,8}\Z")], Token] | None
    additional_special_tokens: list[str | Token] | None
    bos_token: str | Token | None
    chat_template: str | list[NamedTemplate] | dict[str, str] | None
    cls_token: str | Token | None
    eos_token: str | Token | None
    extra_special_tokens: list[str | Token] | dict[str, str | Token] | None
    image_token: str | Token | None
    legacy: bool | None
    mask_token: str | Token | None
    pad_token: str | Token | None
    sep_token: str | Token | None
    tokenizer_class: str | None
    unk_token: str | Token | None


AddedIds = dict[str, Annotated[int, Meta(ge=0, le=MAX_ID)]]  # `added_tokens.json`


class Tokenizer:
    """Encodes text to ids, and decodes ids.

    Attributes:
      bos_id: the first id of a prompt; None if the tokenizer adds none.
      eos_id, unk_id, pad_id: None if the tokenizer has none.
      files: the contents of the tokenizer's files by name, to be saved with a checkpoint.
    """

    def __init__(
        self, engine: "SentencePieceTokenizer | JsonTokenizer", settings: dict[str, Any], files: dict[str, bytes]
    ):
        self._engine, self._settings, self.files = engine, settings, files
        token = {key: content_of(settings.get(f"{key}_token")) for key in ("bos", "eos", "unk", "pad")}
        ids = self._ids = {key: engine.token_id(t) if t else None for key, t in token.items()}
        self.bos_id = ids["bos"] if settings["add_bos_token"] else None
        self.eos_id, self.unk_id = ids["eos"], ids["unk"]
        self.pad_id = ids["pad"] if ids["pad"] is not None else ids["unk"]

    def __len__(self) -> int:
        """The highest id plus one."""
        return len(self._engine)

    def encode(self, text: str, *, guarded: bool = False) -> tuple[list[int], Offsets]:
        """Encode a text, including added tokens but without BOS or EOS: ids, and the (start, end) of each.

        Args:
          guarded: whether parts of it come from `guard`.
        """
        return self._engine.encode(text, guarded)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Decode ids; special tokens are skipped unless `special`."""
        return self._engine.decode([int(i) for i in ids], special)

    def stream(self) -> Stream:
        """A decoder to which ids are added one by one; special tokens are skipped."""
        return self._engine.stream()

    def token_bytes(self, i: int) -> bytes:
        """The bytes that a token stands for; those of the ids of a text make up the text, behind a dummy prefix."""
        return self._engine.token_bytes(i)

    def token_id(self, token: str) -> int | None:
        return self._engine.token_id(token)

    def token(self, i: int) -> str | None:
        return self._engine.token(i)

    def add_special(self, tokens: list[str]) -> None:
        """Append the special tokens that the vocabulary lacks."""
        self._engine.add_special([token for token in tokens if self.token_id(token) is None])
        self.__dict__.pop("_controls", None)

    def guard(self, text: str) -> str:
        """Make text of the special tokens, added tokens and `<image>` marks in a text: `encode` spells them.

        A `BREAK` goes behind the first character of each, over which no token extends.

        Raises:
          InputError: the text has a `BREAK` itself, which is a noncharacter that no text needs.
        """
        if BREAK in text:
            raise InputError(f"the text has the noncharacter U+{ord(BREAK):04X}, which is reserved; remove it")
        return self._controls.sub(BREAK, text)

    @functools.cached_property
    def _controls(self) -> re.Pattern[str]:
        """Matches between the first two characters of each token that `guard` makes text."""
        tokens = {token for token in self._engine.control_tokens() if len(token) > 1 and token.strip(f"{SPACE} \n\t")}
        rests: dict[str, list[str]] = {}
        for token in sorted(tokens | {IMAGE_TOKEN}):
            rests.setdefault(token[0], []).append(re.escape(token[1:]))
        return re.compile("|".join(f"(?<={re.escape(first)})(?={'|'.join(rest)})" for first, rest in rests.items()))

    def transformers_files(self, new_tokens: Sequence[str] = (), *, pad: str | None = None) -> dict[str, Any]:
        """The files of this tokenizer for transformers, by name; `tokenizer.json` is complete by itself.

        There, a whole prompt is encoded to the same ids as by `prompts.encode`, which encodes it piece by piece. For a
        non-legacy tokenizer, this holds for prompts without a leading space and with a newline after each image, as in
        all templates.

        Args:
          new_tokens: special tokens to append.
          pad: the padding token; None for the tokenizer's own.
        """
        engine = self._engine.for_transformers()
        name = {key: i if i is None else self.token(i) for key, i in self._ids.items()}
        if self.bos_id is not None and limit_untrusted(engine).encode("a").ids[:1] != [self.bos_id]:
            bos = name["bos"]
            engine.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, self.bos_id)]
            )
        engine.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in new_tokens])
        self._warn_if_different(engine)
        settings = parse_json(self.files.get("tokenizer_config.json", b"{}"))
        for key in ("auto_map", "chat_template", "add_prefix_space", "extra_special_tokens", "use_fast", "backend"):
            settings.pop(key, None)
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
        if isinstance(self._engine, SentencePieceTokenizer):
            settings["legacy"] = self._engine.legacy
        kept = {file: self.files[file] for file in ("tokenizer.model",) if file in self.files}
        return {**kept, "tokenizer.json": engine.to_str(pretty=True), "tokenizer_config.json": settings}

    def _warn_if_different(self, engine: tokenizers.Tokenizer) -> None:
        """Warn if an exported engine encodes a prompt differently: it does not support all that SentencePiece does."""
        image, exported = engine.token_to_id(IMAGE_TOKEN), limit_untrusted(engine)
        for probe in PROBES:
            ids = [self.encode(piece)[0] for piece in probe.split(IMAGE_TOKEN)]
            ours = ids[0] + [i for piece in ids[1:] for i in (image, *piece)]
            if image is not None and ours != exported.encode(probe, add_special_tokens=False).ids:
                note(f"warning: the exported tokenizer encodes some prompts differently, for example {probe!r}")
                return


# ---------------------------------------------------------------- reading


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """Load the tokenizer of a checkpoint directory.

    Raises:
      InputError: the directory has no tokenizer, or its files cannot be read.
    """
    directory = Path(directory)
    files = {name: read_bytes(directory / name, MAX_FILE) for name in FILES if (directory / name).exists()}
    config = read_json(directory / "tokenizer_config.json", Settings) or {}
    # As in transformers: special_tokens_map.json only applies to older files.
    newer = "added_tokens_decoder" in config
    settings = config if newer else config | (read_json(directory / "special_tokens_map.json", Settings) or {})
    added = read_json(directory / "added_tokens.json", AddedIds) or {}
    if "tokenizer.json" not in files and "vocab.json" in files and "tokenizer_class" not in settings:
        raise InputError(f"{directory}: vocab.json needs a tokenizer_config.json with its tokenizer_class")
    if "tokenizer.json" in files and TIKTOKEN.match(files.get("tokenizer.model", b"")):
        files.pop("tokenizer.model")
    engine: SentencePieceTokenizer | JsonTokenizer
    fallback: dict[str, Any] = {}
    if "tokenizer.model" in files:
        fallback = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
        engine = SentencePieceTokenizer(
            files["tokenizer.model"],
            directory / "tokenizer.model",
            legacy=settings.get("legacy") is not False,
            unk=content_of((fallback | settings)["unk_token"]) or "<unk>",
            special=_special_tokens(settings) + [token for key, token in fallback.items() if key in SPECIAL],
            added=_added_tokens(settings, added),
        )
    elif "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files.keys():
        engine = JsonTokenizer(files, settings, _added_tokens(settings, added), _special_tokens(settings), directory)
        first = engine.first_token
        if str(settings.get("tokenizer_class", "")).startswith(("LlamaTokenizer", "CodeLlamaTokenizer")):
            # The defaults of this class in transformers, which override the file.
            defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            fallback = {key: token for key, token in defaults.items() if engine.token_id(token) is not None}
            fallback["add_bos_token"] = True
        elif first is not None:
            settings = settings | {"bos_token": first, "add_bos_token": True}
        else:
            settings = settings | {"add_bos_token": False}
    else:
        raise InputError(f"{directory}: no tokenizer (needs tokenizer.model or tokenizer.json)")
    if settings.get("add_eos_token"):
        note(f"warning: {shorten(directory)}: add_eos_token is ignored: prompts never end with an end-of-text token")
    return Tokenizer(engine, fallback | settings, files)


def _special_tokens(settings: dict[str, Any]) -> list[str | Token]:
    """The special tokens in a checkpoint's files."""
    more = [settings.get(key) or [] for key in ("additional_special_tokens", "extra_special_tokens")]
    more = [list(tokens.values()) if isinstance(tokens, dict) else tokens for tokens in more]
    return [settings[key] for key in SPECIAL if settings.get(key)] + list(itertools.chain(*more))


def _added_tokens(settings: dict[str, Any], added: dict[str, int]) -> dict[int, AddedToken]:
    """Tokens beyond the model's own pieces: `added_tokens_decoder` (new) and `added_tokens.json` (old)."""
    special = {content_of(token) for token in _special_tokens(settings)}
    old = {i: added_token(content, content in special) for content, i in added.items()}
    new = settings.get("added_tokens_decoder") or {}
    if beyond := [i for i in new if int(i) > MAX_ID]:
        raise InputError(f"tokenizer_config.json: added_tokens_decoder: {beyond[0]} is not a valid token id")
    return old | {int(i): added_token(token, False) for i, token in new.items()}
