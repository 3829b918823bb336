"""`tokenizer.json`, run by `tokenizers` as it stands.

Its regular expressions are a stranger's programs: oniguruma gives up a match after 10**7 tries, but a long text has
many places where one may begin. Patterns that are in use (`PATTERNS`, and those without repetition) run in this
process. A tokenizer with any other, or with parts that could make a text much longer, runs in a process of its own,
within limits of time and memory (`limited`).
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokenizers
from tokenizers import AddedToken

from llava_jax.console import InputError, first_line, shorten
from llava_jax.data.sentencepiece_tokenizer import Offsets, added_token, prefix_after_images
from llava_jax.json_files import parse_json
from llava_jax.limited import LimitError, Worker

SECONDS, MEMORY = 10, 2**31  # for reading a tokenizer, and for a text
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Patterns that take time in proportion to the text.
PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    _WORD + r"\p{N}{1,3}" + _REST,  # Llama 3, GPT-4
    _WORD + r"\p{N}" + _REST,  # Qwen2
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",  # CLIP
    r"\A +| +\z",  # of SentencePiece models, converted
    r" {2,}",
    r"\s+",
}
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
MOST_ADDED = 2  # characters, to the beginning of a text: `▁\n`
LITERALS = re.compile(r"(?:[^\\()\[\]{}*+?]|\\A|\\n|\\\W)*")


class JsonTokenizer:
    """`tokenizers`, as `tokenizer.json` stands, and the added tokens that other files of the directory name.

    Raises:
      InputError: it cannot be read.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        settings: dict[str, Any],
        added: dict[int, AddedToken],
        special: list[str | dict],
        directory: Path,
    ):
        self._file = directory / ("tokenizer.json" if "tokenizer.json" in files else "vocab.json")
        with _refused(f"{self._file}: cannot be read"), _silenced():
            self._engine = _read(files, settings, directory)
        for i, token in sorted(added.items()):
            (self._engine.add_special_tokens if token.special else self._engine.add_tokens)([token])
            if (found := self._engine.token_to_id(token.content)) != i:
                raise InputError(
                    f"{shorten(directory)}: the added token {shorten(token.content)!r} should have id {i}, but the "
                    f"vocabulary before it makes it {found}"
                )
        self._engine.add_special_tokens([added_token(token, True) for token in special])
        self._run = runner(self._engine)
        with _refused(f"{self._file}: cannot be used"), _silenced():
            encoded = self._run.encode("a", add_special_tokens=True)
        # The special token that the file's post-processor puts first.
        self.first_token = encoded.tokens[0] if encoded.special_tokens_mask[:1] == [1] else None

    def __len__(self) -> int:
        return self._engine.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        with _refused(f"{self._file}: encoding a text of {len(text):,} characters fails"):
            encoding = self._run.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int], special: bool) -> str:
        with _refused(f"{self._file}: decoding {len(ids):,} ids fails"):
            return self._run.decode(ids, skip_special_tokens=not special)

    def decode_settled(self, ids: list[int]) -> str:
        n = len(ids)  # one more byte can make another text of a run of them
        while n and re.fullmatch(r"<0x[0-9A-F]{2}>", self.token(ids[n - 1]) or ""):
            n -= 1
        return self.decode(ids[:n], False)

    def token_id(self, token: str) -> int | None:
        return self._engine.token_to_id(token)

    def token(self, i: int) -> str | None:
        return self._engine.id_to_token(i)

    def add_special(self, tokens: list[str]) -> None:
        if tokens:
            self._engine.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
            self._run = runner(self._engine)

    def for_transformers(self) -> tokenizers.Tokenizer:
        engine = tokenizers.Tokenizer.from_str(self._engine.to_str())
        if '"prepend_scheme":"first"' in self._engine.to_str():
            prefix_after_images(engine)
        return engine


def _read(files: dict[str, bytes], settings: dict[str, Any], directory: Path) -> tokenizers.Tokenizer:
    if "tokenizer.json" not in files:  # the two files of GPT-2's kind: their class in transformers reads them
        import transformers

        kind = getattr(transformers, str(settings.get("tokenizer_class")).removesuffix("Fast"), None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerBase)):
            raise ValueError("tokenizer_class in tokenizer_config.json names no tokenizer of transformers")
        return kind.from_pretrained(directory).backend_tokenizer
    fields = parse_json(files["tokenizer.json"])
    fields |= {"truncation": None, "padding": None}  # of whoever saved it; neither is part of a prompt
    if isinstance(fields.get("model"), dict):
        fields["model"].pop("dropout", None)  # merges that are left out at random, in training
    text = json.dumps(fields)
    if not _are_known([fields.get(name) for name in PARTS]):
        trial = Worker(SECONDS, MEMORY)
        trial.run("load", text)
        trial.close()
    return tokenizers.Tokenizer.from_str(text)


# ---------------------------------------------------------------- what runs where


def runner(engine: tokenizers.Tokenizer) -> "tokenizers.Tokenizer | _Limited":
    """What encodes and decodes as an engine does now: itself, or a process of its own if it has unknown parts."""
    parts = [part and json.loads(part.__getstate__()) for part in (getattr(engine, name) for name in PARTS)]
    return engine if _are_known(parts) else _Limited(engine.to_str())


def _are_known(parts: list[Any]) -> bool:
    """Whether parts of a `tokenizer.json` are known to take time and memory in proportion to the text."""
    found = list(_objects(parts))
    byte_levels = sum(part.get("type") == "ByteLevel" for part in found)  # each doubles what is not ASCII
    return byte_levels <= len(PARTS) and all(map(_is_known, found))


def _is_known(part: dict[str, Any]) -> bool:
    regex, kind = part.get("Regex", ""), part.get("type")
    if not isinstance(regex, str) or not (regex in PATTERNS or LITERALS.fullmatch(regex)):
        return False
    if kind == "Replace":
        pattern = part.get("pattern")
        if not isinstance(pattern, dict):
            return False
        content, regex = len(str(part.get("content"))), str(pattern.get("Regex", ""))
        if regex.startswith(r"\A") and "|" not in regex:  # once in a text
            return content <= MOST_ADDED
        return content <= (1 if regex in PATTERNS else len(str(pattern.get("String", ""))))
    return kind != "Precompiled" and (kind != "Prepend" or len(str(part.get("prepend"))) <= MOST_ADDED)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _objects(inner)


class _Limited:
    """An engine, run by a worker."""

    def __init__(self, tokenizer_json: str):
        self._worker = Worker(SECONDS, MEMORY, setup=("load", tokenizer_json))

    def encode(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        found = SimpleNamespace(**self._worker.run("encode", text, add_special_tokens))
        found.offsets = [(start, end) for start, end in found.offsets]
        return found

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._worker.run("decode", ids, skip_special_tokens)


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Whatever `tokenizers` raises is an `InputError`: a panic of Rust's too, which is no `Exception`."""
    try:
        yield
    except LimitError as error:
        raise InputError(f"{what}: it {error}") from None
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{what} ({first_line(error)})") from None


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """While the body runs, Rust writes nothing of its panics to the file of standard error."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
