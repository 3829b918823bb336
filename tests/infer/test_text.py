"""The text of an answer, token by token, against decoding all of its ids at once."""

import json
import random
import re

import pytest

from helpers import TOKENIZERS, copy_tokenizer, golden_json
from infer.text import AnswerText
from llava_jax.data.decoding import WholeStream
from llava_jax.data.tokenizer import load_tokenizer

KINDS = sorted(directory.parent.name for directory in TOKENIZERS.glob("*/tokenizer_config.json"))
STRINGS = golden_json("tokenizers/strings.json")
UNICODE = "猫の図 🙂👩‍👩‍👧 नमस्ते ខ្មែរ \U0010ffff"


def tokenizer_of(kind, legacy, path, **changes):
    """A golden tokenizer; `fallback` is one whose bytes are no special tokens, as in published checkpoints."""
    if kind != "fallback":
        return load_tokenizer(copy_tokenizer(kind, path, legacy=legacy))
    copy_tokenizer("metaspace", path)
    fields = json.loads((path / "tokenizer.json").read_text())
    fields["added_tokens"] = fields["added_tokens"][:3]
    (path / "tokenizer.json").write_text(json.dumps(fields | changes))
    return load_tokenizer(path)


def whole(tokenizer, ids, stops):
    """The text, ids and stop string of an answer, decoded anew at each token."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n])
        if found := [(text.index(stop), len(stop), stop) for stop in stops if stop in text]:
            at, _, stop = min(found)
            return text[:at].strip(), ids[:n], stop
    return tokenizer.decode(ids).strip(), ids, None


def check(tokenizer, ids, stops=()):
    answer = AnswerText(tokenizer, stops)
    shown = ""
    for i in ids:
        shown += answer.add(i)
        assert shown == answer.text
    shown += answer.finish()
    assert (answer.text, answer.token_ids, answer.stopped) == (shown, *whole(tokenizer, ids, stops)[1:])
    assert shown == whole(tokenizer, ids, stops)[0]
    assert not answer.stopped or answer.add(ids[0]) == ""
    assert answer.finish() == "" and answer.text == shown


def random_ids(tokenizer, pick):
    """Words, bytes, spaces, special tokens and ids beyond the vocabulary, in runs."""
    byte = [i for b in range(256) if (i := tokenizer.token_id(f"<0x{b:02X}>")) is not None]
    odd = [i for token in ("▁", "▁▁", "Ġ", "<s>", "</s>", "<|im_end|>", "<|eot_id|>", "[INST]", "<tag>", "cats", "\n")
           if (i := tokenizer.token_id(token)) is not None]  # fmt: skip
    ids: list[int] = []
    for _ in range(pick.randint(1, 8)):
        kind = pick.random()
        if kind < 0.3:
            ids += [pick.randrange(len(tokenizer) + 3) for _ in range(pick.randint(1, 5))]
        elif kind < 0.5 and byte:
            ids += pick.choices(byte, k=pick.randint(1, 5))
        elif kind < 0.7 and odd:
            ids += pick.choices(odd, k=pick.randint(1, 3))
        else:
            text = pick.choice([*STRINGS, UNICODE])
            spelled = [i for b in text.encode() if (i := tokenizer.token_id(f"<0x{b:02X}>")) is not None]
            found = spelled if spelled and pick.random() < 0.5 else tokenizer.encode(text)[0]
            start = pick.randint(0, len(found))
            ids += found[start : start + pick.randint(1, 12)]
    return ids


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "fallback"])
def test_random_ids(kind, legacy, tmp_path):
    tokenizer = tokenizer_of(kind, legacy, tmp_path / "t")
    assert not isinstance(tokenizer.stream(), WholeStream)
    check_random_ids(tokenizer, random.Random(kind), 120)


def sequence(*decoders):
    return {"type": "Sequence", "decoders": decoders}


@pytest.mark.parametrize(
    ("decoder", "whole"),
    [
        (None, True),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}, False),
        ({"type": "BPEDecoder", "suffix": "t"}, True),
        ({"type": "CTC", "pad_token": "<unk>", "word_delimiter_token": "a", "cleanup": True}, True),
        (sequence({"type": "ByteFallback"}, {"type": "Strip", "content": "t", "start": 0, "stop": 1}), True),
        (sequence({"type": "ByteFallback"}, {"type": "Strip", "content": "▁", "start": 1, "stop": 0}), False),
        (sequence({"type": "Fuse"}, {"type": "Strip", "content": "▁", "start": 3, "stop": 0}), False),
    ],
)  # fmt: skip
def test_other_decoders(decoder, whole, tmp_path):
    tokenizer = tokenizer_of("fallback", True, tmp_path / "t", decoder=decoder)
    assert isinstance(tokenizer.stream(), WholeStream) == whole
    check_random_ids(tokenizer, random.Random(0), 60)


def check_random_ids(tokenizer, pick, n):
    for _ in range(n):
        ids = random_ids(tokenizer, pick)
        text = tokenizer.decode(ids)
        stops = ()
        if text and pick.random() < 0.7:
            starts = [pick.randrange(len(text)) for _ in range(pick.randint(1, 3))]
            stops = tuple(text[start : start + pick.randint(1, 4)] for start in starts)
            if "\ufffd" in "".join(stops):
                stops = ()
        try:
            check(tokenizer, ids, stops)
        except AssertionError as error:
            raise AssertionError((ids, [tokenizer.token(i) for i in ids], stops)) from error


@pytest.mark.parametrize("kind", [*KINDS, "fallback"])
def test_text_is_shown_as_soon_as_it_is_settled(kind, tmp_path):
    tokenizer = tokenizer_of(kind, True, tmp_path / "t")
    for text in STRINGS:
        if "<" in text:  # special tokens are left out, and the bytes around them may be one character
            continue
        ids, answer = tokenizer.encode(text)[0], AnswerText(tokenizer)
        for n, i in enumerate(ids):
            answer.add(i)
            if not re.fullmatch("<0x[0-9A-F]{2}>", tokenizer.token(i)):  # after one, the next byte may change the text
                assert len(answer.text) >= len(tokenizer.decode(ids[: n + 1]).rstrip("\ufffd").strip())


def pieces(text, stops, kind="llama"):
    """The ids of a text one by one, and what is shown of it: one piece for each token, one for the end."""
    tokenizer = load_tokenizer(TOKENIZERS / kind)
    answer = AnswerText(tokenizer, stops)
    ids = [i for char in text for i in tokenizer.encode("\n" + char)[0][2:]]
    return [*map(answer.add, ids), answer.finish()], answer


@pytest.mark.parametrize(
    ("text", "stops", "shown", "stopped"),
    [
        ("a#b##c", ["###"], ["a", "", "#b", "", "", "##c", ""], None),
        ("a##", ["###"], ["a", "", "", "##"], None),
        ("a####b", ["###"], ["a", "", "", "", "", "", ""], "###"),
        ("  a  b  ", [], ["", "", "a", "", "", "  b", "", "", ""], None),
        ("a \n#b", ["\n#"], ["a", "", "", "", "", ""], "\n#"),
        ("abcd", ["bcd", "c", "cd"], ["a", "", "b", "", ""], "c"),
        ("abab", ["abb", "ba"], ["", "", "a", "", ""], "ba"),
        ("猫", ["x"], ["", "", "猫", ""], None),
        ("ab", ["", None, "b"], ["a", "", ""], "b"),
        ("猫b", ["猫"], ["", "", "", "", ""], "猫"),
    ],
)
def test_what_is_shown_after_each_character(text, stops, shown, stopped):
    found, answer = pieces(text, stops)
    assert found == shown
    assert answer.stopped == stopped
    assert answer.text == "".join(shown)


@pytest.mark.parametrize("kind", ["llama", "llama-3", "fallback"])
def test_the_cost_of_a_token_does_not_grow(kind, tmp_path, monkeypatch):
    """Whatever the tokens before it, a token takes few decodes of few ids."""
    tokenizer = tokenizer_of(kind, True, tmp_path / "t")
    decoded = []
    engine, decode = tokenizer._engine, tokenizer._engine.decode
    monkeypatch.setattr(engine, "decode", lambda ids, special: decoded.append(len(ids)) or decode(ids, special))
    odd = [i for token in ("▁", "Ġ", "</s>", "<|eot_id|>") if (i := tokenizer.token_id(token)) is not None]
    byte = [i for token in ("<0xE7>", "<0x8C>", "<0xAB>") if (i := tokenizer.token_id(token)) is not None]
    for ids in (tokenizer.encode("the cat 猫 </s> " * 200)[0], byte * 300, *([i] * 900 for i in odd)):
        answer = AnswerText(tokenizer, ["###", "the dog"])
        decoded.clear()
        for i in ids:
            answer.add(i)
        answer.finish()
        assert answer.text == tokenizer.decode(ids).strip()
        assert sum(decoded) <= 12 * len(ids)


# ---------------------------------------------------------------- the bytes of tokens


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(
    "kind", ["llama", "yi", "mistral", "user-defined", "added", "llama-3", "byte-level", "fallback"]
)
def test_the_bytes_of_tokens_are_those_of_the_text(kind, legacy, tmp_path):
    tokenizer = tokenizer_of(kind, legacy, tmp_path / "t")
    for text in [UNICODE, *STRINGS]:
        found = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)[0])).decode()
        if kind == "mistral":  # its marks strip the spaces beside them, and each text after one has the dummy prefix
            found, text = found.replace(" ", ""), text.replace(" ", "")
        if kind != "llama-3" and kind != "byte-level":
            found, text = found.replace(" ", ""), text.replace("▁", " ").replace(" ", "")
        assert found == text


def test_the_bytes_of_single_tokens(tmp_path):
    llama, byte_level = load_tokenizer(TOKENIZERS / "llama"), load_tokenizer(TOKENIZERS / "llama-3")
    fallback = tokenizer_of("fallback", True, tmp_path / "t")
    for tokenizer, token, found in (
        (llama, "▁cat", b" cat"), (llama, "<0xE7>", b"\xe7"), (llama, "</s>", b"</s>"), (llama, "<unk>", b"<unk>"),
        (byte_level, "Ġcat", b" cat"), (byte_level, "ç", b"\xe7"), (byte_level, "<|eot_id|>", b"<|eot_id|>"),
        (fallback, "▁cat", b" cat"), (fallback, "<0xE7>", b"\xe7"), (fallback, "</s>", b"</s>"),
    ):  # fmt: skip
        assert tokenizer.token_bytes(tokenizer.token_id(token)) == found
    assert llama.token_bytes(10**6) == fallback.token_bytes(10**6) == byte_level.token_bytes(10**6) == b""
