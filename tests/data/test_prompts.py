import json
import random
import re
import shutil

import numpy as np
import pytest

from helpers import GOLDEN, golden_json, turns
from llava_jax import config as c
from llava_jax.console import InputError
from llava_jax.data.prompts import add_image_tokens, encode, encode_conversation, prepare_tokenizer
from llava_jax.data.splice import IGNORE, IMAGE
from llava_jax.data.templates import TEMPLATES, choose_template, get_template, render
from llava_jax.data.tokenizer import load_tokenizer


def golden_tokenizer(directory, legacy: bool, kind: str = "tokenizer.model"):
    """The golden tokenizer with another `legacy`, from either kind of file."""
    shutil.copytree(GOLDEN / "tokenizer", directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"legacy": legacy}
    path.write_text(json.dumps(settings))
    if kind == "tokenizer.json":
        (directory / "tokenizer.json").write_text(load_tokenizer(directory).transformers_files()["tokenizer.json"])
        (directory / "tokenizer.model").unlink()
    return load_tokenizer(directory)


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def tokenizers(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    return {legacy: golden_tokenizer(root / str(legacy), legacy, request.param) for legacy in (True, False)}


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("name", sorted({case["template"] for case in golden_json("prompts.json")}))
def test_prompts_equal_the_reference(name):
    for case in golden_json("prompts.json"):
        if case["template"] == name:
            assert get_template(name).stop == case["stop"]
            if case["prompt"] is not None:  # None: the reference raises
                assert render(get_template(name), case["turns"])[0] == case["prompt"]


def test_llama_3():
    system = TEMPLATES["llava_llama_3"].system.split("\n\n")[1]
    assert render(get_template("llava_llama_3"), [" Hi ", "Hello.", "Why?", None])[0] == (
        f"<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_qwen():
    assert render(get_template("qwen_1_5"), ["Hi", "Hello.", "Why?", None])[0] == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n not in ("plain", "v0_plain")])
def test_another_system_message(name):
    text, _ = render(get_template(name), ["Q", None], system="Be brief.")
    assert "Be brief." in text
    own = get_template(name).system.split("\n")[-1]
    assert not own or own not in text
    headers = {"chatml": "<|im_start|>system\n", "llama_3": "<|start_header_id|>system<|end_header_id|>\n\n"}
    assert headers.get(get_template(name).style, "") + "Be brief." in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_spans_are_the_answers_and_their_ends(name):
    template = get_template(name)
    text, spans = render(template, ["Q1", "First answer.", "Q2", "Second."])
    answers = [text[a:b].strip() for a, b in spans][-2:]
    end = "</s>" if template.style in ("two", "llama_2") else template.stop or ""
    for got, answer in zip(answers, ["First answer.", "Second."], strict=True):
        assert got.removesuffix(end).strip() == answer
        assert got.endswith(end)


def test_unknown_template_lists_the_known():
    with pytest.raises(InputError, match=r"unknown template 'v9'.*chatml_direct.*v1_mmtag"):
        get_template("v9")


def test_image_marks():
    config = c.tiny()
    assert add_image_tokens(["Why?"], 2, config) == ["<image>\n<image>\nWhy?"]
    assert add_image_tokens(["A <image> or <image>?"], 2, config) == ["A <image> or <image>?"]
    assert add_image_tokens(["Why?", None], 0, config) == ["Why?", None]
    assert add_image_tokens(["A <image>?", "Yes.", "<image>?"], 2, config) == ["A <image>?", "Yes.", "<image>?"]
    tagged = config.replace(use_im_start_end=True)
    assert add_image_tokens(["Why?"], 1, tagged) == ["<im_start><image><im_end>\nWhy?"]
    with pytest.raises(InputError, match="1 <image> tokens for 2 images"):
        add_image_tokens(["A <image>?"], 2, config)


@pytest.mark.parametrize(
    ("text", "name", "template"),
    [
        (dict(), "llava-v1.5-7b", "llava_v1"),
        (dict(), "", "llava_v1"),
        (dict(), "llava-llama-2-13b-chat-lightning-preview", "llava_llama_2"),
        (dict(), "LLaVA-13b-delta-v0", "llava_v0"),
        (dict(family="mistral"), "", "mistral_instruct"),
        (dict(family="mistral"), "bakLlava-v1-hf", "mistral_instruct"),
        (dict(vocab_size=64000), "", "chatml_direct"),
        (dict(vocab_size=64064), "", "chatml_direct"),
        (dict(vocab_size=128256), "", "llava_llama_3"),
        (dict(family="qwen2", vocab_size=152064), "", "qwen_1_5"),
    ],
)
def test_choice_of_template(text, name, template):
    config = c.tiny(template=None, name=name, text=c.TextConfig(**text))
    assert choose_template(config) == template
    assert choose_template(config.replace(template="plain")) == "plain"


