"""Every kind of tokenizer file beside SentencePiece, transformers 4.37.2 and the transformers at hand.

`golden/tokenizers/make.py` made the files, and what transformers 4.37.2 gives for them.
"""

import gzip
import json

import pytest

from helpers import TOKENIZERS, copy_tokenizer, golden_json
from llava_jax.data.prompts import encode
from llava_jax.data.tokenizer import load_tokenizer

STRINGS = golden_json("tokenizers/strings.json")
SENTENCEPIECE = sorted(file.parent.name for file in TOKENIZERS.glob("*/tokenizer.model"))
JSON = sorted(file.parent.name for file in TOKENIZERS.glob("*/tokenizer.json"))
EXPECTED = json.loads(gzip.decompress((TOKENIZERS / "expected.json.gz").read_bytes()))


def test_there_are_twelve_kinds_and_two_hundred_strings():
    assert len(SENTENCEPIECE) + len(JSON) >= 12
    assert len(STRINGS) == 200
    assert EXPECTED.keys() == set(SENTENCEPIECE)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_ids_are_those_of_the_slow_tokenizer(kind, legacy, tmp_path):
    tokenizer = load_tokenizer(copy_tokenizer(kind, tmp_path / "t", legacy=legacy))
    for text, ids in zip(STRINGS, EXPECTED[kind][str(legacy).lower()], strict=True):
        assert tokenizer.encode(text)[0] == ids, repr(text)


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_without_added_tokens_ids_are_sentencepieces_own(kind):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(TOKENIZERS / kind / "tokenizer.model"))
    tokenizer = load_tokenizer(TOKENIZERS / kind)
    added = [token.content for token in tokenizer._engine.added.values()]
    texts = [text for text in STRINGS if not any(token in text for token in added)]
    assert len(texts) > 50
    for text in texts:
        assert tokenizer.encode(text)[0] == model.encode(text), repr(text)


@pytest.mark.parametrize("kind", JSON)
def test_a_tokenizer_json_is_run_as_it_stands(kind):
    import tokenizers
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(TOKENIZERS / kind)
    raw = tokenizers.Tokenizer.from_file(str(TOKENIZERS / kind / "tokenizer.json"))
    ours = load_tokenizer(TOKENIZERS / kind)
    for text in STRINGS:
        ids = ours.encode(text)[0]
        assert ids == theirs.encode(text, add_special_tokens=False), repr(text)
        assert ids == raw.encode(text, add_special_tokens=False).ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text)
    first = theirs.encode("a")[0]
    assert ours.bos_id == (first if first in theirs.all_special_ids else None)
    assert ours.eos_id == theirs.eos_token_id


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", [*SENTENCEPIECE, *JSON])
def test_offsets_cover_the_text_in_order(kind, legacy, tmp_path):
    tokenizer = load_tokenizer(copy_tokenizer(kind, tmp_path / "t", legacy=legacy))
    for text in STRINGS:
        ids, offsets = tokenizer.encode(text)
        assert len(ids) == len(offsets)
        starts = [start for start, _ in offsets]
        assert starts == sorted(starts), repr(text)
        assert all(0 <= start <= end <= len(text) for start, end in offsets), repr(text)
        for i, (start, end) in zip(ids, offsets, strict=True):
            if len(token := tokenizer.token(i)) > 5 and token[:3] != "<0x" and token in text:  # added, or a long word
                assert text[start:end].strip() == token.strip()


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", [*SENTENCEPIECE, *JSON])
def test_decoding_streams_without_a_broken_character(kind, legacy, tmp_path):
    tokenizer = load_tokenizer(copy_tokenizer(kind, tmp_path / "t", legacy=legacy))
    for text in STRINGS:
        ids, stream = tokenizer.encode(text)[0], tokenizer.stream()
        whole = tokenizer.decode(ids)
        assert "".join([*map(stream.add, ids), stream.finish()]) == whole, repr(text)
        assert "\ufffd" not in whole or "\ufffd" in text, repr(text)


@pytest.mark.parametrize("kind", ["llama", "yi", "user-defined", "llama-3", "byte-level"])  # without normalization
def test_decoding_gives_the_text_back(kind):
    tokenizer = load_tokenizer(TOKENIZERS / kind)
    for text in ("Hello there, two cats.", "naïve café 猫 🙂 e\u0301", "line one\nline two", "a  b", "x\x01y"):
        assert tokenizer.decode(encode(text, tokenizer)[0]) == text


def can_be_said_in_transformers(text: str, kind: str, legacy: bool) -> bool:
    """Whether `tokenizers` has the means to do with a text what SentencePiece and the slow tokenizer do."""
    stacked = "a\u0308\u0323" in text  # its normalization goes by grapheme
    beyond = {
        "nfkc": stacked or "\r\n" in text or "\x7f" in text,
        "openllama": stacked or "▁" in text,  # of the marks for spaces, extra ones are kept
        "unigram": "<0x0A>" in text,  # the text of a byte piece is taken for the piece
        "added": "cats" in text,  # another idea of what a word is
    }
    # Without legacy, a space before the text is added only where none is, and a newline behind any token is taken for
    # one behind an image.
    if not legacy and kind in SENTENCEPIECE and (text.startswith((" ", "▁", "<|im_", "<image>")) or "[/INST]" in text):
        return False
    return not beyond.get(kind, False)


@pytest.mark.parametrize(
    ("kind", "legacy"),
    [
        (kind, legacy) for kind in [*SENTENCEPIECE, *JSON] for legacy in (True, False)
        if legacy or kind not in ("nfkc", "openllama")  # no published model is like that
    ],
)  # fmt: skip
def test_transformers_gets_the_same_ids(kind, legacy, tmp_path):
    from transformers import AutoTokenizer

    ours = load_tokenizer(copy_tokenizer(kind, tmp_path / "t", legacy=legacy))
    (tmp_path / "hf").mkdir()
    for name, content in ours.transformers_files().items():
        if isinstance(content, bytes):
            (tmp_path / "hf" / name).write_bytes(content)
        else:
            (tmp_path / "hf" / name).write_text(content if isinstance(content, str) else json.dumps(content))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    again = load_tokenizer(tmp_path / "hf")
    assert (again.bos_id, again.eos_id, again.pad_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    compared = 0
    for text in STRINGS:
        ids = ours.encode(text)[0]
        assert again.encode(text)[0] == ids, repr(text)
        if can_be_said_in_transformers(text, kind, legacy):
            assert theirs.encode(text, add_special_tokens=False) == ids, repr(text)
            compared += 1
    assert compared > 100


def test_characters_of_bytes_are_shown_when_they_are_whole():
    tokenizer = load_tokenizer(TOKENIZERS / "llama")
    ids, stream = tokenizer.encode("😀猫")[0], tokenizer.stream()
    assert [stream.add(i) for i in ids] == ["", "", "", "", "😀", "", "", "猫"]
