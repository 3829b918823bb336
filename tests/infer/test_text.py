"""The text of an answer, token by token, against decoding all of its ids at once."""

import json
import random

import pytest

from helpers import TOKENIZERS, copy_tokenizer, golden_json
from infer.text import AnswerText
from llava_jax.data.decoding import WholeStream
from llava_jax.data.tokenizer import load_tokenizer

KINDS = sorted(directory.parent.name for directory in TOKENIZERS.glob("*/tokenizer_config.json"))
STRINGS = golden_json("tokenizers/strings.json")
UNICODE = "猫の図 🙂👩‍👩‍👧 नमस्ते ខ្មែរ \U0010ffff"


def tokenizer_of(kind, legacy, path):
    """A golden tokenizer; `fallback` is one whose bytes are no special tokens, as in published checkpoints."""
    if kind != "fallback":
        return load_tokenizer(copy_tokenizer(kind, path, legacy=legacy))
    copy_tokenizer("metaspace", path)
    fields = json.loads((path / "tokenizer.json").read_text())
    fields["added_tokens"] = fields["added_tokens"][:3]
    (path / "tokenizer.json").write_text(json.dumps(fields))
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
    pick = random.Random(kind)
    for _ in range(120):
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
