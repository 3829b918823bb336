"""`to-orbax`: our own format holds what went in; destinations are kept, and a failure leaves nothing."""

import json
import shutil

import jax
import numpy as np
import pytest

from convert import __main__ as cli
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from helpers import CHECKPOINTS, GOLDEN, assert_same_params, leaves, load_golden, one_device
from llava_jax.checkpoints import safetensors_files
from llava_jax.checkpoints.checkpoint import open_any, open_checkpoint
from llava_jax.checkpoints.orbax_files import save
from llava_jax.console import InputError
from llava_jax.sharding.mesh import make_mesh


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_orbax_holds_what_went_in(name, tmp_path, run_cli):
    status, out, err = run_cli(cli.main, "to-orbax", GOLDEN / "checkpoints" / name, tmp_path / "o")
    assert (status, out, err) == (0, "", f"wrote {tmp_path / 'o'}\n")
    found = open_checkpoint(tmp_path / "o")
    direct, params = load_golden(name)
    assert found.config.replace(template=None, template_from="") == direct.config
    assert_same_params(found.load(one_device(), np.float32), params)
    assert found.tokenizer.encode("Hello there")[0] == direct.tokenizer.encode("Hello there")[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_stored_type(tmp_path, dtype):
    to_orbax(GOLDEN / "checkpoints/v1.5-llama", tmp_path / "o", dtype=dtype)
    params = open_checkpoint(tmp_path / "o").load(one_device(), dtype)
    want = {k: v.astype(dtype) for k, v in leaves(load_golden("v1.5-llama")[1]).items()}
    for path, x in leaves(params).items():
        assert x.dtype == want[path].dtype
        np.testing.assert_array_equal(x, want[path])


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"tensor": 2, "fsdp": 4}])
def test_loading_onto_a_mesh_from_either_format(tmp_path, mesh):
    mesh = make_mesh(mesh)
    to_orbax(GOLDEN / "checkpoints/v1.6-mistral", tmp_path / "o")
    for where in (GOLDEN / "checkpoints/v1.6-mistral", tmp_path / "o"):
        params = open_checkpoint(where).load(mesh, np.float32)
        kernel = params["decoder"]["layers"]["0"]["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 8
        assert_same_params(params, load_golden("v1.6-mistral")[1])


def test_existing_destination_is_kept_without_overwrite(tmp_path, run_cli):
    destination = tmp_path / "o"
    source = GOLDEN / "checkpoints/v1.5-llama"
    to_hf(source, destination, part="projector")
    before = (destination / "config.json").read_text()
    status, _, err = run_cli(cli.main, "to-orbax", source, destination)
    assert status == 1
    assert err.count("\n") == 1
    assert "--overwrite" in err
    assert (destination / "config.json").read_text() == before
    assert run_cli(cli.main, "to-orbax", source, destination, "--overwrite")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o"]


def test_overwriting_replaces_checkpoints_only_and_never_the_source(tmp_path, run_cli):
    source = tmp_path / "models" / "model"
    shutil.copytree(GOLDEN / "checkpoints" / "v1.6-mistral", source)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for destination, says in (
        (source, "overlaps an input of this command"),
        (tmp_path / "models", "overlaps an input of this command"),
        (tmp_path / "models" / "model" / ".." / "..", "overlaps an input of this command"),
        (tmp_path / "mine", "precious.txt"),
    ):
        status, _, err = run_cli(cli.main, "to-orbax", source, destination, "--overwrite")
        assert (status, err.count("\n")) == (1, 1) and says in err
    assert sorted(tmp_path.rglob("*")) == before


def test_paths_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    to_orbax(GOLDEN / "checkpoints" / "v1.5-llama", "here")
    for where in ("here", "./here/", "../" + tmp_path.name + "/here"):
        found = open_checkpoint(where)
        assert_same_params(found.load(one_device(), np.float32), load_golden("v1.5-llama")[1])
    assert open_any("here").tensors["decoder/norm/scale"].read().ndim == 1


def test_a_source_that_breaks_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    real, count = safetensors_files.File.read, [0]

    def read(self, name):
        count[0] += 1
        if count[0] > 20:
            raise InputError("truncated meanwhile")
        return real(self, name)

    monkeypatch.setattr(safetensors_files.File, "read", read)
    with pytest.raises(InputError, match="truncated meanwhile"):
        to_orbax(GOLDEN / "checkpoints/v1.5-llama", tmp_path / "o")
    assert list(tmp_path.iterdir()) == []
    read_into = safetensors_files.read_into
    monkeypatch.setattr(safetensors_files.File, "read", real)
    monkeypatch.setattr(safetensors_files, "read_into", lambda out, path, *rest: read_into(out, f"{path}.gone", *rest))
    with pytest.raises(InputError, match=r"\.safetensors\.gone: cannot be read \(No such file"):  # not the destination
        to_orbax(GOLDEN / "checkpoints/v1.5-llama", tmp_path / "o")
    assert list(tmp_path.iterdir()) == []


def test_faults_in_our_own_format(tmp_path):
    to_orbax(GOLDEN / "checkpoints/v1.5-llama", tmp_path / "o")
    settings = json.loads((tmp_path / "o/config.json").read_text())
    wrong = json.loads(json.dumps(settings))
    wrong["text"]["layers"] = 4
    wrong["text"]["ffn_width"] = 97
    (tmp_path / "o/config.json").write_text(json.dumps(wrong))
    with pytest.raises(InputError, match=r"missing tensors: decoder/layers/3/.*wrong shape: .*should be \[97, 48\]"):
        open_checkpoint(tmp_path / "o").load(one_device())
    (tmp_path / "o/config.json").write_text(json.dumps(settings))
    shutil.rmtree(tmp_path / "o/params/ocdbt.process_0")
    shutil.rmtree(tmp_path / "o/params/d")
    with pytest.raises(InputError, match="o/params: "):
        open_checkpoint(tmp_path / "o").load(one_device())


def test_trees_of_arrays_are_saved_too(tmp_path):
    """What training will hand over."""
    found, params = load_golden("v1.6-mistral")
    save(tmp_path / "a", params, found.config, found.tokenizer.files)
    assert_same_params(open_checkpoint(tmp_path / "a").load(one_device(), np.float32), params)
    save(tmp_path / "b", jax.tree.map(np.asarray, params), found.config, found.tokenizer.files, dtype="bfloat16")
    stored = open_checkpoint(tmp_path / "b").load(one_device(), np.float32)
    assert_same_params(stored, jax.tree.map(lambda x: x.astype("bfloat16").astype(np.float32), params))
