"""Checkpoints in: every spelling of their names, whole or refused with every fault named, and our own format."""

import json
import shutil
import struct
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

from convert import __main__ as cli
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from helpers import CHECKPOINTS, GOLDEN, golden_tensors, load_golden, one_device, write_checkpoint
from llava_jax import config as c
from llava_jax.checkpoints import safetensors_files, tensor_names, torch_files
from llava_jax.checkpoints.checkpoint import open_any, open_checkpoint
from llava_jax.checkpoints.orbax_files import save
from llava_jax.checkpoints.outputs import new_directory
from llava_jax.console import InputError
from llava_jax.models.llava import param_shapes
from llava_jax.sharding.mesh import make_mesh
from llava_jax.sharding.partition import path_of


def leaves(params) -> dict[str, np.ndarray]:
    return {path_of(k): np.asarray(x) for k, x in jax.tree_util.tree_flatten_with_path(params)[0]}


def assert_same(a, b) -> None:
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


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
    assert_same(found.load(one_device(), np.float32), load_golden("v1.6-mistral")[1])


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
    assert_same(open_checkpoint(directory).load(one_device(), np.float32), load_golden("v1.6-mistral")[1])
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"not there: model-00002-of-00003\.safetensors"):
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
    assert_same(given, beside)
    with pytest.raises(InputError, match="no CLIP directory"):
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
            ["tensors twice: model.norm.weight", " and language_model.model.norm.weight (model.safetensors)"],
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


def header(entries: dict, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "truncated, or no safetensors"),
        (b"PK\x03\x04junkjunkjunk", "truncated, or no safetensors"),
        (struct.pack("<Q", 2**60) + b"{}", "truncated, or no safetensors"),
        (struct.pack("<Q", 9) + b"{nonsense", "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "no JSON object"),
        (struct.pack("<Q", 20000) + b"[" * 20000, "not JSON"),
        (header({"a": F32}, b"1234"), "truncated: tensor 'a' ends at byte"),
        (header({"a": F32}, b"12345678extra"), "5 bytes after the last tensor"),
        (header({"a": F32, "b": F32}, b"12345678"), "'a' and 'b' overlap"),
        (header({"a": F32 | {"data_offsets": [4, 12]}}, b"1" * 12), "4 bytes before tensor 'a'"),
        (header({"a": F32 | {"shape": [3]}}, b"12345678"), "wants 12 bytes, its offsets give 8"),
        (header({"a": F32 | {"dtype": "F128"}}, b"12345678"), "broken header entry"),
        (header({"a": F32 | {"shape": [-2]}}, b"12345678"), "broken header entry"),
        (header({"a": F32 | {"data_offsets": [8, 0]}}, b"12345678"), "wants 8 bytes"),
        (header({"a": {"dtype": "F32"}}, b"12345678"), "broken header entry"),
        (header({"a": 7}, b"12345678"), "broken header entry"),
        (header({"a": F32 | {"dtype": ["F32"]}}, b"12345678"), "broken header entry"),
        (header({"a": F32 | {"shape": "22"}}, b"12345678"), "broken header entry"),
        (header({"a": F32 | {"data_offsets": [0, 8, 8]}}, b"12345678"), "broken header entry"),
        (header({"a": F32 | {"shape": [1] * 16 + [2]}}, b"12345678"), "broken header entry"),
        (header({"a": F32 | {"shape": [2**40] * 200_000}}, b"12345678"), "broken header entry"),
        (header({"a": F32 | {"shape": [0, 2**47, 2**47], "data_offsets": [0, 0]}}), "broken header entry"),
        (header({"a" * 1001: F32}, b"12345678"), "broken header entry"),
        (header({"a" * 1000: F32, "b": F32}, b"12345678"), "overlap"),
        (header({"a": F32, "c": F32}, b"12345678").replace(b'"c"', b'"a"'), "a key twice"),
        (header({"a": F32 | {"shape": [2], "sh": [3]}}, b"12345678").replace(b'"sh"', b'"shape"'), "not JSON"),
        (header({"__metadata__": [1], "a": F32}, b"12345678"), "no JSON object"),
        (struct.pack("<Q", 2**24 + 1) + b" " * 2**24 + b"{}", "truncated, or no safetensors"),
    ],
)
def test_broken_safetensors(tmp_path, data, says):
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError, match=says) as error:
        safetensors_files.File(path)
    assert "m.safetensors" in str(error.value) and len(str(error.value)) < 300


# ---------------------------------------------------------------- what torch.save writes, by hand


def text(string: str) -> bytes:
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def tensor(
    *, storage: str = "FloatStorage", shape: bytes = b"K\x04\x85", strides: bytes = b"K\x01\x85", more=b""
) -> bytes:
    """A tensor of four numbers in storage 0, in the instructions of a pickle."""
    place = b"(" + text("storage") + b"ctorch\n" + storage.encode() + b"\n" + text("0") + text("cpu") + b"K\x04tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + b"K\x00" + shape + strides + b"\x89N" + more + b"tR"


def torch_file(path, pickle: bytes, compression: int = zipfile.ZIP_STORED, entries: int = 1):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + pickle + b".", compression)
        for i in range(entries):
            archive.writestr(f"a/data/{i}", np.arange(4, dtype=np.float32).tobytes())
    return path


