"""Parameters sharded along `fsdp`: gathered where they are used, their gradients reduce-scattered, each once.

Training only: in inference `Partition.gather` is a sharding constraint. Left to itself the compiler all-reduces whole
gradients, that of the head once for each chunk of the sequence. Inside `map_rows` nothing is sent along `data` and
`fsdp` but what `gather_shard` gathers, and its gradients.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llava_jax.sharding.mesh import BATCH, FSDP, TENSOR, fsdp_lines


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shard:
    """A device's shard of a parameter that is sharded along `fsdp`, inside `map_rows`.

    `gather_shard` gathers it in `dtype`; its gradient is reduced in the dtype of `array`.
    """

    array: jax.Array
    axis: int = dataclasses.field(metadata=dict(static=True))  # negative: stacking layers does not change it
    dtype: jax.typing.DTypeLike = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def astype(self, dtype) -> "Shard":
        return dataclasses.replace(self, dtype=dtype)


def is_shard(x: Any) -> bool:
    return isinstance(x, Shard)


def map_rows(f: Callable, params: Any, specs: Any, rows: Any, *others: Any, mesh: Mesh) -> jax.Array:
    """The sum over devices of the scalar `f(params, rows, *others)` of each device's shard of the rows.

    Args:
      specs: a tree like `params` of `PartitionSpec`. Parameters that are sharded along `fsdp` reach `f` as `Shard`.
      rows: arrays whose first dimension is rows, which the mesh must divide.
      others: replicated arrays, or None.
    """

    def local(params, rows, *others):
        def shard(x, spec):
            axes = [i for i, axis in enumerate(spec) if axis == FSDP]
            return Shard(x, axes[0] - x.ndim, x.dtype) if axes and mesh.shape[FSDP] > 1 else x

        return f(jax.tree.map(shard, params, specs), rows, *others)[None]

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        axis_names=set(BATCH),
        in_specs=(jax.tree.map(lambda _, spec: without(spec, TENSOR), params, specs), P(BATCH), *(P() for _ in others)),
        out_specs=P(BATCH),
        check_vma=False,
    )
    return jax.numpy.sum(mapped(params, rows, *others))


def in_map_rows() -> bool:
    """Whether the program being traced runs inside `map_rows`, where arrays of rows hold the device's own."""
    return FSDP in jax.sharding.get_abstract_mesh().manual_axes


def row_shard_index() -> jax.Array | int:
    """Which shard of the rows this device has, inside `map_rows`; 0 elsewhere."""
    return jax.lax.axis_index(BATCH) if in_map_rows() else 0


def gather_shard(shard: Shard, mesh: Mesh) -> jax.Array:
    """The whole parameter."""
    return _gather(shard.array, shard.dtype, shard.array.ndim + shard.axis, mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(array: jax.Array, dtype: jax.typing.DTypeLike, axis: int, mesh: Mesh) -> jax.Array:
    """All-gather along one torus dimension at a time, in the reverse order of `_reduce_scatter`: XLA's TPU
    compiler turns an all-gather over 64 chips at once into all-reduces."""
    whole = array.astype(dtype)
    for lines in reversed(fsdp_lines(mesh)):
        whole = jax.lax.all_gather(whole, FSDP, axis=axis, tiled=True, axis_index_groups=[list(line) for line in lines])
    return whole


def _gather_forward(array: jax.Array, dtype: jax.typing.DTypeLike, axis: int, mesh: Mesh):
    return _gather(array, dtype, axis, mesh), jax.numpy.zeros((), array.dtype)


def _reduce_scatter(dtype, axis: int, mesh: Mesh, like: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    """Reduce-scatter in the dtype of the shard, along one torus dimension at a time.

    XLA's TPU compiler turns a reduce-scatter over all of a 4x4 slice into an all-reduce, which sends twice as much, but
    leaves those along lines of chips as they are.
    """
    gradient = gradient.astype(like.dtype)
    for lines in fsdp_lines(mesh):
        gradient = jax.lax.psum_scatter(
            gradient, FSDP, scatter_dimension=axis, tiled=True, axis_index_groups=[list(line) for line in lines]
        )
    return (gradient,)


_gather.defvjp(_gather_forward, _reduce_scatter)


def gradient_options(mesh: Mesh) -> dict[str, str]:
    """`compiler_options` for a program that differentiates `map_rows`; none but on CPUs.

    JAX puts a sharding constraint into the reduction of a `psum` over some of a mesh's axes. The pass of XLA's CPU
    compiler that widens bfloat16 reductions to float32 aborts the process when it finds one there. Without that pass
    they are reduced in bfloat16, as on TPUs.
    """
    on_cpus = mesh.devices.flat[0].platform == "cpu"
    return {"xla_disable_hlo_passes": "all-reduce-promotion"} if on_cpus else {}


def without(spec: P, dropped: str) -> P:
    """The spec with one mesh axis left out."""
    return P(*(None if axis == dropped else axis for axis in spec))
