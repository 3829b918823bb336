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

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tokenizers
from msgspec import Meta
from tokenizers import AddedToken, processors

from llava_jax.console import InputError, note, shorten
from llava_jax.data.json_tokenizer import JsonTokenizer, runner
from llava_jax.data.sentencepiece_tokenizer import Offsets, SlowTokenizer, Token, added_token, content_of
from llava_jax.data.templates import MARK
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
# Prompts that an exported tokenizer is tried with.
PROBES = (
    f"USER: {MARK}\nWhat is shown?  It's 2024! ASSISTANT: A cat.</s>",
    f"<|im_start|>user\n{MARK}\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    f"USER: {MARK}\nnaïve café ﬁne a\u0308\u0323 猫 🙂 ASSISTANT:",
)
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_FILE = 128 * 2**20  # bytes; Gemma's, one of the largest, has 33 MB
MAX_ID = 2**24
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # the first line of what Llama 3 calls tokenizer.model


class NamedTemplate(TypedDict):
    """One of several chat templates."""

    name: str
    template: str


class Settings(TypedDict, total=False):
    """`tokenizer_config.json`, and `special_tokens_map.json` of older checkpoints, as far as they are read."""

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
    """Text to ids, and back.

    Attributes:
      bos_id: begins a prompt; None where the tokenizer adds none.
      eos_id, unk_id, pad_id: None where there is none.
      files: the files it was read from, by name, to go along with a checkpoint.
    """

    def __init__(self, engine: "SlowTokenizer | JsonTokenizer", settings: dict[str, Any], files: dict[str, bytes]):
        self._engine, self._settings, self.files = engine, settings, files
        token = {key: content_of(settings.get(f"{key}_token")) for key in ("bos", "eos", "unk", "pad")}
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
        return self._engine.decode_settled([int(i) for i in ids]).rstrip("\ufffd")

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
        if self.bos_id is not None and runner(engine).encode("a").ids[:1] != [self.bos_id]:
            bos = name["bos"]
            engine.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, self.bos_id)]
            )
        engine.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in new_tokens])
        self._compare(engine)
        settings = parse_json(self.files.get("tokenizer_config.json", b"{}"))
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
        if isinstance(self._engine, SlowTokenizer):
            settings["legacy"] = self._engine.legacy
        kept = {file: self.files[file] for file in ("tokenizer.model",) if file in self.files}
        return {**kept, "tokenizer.json": engine.to_str(pretty=True), "tokenizer_config.json": settings}

    def _compare(self, engine: tokenizers.Tokenizer) -> None:
        """Warn if another engine gives a prompt other ids: not all that SentencePiece does can be said there."""
        image, run = engine.token_to_id(MARK), runner(engine)
        for probe in PROBES:
            ids = [self.encode(piece)[0] for piece in probe.split(MARK)]
            ours = ids[0] + [i for piece in ids[1:] for i in (image, *piece)]
            if image is not None and ours != run.encode(probe, add_special_tokens=False).ids:
                note(f"warning: transformers' tokenizer gives other ids than this one, for {probe!r} for example")
                return


# ---------------------------------------------------------------- reading


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """Read the tokenizer of a checkpoint directory.

    Raises:
      InputError: there is none, or its files cannot be read.
    """
    directory = Path(directory)
    files = {name: read_bytes(directory / name, MAX_FILE) for name in FILES if (directory / name).exists()}
    config = read_json(directory / "tokenizer_config.json", Settings) or {}
    # As transformers: of older files the map counts, of newer ones nothing but the configuration.
    newer = "added_tokens_decoder" in config
    settings = config if newer else config | (read_json(directory / "special_tokens_map.json", Settings) or {})
    added = read_json(directory / "added_tokens.json", AddedIds) or {}
    if "tokenizer.json" not in files and "vocab.json" in files and "tokenizer_class" not in settings:
        raise InputError(f"{directory}: vocab.json needs a tokenizer_config.json that names its tokenizer_class")
    if "tokenizer.json" in files and TIKTOKEN.match(files.get("tokenizer.model", b"")):
        files.pop("tokenizer.model")
    if "tokenizer.model" in files:
        plain = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
        engine = SlowTokenizer(
            files["tokenizer.model"],
            directory / "tokenizer.model",
            legacy=settings.get("legacy") is not False,
            unk=content_of((plain | settings)["unk_token"]) or "<unk>",
            special=_special_tokens(settings) + [token for key, token in plain.items() if key in SPECIAL],
            added=_added_tokens(settings, added),
        )
    elif "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files.keys():
        engine = JsonTokenizer(files, settings, _added_tokens(settings, added), _special_tokens(settings), directory)
        first, plain = engine.first_token, {}
        if str(settings.get("tokenizer_class", "")).startswith(("LlamaTokenizer", "CodeLlamaTokenizer")):
            # What this class of transformers has by default, whatever the file says.
            usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            plain = {key: token for key, token in usual.items() if engine.token_id(token) is not None}
            plain["add_bos_token"] = True
        elif first is not None:
            settings = settings | {"bos_token": first, "add_bos_token": True}
        else:
            settings = settings | {"add_bos_token": False}
    else:
        raise InputError(f"{directory}: no tokenizer (neither tokenizer.model nor tokenizer.json)")
    if settings.get("add_eos_token"):
        note(f"warning: {shorten(directory)}: add_eos_token is not followed: no prompt ends with an end-of-text token")
    return Tokenizer(engine, plain | settings, files)


def _special_tokens(settings: dict[str, Any]) -> list[str | Token]:
    """The special tokens that a checkpoint's files name."""
    more = [settings.get(key) or [] for key in ("additional_special_tokens", "extra_special_tokens")]
    more = [list(tokens.values()) if isinstance(tokens, dict) else tokens for tokens in more]
    return [settings[key] for key in SPECIAL if settings.get(key)] + list(itertools.chain(*more))


def _added_tokens(settings: dict[str, Any], added: dict[str, int]) -> dict[int, AddedToken]:
    """Tokens beyond the model's own pieces: `added_tokens_decoder` (new) and `added_tokens.json` (old)."""
    special = {content_of(token) for token in _special_tokens(settings)}
    old = {i: added_token(content, content in special) for content, i in added.items()}
    new = settings.get("added_tokens_decoder") or {}
    if beyond := [i for i in new if int(i) > MAX_ID]:
        raise InputError(f"tokenizer_config.json: added_tokens_decoder: {beyond[0]} is no id of a token")
    return old | {int(i): added_token(token, False) for i, token in new.items()}
