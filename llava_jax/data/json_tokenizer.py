"""Run `tokenizer.json` unchanged, with the `tokenizers` library.

Its regular expressions are untrusted: oniguruma gives up a match after 10**7 tries, but a long text has many positions
at which to try. Known patterns (`PATTERNS`, and those without repetition) run in this process. A tokenizer with any
other pattern, or with components that could make a text much longer, runs in a separate process with limits on time and
memory (`sandbox`).
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokenizers
from tokenizers import AddedToken, pre_tokenizers

from llava_jax.console import InputError, first_line, shorten
from llava_jax.data.decoding import ByteStream, PieceStream, Stream, WholeStream
from llava_jax.data.sentencepiece_tokenizer import (
    BREAK,
    SPACE,
    Offsets,
    Token,
    added_token,
    prefix_after_images,
)
from llava_jax.json_files import parse_json
from llava_jax.sandbox import LimitError, Worker

SECONDS, MEMORY = 10, 2**31  # limits for loading a tokenizer, and for each text
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Patterns that run in time linear in the text.
PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    _WORD + r"\p{N}{1,3}" + _REST,  # Llama 3, GPT-4
    _WORD + r"\p{N}" + _REST,  # Qwen2
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",  # CLIP
    r"\A +| +\z",  # converted SentencePiece models
    r" {2,}",
    r"\s+",
}
COMPONENTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
MAX_ADDED_CHARS = 2  # at the beginning of a text: `▁\n`
LITERALS = re.compile(r"(?:[^\\()\[\]{}*+?]|\\A|\\n|\\\W)*")


BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # the token of a byte


class JsonTokenizer:
    """The tokenizer of a `tokenizer.json`, plus the added tokens from the other files in its directory.

    Raises:
      InputError: the files cannot be read.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        settings: dict[str, Any],
        added: dict[int, AddedToken],
        special: list[str | Token],
        directory: Path,
    ):
        self._file = directory / ("tokenizer.json" if "tokenizer.json" in files else "vocab.json")
        with _input_errors(f"{self._file}: cannot be read"), _silenced():
            self._engine = _read(files, settings, directory)
        for i, token in sorted(added.items()):
            (self._engine.add_special_tokens if token.special else self._engine.add_tokens)([token])
            if (found := self._engine.token_to_id(token.content)) != i:
                raise InputError(
                    f"{shorten(directory)}: the added token {shorten(token.content)!r} should have id {i}, but gets "
                    f"{found} after the vocabulary before it"
                )
        self._engine.add_special_tokens([added_token(token, True) for token in special])
        self._run = limit_untrusted(self._engine)
        with _input_errors(f"{self._file}: cannot be used"), _silenced():
            encoded = self._run.encode("a", add_special_tokens=True)
        # The special token that the file's post-processor puts in front.
        self.first_token = encoded.tokens[0] if encoded.special_tokens_mask[:1] == [1] else None

    def __len__(self) -> int:
        return self._engine.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, breaks: bool = False) -> tuple[list[int], Offsets]:
        with _input_errors(f"{self._file}: encoding a text of {len(text):,} characters fails"):
            run = self._breaking if breaks and BREAK in text else self._run
            encoding = run.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int], special: bool) -> str:
        with _input_errors(f"{self._file}: decoding {len(ids):,} ids fails"):
            return self._run.decode(ids, skip_special_tokens=not special)

    @functools.cached_property
    def _breaking(self) -> "tokenizers.Tokenizer | _Limited":
        """The engine with a boundary between tokens at each `BREAK`, which has no token itself.

        Pre-tokenizers come after added tokens, of which none can then extend over a boundary.
        """
        engine = tokenizers.Tokenizer.from_str(self._engine.to_str())
        spelled = "".join(char for byte in BREAK.encode() for char, value in _alphabet().items() if value == byte)
        breaks = [pre_tokenizers.Split(text, "removed") for text in (BREAK, spelled)]
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [engine.pre_tokenizer, *breaks] if engine.pre_tokenizer else breaks
        )
        return limit_untrusted(engine)

    def control_tokens(self) -> list[str]:
        return [token.content for token in self._added.values()]

    def stream(self) -> Stream:
        decode = functools.partial(self.decode, special=False)
        special = {i for i, token in self._added.items() if token.special}
        skips = lambda i: i in special or self.token(i) is None  # noqa: E731
        kinds = [part["type"] for part in self._decoders]
        if kinds == ["ByteLevel"]:
            return ByteStream(lambda i: _bytes_of(self.token(i) or ""), skips)
        if kinds and all(map(_is_local, self._decoders)):
            return PieceStream(decode, self._byte, skips, whole_runs=True)
        return WholeStream(decode)

    def token_bytes(self, i: int) -> bytes:
        token = self.token(i) or ""
        if i in self._added:
            return token.encode()
        kinds = {part["type"]: part for part in self._decoders}
        if "ByteLevel" in kinds:
            return _bytes_of(token)
        if (byte := self._byte(i)) is not None:
            return bytes([byte])
        return (token.replace(SPACE, " ") if kinds.keys() & {"Replace", "Metaspace"} else token).encode()

    def _byte(self, i: int) -> int | None:
        fallback = any(part["type"] == "ByteFallback" for part in self._decoders)
        token = BYTE.fullmatch(self.token(i) or "") if fallback else None
        return int(token[1], 16) if token else None

    @functools.cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self._engine.get_added_tokens_decoder()

    @functools.cached_property
    def _decoders(self) -> list[dict[str, Any]]:
        """The settings of the decoders, in order."""
        decoder = self._engine.decoder
        parts = [json.loads(decoder.__getstate__())] if decoder else []
        while any(part["type"] == "Sequence" for part in parts):
            parts = [inner for part in parts for inner in part.get("decoders", [part])]
        return parts

    def token_id(self, token: str) -> int | None:
        return self._engine.token_to_id(token)

    def token(self, i: int) -> str | None:
        return self._engine.id_to_token(i)

    def add_special(self, tokens: list[str]) -> None:
        if tokens:
            self._engine.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
            self._run = limit_untrusted(self._engine)
            for name in ("_added", "_breaking"):
                self.__dict__.pop(name, None)

    def for_transformers(self) -> tokenizers.Tokenizer:
        engine = tokenizers.Tokenizer.from_str(self._engine.to_str())
        if '"prepend_scheme":"first"' in self._engine.to_str():
            prefix_after_images(engine)
        return engine


