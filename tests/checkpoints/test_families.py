"""A family is its file: one more in the lists is read, written, inspected, and completed by its tables alone."""

import dataclasses
import json

import numpy as np
import pytest

from convert.inspect import inspect
from helpers import GOLDEN
from llava_jax.checkpoints.checkpoint import open_any
from llava_jax.checkpoints.families import DECODERS, TOWERS
from llava_jax.checkpoints.families.clip import CLIP
from llava_jax.checkpoints.families.mistral import MISTRAL
from llava_jax.checkpoints.hf_files import write_hf
from llava_jax.checkpoints.sources import Source
from llava_jax.console import InputError
from llava_jax.data.tokenizer import load_tokenizer


def renamed(family, old: str, new: str):
    tensors = tuple((theirs.replace(old, new), ours, layout) for theirs, ours, layout in family.tensors)
    assert tensors != family.tensors
    return tensors


MOON = dataclasses.replace(
    CLIP,
    name="moon",
    title="Moon",
    model_type="moon_vision_model",
    classes=("MoonVisionModel",),
    fields=tuple(field._replace(theirs=f"moon_{field.theirs}") for field in CLIP.fields),
    tensors=renamed(CLIP, "encoder.layers.", "blocks."),
    inner="moon.",
    processor="MoonImageProcessor",
)
LUNA = dataclasses.replace(
    MISTRAL,
    name="luna",
    model_type="luna",
    fields=tuple(f._replace(theirs="window") if f.ours == "sliding_window" else f for f in MISTRAL.fields),
    read=lambda get: MISTRAL.read(lambda key: get("window" if key == "sliding_window" else key)),
    tensors=renamed(MISTRAL, "self_attn.", "attn."),
)


@pytest.fixture
def source(monkeypatch) -> Source:
    """A golden checkpoint of the two new families."""
    found = open_any(GOLDEN / "checkpoints" / "v1.6-mistral")
    monkeypatch.setitem(TOWERS, MOON.name, MOON)
    monkeypatch.setitem(DECODERS, LUNA.name, LUNA)
    text = dataclasses.replace(found.config.text, family=LUNA.name)
    vision = dataclasses.replace(found.config.vision, family=MOON.name)
    return dataclasses.replace(found, config=found.config.replace(text=text, vision=vision))


def test_a_new_family_is_written_and_read_back(source, tmp_path):
    write_hf(tmp_path / "hf", source, load_tokenizer(source.directory))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vision_config"]["model_type"] == "moon_vision_model" and "window" in config["text_config"]
    again = open_any(tmp_path / "hf")
    for part in ("text", "vision"):
        ours, theirs = (getattr(x.config, part) for x in (source, again))
        grown = {"vocab_size": theirs.vocab_size, "pad_id": theirs.pad_id} if part == "text" else {}
        assert dataclasses.replace(ours, **grown) == theirs
    for path in ("vision/layers/1/attention/q/kernel", "decoder/layers/1/attention/k/kernel"):
        np.testing.assert_array_equal(source.tensors[path].read(), again.tensors[path].read())
    names = {tensor.name for tensor in again.tensors.values()}
    assert "vision_tower.moon.blocks.1.self_attn.q_proj.weight" in names
    assert "language_model.model.layers.1.attn.k_proj.weight" in names
    assert "Moon tower" in inspect(tmp_path / "hf")["config"]


def test_its_fields_are_checked(source, tmp_path):
    write_hf(tmp_path / "hf", source, load_tokenizer(source.directory))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["vision_config"]["moon_patch_size"] = "7"
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json: vision_config\.moon_patch_size: expected an integer"):
        open_any(tmp_path / "hf")
