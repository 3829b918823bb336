"""Makes the tokenizers of this directory, and what transformers 4.37.2 computes with them.

    python make.py            with the project's own packages: the tokenizer files, strings.json
    python make.py expected   with transformers==4.37.2 sentencepiece protobuf "numpy<2": expected.json.gz

Each directory is a kind of tokenizer file that published checkpoints have, with a small vocabulary. `expected.json.gz`
has the ids that the slow `LlamaTokenizer`, which the reference runs, gives the strings: kind -> legacy -> ids of each.
"""

import gzip
import io
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
KINDS = HERE / "strings.json"
WORDS = (
    *("the", "Small", "cats", "USER:", "ASSISTANT:", "3.5", "it's", "don't", "2024", "x" * 9, "naïve", "café", "ﬁne"),
    *(
        "２０２４",
        "①",
        "猫",
        "图片里有什么",
        "こんにちは",
        "🙂",
        "👩‍👩‍👧",
        "🇩🇪",
        "e\u0301",
        "a\u0308\u0323",
        "نص",
        "हिन्दी",
    ),
    *("\u00a0", "\u200b", "\ufeff", "\x01", "\x1b", "\x7f", "\r\n", "\n", "\n\n", "\t", " ", "  ", "     ", "▁", "▁▁"),
    *(
        "</s>",
        "<s>",
        "<unk>",
        "<|im_start|>",
        "<|im_end|>",
        "<tag>",
        "[INST]",
        "[/INST]",
        "<0x0A>",
        "<image>",
        ".",
        "?!",
    ),
)


def strings() -> list[str]:
    pick = random.Random(0)
    made = ["", " ", "▁", "\n", "Hello there", " two  cats ", "</s>USER: <|im_end|> x", "<|im_start|>user\nWhat?"]
    while len(made) < 200:
        made.append("".join(pick.choice(WORDS) + pick.choice(["", " "]) for _ in range(pick.randint(1, 10))))
    return made


def corpus() -> list[str]:
    pick = random.Random(1)
    words = "the a cat cats dog on mat small large red what is shown in this image user assistant system answer"
    words = [*words.split()]
    words += [
        "questions",
        "Hello",
        "there",
        "two",
        "café",
        "naïve",
        "2024",
        "it's",
        "USER:",
        "ASSISTANT:",
        "What",
        "How",
    ]
    return [" ".join(pick.choices(words, k=pick.randint(3, 12))) + pick.choice(".?!") for _ in range(3000)]


# ---------------------------------------------------------------- SentencePiece


def sentencepiece_model(kind: str, settings: dict, **options) -> None:
    import sentencepiece

    plain = dict(
        model_type="bpe", vocab_size=500, byte_fallback=True, add_dummy_prefix=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", character_coverage=1.0, hard_vocab_limit=False, split_digits=True,
    )  # fmt: skip
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=made, minloglevel=2, num_threads=1, **plain | options
    )
    (HERE / kind).mkdir(exist_ok=True)
    (HERE / kind / "tokenizer.model").write_bytes(made.getvalue())
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True} | settings
    save(kind, settings | {"tokenizer_class": "LlamaTokenizer"})


def save(kind: str, settings: dict) -> None:
    (HERE / kind / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def added(**tokens) -> dict:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"added_tokens_decoder": {str(i): plain | token for token, i in tokens.values()}}


def make_sentencepiece() -> None:
    token = lambda content, **flags: {"content": content} | flags  # noqa: E731
    sentencepiece_model("llama", {})
    sentencepiece_model(
        "yi",
        {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>", "add_bos_token": False, "pad_token": "<unk>"}
        | added(a=(token("<|im_start|>", special=False), 6), b=(token("<|im_end|>"), 7)),
        add_dummy_prefix=False, bos_piece="<|startoftext|>", eos_piece="<|endoftext|>",
        user_defined_symbols=["<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    sentencepiece_model(
        "mistral",
        {"additional_special_tokens": ["[INST]", "[/INST]"]}
        | added(a=(token("[INST]", rstrip=True), 3), b=(token("[/INST]", lstrip=True), 4)),
        control_symbols=["[INST]", "[/INST]"],
    )
    sentencepiece_model("openllama", {}, normalization_rule_name="nfkc", remove_extra_whitespaces=True)
    sentencepiece_model("nfkc", {}, normalization_rule_name="nmt_nfkc")
    sentencepiece_model("unigram", {}, model_type="unigram", vocab_size=400)
    sentencepiece_model("user-defined", {}, user_defined_symbols=["<tag>", "ASSISTANT:", "▁▁", "<extra>"])
    sentencepiece_model("no-bytes", {}, byte_fallback=False, vocab_size=300)
    sentencepiece_model(
        "added", added(a=(token("<image>"), 700), b=(token("cats", special=False, single_word=True), 701))
    )


# ---------------------------------------------------------------- tokenizers


def make_json() -> None:
    import tokenizers as t
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    split += r"|\s+(?!\S)|\s+"
    isolated = pre_tokenizers.Split(t.Regex(split), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def finish(kind: str, engine, special: list[str], settings: dict, size: int = 500) -> None:
        alphabet = pre_tokenizers.ByteLevel.alphabet() if "metaspace" not in kind else []
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        if "metaspace" in kind:
            trainer = trainers.BpeTrainer(
                vocab_size=size, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
                show_progress=False,
            )  # fmt: skip
        engine.train_from_iterator(corpus(), trainer)
        engine.add_special_tokens([t.AddedToken(token, normalized=False) for token in special])
        (HERE / kind).mkdir(exist_ok=True)
        engine.save(str(HERE / kind / "tokenizer.json"))
        save(kind, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})

    engine = t.Tokenizer(models.BPE(ignore_merges=True))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.Sequence([isolated, byte_level]), decoders.ByteLevel()
    finish("llama-3", engine, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], {
        "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>",
    })  # fmt: skip
    begin = engine.token_to_id("<|begin_of_text|>")
    engine.post_processor = processors.TemplateProcessing(
        "<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    engine.save(str(HERE / "llama-3" / "tokenizer.json"))

    engine = t.Tokenizer(models.BPE())
    engine.normalizer = normalizers.NFC()
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.Sequence([isolated, byte_level]), decoders.ByteLevel()
    finish("qwen-2", engine, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False,
    })  # fmt: skip

    engine = t.Tokenizer(models.BPE(byte_fallback=True))  # as conversions from GGUF write it
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    finish("byte-level", engine, ["<|endoftext|>"], {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})

    engine = t.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    engine.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    finish("metaspace", engine, [], {"bos_token": "<s>", "eos_token": "</s>", "legacy": True})


# ---------------------------------------------------------------- expected


def expected() -> None:
    import sentencepiece  # noqa: F401
    import transformers

    assert transformers.__version__ == "4.37.2"
    found = {}
    for file in sorted(HERE.glob("*/tokenizer.model")):
        for legacy in (True, False):
            tokenizer = transformers.LlamaTokenizer.from_pretrained(file.parent, legacy=legacy)
            ids = [tokenizer.encode(text, add_special_tokens=False) for text in json.loads(KINDS.read_text())]
            found.setdefault(file.parent.name, {})[str(legacy).lower()] = ids
    data = json.dumps(found, separators=(",", ":")).encode()
    (HERE / "expected.json.gz").write_bytes(gzip.compress(data, mtime=0))


if __name__ == "__main__":
    if sys.argv[1:] == ["expected"]:
        expected()
    else:
        KINDS.write_text(json.dumps(strings(), ensure_ascii=True, indent=0) + "\n")
        make_sentencepiece()
        make_json()
