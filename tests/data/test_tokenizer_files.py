"""What the files of a tokenizer say is done, or refused; work that a stranger's file asks for has a limit."""

import json
import random

import pytest

from helpers import GOLDEN, TOKENIZERS, copy_tokenizer, damage, golden_json
from llava_jax.console import InputError
from llava_jax.data.json_tokenizer import limit_untrusted
from llava_jax.data.tokenizer import load_tokenizer

STRINGS = golden_json("tokenizers/strings.json")


def test_truncation_and_padding_of_a_file_are_no_part_of_a_prompt(tmp_path):
    path = copy_tokenizer("llama-3", tmp_path / "t") / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 9}
    fields["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "!",
    }  # fmt: skip
    path.write_text(json.dumps(fields))
    text = "What is shown in this image?"
    assert load_tokenizer(tmp_path / "t").encode(text) == load_tokenizer(TOKENIZERS / "llama-3").encode(text)


def test_merges_are_never_left_out_at_random(tmp_path):
    path = copy_tokenizer("llama-3", tmp_path / "t") / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["model"]["dropout"] = 0.9
    path.write_text(json.dumps(fields))
    text = "What is shown in this image?"
    assert load_tokenizer(tmp_path / "t").encode(text) == load_tokenizer(TOKENIZERS / "llama-3").encode(text)


def rewrite(kind: str, directory, **changed):
    """A tokenizer with other parts."""
    path = copy_tokenizer(kind, directory) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return directory


def split(pattern: str) -> dict:
    """A pre-tokenizer of the kind of Llama 3's."""
    parts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    return {"type": "Sequence", "pretokenizers": parts}


def replace(pattern: str) -> dict:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": "b"}


def test_a_pattern_that_is_not_known_gives_what_tokenizers_gives(tmp_path):
    import tokenizers

    parts = dict(pre_tokenizer=split(r"\p{L}+|\p{N}|\s+|."), normalizer=replace("[x-z]"), decoder=replace("a"))
    directory = rewrite("llama-3", tmp_path / "t", **parts)
    ours = load_tokenizer(directory)
    ours.add_special(["<new>"])
    theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    theirs.add_special_tokens(["<new>"])
    for text in [*STRINGS[:50], "xy<new>z"]:
        want = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == (want.ids, want.offsets), repr(text)
        assert ours.decode(want.ids) == theirs.decode(want.ids), repr(text)


@pytest.mark.parametrize(
    ("pattern", "text", "says"),
    [
        ("(a+)+$", "a" * 40 + "b", r"\(Onig: .*retry-limit.*\)"),
        ("a*a*a*$", ("a" * 200 + "b") * 50, ": it takes more than 1 s"),
    ],
    ids=["exponential", "cubic"],
)
@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer", "decoder"])
def test_a_pattern_that_takes_for_ever_is_given_up(part, pattern, text, says, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("llava_jax.data.json_tokenizer.SECONDS", 1)
    made = split(pattern) if part == "pre_tokenizer" else replace(pattern)
    tokenizer = load_tokenizer(rewrite("byte-level", tmp_path / "t", **{part: made}))
    with pytest.raises(InputError, match=rf"tokenizer.json: (encoding a text|decoding) .* fails ?{says}$") as refused:
        if part == "decoder":
            tokenizer.add_special([text])
            tokenizer.decode([tokenizer.token_id(text)], special=True)
        else:
            tokenizer.encode(text)
    assert len(str(refused.value).replace(str(tmp_path), "")) < 300
    assert capfd.readouterr().err == ""
    assert tokenizer.decode(tokenizer.encode("Hi")[0])  # the next one is run


def doubling(pattern: dict, content: str) -> dict:
    parts = [{"type": "Replace", "pattern": pattern, "content": content}] * 40
    return {"type": "Sequence", "normalizers": parts, "decoders": parts}


@pytest.mark.parametrize(
    ("part", "made"),
    [
        ("normalizer", doubling({"String": "a"}, "aa")),
        ("normalizer", doubling({"Regex": "a"}, "aa")),
        ("normalizer", doubling({"Regex": "a|"}, "b")),
        ("decoder", doubling({"String": "a"}, "aa")),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False,
                                                                   "trim_offsets": True, "use_regex": False}] * 40}),
    ],
)  # fmt: skip
def test_a_part_that_makes_a_text_ever_longer_is_given_up(part, made, tmp_path, monkeypatch):
    monkeypatch.setattr("llava_jax.data.json_tokenizer.SECONDS", 1)
    directory = rewrite("byte-level", tmp_path / "t", **{part: made})
    with pytest.raises(InputError, match=r"tokenizer.json: .* (it takes more than|it crashes)") as refused:
        tokenizer = load_tokenizer(directory)
        tokenizer.decode(tokenizer.encode("a naïve text")[0])
    assert len(str(refused.value).replace(str(tmp_path), "")) < 300


