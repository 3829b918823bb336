"""Tied and untied heads as transformers 5 resolves them: what config.json says in two places, what the file holds."""

import itertools
import json

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from helpers import one_device
from llava_jax.checkpoints.checkpoint import open_checkpoint
from llava_jax.console import InputError
from torch_models import make_model

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def saved(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    make_model("llava", request.param, directory)
    return directory, json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")


def write(saved, outer, inner, head) -> None:
    directory, config, tensors = saved
    config = json.loads(json.dumps(config))
    for fields, value in ((config, outer), (config["text_config"], inner)):
        fields.pop("tie_word_embeddings", None)
        if value is not None:
            fields["tie_word_embeddings"] = value
    held = {"none": None, "same": tensors[EMBEDDING].clone(), "own": tensors[HEAD]}[head]
    rest = {name: x for name, x in tensors.items() if name != HEAD}
    save_file(rest | ({HEAD: held} if held is not None else {}), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("outer", "inner", "head"), itertools.product([None, True, False], [None, True, False], ["none", "same", "own"])
)
def test_the_head_is_the_one_that_transformers_takes(saved, outer, inner, head, capsys):
    write(saved, outer, inner, head)
    if head == "none" and not (outer or inner):  # transformers draws one at random
        with pytest.raises(InputError, match="missing tensors: language_model.lm_head.weight"):
            open_checkpoint(saved[0])
        return
    theirs = tf.LlavaForConditionalGeneration.from_pretrained(saved[0], dtype=torch.float32).lm_head.weight
    found = open_checkpoint(saved[0])
    params = found.load(one_device(), np.float32)["decoder"]
    ours = params["embed"]["embedding"].T if found.config.text.tied_head else params["head"]["kernel"]
    np.testing.assert_array_equal(np.asarray(ours).T, theirs.detach().numpy())
    assert ("ties the head" in capsys.readouterr().err) == bool(head == "own" and (outer or inner))
