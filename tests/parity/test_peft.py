"""An adapter of ours in PEFT and torch: the same logits, and every tensor found."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model_state_dict

from helpers import golden_tensors, load_golden, one_device
from llava_jax.data.splice import Batch
from llava_jax.models import llava
from train import lora
from train.config import TrainConfig
from train.parameters import export_params
from train.step import setup

CONFIG = TrainConfig(
    tune="lora", lora_rank=4, lora_alpha=12.0, lora_targets=("q", "v", "o", "up", "down"), dtype="float32"
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of the golden v1.5 checkpoint as if it had been trained: its directory, and the model with it."""
    found, params = load_golden("v1.5-llama")
    frozen, state, _, _ = setup(dict(params), found.config, CONFIG, one_device(), 8)
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), state.trained)
    state = dataclasses.replace(state, trained=trained)
    directory = tmp_path_factory.mktemp("adapter")
    lora.save_adapter(directory, export_params({}, state.trained), found.config, CONFIG)
    return directory, found.config, export_params(frozen, state.trained)


@torch.inference_mode()
def test_peft_gives_our_logits(adapter):
    directory, config, params = adapter
    text = config.text
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=text.vocab_size, hidden_size=text.width, intermediate_size=text.ffn_width,
            num_hidden_layers=text.layers, num_attention_heads=text.heads, num_key_value_heads=text.kv_heads,
            rms_norm_eps=text.norm_eps, max_position_embeddings=text.max_positions,
        )
    ).eval()  # fmt: skip
    tensors = {k: torch.from_numpy(x) for k, x in golden_tensors("v1.5-llama").items() if "mm_projector" not in k}
    model.load_state_dict(tensors)
    ids = np.random.default_rng(0).integers(3, text.vocab_size, (2, 24))
    untouched = model(torch.from_numpy(ids)).logits.numpy()
    model = PeftModel.from_pretrained(model, directory)
    theirs = model(torch.from_numpy(ids)).logits.numpy()
    assert len(get_peft_model_state_dict(model)) == 2 * 5 * text.layers

    ids = ids.astype(np.int32)
    whole = np.ones_like(ids)
    batch = Batch(np.zeros((2, 0, 28, 28, 3), np.uint8), ids, -whole, np.cumsum(whole, 1) - 1, whole, ids)
    with lora.adapted(CONFIG):
        ours = jax.jit(llava.forward, static_argnums=1)(params, config, batch)
    assert np.abs(theirs - untouched).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_torch_reads_the_projector(adapter):
    directory, _, params = adapter
    tensors = torch.load(directory / "non_lora_trainables.bin", weights_only=True)
    names = sorted(name for name in golden_tensors("v1.5-llama") if "mm_projector" in name)
    assert sorted(tensors) == [f"base_model.model.{name}" for name in names]
    first = tensors["base_model.model.model.mm_projector.0.weight"].numpy()
    np.testing.assert_array_equal(first, np.asarray(params["projector"]["linear_0"]["kernel"]).T)