def test_tokenizers_that_are_in_use_run_in_this_process():
    import tokenizers

    for path in TOKENIZERS.glob("*/tokenizer.json"):
        assert isinstance(load_tokenizer(path.parent)._engine._run, tokenizers.Tokenizer), path
    exported = load_tokenizer(TOKENIZERS / "llama")._engine.for_transformers()
    assert isinstance(limit_untrusted(exported), tokenizers.Tokenizer)


@pytest.mark.parametrize(
    "changed",
    [
        {"pre_tokenizer": split("(a")},
        {"pre_tokenizer": split("(" * 9999 + ")" * 9999)},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]],
                   "continuing_subword_prefix": "x" * 99}},
        {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
                            "pair": [], "special_tokens": {}}},
        {"added_tokens": [{"id": -1}]},
        {"decoder": []},
    ],
)  # fmt: skip
def test_a_faulty_tokenizer_json_is_refused_in_one_line(changed, tmp_path, capfd):
    with pytest.raises(InputError, match=r"tokenizer.json: cannot be (read|used) \(") as refused:
        load_tokenizer(rewrite("byte-level", tmp_path / "t", **changed))
    assert "\n" not in str(refused.value) and len(str(refused.value).replace(str(tmp_path), "")) < 300
    assert capfd.readouterr().err == ""  # of a panic of Rust's too


@pytest.mark.parametrize("kind", ["llama", "unigram"])
def test_a_damaged_tokenizer_model_is_read_or_refused(kind, tmp_path):
    path, pick, read = copy_tokenizer(kind, tmp_path / "t") / "tokenizer.model", random.Random(0), 0
    whole = path.read_bytes()
    for _ in range(200):
        path.write_bytes(damage(whole, pick))
        try:
            tokenizer = load_tokenizer(tmp_path / "t")
            tokenizer.decode(tokenizer.encode("naïve 猫 <image> It's\n")[0])
            read += 1
        except InputError as error:
            assert "\n" not in str(error) and len(str(error).replace(str(tmp_path), "")) < 300
    assert 0 < read < 200


def test_a_piece_that_is_no_text_is_refused(tmp_path):
    path = copy_tokenizer("llama", tmp_path / "t") / "tokenizer.model"
    path.write_bytes(path.read_bytes().replace("▁a".encode(), b"\xb8\xb8\xb8a", 1))
    with pytest.raises(InputError, match=r"tokenizer.model: not a SentencePiece model \('utf-8' codec can't decode"):
        load_tokenizer(tmp_path / "t")


def test_bos_is_what_the_class_or_the_file_adds(tmp_path):
    assert load_tokenizer(TOKENIZERS / "metaspace").bos_id is None  # its file has no post-processor
    as_llama = copy_tokenizer("metaspace", tmp_path / "llama", tokenizer_class="LlamaTokenizerFast")
    assert load_tokenizer(as_llama).bos_id == 1
    as_it_stands = load_tokenizer(copy_tokenizer("llama-3", tmp_path / "off", add_bos_token=False, bos_token="!"))
    assert as_it_stands.bos_id == load_tokenizer(TOKENIZERS / "llama-3").bos_id  # whatever stands beside the file


def test_a_token_at_the_end_of_each_text_is_left_out_and_named(tmp_path, capsys):
    plain = load_tokenizer(TOKENIZERS / "llama").encode("a")
    assert load_tokenizer(copy_tokenizer("llama", tmp_path / "t", add_eos_token=True)).encode("a") == plain
    assert "add_eos_token is ignored" in capsys.readouterr().err