def _read(files: dict[str, bytes], settings: dict[str, Any], directory: Path) -> tokenizers.Tokenizer:
    if (
        "tokenizer.json" not in files
    ):  # vocab.json and merges.txt, as for GPT-2: load them with their class in transformers
        import transformers

        kind = getattr(transformers, str(settings.get("tokenizer_class")).removesuffix("Fast"), None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerBase)):
            raise ValueError("tokenizer_class in tokenizer_config.json names no tokenizer of transformers")
        return kind.from_pretrained(directory).backend_tokenizer
    fields = parse_json(files["tokenizer.json"])
    fields |= {"truncation": None, "padding": None}  # settings of the last use, irrelevant to prompts
    if isinstance(fields.get("model"), dict):
        fields["model"].pop("dropout", None)  # random omission of merges, for training
    text = json.dumps(fields)
    if not _are_linear([fields.get(name) for name in COMPONENTS]):
        trial = Worker(SECONDS, MEMORY)
        trial.run("load", text)
        trial.close()
    return tokenizers.Tokenizer.from_str(text)


# ---------------------------------------------------------------- the bytes of tokens


@functools.cache
def _alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level BPE (GPT-2's encoder.py `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _bytes_of(token: str) -> bytes:
    """The bytes of a token of byte-level BPE; a token with other characters is its own text."""
    found = [_alphabet().get(char) for char in token]
    return token.encode() if None in found else bytes(byte for byte in found if byte is not None)


def _is_local(decoder: dict[str, Any]) -> bool:
    """Whether a decoder gives a token the same text everywhere except at the beginning of a text."""
    kind = decoder["type"]
    if kind == "Replace":
        return decoder["pattern"] == {"String": SPACE}
    return kind in ("ByteFallback", "Fuse", "Metaspace") or (kind == "Strip" and decoder["stop"] == 0)


# ---------------------------------------------------------------- limits


def limit_untrusted(engine: tokenizers.Tokenizer) -> "tokenizers.Tokenizer | _Limited":
    """The engine itself, or a limited process that encodes and decodes like it if it has unknown components."""
    parts = [part and json.loads(part.__getstate__()) for part in (getattr(engine, name) for name in COMPONENTS)]
    return engine if _are_linear(parts) else _Limited(engine.to_str())


def _are_linear(parts: list[Any]) -> bool:
    """Whether components of a `tokenizer.json` are known to take time and memory linear in the text."""
    found = list(_objects(parts))
    byte_levels = sum(part.get("type") == "ByteLevel" for part in found)  # each doubles the length of non-ASCII text
    return byte_levels <= len(COMPONENTS) and all(map(_is_linear, found))


def _is_linear(part: dict[str, Any]) -> bool:
    regex, kind = part.get("Regex", ""), part.get("type")
    if not isinstance(regex, str) or not (regex in PATTERNS or LITERALS.fullmatch(regex)):
        return False
    if kind == "Replace":
        pattern = part.get("pattern")
        if not isinstance(pattern, dict):
            return False
        content, regex = len(str(part.get("content"))), str(pattern.get("Regex", ""))
        if regex.startswith(r"\A") and "|" not in regex:  # matches once per text
            return content <= MAX_ADDED_CHARS
        return content <= (1 if regex in PATTERNS else len(str(pattern.get("String", ""))))
    return kind != "Precompiled" and (kind != "Prepend" or len(str(part.get("prepend"))) <= MAX_ADDED_CHARS)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _objects(inner)


class _Limited:
    """An engine that runs in a worker process."""

    def __init__(self, tokenizer_json: str):
        self._worker = Worker(SECONDS, MEMORY, setup=("load", tokenizer_json))

    def encode(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        found = SimpleNamespace(**self._worker.run("encode", text, add_special_tokens))
        found.offsets = [(start, end) for start, end in found.offsets]
        return found

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._worker.run("decode", ids, skip_special_tokens)


@contextlib.contextmanager
def _input_errors(action: str) -> Iterator[None]:
    """Turn whatever `tokenizers` raises into an `InputError`, including Rust panics, which are no `Exception`."""
    try:
        yield
    except LimitError as error:
        raise InputError(f"{action}: it {error}") from None
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{action} ({first_line(error)})") from None


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keep Rust from printing panics to standard error while the body runs."""
    try:
        stderr = os.dup(2)
    except OSError:  # standard error is closed
        yield
        return
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
