"""Tiny random models of transformers, run beside ours: logits, greedy tokens, any size of picture.

Needs torch, which is not needed for anything else.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from helpers import GOLDEN, one_device
from infer.engine import Engine
from llava_jax.data.splice import IMAGE

TOLERANCE = 1e-4
NEW = 12
MARK = 1000  # `<image>` in the vocabulary
LLAMA_3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
PLAIN = dict(rope_type="default", rope_theta=10000.0)

# name -> (decoder class, what differs from the base)
DECODERS = {
    "llama": (tf.LlamaConfig, dict(num_key_value_heads=4)),
    "grouped": (tf.LlamaConfig, dict(num_key_value_heads=2)),
    "one key head, wide heads": (tf.LlamaConfig, dict(num_key_value_heads=1, head_dim=24)),
    "llama 3": (tf.LlamaConfig, dict(num_key_value_heads=2, rope_parameters=LLAMA_3)),
    "linear scaling": (tf.LlamaConfig, dict(rope_parameters=PLAIN | dict(rope_type="linear", factor=4.0))),
    "biases": (tf.LlamaConfig, dict(attention_bias=True, mlp_bias=True)),
    "tied": (tf.LlamaConfig, dict(tie_word_embeddings=True)),
    "mistral": (tf.MistralConfig, dict(num_key_value_heads=2, sliding_window=None)),
    "sliding window": (tf.MistralConfig, dict(num_key_value_heads=2, sliding_window=40)),
    "qwen2": (tf.Qwen2Config, dict(num_key_value_heads=2)),
}


def make_model(kind: str, decoder: str, directory):
    """A random model, its weights large enough to disagree about, saved as transformers saves."""
    cls, changes = DECODERS[decoder]
    text = cls(**dict(
        vocab_size=1064, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=1024, rms_norm_eps=1e-5, rope_parameters=PLAIN, bos_token_id=1, eos_token_id=2,
    ) | changes)  # fmt: skip
    vision = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, image_size=28, patch_size=7,
    )  # fmt: skip
    common = dict(
        text_config=text.to_dict(), vision_config=vision, image_token_index=MARK,
        tie_word_embeddings=changes.get("tie_word_embeddings", False),
    )  # fmt: skip
    torch.manual_seed(0)
    if kind == "llava":
        model = tf.LlavaForConditionalGeneration(tf.LlavaConfig(**common)).eval()
    else:
        pinpoints = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
        model = tf.LlavaNextForConditionalGeneration(
            tf.LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)
        ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.2 * torch.randn_like(p))
            elif p.ndim > 1:
                p.mul_(4)
            else:
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(directory)
    if kind == "llava":  # whose processor pads only if told to
        (directory / "preprocessor_config.json").write_text(json.dumps({"do_pad": True}))
    for file in (GOLDEN / "tokenizer").iterdir():
        shutil.copy(file, directory)
    return model


PAIRS = [("llava", d) for d in ("llama", "mistral", "qwen2")] + [("llava_next", d) for d in DECODERS]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request, tmp_path_factory):
    kind, decoder = request.param
    directory = tmp_path_factory.mktemp("model")
    model = make_model(kind, decoder, directory)
    engine = Engine.load(
        directory, mesh=one_device(), dtype=np.float32, template="llava_v1", image_rules="transformers"
    )
    return kind, model, engine


SIZE = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, return_tensors="pt")


def processed(kind: str, model, image: Image.Image) -> dict:
    if kind == "llava":
        return LlavaImageProcessorPil(do_pad=True)(image, **SIZE)
    return LlavaNextImageProcessorPil(image_grid_pinpoints=model.config.image_grid_pinpoints)(image, **SIZE)


def sizes(n: int):
    random = np.random.default_rng(7)
    return [tuple(int(x) for x in random.integers(8, 150, 2)) for _ in range(n)]


def picture(size) -> Image.Image:
    random = np.random.default_rng(size[0] * 1000 + size[1])
    coarse = Image.fromarray(random.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


@torch.inference_mode()
def test_logits_and_greedy_tokens_over_random_sizes(pair):
    kind, model, engine = pair
    for size in sizes(8):
        image = picture(size)
        logits, ids = engine.logits("What is this?", [image])
        inputs = processed(kind, model, image) | {"input_ids": torch.tensor(np.where(ids == IMAGE, MARK, ids))[None]}
        theirs = model(**inputs).logits[0].numpy()
        assert theirs.shape == logits.shape, size
        np.testing.assert_allclose(logits, theirs, atol=TOLERANCE, rtol=0, err_msg=str(size))

    mask = torch.ones_like(inputs["input_ids"])
    out = model.generate(**inputs, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    answer = engine.ask("What is this?", [image], max_new_tokens=NEW)
    assert answer.token_ids == out[0, inputs["input_ids"].shape[1] :].tolist()


@torch.inference_mode()
def test_several_pictures_and_none(pair):
    kind, model, engine = pair
    two = [picture((60, 40)), picture((33, 90))]
    for images in ([], two):
        logits, ids = engine.logits("<image> and <image>" if images else "Hello.", images)
        inputs = {"input_ids": torch.tensor(np.where(ids == IMAGE, MARK, ids))[None]}
        if images:
            inputs |= dict(processed(kind, model, images))
        theirs = model(**inputs).logits[0].numpy()
        np.testing.assert_allclose(logits, theirs, atol=TOLERANCE, rtol=0)


def test_the_projectors_gelu_is_exact(pair):
    """tanh's approximation would be 1e-4 off."""
    _, model, engine = pair
    assert model.config.projector_hidden_act == "gelu"
    assert engine.config.projector == "mlp2x_gelu"


def test_config_as_transformers_reads_it(pair, tmp_path):
    _, model, engine = pair
    text, ours = model.config.text_config, engine.config.text
    assert (ours.vocab_size, ours.width, ours.layers, ours.heads) == (
        text.vocab_size, text.hidden_size, text.num_hidden_layers, text.num_attention_heads,
    )  # fmt: skip
    assert ours.kv_heads == text.num_key_value_heads
    assert json.loads(json.dumps(engine.config.to_json()))["text"]["rope_theta"] == text.rope_parameters["rope_theta"]