def dictionary(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


DOUBLED = b"U\x01a" + b"".join(bytes([ord("q"), i, ord("h"), i, 0x86]) for i in range(60))  # a tuple of 2**60 texts
SIDE = b"\x8a\x06" + b"\xff" * 5 + b"\x00"  # 2**40 - 1
MANY = b"".join(text(str(i)) + b"h\x00" for i in range(30_000))


@pytest.mark.parametrize(
    ("pickle", "says"),
    [
        (dictionary(w=tensor(more=DOUBLED)), "a view of another kind"),
        (dictionary(w=tensor(shape=DOUBLED)), "layout is not made of numbers"),
        (dictionary(w=tensor(strides=DOUBLED)), "layout is not made of numbers"),
        (DOUBLED + b"K\x01\x93", "asks for what has no name"),
        (b"}" + DOUBLED + b"Ns", "keys are no names"),
        (b"(" + DOUBLED + DOUBLED + DOUBLED + DOUBLED + b"K\x04tQ", "a storage without a name"),
        (b"(" + DOUBLED + b"N" + text("0") + b"NK\x04tQ", "no storage of a tensor"),
        (b"}K\x07" + tensor() + b"s", "names are numbers"),
        (dictionary(w=tensor(shape=b"(K\x00" + SIDE + SIDE + b"t", strides=b"K\x00K\x00K\x00\x87")), "broken layout"),
        (dictionary(w=tensor(storage="x" * 10_000 + "Storage")), "which are not supported"),
        (dictionary(**{"w" * 1000: tensor(shape=b"K\x09\x85")}), "has more elements than its storage"),
        (b"c" + b"x" * 10_000 + b"\ny\n", "refused: its pickle asks for xxx"),
        (b"]0" * 600_000, "it is too long"),
        (b"I" + b"9" * 2_000_000 + b"\n", "truncated or broken"),
        (b"\x8b" + struct.pack("<i", 10**6) + b"\xff" * 10**6, "instruction LONG4"),
        (b"l", "instruction LIST"),
    ],
)  # fmt: skip
def test_pickles_of_strangers_are_refused_at_once(tmp_path, pickle, says):
    with pytest.raises(InputError, match=says) as error:
        torch_files.File(torch_file(tmp_path / "m.bin", pickle))
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_one_dictionary_under_many_names_is_gone_through_once(tmp_path):
    """And not 30,000 times 30,000 items."""
    inner = b"}q\x00(" + MANY + b"u"
    assert not torch_files.File(torch_file(tmp_path / "m.bin", b"}(" + text("d") + inner + MANY + b"u")).tensors


def test_archives_of_strangers_are_refused_at_once(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="data.pkl is compressed"):
        torch_files.File(torch_file(tmp_path / "m.bin", b"]0" * 10**6, zipfile.ZIP_DEFLATED))
    path = torch_file(tmp_path / "m.bin", dictionary(w=tensor()), entries=1000)
    assert torch_files.File(path).read("w").tolist() == [0, 1, 2, 3]
    monkeypatch.setattr(torch_files, "MAX_ARCHIVE", 10_000)
    with pytest.raises(InputError, match="too many entries"):
        torch_files.File(path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_])
def test_safetensors_are_read_as_the_library_writes_them(tmp_path, dtype):
    from safetensors.numpy import save_file

    tensors = {
        "a": np.arange(6).reshape(2, 3).astype(dtype),
        "scalar": np.array(1, dtype),
        "none": np.zeros((0, 3), dtype),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    file = safetensors_files.File(tmp_path / "m.safetensors")
    assert file.metadata == {"format": "pt"}
    assert file.tensors.keys() == tensors.keys()
    for name, x in tensors.items():
        got = file.read(name)
        assert (got.dtype, got.shape) == (x.dtype, x.shape)
        np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("nowhere", "no such directory"),
        ("/nowhere/at/all", "no such directory"),
        ("org/model", "the hub did not give it"),
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


# ---------------------------------------------------------------- our own format


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_orbax_holds_what_went_in(name, tmp_path, run_cli):
    status, out, err = run_cli(cli.main, "to-orbax", GOLDEN / "checkpoints" / name, tmp_path / "o")
    assert (status, out, err) == (0, "", f"wrote {tmp_path / 'o'}\n")
    found = open_checkpoint(tmp_path / "o")
    direct, params = load_golden(name)
    assert found.config.replace(template=None, template_from="") == direct.config
    assert_same(found.load(one_device(), np.float32), params)
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
        assert_same(params, load_golden("v1.6-mistral")[1])


def test_existing_destination_is_kept_unless_told(tmp_path, run_cli):
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
        (source, "holds what is to be read"),
        (tmp_path / "models", "holds what is to be read"),
        (tmp_path / "models" / "model" / ".." / "..", "holds what is to be read"),
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
        assert_same(found.load(one_device(), np.float32), load_golden("v1.5-llama")[1])
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


def test_a_failure_leaves_no_parents_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "a" / "b" / "c") as staged:
        (staged / "file").write_text("x")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with new_directory(tmp_path / "a" / "b" / "c") as staged:
        (staged / "file").write_text("x")
    assert (tmp_path / "a" / "b" / "c" / "file").read_text() == "x" and len(list(tmp_path.rglob("*"))) == 4


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
    assert_same(open_checkpoint(tmp_path / "a").load(one_device(), np.float32), params)
    save(tmp_path / "b", jax.tree.map(np.asarray, params), found.config, found.tokenizer.files, dtype="bfloat16")
    stored = open_checkpoint(tmp_path / "b").load(one_device(), np.float32)
    assert_same(stored, jax.tree.map(lambda x: x.astype("bfloat16").astype(np.float32), params))