# ---------------------------------------------------------------- token ids


def test_ids_equal_the_reference(tokenizers):
    for case in golden_json("image_tokens.json"):
        tokenizer = tokenizers[case["legacy"]]
        if "tokenizer.model" not in tokenizer.files and not case["legacy"] and "<image> " in case["prompt"]:
            continue  # a tokenizer.json cannot say that a space goes before a text that begins with one
        ids, offsets = encode(case["prompt"], tokenizer)
        assert ids.tolist() == case["ids"], case
        assert len(offsets) == len(ids)


def test_masks_equal_the_reference(tokenizers):
    better = 0
    for case in golden_json("masks.json"):
        tokenizer = tokenizers[case["legacy"]]
        ids, labels = encode_conversation(case["conversation"], get_template(case["template"]), tokenizer)
        assert ids.tolist() == case["input_ids"], case
        if not case["mismatch"]:
            assert labels.tolist() == case["labels"], case
            continue
        # Here the reference ignores the whole sample; the answers and their ends should be what is trained.
        template = get_template(case["template"])
        answers = [t["value"] for t in case["conversation"][case["conversation"][0]["from"] == "gpt" :]][1::2]
        end = "<|im_end|>" if template.style == "chatml" else ""
        trained = tokenizer.decode(labels[labels != IGNORE])
        assert trained.replace(" ", "") == "".join(a.replace(" ", "") + end for a in answers if a), case
        assert (labels[ids == IMAGE] == IGNORE).all()
        if template.style != "chatml" and any(answers):
            assert (labels == tokenizer.eos_id).sum() == len(answers)
        better += any(answers)
    assert better > 25


def test_decoding_gives_the_text_back(tokenizers):
    for text in ("Hello there, two cats.", "naïve café 猫 🙂", "line one\nline two", "a  b"):
        for tokenizer in tokenizers.values():
            assert tokenizer.decode(encode(text, tokenizer)[0]) == text


@pytest.mark.parametrize("legacy", [True, False])
def test_pieces_and_spaces_equal_sentencepiece(tmp_path, legacy):
    """Random text against SentencePiece itself, in the way that transformers 4.37's slow tokenizer called it."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(GOLDEN / "tokenizer/tokenizer.model"))
    tokenizer = golden_tokenizer(tmp_path / "t", legacy)
    prefix = len(model.encode("<unk>", out_type=str)) if legacy else None
    if not legacy:
        from sentencepiece import sentencepiece_model_pb2 as proto

        spec = proto.ModelProto.FromString(model.serialized_model_proto())
        spec.normalizer_spec.add_dummy_prefix = False
        model.load_from_serialized_proto(spec.SerializeToString())
        prefix = len(model.encode("<unk>"))

    def reference(text):
        if legacy:
            return model.encode(text)
        return model.encode("<unk>▁" + text.replace("▁", " "))[prefix:] if text else []

    words = ["the", "Small", " ", "  ", "\n", "\t", "猫", "🙂", "café", "3.5", "USER:", "▁", "\u00a0", "x" * 9, "é"]
    random.seed(0)
    for _ in range(3000):
        text = "".join(random.choice(words) + random.choice(["", " "]) for _ in range(random.randint(0, 9)))
        assert tokenizer.encode(text)[0] == reference(text), repr(text)


def test_added_tokens(tmp_path):
    tokenizer = golden_tokenizer(tmp_path / "t", False)
    settings = json.loads((tmp_path / "t/tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] |= {
        "1000": {"content": "<image>", "special": True, "normalized": False},
        "1001": {"content": "<|im_end|>", "special": True, "normalized": False},
    }
    (tmp_path / "t/tokenizer_config.json").write_text(json.dumps(settings))
    more = load_tokenizer(tmp_path / "t")
    assert len(more) == len(tokenizer) + 2
    assert more.encode("hello<|im_end|>")[0] == [*tokenizer.encode("hello")[0], 1001]
    assert more.decode([*tokenizer.encode("hello")[0], 1001]) == "hello"

    (tmp_path / "t/tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": {}}))
    (tmp_path / "t/added_tokens.json").write_text(json.dumps({"<image>": 1000}))
    assert load_tokenizer(tmp_path / "t").token_id("<image>") == 1000
    (tmp_path / "t/added_tokens.json").write_text(json.dumps({"<image>": 1007}))  # as its file says, gap or no gap
    far = load_tokenizer(tmp_path / "t")
    assert (far.token_id("<image>"), len(far)) == (1007, 1008)


def test_image_tokens_are_added_where_the_configuration_wants_them(tmp_path):
    tokenizer = golden_tokenizer(tmp_path / "t", True)
    prepare_tokenizer(tokenizer, c.tiny())
    assert len(tokenizer) == 1000
    prepare_tokenizer(tokenizer, c.tiny(use_im_start_end=True))
    ids, _ = encode("<im_start><image><im_end>\nhello", tokenizer)
    assert ids.tolist() == [1, 1000, IMAGE, 1001, 904, 13, 264, 913, 323]


def test_byte_level_tokenizer_without_bos(tmp_path):
    """A tokenizer.json of GPT's kind (Llama 3, Qwen): its own rules stand."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    engine = Tokenizer(models.BPE({ch: i for i, ch in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(["<|begin|>", "<|end|>"])
    engine.save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "bos_token": "<|begin|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    plain = load_tokenizer(tmp_path)
    assert (plain.bos_id, plain.eos_id) == (None, 257)
    ids, _ = encode("a<image>b c<|end|>", plain)
    assert [plain.decode([i]) if i >= 0 else "*" for i in ids[:-1]] == ["a", "*", "b", " ", "c"]
    assert ids[-1] == 257

    engine.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 256)])
    engine.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).bos_id == 256


