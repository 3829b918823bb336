"""Conversion beside the libraries whose files it reads and writes: torch, PEFT and transformers."""

import itertools
import json
import os
import pickle
import re
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file, save_file

from convert.combine import fresh_tensors
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from helpers import CHECKPOINTS, GOLDEN, golden_tensors, load_golden, one_device, read_damaged
from infer.engine import Engine
from llava_jax import config as c
from llava_jax.checkpoints import tensor_names, torch_files
from llava_jax.checkpoints.checkpoint import open_any, open_checkpoint
from llava_jax.console import InputError
from llava_jax.data.templates import choose_template
from parity.test_transformers import make_model

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EXPRESSIBLE = ("v1.5-llama", "v1.6-mistral")  # of the golden checkpoints, those that transformers' classes can hold


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() <= b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype, name
        assert torch.equal(x.contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)), name


def copy_but_weights(name: str, directory: Path, tower: bool = False) -> Path:
    shutil.copytree(GOLDEN / "checkpoints" / name, directory, ignore=shutil.ignore_patterns("expected*", "model.*"))
    if tower:
        weights = GOLDEN / "checkpoints" / name / "vision_tower" / "model.safetensors"
        shutil.copy(weights, directory / "vision_tower")
    return directory


def golden_as(name: str, dtype: str) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v).to(DTYPES[dtype]) for k, v in golden_tensors(name).items()}


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in CHECKPOINTS), ("v1.6-mistral", "float16"), ("v1.6-mistral", "bfloat16")],
)
def test_original_there_and_back_is_bit_exact(tmp_path, name, dtype):
    source = copy_but_weights(name, tmp_path / "source", tower=True)
    tensors = golden_as(name, dtype)
    save_file(tensors, source / "model.safetensors")
    to_orbax(source, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back", form="original")
    assert_same_bits(tensors, tensors_of(tmp_path / "back"))
    before, after = open_any(source).config, open_any(tmp_path / "back").config
    assert after.template == choose_template(before)
    apart = dict(name="", vision_tower="", template=None, template_from="")
    assert before.replace(**apart) == after.replace(**apart)


@pytest.mark.parametrize(
    ("kind", "decoder", "dtype"),
    [
        *(("llava", "llama", dtype) for dtype in DTYPES),
        ("llava_next", "mistral", "float32"), ("llava_next", "tied", "float16"), ("llava", "qwen2", "bfloat16"),
    ],
)  # fmt: skip
def test_transformers_there_and_back_is_bit_exact(tmp_path, kind, decoder, dtype):
    model = make_model(kind, decoder, tmp_path / "source").to(DTYPES[dtype])
    model.save_pretrained(tmp_path / "source")
    to_orbax(tmp_path / "source", tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back", shard_bytes=100_000)
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 1
    again, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True, dtype=DTYPES[dtype])
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same_bits(dict(model.state_dict()), dict(again.state_dict()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_torch_files_give_what_safetensors_give(tmp_path, dtype, shards):
    source = copy_but_weights("v1.6-mistral", tmp_path / "source")
    tensors = golden_as("v1.6-mistral", dtype)
    every = list(tensors)
    if shards == 1:
        torch.save(tensors, source / "pytorch_model.bin")
    else:
        files = {k: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin" for i, k in enumerate(every)}
        for file in set(files.values()):
            torch.save({k: tensors[k] for k in every if files[k] == file}, source / file)
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    to_orbax(source, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back", form="original")
    assert_same_bits(tensors, tensors_of(tmp_path / "back"))


# ---------------------------------------------------------------- transformers takes it


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The golden checkpoints that transformers can hold, exported: name -> (directory, model there)."""
    found = {}
    for name in EXPRESSIBLE:
        where = tmp_path_factory.mktemp("exported") / name
        to_hf(GOLDEN / "checkpoints" / name, where)
        cls = tf.LlavaNextForConditionalGeneration if "1.6" in name else tf.LlavaForConditionalGeneration
        model, info = cls.from_pretrained(where, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        found[name] = where, model.eval()
    return found


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_golden_logits_inside_transformers(name, exported):
    _, model = exported[name]
    expected = np.load(GOLDEN / "checkpoints" / name / "expected.right.400.single.npz")
    with torch.no_grad():
        out = model.model.language_model(
            inputs_embeds=torch.from_numpy(expected["inputs_embeds"]),
            attention_mask=torch.from_numpy(expected["attention_mask"]).long(),
        ).last_hidden_state
        logits = model.lm_head(out)[:, ::16, : expected["logits"].shape[-1]].numpy()
    seen = expected["attention_mask"][:, ::16].astype(bool)
    np.testing.assert_allclose(logits[seen], expected["logits"][seen], atol=1e-4)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_processor_and_generate_give_our_tokens(name, exported):
    where, model = exported[name]
    processor = tf.AutoProcessor.from_pretrained(where)
    found, params = load_golden(name)
    ours = Engine(params, found.config, found.tokenizer, one_device())
    again = open_checkpoint(where)
    theirs = Engine(again.load(one_device(), np.float32), again.config, again.tokenizer, one_device())
    pick = np.random.RandomState(0)
    for turns in (["What is this?"], ["What is this?", "A cat.", "And\n what else?"]):
        for i in range(3):
            width, height = pick.randint(60, 300, 2)
            image = Image.fromarray(pick.randint(0, 256, (height, width, 3), dtype=np.uint8))
            messages = [
                {"role": ("user", "assistant")[turn % 2], "content": [{"type": "text", "text": text}]}
                for turn, text in enumerate(turns)
            ]
            messages[0]["content"].insert(0, {"type": "image"})
            prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
            inputs = processor(text=prompt, images=image, return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            answer = ours.ask(turns, [image], max_new_tokens=8)
            assert answer.prompt_tokens == inputs["input_ids"].shape[1]
            assert answer.token_ids == out.tolist()
            if i == 0:
                assert theirs.ask(turns, [image], max_new_tokens=8).token_ids == out.tolist()


def test_the_vocabulary_grows_as_published_but_by_the_mean(exported):
    where, model = exported["v1.5-llama"]
    fields = json.loads((where / "config.json").read_text())
    assert fields["image_token_index"] == 1000 and fields["text_config"]["pad_token_id"] == 1001
    table = model.get_input_embeddings().weight.detach()
    assert table.shape[0] == 1024 == fields["text_config"]["vocab_size"]
    mean = table[:1000].double().mean(0).float()
    assert torch.equal(table[1000:], mean.expand(24, -1))


# ---------------------------------------------------------------- parts, LoRA, deltas


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A plain language model with the golden tokenizer, and a CLIP directory."""
    where = tmp_path_factory.mktemp("parts")
    torch.manual_seed(1)
    text = tf.LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, max_position_embeddings=512,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(text)
    model.save_pretrained(where / "lm")
    for file in (GOLDEN / "tokenizer").iterdir():
        shutil.copy(file, where / "lm")
    shutil.copytree(GOLDEN / "checkpoints" / "v1.5-llama" / "vision_tower", where / "clip")
    return where / "lm", where / "clip", model


def mm_config(language_model: Path, directory: Path, **fields) -> None:
    """The config.json that the original writes beside what it trains."""
    plain = json.loads((language_model / "config.json").read_text())
    seeing = dict(
        model_type="llava_llama", mm_vision_tower="openai/clip-vit-large-patch14-336", mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2, mm_vision_select_feature="patch", mm_hidden_size=32, image_aspect_ratio="pad",
        mm_use_im_start_end=False, mm_use_im_patch_token=False,
    )  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(plain | seeing | fields))


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_a_fresh_projector_is_torchs(seed, projector):
    config = c.tiny(projector=projector)
    torch.manual_seed(seed)
    widths = [config.projector_in] + [config.text.width] * c.projector_depth(projector)
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    made = fresh_tensors(config, seed, np.dtype(np.float32))
    for i, layer in enumerate(layers):
        np.testing.assert_array_equal(made[f"projector/linear_{i}/kernel"].read(), layer.weight.detach().numpy().T)
        np.testing.assert_array_equal(made[f"projector/linear_{i}/bias"].read(), layer.bias.detach().numpy())


def test_parts_make_a_whole(tmp_path, language_model):
    lm, clip, model = language_model
    with pytest.raises(InputError, match="--vision-tower"):
        to_orbax(lm, tmp_path / "none")
    to_orbax(lm, tmp_path / "fresh", vision_tower=clip, aspect_ratio="anyres", seed=3)
    got = open_any(tmp_path / "fresh")
    assert got.config.merge == "spatial_unpad" and "newline" in got.tensors
    state = model.state_dict()
    for name, x in state.items():
        path, (to_ours, _) = tensor_names.read_name(name, got.config)
        np.testing.assert_array_equal(got.tensors[path].read(), to_ours(x.numpy()))

    trained = {f"model.mm_projector.{i}.{k}": torch.randn(s) for i, w in ((0, 32), (2, 64))
               for k, s in (("weight", (64, w)), ("bias", (64,)))}  # fmt: skip
    stage_one = tmp_path / "stage one"
    mm_config(lm, stage_one)
    torch.save(trained, stage_one / "mm_projector.bin")
    to_orbax(lm, tmp_path / "trained", vision_tower=clip, projector=stage_one / "mm_projector.bin")
    to_orbax(stage_one, tmp_path / "same", base=lm, vision_tower=clip)
    for where in ("trained", "same"):
        tensors = open_any(tmp_path / where).tensors
        for name, x in trained.items():
            path, (to_ours, _) = tensor_names.read_name(name, got.config)
            np.testing.assert_array_equal(tensors[path].read(), to_ours(x.numpy()))
    to_hf(tmp_path / "trained", tmp_path / "projector", part="projector")
    assert_same_bits(trained, load_file(tmp_path / "projector" / "mm_projector.safetensors"))


LORAS = {
    "plain": {},
    "rank stabilised": dict(use_rslora=True),
    "patterns": dict(rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\.mlp\.up_proj": 32}),
}


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("settings", LORAS.values(), ids=LORAS)
def test_lora_merges_as_peft_merges(tmp_path, language_model, settings, safe):
    lm, clip, _ = language_model
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM", **settings)
    tuned = peft.get_peft_model(tf.LlamaForCausalLM.from_pretrained(lm), lora)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
    adapter = tmp_path / "adapter"
    tuned.save_pretrained(adapter)
    if not safe:
        torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
    mm_config(lm, adapter)
    projector = {f"base_model.model.model.mm_projector.{i}.{k}": torch.randn(s)
                 for i, w in ((0, 32), (2, 64)) for k, s in (("weight", (64, w)), ("bias", (64,)))}  # fmt: skip
    torch.save(projector, adapter / "non_lora_trainables.bin")
    with pytest.raises(InputError, match="--base"):
        to_orbax(adapter, tmp_path / "none", vision_tower=clip)
    to_orbax(adapter, tmp_path / "merged", base=lm, vision_tower=clip)
    got = open_any(tmp_path / "merged")
    want = {**tuned.merge_and_unload().state_dict()}
    want |= {name.removeprefix("base_model.model."): x for name, x in projector.items()}
    for name, x in want.items():
        path, (to_ours, _) = tensor_names.read_name(name, got.config)
        np.testing.assert_allclose(got.tensors[path].read(), to_ours(x.detach().numpy()), atol=1e-6, err_msg=name)


def test_lora_of_the_tower_is_merged_too(tmp_path):
    base = GOLDEN / "checkpoints" / "v1.6-mistral"
    module = "model.vision_tower.vision_tower.vision_model.encoder.layers.1.self_attn.q_proj"
    A, B = torch.randn(2, 32), torch.randn(32, 2)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=2, lora_alpha=6)))
    save_file(
        {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B},
        adapter / "adapter_model.safetensors",
    )
    to_orbax(adapter, tmp_path / "merged", base=base)
    got = open_any(tmp_path / "merged").tensors["vision/layers/1/attention/q/kernel"].read()
    want = golden_tensors("v1.6-mistral")[f"{module}.weight"] + 3 * (B @ A).numpy()
    np.testing.assert_allclose(got, want.T, atol=1e-5)


def test_faulty_adapters(tmp_path, language_model):
    lm, clip, _ = language_model
    adapter = tmp_path / "adapter"
    mm_config(lm, adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=4, lora_alpha=8)))
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    cases = {
        "only one of its two factors": {f"{q}.lora_A.weight": torch.zeros(4, 64)},
        r"should be \[4, 64\]": {f"{q}.lora_A.weight": torch.zeros(3, 64), f"{q}.lora_B.weight": torch.zeros(64, 3)},
        "no such module": {f"{q}x.lora_A.weight": torch.zeros(4, 64)},
        "not of a plain LoRA": {f"{q}.lora_magnitude_vector": torch.zeros(64)},
        "lora_B.bias: not of a plain": {f"{q}.lora_B.bias": torch.zeros(64)},
    }
    for says, tensors in cases.items():
        torch.save(tensors, adapter / "adapter_model.bin")
        with pytest.raises(InputError, match=says):
            to_orbax(adapter, tmp_path / "out", base=lm, vision_tower=clip)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extra", [0, 3])
