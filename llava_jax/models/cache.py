"""The KV cache: B slots of M positions, one slot for each conversation, and reads and writes of single slots.

Along `data` and `fsdp` each device holds its own slots, so that reading and writing them sends nothing: A rows that go
to slots are one for each such shard, and their slots are numbered within it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llava_jax.config import TextConfig
from llava_jax.sharding.mesh import BATCH, TENSOR
from llava_jax.sharding.partition import UNSHARDED, Partition


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values_BKMN", "key_scales_BKM", "value_scales_BKM"],
    meta_fields=["by_position"],
)
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of a layer: in the model's dtype, or int8 with the scale of each position's vectors.

    `by_position`: keys are [B, K, M, N] as values are, otherwise [B, K, N, M], which the matmul with a query reads 1.6
    times as fast on a CPU. On TPUs, XLA writes to the latter only by copying all keys to the former and back.
    """

    keys: jax.Array
    values_BKMN: jax.Array
    key_scales_BKM: jax.Array | None = None
    value_scales_BKM: jax.Array | None = None
    by_position: bool = False

    @property
    def is_int8(self) -> bool:
        return self.key_scales_BKM is not None

    @property
    def positions(self) -> int:
        return self.values_BKMN.shape[2]


Cache = tuple[LayerCache, ...]  # one for each layer


def new_cache(
    config: TextConfig, slots: int, positions: int, dtype, *, int8: bool = False, partition: Partition = UNSHARDED
) -> Cache:
    """An empty cache of `slots` slots (a multiple of `partition.row_shards`)."""
    x_BMKN = jnp.zeros((slots, positions, config.kv_heads, config.head_width), dtype)
    by_position = partition.platform == "tpu"

    def layer() -> LayerCache:
        empty = to_cache(x_BMKN, x_BMKN, int8=int8, by_position=by_position)
        return _map_arrays(lambda x, _: _constrain(x, partition), empty)

    return tuple(layer() for _ in range(config.layers))


def to_cache(k_BSKN: jax.Array, v_BSKN: jax.Array, *, int8: bool = False, by_position: bool = False) -> LayerCache:
    """Keys and values in the layout and dtype of the cache."""
    keys = k_BSKN.swapaxes(1, 2) if by_position else k_BSKN.transpose(0, 2, 3, 1)
    layer = LayerCache(keys, v_BSKN.swapaxes(1, 2), by_position=by_position)
    return quantized(layer) if int8 else layer


def quantized(layer: LayerCache) -> LayerCache:
    """A layer's keys and values as int8."""
    keys, key_scales = _quantized(layer.keys, 3 if layer.by_position else 2)
    values, value_scales = _quantized(layer.values_BKMN, 3)
    return LayerCache(keys, values, key_scales, value_scales, layer.by_position)


