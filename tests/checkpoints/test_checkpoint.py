"""Checkpoints of others: every spelling of their names, whole or refused with every fault named."""

import json
import shutil

import jax
import numpy as np
import pytest

from helpers import GOLDEN, assert_same_params, golden_tensors, load_golden, one_device, write_checkpoint
from llava_jax import config as c
from llava_jax.checkpoints import tensor_names
from llava_jax.checkpoints.checkpoint import open_checkpoint
from llava_jax.console import InputError
from llava_jax.models.llava import param_shapes
from llava_jax.sharding.partition import path_of

# ---------------------------------------------------------------- names


@pytest.mark.parametrize("dialect", ["original", "transformers"])
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_the_table_reads_what_it_writes(dialect, projector):
    config = c.tiny(projector=projector)
    shapes, _ = jax.tree_util.tree_flatten_with_path(param_shapes(config))
    written = {}
    for key, leaf in shapes:
        path = path_of(key)
        name, (_, to_theirs) = tensor_names.write_name(path, dialect, config)
        assert name not in written
        written[name] = path
        found, (to_ours, _) = tensor_names.read_name(name, config)
        assert found == path
        x = np.arange(np.prod(leaf.shape)).reshape(leaf.shape)
        np.testing.assert_array_equal(to_ours(to_theirs(x)), x)
    if dialect == "original" and projector == "linear":
        assert {"model.mm_projector.weight", "model.mm_projector.bias"} < written.keys()


ORIGINAL = "model.vision_tower.vision_tower.vision_model."
PREFIXES = {
    # what transformers 5 writes afresh
    "fresh": {"model.": "language_model.model.", "lm_head.": "language_model.lm_head.", ORIGINAL: "vision_tower.",
              "model.mm_projector.0.": "multi_modal_projector.linear_1.",
              "model.mm_projector.2.": "multi_modal_projector.linear_2.", "model.image_newline": "image_newline"},
    # the hub's, written by transformers 4
    "hub": {"model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
            ORIGINAL: "vision_tower.vision_model.", "model.mm_projector.0.": "multi_modal_projector.linear_1.",
            "model.mm_projector.2.": "multi_modal_projector.linear_2.", "model.image_newline": "image_newline"},
    # in memory, saved as it is
    "memory": {"model.": "model.language_model.", "lm_head.": "lm_head.", ORIGINAL: "model.vision_tower.",
               "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
               "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
               "model.image_newline": "model.image_newline"},
    "memory, old tower": {"model.": "model.language_model.", "lm_head.": "lm_head.",
                          ORIGINAL: "model.vision_tower.vision_model.",
                          "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
                          "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
                          "model.image_newline": "model.image_newline"},
}  # fmt: skip


def rename(tensors: dict, prefixes: dict[str, str]) -> dict:
    def new(name):
        old = max((p for p in prefixes if name.startswith(p)), key=len)
        return prefixes[old] + name[len(old) :]

    return {new(name): x for name, x in tensors.items()}


def hugging_face_config(name: str) -> dict:
    """A golden original's config.json in transformers' dialect."""
    config = json.loads((GOLDEN / "checkpoints" / name / "config.json").read_text())
    vision = json.loads((GOLDEN / "checkpoints" / name / "vision_tower/config.json").read_text())
    text = {k: v for k, v in config.items() if not k.startswith(("mm_", "image_", "architectures"))}
    text["model_type"] = "mistral" if "mistral" in name else "llama"
    return {
        "model_type": "llava_next", "text_config": text, "vision_config": vision,
        "image_grid_pinpoints": config["image_grid_pinpoints"], "tie_word_embeddings": False,
    }  # fmt: skip


@pytest.mark.parametrize("spelling", PREFIXES)
def test_every_spelling_of_transformers_names(tmp_path, spelling):
    directory = write_checkpoint(
        tmp_path / "hf", rename(golden_tensors("v1.6-mistral"), PREFIXES[spelling]), "v1.6-mistral"
    )
    (directory / "config.json").write_text(json.dumps(hugging_face_config("v1.6-mistral")))
    found = open_checkpoint(directory)
    assert_same_params(found.load(one_device(), np.float32), load_golden("v1.6-mistral")[1])


def test_shards_with_an_index(tmp_path):
    tensors = golden_tensors("v1.6-mistral")
    directory = write_checkpoint(tmp_path / "c", tensors, "v1.6-mistral")
    (directory / "model.safetensors").unlink()
    keys, index = sorted(tensors), {}
    from safetensors.numpy import save_file

    for n in range(3):
        part = keys[n::3]
        file = f"model-0000{n + 1}-of-00003.safetensors"
        save_file({k: tensors[k] for k in part}, directory / file)
        index |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same_params(open_checkpoint(directory).load(one_device(), np.float32), load_golden("v1.6-mistral")[1])
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"missing files: model-00002-of-00003\.safetensors"):
        open_checkpoint(directory)


def test_tables_that_are_computed_are_passed_over(tmp_path):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
        ORIGINAL + "embeddings.position_ids": np.arange(17),
    }
    open_checkpoint(write_checkpoint(tmp_path / "c", golden_tensors("v1.6-mistral") | extra, "v1.6-mistral"))


# ---------------------------------------------------------------- the vision tower of originals


