"""Conversion beside transformers and torch: there and back bit for bit, and inside transformers the same model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import save_file

from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from helpers import CHECKPOINTS, GOLDEN, golden_tensors, load_golden, one_device
from infer.engine import Engine
from llava_jax.checkpoints.checkpoint import open_any, open_checkpoint
from llava_jax.data.templates import choose_template
from torch_models import assert_same_bits, make_model, tensors_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EXPRESSIBLE = ("v1.5-llama", "v1.6-mistral")  # of the golden checkpoints, those that transformers' classes can hold


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
