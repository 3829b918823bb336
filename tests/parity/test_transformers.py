"""Tiny random models of transformers, run beside ours: logits, greedy tokens, any size of image.

Needs torch, which is not needed for anything else.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from helpers import one_device
from infer.engine import Engine
from llava_jax.data.splice import IMAGE
from torch_models import DECODERS, MARK, make_model

TOLERANCE = 1e-4
NEW = 12
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


def random_image(size) -> Image.Image:
    random = np.random.default_rng(size[0] * 1000 + size[1])
    coarse = Image.fromarray(random.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


@torch.inference_mode()
def test_logits_and_greedy_tokens_over_random_sizes(pair):
    kind, model, engine = pair
    for size in sizes(8):
        image = random_image(size)
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
def test_several_images_and_none(pair):
    kind, model, engine = pair
    two = [random_image((60, 40)), random_image((33, 90))]
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