def test_deltas_are_added_in_float32(tmp_path, language_model, extra):
    lm, clip, model = language_model
    delta = tmp_path / "delta"
    mm_config(lm, delta, vocab_size=1000 + extra, mm_projector_type="linear")
    for file in (GOLDEN / "tokenizer").iterdir():
        shutil.copy(file, delta)
    torch.manual_seed(4)
    base, tensors, want = model.state_dict(), {}, {}
    for name, x in base.items():
        grown = name in ("model.embed_tokens.weight", "lm_head.weight")
        difference = torch.randn(x.shape[0] + extra * grown, *x.shape[1:]).half()
        tensors[name] = difference
        total = difference.float()
        total[: x.shape[0]] += x
        want[name] = total.half()
    tensors |= {
        "model.mm_projector.weight": torch.randn(64, 32).half(),
        "model.mm_projector.bias": torch.randn(64).half(),
    }
    torch.save(tensors, delta / "pytorch_model.bin")
    want |= {name: x for name, x in tensors.items() if "mm_projector" in name}
    to_orbax(delta, tmp_path / "whole", base=lm, delta=delta, vision_tower=clip)
    got = open_any(tmp_path / "whole")
    for name, x in want.items():
        path, (to_ours, _) = tensor_names.read_name(name, got.config)
        np.testing.assert_array_equal(got.tensors[path].read(), to_ours(x.numpy()), err_msg=name)


