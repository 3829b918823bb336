"""The same model on every mesh of eight emulated devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from helpers import GOLDEN, QUESTION, golden_engine, load_golden, make_row
from infer.engine import Engine, Request
from infer.next_token import Controls, History, choose, row_keys
from infer.sampling import Sampling
from llava_jax import config as c
from llava_jax.console import InputError
from llava_jax.data.splice import Batch, splice
from llava_jax.models import llama, llava
from llava_jax.models.cache import new_cache
from llava_jax.sharding.fsdp import map_rows
from llava_jax.sharding.mesh import inference_mesh, make_mesh, parse_mesh
from llava_jax.sharding.partition import Partition, path_of, put_rows

MESHES = [
    "data=8", "fsdp=8", "tensor=8", "data=2,fsdp=4", "data=4,tensor=2", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2",
    "fsdp=2,tensor=4",
]  # fmt: skip


@functools.cache
def mixed_batch(name: str) -> Batch:
    """Eight rows: no image, one, two."""
    found, _ = load_golden(name)
    talk = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "Yes."}]
    several = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "Both."}]
    text = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hi."}]
    image_files = sorted((GOLDEN / "images").iterdir())
    rows = [make_row(talk, [p], "v1", found.config, found.tokenizer) for p in image_files[:5]]
    rows += [make_row(several, image_files[5:7], "v1", found.config, found.tokenizer)]
    rows += [make_row(text, [], "v1", found.config, found.tokenizer)] * 2
    return splice(rows, found.config)


def place(name: str, mesh):
    found, params = load_golden(name)
    params = jax.device_put(params, Partition(found.config, mesh).shardings(params))
    batch = jax.tree.map(lambda x: put_rows(x, mesh), mixed_batch(name))
    return found.config, params, batch


@pytest.mark.parametrize("name", ["v1.5-llama", "v1.6-mistral"])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_logits_of_one_device(name, mesh):
    found, params = load_golden(name)
    forward = jax.jit(llava.forward, static_argnums=(1, 3))
    want = np.asarray(forward(params, found.config, mixed_batch(name)))
    mesh = make_mesh(parse_mesh(mesh))
    config, params, batch = place(name, mesh)
    got = np.asarray(forward(params, config, batch, Partition(config, mesh)))
    used = mixed_batch(name).segments > 0
    np.testing.assert_allclose(got[used], want[used], atol=1e-5)


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "tensor=8", "fsdp=8"])
def test_every_mesh_generates_the_same(mesh):
    """Drawn answers too."""
    alone = golden_engine("v1.6-mistral")
    mesh = make_mesh(parse_mesh(mesh))
    _, params, _ = place("v1.6-mistral", mesh)
    engine = Engine(params, alone.config, alone.tokenizer, mesh)
    requests = [Request((QUESTION,), (p,)) for p in sorted((GOLDEN / "images").iterdir())[:3]]
    requests.append(Request(("Hello",)))
    for sampling in (Sampling(max_new_tokens=12), Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=5)):
        want = dict(alone.generate(requests, sampling))
        got = dict(engine.generate(requests, sampling))
        assert [got[i].token_ids for i in range(4)] == [want[i].token_ids for i in range(4)]


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "tensor=8", "fsdp=8"])
def test_every_mesh_quantizes_the_same(mesh):
    """Keys and values are what one device has, but for numbers that lie between two steps."""
    found, _ = load_golden("v1.6-mistral")
    mesh = make_mesh(parse_mesh(mesh))
    x_BSD = np.random.default_rng(0).standard_normal((8, 12, found.config.text.width), np.float32)

    def cache(params, mesh=None):
        partition, text = Partition(found.config, mesh), found.config.text
        per_shard = 8 // partition.row_shards
        slots = jnp.tile(jnp.arange(per_shard), partition.row_shards)

        @jax.jit
        def fill(params, x_BSD, slots):
            empty = new_cache(text, 8, 16, x_BSD.dtype, int8=True, partition=partition)
            zeros, full = jnp.zeros(8, int), jnp.full(8, 12)
            return llama.prefill(params, text, x_BSD, zeros, full, empty, slots, span=0, partition=partition)[1]

        return fill(params["decoder"], x_BSD, slots)

    alone, cut = cache(load_golden("v1.6-mistral")[1]), cache(place("v1.6-mistral", mesh)[1], mesh)
    assert sum(x.dtype == "int8" for x in jax.tree.leaves(alone)) == 2 * found.config.text.layers
    for want, got in zip(jax.tree.leaves(alone), jax.tree.leaves(cut), strict=True):
        assert got.dtype == want.dtype
        if want.dtype == "int8":
            difference = np.abs(np.asarray(got, int) - np.asarray(want, int))
            assert difference.max() <= 1 and difference.mean() < 1e-3
        else:
            np.testing.assert_allclose(got, want, rtol=1e-4)


def test_only_drawing_gathers_logits():
    """The likeliest token is found where its logits are, even if the vocabulary divides nothing."""
    mesh = make_mesh({"tensor": 4}, jax.devices()[:4])
    keys, controls, generated = row_keys(0, range(8)), Controls.of([Sampling()] * 8), np.zeros(8, np.int32)
    cut = jax.NamedSharding(mesh, P(None, "tensor"))
    logits = jax.device_put(np.random.default_rng(0).standard_normal((8, 4096), np.float32), cut)
    partition = Partition(c.tiny(), mesh)
    static, dtypes = dict(static_argnums=(5, 6)), (bool, np.int32, np.float32)
    history = History(*(np.zeros((8, 4096), dtype) for dtype in dtypes))
    chosen = jax.jit(choose, **static).lower(logits, keys, controls, history, generated, (2,), partition).compile()
    computations = {part.split(" ", 1)[0]: part for part in re.split(r"\n(?=%|ENTRY)", chosen.as_text())}
    gathering = {name for name, part in computations.items() if re.search(r"f32\[8,4096\]\S* all-gather\(", part)}
    branches = re.findall(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.]+)", chosen.as_text())
    assert gathering and gathering <= {name for pair in branches for group in pair for name in group.split(", ")}
    odd = np.random.default_rng(1).standard_normal((8, 4097), np.float32)
    history = History(*(np.zeros(odd.shape, dtype) for dtype in dtypes))
    np.testing.assert_array_equal(
        jax.jit(choose, **static)(odd, keys, controls, history, generated, (2,), partition), odd.argmax(-1)
    )


COLLECTIVES = re.compile(r"(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(-start)?\(")


@pytest.mark.parametrize("mesh", MESHES)
def test_the_compiled_splice_holds_no_collective(mesh):
    """Nor does its gradient: feature tables and token embeddings stay with their rows."""
    mesh = make_mesh(parse_mesh(mesh))
    config, params, batch = place("v1.6-mistral", mesh)
    params = {"decoder": {"embed": jax.device_put(params["decoder"]["embed"], jax.NamedSharding(mesh, P()))}}
    features = put_rows(np.ones((8, batch.tiles.shape[1] * 16 + 1, 64), np.float32), mesh)

    def spliced(features, batch):
        return llava.splice_embeddings(params, config, features, batch.ids, batch.feature_rows, Partition(config, mesh))

    whole = jax.jit(spliced).lower(features, batch).compile().as_text()
    assert "gather" in whole
    assert not COLLECTIVES.search(whole)
    gradient = jax.jit(jax.grad(lambda f, b: jnp.sum(spliced(f, b) ** 2)))
    assert not COLLECTIVES.search(gradient.lower(features, batch).compile().as_text())


def test_with_fsdp_the_embedding_table_is_gathered_and_nothing_that_grows_with_the_sequence():
    mesh = make_mesh({"fsdp": 8})
    config, params, batch = place("v1.6-mistral", mesh)
    features = put_rows(np.ones((8, batch.tiles.shape[1] * 16 + 1, 64), np.float32), mesh)
    spliced = jax.jit(llava.splice_embeddings, static_argnums=(1, 5))
    args = params, config, features, batch.ids, batch.feature_rows, Partition(config, mesh)
    text = spliced.lower(*args).compile().as_text()
    moved = [line.split(" = ")[1] for line in text.splitlines() if COLLECTIVES.search(line)]
    assert len(moved) == 1
    assert moved[0].startswith("f32[1000,64]")


@pytest.mark.parametrize("sides", [(2, 4), (4, 2), (2, 2, 2)])
def test_along_one_side_of_a_slice_after_the_other_the_same_is_gathered_and_scattered(sides, monkeypatch):
    mesh, numbers = make_mesh({"fsdp": 8}), np.arange(8).reshape(sides)
    lines = tuple(tuple(map(tuple, np.moveaxis(numbers, k, -1).reshape(-1, n).tolist())) for k, n in enumerate(sides))
    monkeypatch.setattr("llava_jax.sharding.fsdp.fsdp_lines", lambda mesh: lines)
    x = np.arange(24 * 3, dtype=np.float32).reshape(24, 3)

    def loss(shards, rows):  # on each device's shard of the rows
        return jnp.sum(rows @ Partition(c.tiny(), mesh).gather(shards, "")["x"])

    rows = np.random.default_rng(0).integers(0, 9, (8, 24)).astype(np.float32)
    f = jax.value_and_grad(lambda x: map_rows(loss, {"x": x}, {"x": P("fsdp", None)}, rows, mesh=mesh))
    value, gradient = jax.jit(f)(x)
    assert float(value) == (rows @ x).sum()
    np.testing.assert_array_equal(gradient, np.repeat(rows.sum(0)[:, None], 3, axis=1))


# ---------------------------------------------------------------- specs and meshes


def test_specs():
    config = c.preset("v1.6-mistral-7b")
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    shapes = {path_of(k): x.shape for k, x in jax.tree_util.tree_flatten_with_path(llava.param_shapes(config))[0]}
    spec = lambda path: Partition(config, mesh).spec(path, shapes[path])  # noqa: E731
    assert spec("decoder/layers/0/attention/q/kernel") == P("fsdp", "tensor")
    assert spec("decoder/layers/0/attention/o/kernel") == P("tensor", "fsdp")
    assert spec("decoder/layers/31/mlp/down/kernel") == P("tensor", "fsdp")
    assert spec("decoder/head/kernel") == P("fsdp", "tensor")
    assert spec("decoder/embed/embedding") == P("fsdp", None)
    assert spec("decoder/norm/scale") == P()
    assert spec("decoder/layers/0/mlp/gate/kernel") == P("fsdp", "tensor")
    # What encodes tiles is not sharded by `tensor`.
    assert spec("vision/layers/0/attention/q/kernel") == P("fsdp", None)
    assert spec("vision/layers/0/attention/o/kernel") == P("fsdp", None)
    assert spec("vision/layers/0/mlp/up/bias") == P(None)
    assert spec("projector/linear_0/kernel") == spec("projector/linear_1/kernel") == P("fsdp", None)

    def share_not_sharded(part: str, *axes: str) -> float:
        sizes = {path: np.prod(shape) for path, shape in shapes.items() if path.startswith(part)}
        return sum(n for path, n in sizes.items() if not set(axes) <= set(spec(path))) / sum(sizes.values())

    assert share_not_sharded("decoder/", "fsdp", "tensor") < 0.03
    assert share_not_sharded("vision/", "fsdp") < 0.003
    assert share_not_sharded("projector/", "fsdp") < 0.003


def test_rows_are_sharded_rather_than_columns_where_either_will_do():
    config = c.preset("v1.5-7b")
    down, table = "decoder/layers/0/mlp/down/kernel", "decoder/embed/embedding"
    assert Partition(config, make_mesh({"fsdp": 8})).spec(down, (11008, 4096)) == P("fsdp", None)
    assert Partition(config, make_mesh({"fsdp": 8})).spec(table, (32000, 4096)) == P("fsdp", None)
    assert Partition(config, make_mesh({"fsdp": 8})).spec(table, (32003, 4096)) == P(None, "fsdp")


def test_no_head_is_split_between_shards():
    config = c.preset("v1.6-mistral-7b")  # 8 key/value heads
    mesh = make_mesh({"tensor": 8})
    assert Partition(config, mesh).spec("decoder/layers/0/attention/k/kernel", (4096, 1024)) == P("fsdp", "tensor")
    wide = config.replace(text=c.TextConfig(heads=32, kv_heads=4))
    assert Partition(wide, mesh).spec("decoder/layers/0/attention/k/kernel", (4096, 512)) == P("fsdp", None)
    assert Partition(wide, mesh).spec("decoder/layers/0/attention/q/kernel", (4096, 4096)) == P("fsdp", "tensor")


def test_default_mesh_for_generation():
    assert dict(inference_mesh(c.preset("v1.5-7b")).shape) == {"data": 1, "fsdp": 1, "tensor": 8}
    assert dict(inference_mesh(c.tiny()).shape) == {"data": 1, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data=3", "needs 3 devices, here are 8"),
        ("data=4,fsdp=4", "needs 16 devices, here are 8"),
        ("fsdp=3,tensor=-1", "needs 6 devices, here are 8"),
        ("model=8", "write it as"),
        ("data=8,data=1", "write it as"),
        ("data=0", "write it as"),
        ("data=x", "write it as"),
        ("data", "write it as"),
        ("data=-1,fsdp=-1", "only one"),
    ],
)
def test_meshes_that_do_not_fit(text, says):
    with pytest.raises(InputError, match=says):
        make_mesh(parse_mesh(text))


def test_one_axis_may_take_the_rest():
    assert dict(make_mesh(parse_mesh("data=2,tensor=-1")).shape) == {"data": 2, "fsdp": 1, "tensor": 4}
