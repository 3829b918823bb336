"""The KV cache: prompts in chunks and decode steps through it, against one pass over everything."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import load_golden
from llava_jax.data.splice import Row, splice
from llava_jax.models import cache as kv
from llava_jax.models import llama, llava
from llava_jax.sharding.mesh import make_mesh
from llava_jax.sharding.partition import Partition, put_rows

LENGTHS, PROMPTS = (40, 33, 39, 37), (20, 9, 24, 13)
CHUNK, STEPS, POSITIONS = 12, 4, 64


@pytest.mark.parametrize("name", ["v1.5-llama", "v1.6-mistral"])
@pytest.mark.parametrize(("window", "by_position"), [(None, True), (11, False)])
@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_chunks_and_decode_steps_give_the_logits_of_a_full_pass(name, window, by_position, mesh):
    """Every slot has its own length, and each of its positions gives what it gives in one pass, in the layout of TPUs
    too."""
    found, params = load_golden(name)
    config = found.config.replace(text=dataclasses.replace(found.config.text, sliding_window=window))
    random = np.random.default_rng(0)
    ids = [random.integers(3, 1000, n).astype(np.int32) for n in LENGTHS]
    whole = np.asarray(llava.forward(params, config, splice([Row(x) for x in ids], config)))
    partition = Partition(config, make_mesh(mesh, jax.devices()[: 4 if mesh else 1]))
    decoder, text = jax.device_put(params, partition.shardings(params))["decoder"], config.text
    shards, per_shard = partition.row_shards, len(ids) // partition.row_shards

    def check(x, rows, positions):
        logits = np.asarray(llama.logits(decoder, text, x, partition))
        for row, (b, position) in enumerate(zip(rows, positions, strict=True)):
            np.testing.assert_allclose(logits[row], whole[b, position], atol=2e-5)

    def put(x):
        return put_rows(np.asarray(x, np.int32), partition.mesh)

    def new_cache(positions):
        empty = kv.new_cache(text, len(ids), positions, jnp.float32, partition=partition)
        assert not empty[0].by_position
        if not by_position:
            return empty
        return tuple(dataclasses.replace(x, keys=x.keys.swapaxes(2, 3), by_position=True) for x in empty)

    prefill = jax.jit(
        lambda chunk, starts, counts, cache, slots, span: llama.prefill(
            decoder, text, llama.embed(decoder, chunk, partition), starts, counts, cache, slots,
            span=span, partition=partition,
        ),
        static_argnums=5,
    )  # fmt: skip
    cache = new_cache(POSITIONS)
    for slot in range(per_shard):
        rows = [slot + per_shard * shard for shard in range(shards)]
        for start in range(0, max(PROMPTS), CHUNK):
            counts = [max(0, min(CHUNK, PROMPTS[b] - start)) for b in rows]
            chunk = [np.pad(ids[b][start : start + n], (0, CHUNK - n)) for b, n in zip(rows, counts, strict=True)]
            starts = [start if n else 0 for n in counts]
            x, cache = prefill(put(chunk), put(starts), put(counts), cache, put([slot] * shards), 16 if start else 0)
            good = [i for i, n in enumerate(counts) if n]
            check(x[np.array(good, int)], [rows[i] for i in good], [start + counts[i] - 1 for i in good])

    lengths = np.array(PROMPTS)
    step = jax.jit(
        lambda tokens, lengths, cache, recent, step: llama.decode_step(
            decoder, text, llama.embed(decoder, tokens, partition), lengths, cache, recent, step, partition
        )
    )
    merge = jax.jit(
        lambda cache, recent, lengths: kv.write_slots(
            cache, recent, put(np.tile(np.arange(per_shard), shards)), lengths, put([STEPS] * len(ids)), partition
        )
    )
    for _ in range(2):
        recent = new_cache(STEPS)
        for i in range(STEPS):
            tokens = [ids[b][lengths[b] + i] for b in range(len(ids))]
            x, recent = step(put(tokens), put(lengths), cache, recent, jnp.int32(i))
            check(x, range(len(ids)), lengths + i)
        cache = merge(cache, recent, put(lengths))
        lengths += STEPS


def random_cache(random, slots, positions, int8=False):
    k, v = (jnp.asarray(random.normal(size=(slots, positions, 2, 4)), jnp.float32) for _ in range(2))
    return (kv.to_cache(k, v, int8=int8),)


@pytest.mark.parametrize("int8", [False, True])
def test_a_write_changes_what_it_is_told_and_nothing_else(int8):
    """Also at the end of a slot, where the new positions must not be moved to make them fit."""
    random = np.random.default_rng(0)
    cache = random_cache(random, 3, 16, int8)
    new = random_cache(random, 3, 8, int8)
    starts, counts = [2, 12, 15], [8, 4, 0]
    written = kv.write_slots(cache, new, jnp.array([2, 0, 1]), jnp.array(starts), jnp.array(counts))
    for before, after, update, axis in zip(
        *(jax.tree.leaves(x) for x in (cache, written, new)), (3, 2, 2, 2), strict=False
    ):
        expected = np.moveaxis(np.array(before), axis, 1)
        for row, slot in enumerate([2, 0, 1]):
            end = starts[row] + counts[row]
            expected[slot, starts[row] : end] = np.moveaxis(np.array(update), axis, 1)[row, : counts[row]]
        np.testing.assert_array_equal(np.moveaxis(np.array(after), axis, 1), expected)


def test_reading_aligns_slots_on_the_right():
    cache = random_cache(np.random.default_rng(0), 3, 16)
    keys, values = kv.read_slots(cache[0], jnp.array([2]), jnp.array([5]), 8, jnp.float32)
    np.testing.assert_array_equal(keys[0, 3:], np.moveaxis(np.array(jax.tree.leaves(cache)[0][2]), 2, 0)[:5])
    np.testing.assert_array_equal(values[0, 3:], np.array(cache[0].values_BKMN[2]).swapaxes(0, 1)[:5])


def test_copying_a_slot():
    cache = random_cache(np.random.default_rng(0), 3, 16, int8=True)
    copied = kv.copy_slots(cache, jnp.array([2]), jnp.array([0]), jnp.array([5]), 8)
    for before, after in zip(jax.tree.leaves(cache), jax.tree.leaves(copied), strict=True):
        axis = 3 if before.ndim == 4 and before.shape[3] == 16 else 2
        before, after = (np.moveaxis(np.array(x), axis, 1) for x in (before, after))
        np.testing.assert_array_equal(after[0, :5], before[2, :5])
        np.testing.assert_array_equal(after[0, 5:], before[0, 5:])
        np.testing.assert_array_equal(after[1:], before[1:])


@pytest.mark.parametrize("by_position", [False, True])
def test_int8_keeps_keys_and_values_to_half_a_step(by_position):
    random = np.random.default_rng(0)
    k, v = (jnp.asarray(random.normal(size=(2, 8, 2, 16)), jnp.float32) for _ in range(2))
    cached = kv.to_cache(k, v, int8=True, by_position=by_position)
    keys, values = kv.read_slots(cached, jnp.array([1]), jnp.array([8]), 8, jnp.float32)
    for read, exact in ((keys[0], k[1]), (values[0], v[1])):
        step = np.abs(exact).max(axis=-1, keepdims=True) / 127
        assert (np.abs(read - exact) <= 0.5001 * step).all()