def _quantized(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Each vector along `axis` as int8, its largest absolute value as 127, and the scales to multiply by."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
    whole = jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return whole, jnp.squeeze(scale, axis)


def first_positions(cached: LayerCache, span: int) -> LayerCache:
    """The first `span` positions of all slots."""
    return _map_arrays(lambda x, axis: jax.lax.slice_in_dim(x, 0, span, axis=axis), cached)


def grown(cache: Cache, positions: int, partition: Partition = UNSHARDED) -> Cache:
    """The same cache with more positions in each slot."""

    def pad(x, axis):
        widths = [(0, positions - n if i == axis else 0) for i, n in enumerate(x.shape)]
        return _constrain(jnp.pad(x, widths), partition)

    return tuple(_map_arrays(pad, cached) for cached in cache)


def write_step(cached: LayerCache, k_BKN: jax.Array, v_BKN: jax.Array, position: jax.Array) -> LayerCache:
    """Write one position, the same of all slots."""
    new = to_cache(k_BKN[:, None], v_BKN[:, None], int8=cached.is_int8, by_position=cached.by_position)
    return _map_arrays(lambda x, new, axis: jax.lax.dynamic_update_slice_in_dim(x, new, position, axis), cached, new)


# ---------------------------------------------------------------- single slots


def read_slots(
    cached: LayerCache, slots_A: jax.Array, lengths_A: jax.Array, span: int, dtype, partition: Partition = UNSHARDED
) -> tuple[jax.Array, jax.Array]:
    """The first `lengths_A` positions of slots, aligned on the right of `span` positions.

    Returns:
      Keys and values [A, span, K, N]; what is left of a slot's positions is unspecified.
    """

    def read(cached: LayerCache, slots_A, lengths_A) -> LayerCache:
        def of_row(x, axis, r):
            row = jax.lax.slice_in_dim(jax.lax.dynamic_slice_in_dim(x, slots_A[r], 1, 0), 0, span, axis=axis)
            return jnp.roll(row, span - lengths_A[r], axis)

        rows = range(len(slots_A))
        return _map_arrays(lambda x, axis: jnp.concatenate([of_row(x, axis, r) for r in rows]), cached)

    part = _on_shards(partition, read, cached, slots_A, lengths_A)
    keys_BKMN, values_BKMN = part.keys if part.by_position else part.keys.swapaxes(2, 3), part.values_BKMN
    if part.is_int8:
        keys_BKMN, values_BKMN = (
            keys_BKMN * part.key_scales_BKM[..., None],
            values_BKMN * part.value_scales_BKM[..., None],
        )
    return keys_BKMN.swapaxes(1, 2).astype(dtype), values_BKMN.swapaxes(1, 2).astype(dtype)


def write_slots(
    cache: Cache,
    new: Cache,
    slots_A: jax.Array,
    starts_A: jax.Array,
    counts_A: jax.Array,
    partition: Partition = UNSHARDED,
) -> Cache:
    """Write the first `counts_A` positions of each row of `new` to slots, from `starts_A` on."""

    def write(cache: Cache, new: Cache, slots_A, starts_A, counts_A) -> Cache:
        def write_row(r, cache: Cache) -> Cache:
            write_array = lambda x, new, axis: _write(x, new, r, slots_A[r], starts_A[r], counts_A[r], axis)  # noqa: E731
            return tuple(_map_arrays(write_array, *pair) for pair in zip(cache, new, strict=True))

        rows = len(slots_A)
        return write_row(0, cache) if rows == 1 else jax.lax.fori_loop(0, rows, write_row, cache)

    return _on_shards(partition, write, cache, new, slots_A, starts_A, counts_A)


def _write(x, new, r, slot, start, count, axis: int) -> jax.Array:
    """Write `count` positions of row `r` of `new`; other positions of `x` keep their values."""
    positions, written = x.shape[axis], new.shape[axis]
    at = jnp.clip(start, 0, positions - written)
    row = jnp.roll(jax.lax.dynamic_slice_in_dim(new, r, 1, 0), start - at, axis)
    indices: list[Any] = [0] * x.ndim
    indices[0], indices[axis] = slot, at
    old = jax.lax.dynamic_slice(x, indices, row.shape)
    place = (at + jnp.arange(written)).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    row = jnp.where((place >= start) & (place < start + count), row.astype(x.dtype), old)
    return jax.lax.dynamic_update_slice(x, row, indices)


def copy_slots(
    cache: Cache,
    sources_A: jax.Array,
    targets_A: jax.Array,
    counts_A: jax.Array,
    span: int,
    partition: Partition = UNSHARDED,
) -> Cache:
    """Copy the first `counts_A` positions, at most `span`, of slots to others."""

    def copy(cache: Cache, sources_A, targets_A, counts_A) -> Cache:
        def copied(x, axis):
            for r in range(len(sources_A)):
                row = jax.lax.slice_in_dim(jax.lax.dynamic_slice_in_dim(x, sources_A[r], 1, 0), 0, span, axis=axis)
                x = _write(x, row, 0, targets_A[r], 0, counts_A[r], axis)
            return x

        return tuple(_map_arrays(copied, cached) for cached in cache)

    return _on_shards(partition, copy, cache, sources_A, targets_A, counts_A)


def _on_shards(partition: Partition, f: Callable, *arguments: Any) -> Any:
    """`f(*arguments)`, run by each device on its own slots and rows; `f` returns a tree like its first argument."""
    if partition.row_shards == 1:
        return f(*arguments)
    specs = jax.tree.map(lambda x: partition.activation_spec(x.shape, *_axes(x)), arguments)
    return jax.shard_map(f, mesh=partition.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*arguments)


def _axes(x: jax.Array) -> tuple:
    """How an array of rows is sharded: the cache's along its heads too."""
    return (BATCH, TENSOR, *(None,) * (x.ndim - 2))[: x.ndim]


def _constrain(x: jax.Array, partition: Partition) -> jax.Array:
    return partition.constrain(x, *_axes(x))


def _map_arrays(f: Callable, *caches: LayerCache) -> LayerCache:
    """`f(*arrays, axis)` for each array of a layer's cache and the axis of its positions."""
    by_position = caches[0].by_position
    axes = dict(keys=2 if by_position else 3, values_BKMN=2, key_scales_BKM=2, value_scales_BKM=2)
    arrays = {name: [getattr(cached, name) for cached in caches] for name in axes}
    mapped: dict[str, Any] = {name: None if x[0] is None else f(*x, axes[name]) for name, x in arrays.items()}
    return LayerCache(**mapped, by_position=by_position)