@pytest.mark.parametrize(
    ("file", "data", "says"),
    [
        (None, b"", "no tokenizer"),
        ("tokenizer.model", b"junk", "not a SentencePiece model"),
        ("tokenizer.json", b"{}", "cannot be read"),
        ("tokenizer_config.json", b"{", "not JSON"),
    ],
)
def test_broken_tokenizers(tmp_path, file, data, says):
    if file:
        (tmp_path / file).write_bytes(data)
    with pytest.raises(InputError, match=says):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------- training text


def test_marks_of_one_image_go_to_the_front_and_those_of_several_stay(tokenizers):
    template = get_template("v1")
    one, _ = encode_conversation(turns("Look at <image> now", "Yes."), template, tokenizers[True])
    front, _ = encode_conversation(turns("<image>\nLook at  now", "Yes."), template, tokenizers[True])
    assert one.tolist() == front.tolist()
    last, _ = encode_conversation(turns("Look at <image> now", "Yes."), template, tokenizers[True], image_last=True)
    where = [int(np.flatnonzero(ids == IMAGE)[0]) for ids in (one, last)]
    assert tokenizers[True].decode(last[: where[1]]).endswith("USER: Look at  now\n")
    assert where[0] < where[1]
    two, _ = encode_conversation(turns("A <image> B <image> C", "Yes."), template, tokenizers[True], images=2)
    assert (two == IMAGE).sum() == 2
    assert np.diff(np.flatnonzero(two == IMAGE))[0] > 1


def test_tagged_marks(tokenizers):
    ids, _ = encode_conversation(turns("<image>\nHi", "Yes."), get_template("v1_mmtag"), tokenizers[True])
    at = int(np.flatnonzero(ids == IMAGE)[0])
    decode = tokenizers[True].decode
    assert decode(ids[:at]).endswith("<Image>")
    assert decode(ids[at + 1 :]).startswith("</Image>\nHi")


@pytest.mark.parametrize(
    ("speakers", "says"),
    [(["gpt", "gpt"], "take turns"), (["human", "human"], "take turns"), (["system", "human"], "take turns")],
)
def test_speakers_out_of_turn(tokenizers, speakers, says):
    conversation = [{"from": s, "value": "x"} for s in speakers]
    with pytest.raises(InputError, match=says):
        encode_conversation(conversation, get_template("v1"), tokenizers[True])


@pytest.mark.parametrize("template", ["chatml_direct", "mpt", "llava_llama_3", "v1", "llava_llama_2", "qwen_1_5"])
@pytest.mark.parametrize("kind", ["nfkc", "openllama", "unigram", "yi", "llama-3", "qwen-2", "metaspace", "no-bytes"])
def test_the_whole_answer_is_trained_whatever_the_tokenizer(kind, template):
    """Where normalization makes the newline of a header a space, that is part of the answer's first token."""
    tokenizer = load_tokenizer(GOLDEN / "tokenizers" / kind)
    said = turns("<image>\nWhat is this?", "a small cat on the mat.", "Where?", "the red mat.")
    _, labels = encode_conversation(said, get_template(template), tokenizer)
    trained = re.sub("[^a-z]", "", tokenizer.decode(labels[labels != IGNORE]).replace("</s>", ""))
    assert re.sub("imend|eotid", "", trained) == "asmallcatonthemattheredmat"


def test_plain_wants_an_image_and_a_caption(tokenizers):
    with pytest.raises(InputError, match="plain"):
        encode_conversation(turns("no mark", "x"), get_template("plain"), tokenizers[True])
