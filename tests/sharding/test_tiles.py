"""Tiles are sharded over all axes of a mesh of eight emulated devices: the tower sends nothing but weights."""

import functools
import re

import jax
import numpy as np
import pytest

from helpers import load_golden
from llava_jax.data.splice import Batch
from llava_jax.models import llava
from llava_jax.sharding.mesh import make_mesh, parse_mesh
from llava_jax.sharding.partition import Partition, put_rows

NAME = "v1.6-mistral"
COLLECTIVE = re.compile(r"(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(-start)?\(")


@functools.cache
def tiles(number: int) -> np.ndarray:
    side = load_golden(NAME)[0].config.vision.image_size
    return np.random.default_rng(0).integers(0, 256, (number, side, side, 3), np.uint8)


def place(mesh: str):
    """A model on a mesh: its partition and parameters."""
    found, params = load_golden(NAME)
    partition = Partition(found.config, make_mesh(parse_mesh(mesh)))
    return partition, jax.device_put(params, partition.shardings(params))


def encode(params, tiles_THW3, partition):
    return llava.encode_tiles(params, partition.config, tiles_THW3, partition)


@functools.cache
def features_of_one_device(number: int) -> np.ndarray:
    found, params = load_golden(NAME)
    return np.asarray(llava.encode_tiles(params, found.config, tiles(number)))


def collectives(compiled) -> list[str]:
    """The collectives of a compiled program: dtype and shape of the result, and the operation."""
    lines = (line.split(" = ")[1] for line in compiled.as_text().splitlines() if COLLECTIVE.search(line))
    return sorted(re.sub(r"\{.*?\}", "", line.split("(")[0]) for line in lines)


@pytest.mark.parametrize("mesh", ["tensor=8", "data=2,tensor=4", "data=2,fsdp=2,tensor=2", "fsdp=8"])
def test_each_device_encodes_its_own_tiles(mesh):
    partition, params = place(mesh)
    batch = put_rows(tiles(16), partition.mesh)
    compiled = jax.jit(encode, static_argnums=2).lower(params, batch, partition).compile()
    assert compiled.output_shardings.shard_shape((16, 16, 64)) == (2, 16, 64)
    weights = {f"f32[{','.join(map(str, x.shape))}] all-gather" for x in jax.tree.leaves(params)}
    assert set(collectives(compiled)) <= (weights if partition.size("fsdp") > 1 else set())
    np.testing.assert_allclose(compiled(params, batch), features_of_one_device(16), atol=1e-5)


@pytest.mark.parametrize("number", [5, 1])
def test_tiles_that_the_mesh_does_not_divide(number):
    partition, params = place("data=2,tensor=4")
    got = jax.jit(encode, static_argnums=2)(params, tiles(number), partition)
    np.testing.assert_allclose(got, features_of_one_device(16)[:number], atol=1e-5)


@pytest.mark.parametrize("mesh", ["tensor=8", "data=2,tensor=4"])
def test_features_are_gathered_once_where_the_decoder_needs_them(mesh):
    """Along `tensor`, also if the tiles of a row are on several devices."""
    partition, params = place(mesh)
    config, side = partition.config, partition.config.vision.image_size
    ids = np.zeros((8, 40), np.int32)
    batch = Batch(tiles(24).reshape(8, 3, side, side, 3), ids, ids, ids, ids, ids + np.arange(40, dtype=np.int32))
    batch = jax.tree.map(lambda x: put_rows(x, partition.mesh), batch)
    embed = jax.jit(llava.embed_batch, static_argnums=(1, 3))
    compiled = embed.lower(params, config, batch, partition).compile()
    assert collectives(compiled) == [f"f32[{24 // partition.row_shards},16,{config.text.width}] all-gather"]