# ---------------------------------------------------------------- the reader of torch files


def test_torch_files_hold_what_torch_saved(tmp_path):
    tensors = {
        "plain": torch.randn(3, 4), "turned": torch.randn(5, 6).T, "scalar": torch.tensor(3.5),
        "slice": torch.randn(10, dtype=torch.bfloat16)[3:7], "parameter": torch.nn.Parameter(torch.randn(2, 2).half()),
        "whole numbers": torch.arange(5), "bytes": torch.arange(7, dtype=torch.uint8), "nothing": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]), "doubles": torch.randn(2, dtype=torch.float64),
    }  # fmt: skip
    for contents in (tensors, {"state_dict": tensors, "step": 3}):
        torch.save(contents, tmp_path / "file.bin")
        file = torch_files.File(tmp_path / "file.bin")
        assert file.tensors.keys() == tensors.keys()
        for name, x in tensors.items():
            x = x.detach()
            want = x.float().numpy() if x.dtype == torch.bfloat16 else x.numpy()
            np.testing.assert_array_equal(file.read(name).astype(want.dtype), want)
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "file.bin")  # with its `_metadata`
    assert torch_files.File(tmp_path / "file.bin").tensors.keys() == {"weight", "bias"}


class Evil:
    def __init__(self, callee, *arguments):
        self.reduced = callee, arguments

    def __reduce__(self):
        return self.reduced


