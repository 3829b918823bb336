"""Every released LLaVA: what its files say is read, its template chosen, its prompt tokenized as the reference does it.

`golden/zoo.py` has the published fields, and made the ids with the reference's tokenizers.
"""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from convert.to_hf import to_hf
from helpers import GOLDEN, golden_json
from infer.engine import Engine
from llava_jax.checkpoints import tensor_names
from llava_jax.checkpoints.checkpoint import open_checkpoint
from llava_jax.checkpoints.config_json import read_config
from llava_jax.checkpoints.safetensors_files import Pending, write
from llava_jax.console import InputError
from llava_jax.data.prompts import add_image_tokens, encode_prompt
from llava_jax.data.splice import IMAGE
from llava_jax.data.templates import choose_template, get_template, render
from llava_jax.models.llava import param_shapes
from llava_jax.sharding.partition import path_of

# llava-hf/llava-1.5-7b-hf's chat template: no system message, `USER:` and `ASSISTANT:`.
USER_ASSISTANT = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': '}}{% endif %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

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
        theirs, (_, to_theirs) = tensor_names.write_name(path_of(path), "original", ours)
        shape = tensor_names.shape_after(to_theirs, leaf.shape)
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
    assert prompt_ids(engine).tolist() == EXPECTED[name]


def prompt_ids(engine: Engine) -> np.ndarray:
    """The token ids of the question about an image."""
    turns = add_image_tokens((zoo.QUESTION,), 1, engine.config)
    return encode_prompt(engine.template, [*turns, None], engine.tokenizer)


# What the conversions by transformers' own scripts carry: v1.5's has no system message, v1.6's are the reference's.
OWN_TEMPLATES = {"llava-v1.5-7b": USER_ASSISTANT}


@pytest.mark.parametrize(
    "name", ["llava-v1.5-7b", "llava-v1.6-mistral-7b", "llava-v1.6-34b", "llama3-llava-next-8b", "llava-next-72b"]
)
def test_the_prompt_of_a_conversion_has_the_ids_that_transformers_gives(name, tmp_path, capsys):
    from transformers import AutoTokenizer

    to_hf(write_model(tmp_path, name), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    fields = json.loads(path.read_text())
    del fields["conversation_template"], fields["image_aspect_ratio"]  # ours
    path.write_text(json.dumps(fields))
    if name in OWN_TEMPLATES:
        (tmp_path / "hf" / "chat_template.jinja").write_text(OWN_TEMPLATES[name])
    (tmp_path / "hf" / "tokenizer.model").unlink(missing_ok=True)
    capsys.readouterr()
    found = open_checkpoint(tmp_path / "hf")
    assert capsys.readouterr().err == ""
    assert found.config.aspect_ratio == ("pad" if "v1.5" in name else "anyres")
    template = get_template(choose_template(found.config))
    assert (template.style == "jinja") == (name in OWN_TEMPLATES)
    engine = Engine({}, found.config, found.tokenizer, None)
    ids = prompt_ids(engine)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": zoo.QUESTION}]}]
    text = theirs.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    image = fields["image_token_index"]
    assert theirs(text).input_ids == np.where(ids == IMAGE, image, ids).tolist()


def test_the_zoo_is_the_references():
    assert len(EXPECTED) == len(zoo.ZOO) == 14
    assert EXPECTED.keys() == zoo.ZOO.keys()


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_what_is_not_supported_is_refused_by_name(name):
    with pytest.raises(InputError, match=f"'{zoo.REFUSED[name]['model_type']}' is not supported"):
        read_config(zoo.REFUSED[name] | {"mm_vision_tower": zoo.CLIP})
