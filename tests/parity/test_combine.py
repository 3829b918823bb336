"""Parts, LoRA adapters and deltas combined as torch, PEFT and the original do it."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from convert.combine import fresh_tensors
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from helpers import GOLDEN, golden_tensors
from llava_jax import config as c
from llava_jax.checkpoints import tensor_names
from llava_jax.checkpoints.checkpoint import open_any
from llava_jax.console import InputError
from torch_models import assert_same_bits


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
        "one of its two factors is missing": {f"{q}.lora_A.weight": torch.zeros(4, 64)},
        r"should be \[4, 64\]": {f"{q}.lora_A.weight": torch.zeros(3, 64), f"{q}.lora_B.weight": torch.zeros(64, 3)},
        "no such module": {f"{q}x.lora_A.weight": torch.zeros(4, 64)},
        "does not belong to a plain LoRA": {f"{q}.lora_magnitude_vector": torch.zeros(64)},
        "lora_B.bias: does not belong to a plain": {f"{q}.lora_B.bias": torch.zeros(64)},
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