def test_nothing_in_a_pickle_is_run(tmp_path):
    target = tmp_path / "touched"
    for callee, says in ((os.system, "posix.system"), (eval, "__builtin__.eval"), (open, "io.open")):
        arguments = (f"touch {target}",) if callee is os.system else (str(target), "w") if callee is open else ("1",)
        torch.save({"a": Evil(callee, *arguments)}, tmp_path / "evil.bin")
        with pytest.raises(InputError, match=f"refused: its pickle asks for {says}"):
            torch_files.File(tmp_path / "evil.bin")
    assert not target.exists()


def test_older_formats_say_how_to_go_on(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"before version 1\.6; .*torch\.save"):
        torch_files.File(tmp_path / "old.bin")
    for data in (pickle.dumps({"a": 1}), b"GIF89a", b""):
        (tmp_path / "other.bin").write_bytes(data)
        with pytest.raises(InputError, match=r"bare pickle|no file of torch"):
            torch_files.File(tmp_path / "other.bin")


def with_pickle(path: Path, program: bytes, **entries: bytes) -> Path:
    """A file of torch's whose pickle is another."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": program, "data/0": b"\0" * 16, **entries}.items():
            archive.writestr(f"archive/{name}", data)
    return path


PAIRS = b")" + b"q\x00h\x00\x86" * 60  # a tuple of itself and itself, 60 times over
BOMBS = {
    "deep key": b"})" + b"\x85" * 200_000 + b"K\x01s.",
    "wide key": b"}" + PAIRS + b"K\x01s.",
    "numbers that hash alike": b"}(" + b"".join(
        b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 30_000)) + b"u.",
    "wide name": PAIRS + b"q\x01h\x01\x93.",
    "many arguments": b"ctorch._utils\n_rebuild_parameter\nq\x00(" + b"K\x01" * 30_000 + b"tq\x01"
    + b"h\x00h\x01R0" * 30_000 + b".",
    "many lists": b"]" * 3_000_000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("program", BOMBS.values(), ids=BOMBS)
def test_pickles_that_would_take_for_ever(tmp_path, program):
    begun = time.monotonic()
    with pytest.raises(InputError):
        torch_files.File(with_pickle(tmp_path / "bomb.bin", b"\x80\x02" + program))
    assert time.monotonic() - begun < 60  # each of these took minutes, or the interpreter's life


def test_archives_that_lie(tmp_path):
    torch.save({"a": torch.randn(4), "b": torch.randn(4)}, tmp_path / "a.bin")
    data = (tmp_path / "a.bin").read_bytes()
    entries = [m.start() for m in re.finditer(b"PK\x01\x02", data)]
    offsets = {data[e + 46 : e + 46 + int.from_bytes(data[e + 28 : e + 30], "little")]: e + 42 for e in entries}
    first, second = (offsets[name] for name in sorted(offsets) if name.endswith((b"data/0", b"data/1")))
    (tmp_path / "lies.bin").write_bytes(data[:second] + data[first : first + 4] + data[second + 4 :])
    with pytest.raises(InputError, match="overlap"):
        torch_files.File(tmp_path / "lies.bin")
    with pytest.raises(InputError, match="big-endian"):
        torch_files.File(with_pickle(tmp_path / "order.bin", b"}.", byteorder=b"big"))
    torch.save({"a": torch._neg_view(torch.randn(3))}, tmp_path / "negated.bin")
    with pytest.raises(InputError, match="save a clone"):
        torch_files.File(tmp_path / "negated.bin")


def test_damaged_torch_files_are_refused_or_read(tmp_path):
    torch.save({"a": torch.randn(3, 4), "b": torch.randn(9)[2:5], "c": torch.arange(6)}, tmp_path / "whole.bin")
    read, refused = read_damaged(torch_files.File, tmp_path / "whole.bin")
    assert read > 100 and refused > 100
