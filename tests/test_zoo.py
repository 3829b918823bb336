"""Every released LLaVA: what its files say is read, its template chosen, its prompt tokenized as the reference does it.

`golden/zoo.py` has the published fields, and made the ids with the reference's tokenizers.
"""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import GOLDEN, golden_json
from PIL import Image

from infer.engine import Engine, Request
from llava_jax import names
from llava_jax.checkpoint import open_checkpoint
from llava_jax.config_json import read_config
from llava_jax.console import InputError
from llava_jax.llava import param_shapes
from llava_jax.safetensors import Pending, write
from llava_jax.sharding import path_of
from llava_jax.templates import choose_template, get_template, render

spec = importlib.util.spec_from_file_location("zoo", GOLDEN / "zoo.py")
zoo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zoo)
EXPECTED = golden_json("zoo.json")
TOWER = {
    "model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 1, "image_size": 336, "patch_size": 168,
}  # fmt: skip


def write_model(directory: Path, name: str) -> Path:
    """A checkpoint as it was released, but for its size: weights are few and random, the tower lies beside it."""
    directory = directory / name
    zoo.write_tokenizer(directory, name)
    config = zoo.ZOO[name][0] | {"mm_vision_tower": "tower"}
    tower = directory / "tower"
    tower.mkdir()
    side = 224 if zoo.ZOO[name][0]["mm_vision_tower"] == zoo.CLIP else 336
    (tower / "config.json").write_text(json.dumps(TOWER | {"image_size": side, "patch_size": side // 2}))
    (directory / "config.json").write_text(json.dumps(config))
    ours = read_config(config, vision=json.loads((tower / "config.json").read_text()))
    random = np.random.default_rng(0)
    pending = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(param_shapes(ours))[0]:
        theirs, (_, to_theirs) = names.write_name(path_of(path), "original", ours)
        shape = names.shape_after(to_theirs, leaf.shape)
        pending[theirs] = Pending(
            shape, np.dtype(np.float16), lambda shape=shape: random.standard_normal(shape).astype(np.float16)
        )
    write(directory / "model.safetensors", pending)
    return directory


@pytest.mark.parametrize("name", EXPECTED)
def test_the_prompt_has_the_ids_of_the_reference(name, tmp_path, capsys):
    found = open_checkpoint(write_model(tmp_path, name))
    assert capsys.readouterr().err == ""  # nothing in the published file is unknown
    prompt = zoo.ZOO[name][3]
    marked = "<im_start><image><im_end>\n" if "<im_start>" in prompt else "<image>\n"
    template = get_template(choose_template(found.config))
    assert render(template, [marked + zoo.QUESTION, None])[0] == prompt
    engine = Engine({}, found.config, found.tokenizer, None)
    [item] = [engine._prepare(Request((zoo.QUESTION,), (Image.new("RGB", (40, 30)),)))]
    assert item.row.ids.tolist() == EXPECTED[name]


def test_the_zoo_is_the_references():
    assert len(EXPECTED) == len(zoo.ZOO) == 14
    assert EXPECTED.keys() == zoo.ZOO.keys()


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_what_is_not_supported_is_refused_by_name(name):
    with pytest.raises(InputError, match=f"'{zoo.REFUSED[name]['model_type']}' is not supported"):
        read_config(zoo.REFUSED[name] | {"mm_vision_tower": zoo.CLIP})