def test_special_tokens_that_a_tokenizer_json_lacks_are_added(tmp_path):
    from transformers import AutoTokenizer

    directory = copy_tokenizer("qwen-2", tmp_path / "t", additional_special_tokens=["<boi>", "<|im_end|>"])
    assert load_tokenizer(directory).encode("a<boi>b") == (
        AutoTokenizer.from_pretrained(directory).encode("a<boi>b"),
        [(0, 1), (1, 6), (6, 7)],
    )


def test_of_older_files_the_map_of_special_tokens_counts(tmp_path):
    directory = copy_tokenizer("yi", tmp_path / "t", eos_token="<|startoftext|>")
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    assert load_tokenizer(directory).eos_id == 1  # `added_tokens_decoder` is there
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["added_tokens_decoder"]
    path.write_text(json.dumps(settings | {"add_bos_token": None}))
    assert (load_tokenizer(directory).eos_id, load_tokenizer(directory).bos_id) == (2, None)


def test_an_export_that_gives_other_ids_is_warned_of(tmp_path, capsys):
    load_tokenizer(TOKENIZERS / "llama").transformers_files(["<image>"])
    assert capsys.readouterr().err == ""
    load_tokenizer(TOKENIZERS / "nfkc").transformers_files(["<image>"])
    assert "exported tokenizer encodes some prompts differently, for example" in capsys.readouterr().err


def test_gpt_files_without_tokenizer_json(tmp_path):
    """`vocab.json` and `merges.txt`, as slow tokenizers of Qwen's and GPT-2's kind are saved."""
    model = json.loads((TOKENIZERS / "qwen-2" / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    whole = load_tokenizer(TOKENIZERS / "qwen-2")
    tokens = {str(whole.token_id(t)): {"content": t, "special": True} for t in ("<|im_start|>", "<|im_end|>")}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "added_tokens_decoder": tokens}
    settings["added_tokens_decoder"][str(whole.token_id("<|endoftext|>"))] = {
        "content": "<|endoftext|>",
        "special": True,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    text = "<|im_start|>user\nWhat is it? 猫<|im_end|>"
    assert load_tokenizer(tmp_path).encode(text)[0] == whole.encode(text)[0]


def test_a_tokenizer_model_of_tiktoken_gives_way_to_tokenizer_json(tmp_path):
    copy_tokenizer("llama-3", tmp_path / "t")
    (tmp_path / "t" / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    assert load_tokenizer(tmp_path / "t").bos_id == load_tokenizer(TOKENIZERS / "llama-3").bos_id


def test_a_model_without_the_usual_special_tokens(tmp_path):
    import io

    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat sat on a mat"] * 9), model_writer=made, model_type="bpe", vocab_size=40,
        hard_vocab_limit=False, bos_id=-1, eos_id=-1, unk_piece="[UNK]", minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(made.getvalue())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    tokenizer.add_special(["<image>"])
    assert tokenizer.encode("a cat<image>")[0][-1] == len(tokenizer) - 1


def test_gpt_files_want_a_class(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(InputError, match="with its tokenizer_class"):
        load_tokenizer(tmp_path)


def test_an_added_token_that_a_tokenizer_json_cannot_hold(tmp_path):
    directory = copy_tokenizer("qwen-2", tmp_path / "t", added_tokens_decoder={"900": {"content": "<far>"}})
    with pytest.raises(InputError, match="'<far>' should have id 900"):
        load_tokenizer(directory)
    directory = copy_tokenizer("qwen-2", tmp_path / "long", added_tokens_decoder={"900": {"content": "a word " * 999}})
    with pytest.raises(InputError, match="should have id 900") as refused:
        load_tokenizer(directory)
    assert len(str(refused.value).replace(str(tmp_path), "")) < 300


def test_work_grows_in_proportion_to_special_tokens(monkeypatch):
    tokenizer = load_tokenizer(GOLDEN / "checkpoints" / "v1.5-llama")
    engine, looked_up = tokenizer._engine, []
    token = engine.token
    monkeypatch.setattr(engine, "token", lambda i: looked_up.append(i) or token(i))
    for n in (10, 300):
        looked_up.clear()
        assert tokenizer.encode("</s> hi" * n)[0].count(tokenizer.eos_id) == n
        assert len(looked_up) <= n
