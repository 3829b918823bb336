"""Floating-point operations that a model needs, by hand."""

import dataclasses

import pytest

from llava_jax.aot import flops
from llava_jax.config import tiny

MODEL = tiny(merge="flat", aspect_ratio="pad", projector="mlp2x_gelu")
DECODER = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)  # q, k and v, o, feed-forward, of two layers
TOWER = 2 * (4 * 16 * 16 + 2 * 16 * 32)  # q, k, v, o, feed-forward, of the two layers that are used
PATCHES = 17  # of a tile, the class token among them
SCORES = 2 * 2 * 16 * PATCHES**2  # of a tile: two layers, two products


def test_a_training_step():
    """Six operations a weight and position where it is trained, four where it is not."""
    attention = 2 * 2 * 4 * 8 * 3 * 100**2  # forward
    tower = 3 * 5 * 2 * (TOWER * PATCHES + SCORES)
    step = dict(rows=3, length=100, tiles=5)
    layers = flops.step_flops(MODEL, "projector,decoder", **step, layers_only=True)
    assert layers == 6 * DECODER * 300 + 3 * attention + tower
    projector = 6 * (16 * 32 + 32 * 32) * 3 * 5 * 16
    assert flops.step_flops(MODEL, "projector,decoder", **step) == layers + 6 * 32 * 512 * 300 + projector
    for tune in ("projector", "lora"):
        frozen = flops.step_flops(MODEL, tune, **step, layers_only=True)
        assert frozen == 4 * DECODER * 300 + 3 * attention + tower
        assert flops.step_flops(MODEL, tune, **step) == frozen + 4 * 32 * 512 * 300 + projector


def test_encoding():
    embedding = 16 * 7 * 7 * 3 * 16
    projector = 16 * (16 * 32 + 32 * 32)
    assert flops.encode_flops(MODEL, 3) == 3 * 2 * (TOWER * PATCHES + SCORES + embedding + projector)


@pytest.mark.parametrize("tied", [False, True])
def test_a_prompt_and_a_decode_step(tied):
    """Of the last layer the prompt needs keys and values, and the rest for one position."""
    model = MODEL.replace(text=dataclasses.replace(MODEL.text, tied_head=tied))
    keys_values, rest = 2 * 32 * 16, 2 * 32 * 32 + 3 * 32 * 64
    scores, head = 2 * 4 * 8 * 50, 32 * 512
    prompt = 2 * 100 * keys_values + (100 + 1) * (rest + scores) + head
    assert flops.decoder_flops(model, 3, 100, 50) == 2 * 3 * prompt
    assert flops.decoder_flops(model, 3, 1, 50) == 2 * 3 * (2 * (keys_values + rest + scores) + head)