def without_tower(tmp_path, **config):
    return write_checkpoint(tmp_path / "c", golden_tensors("v1.5-llama"), "v1.5-llama", **config)


def test_original_without_its_tower_says_which_flag(tmp_path):
    for tower in ("vision_tower", "elsewhere", "openai/clip-vit-large-patch14-336"):
        with pytest.raises(InputError, match="--vision-tower"):
            open_checkpoint(without_tower(tmp_path, mm_vision_tower=tower))
    shutil.rmtree(tmp_path / "c/vision_tower")
    with pytest.raises(InputError, match="--vision-tower"):
        open_checkpoint(tmp_path / "c")


def test_tower_by_flag_and_tower_beside(tmp_path):
    directory = without_tower(tmp_path)
    tower = GOLDEN / "checkpoints/v1.5-llama/vision_tower"
    given = open_checkpoint(directory, vision_tower=tower).load(one_device(), np.float32)
    shutil.copytree(tower, directory / "vision_tower", dirs_exist_ok=True)
    beside = open_checkpoint(directory).load(one_device(), np.float32)
    assert_same_params(given, beside)
    with pytest.raises(InputError, match="not a CLIP directory"):
        open_checkpoint(directory, vision_tower=tmp_path)


def test_whole_clip_model_as_tower(tmp_path):
    """The hub's CLIP directories hold the text half too."""
    tower = tmp_path / "clip"
    shutil.copytree(GOLDEN / "checkpoints/v1.5-llama/vision_tower", tower)
    from safetensors.numpy import save_file

    tensors = golden_tensors("v1.5-llama", "vision_tower")
    more = {"text_model.final_layer_norm.weight": np.ones(3, np.float32), "logit_scale": np.array(1, np.float32)}
    save_file(tensors | more, tower / "model.safetensors")
    vision = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    open_checkpoint(without_tower(tmp_path), vision_tower=tower)


def test_tuned_tower_in_the_checkpoint_wins_over_a_given_one():
    """The golden v1.6 towers beside the checkpoint are wrong on purpose."""
    _, params = load_golden("v1.6-mistral")
    ours = np.asarray(params["vision"]["embed"]["class"])
    inside = golden_tensors("v1.6-mistral")[ORIGINAL + "embeddings.class_embedding"]
    np.testing.assert_array_equal(ours, inside)


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("missing", "more", "says"),
    [
        (
            ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"], {},
            ["missing tensors: model.layers.1.mlp.up_proj.weight, model.norm.weight"],
        ),
        (
            [], {"resampler.query": np.zeros(3), "model.layers.9.mlp.up_proj.weight": np.zeros((128, 64))},
            ["unknown tensors: ", "resampler.query (model.safetensors)", "model.layers.9.mlp.up_proj.weight"],
        ),
        (
            [], {"language_model.model.norm.weight": np.zeros(64)},
            ["duplicate tensors: model.norm.weight", " and language_model.model.norm.weight (model.safetensors)"],
        ),
        (
            [], {"model.image_newline": np.zeros((64, 1)), "model.layers.0.mlp.gate_proj.weight": np.zeros((3, 64))},
            [
                "tensors of the wrong shape or type: ",
                "model.image_newline (model.safetensors) [64, 1] float32 should be [64]",
                "model.layers.0.mlp.gate_proj.weight (model.safetensors) [3, 64] float32 should be [128, 64]",
            ],
        ),
        (
            ["model.norm.weight"],
            {"x" * 99: np.zeros(1), "language_model.model.norm.weight": np.zeros(64), "lm_head.weight": np.zeros(1)},
            ["unknown tensors: xxx", "tensors of the wrong shape or type: lm_head.weight"],
        ),
    ],
)  # fmt: skip
def test_missing_unknown_doubled_and_misshapen_tensors_are_named(tmp_path, missing, more, says):
    tensors = golden_tensors("v1.6-mistral") | {name: x.astype(np.float32) for name, x in more.items()}
    for name in missing:
        del tensors[name]
    with pytest.raises(InputError) as error:
        open_checkpoint(write_checkpoint(tmp_path / "c", tensors, "v1.6-mistral"))
    message = str(error.value)
    for part in says:
        assert part in message
    assert "\n" not in message and len(message) < 300


def test_missing_names_are_in_the_files_dialect(tmp_path):
    tensors = rename(golden_tensors("v1.6-mistral"), PREFIXES["hub"])
    del tensors["language_model.model.norm.weight"]
    directory = write_checkpoint(tmp_path / "hf", tensors, "v1.6-mistral")
    (directory / "config.json").write_text(json.dumps(hugging_face_config("v1.6-mistral")))
    with pytest.raises(InputError, match=r"missing tensors: language_model\.model\.norm\.weight$"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("nowhere", "no such directory"),
        ("/nowhere/at/all", "no such directory"),
        ("org/model", "the hub download failed"),
    ],
)
def test_nothing_there(where, says):
    with pytest.raises(InputError, match=says):
        open_checkpoint(where)


def test_directories_that_are_no_checkpoints(tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        open_checkpoint(tmp_path)
    shutil.copy(GOLDEN / "checkpoints/v1.6-mistral/config.json", tmp_path)
    with pytest.raises(InputError, match="CLIP|vision"):
        open_checkpoint(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="a file"):
        open_checkpoint(file)
