"""How a model is sharded over a mesh: parameters by a table of paths, activations where the model constrains them.

What encodes tiles is not sharded along `tensor`: its tiles are.
An axis that does not divide a dimension is left out of its spec (heads count whole), so that every mesh runs every
model; `tensor` beyond the number of key/value heads replicates those.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.config import LlavaConfig
from llava_jax.sharding import fsdp
from llava_jax.sharding.mesh import AXES, BATCH, FSDP, TENSOR, TILES, row_multiple

GATHERED = "gathered"  # the checkpoint name of gathered weights, which no remat policy saves

# (last parts of a path, spec). Kernels of q, k, v and o are sharded by whole heads (`Partition._divides`). LoRA's two
# factors of a kernel are sharded as the kernel is, and along their rank. P(TENSOR, FSDP) and P(None, FSDP) become
# P(FSDP, None) where no `tensor` shards the rows and `fsdp` divides them (`Partition.spec`): a 32000 x 4096 embedding
# is sharded by rows, one of 32003 x 4096 by columns.
RULES: tuple[tuple[str, P], ...] = (
    ("embed/embedding", P(None, FSDP)),
    ("head/kernel", P(FSDP, TENSOR)),
    ("q/kernel", P(FSDP, TENSOR)),
    ("k/kernel", P(FSDP, TENSOR)),
    ("v/kernel", P(FSDP, TENSOR)),
    ("o/kernel", P(TENSOR, FSDP)),
    ("gate/kernel", P(FSDP, TENSOR)),
    ("up/kernel", P(FSDP, TENSOR)),
    ("down/kernel", P(TENSOR, FSDP)),
    ("q/bias", P(TENSOR)),
    ("k/bias", P(TENSOR)),
    ("v/bias", P(TENSOR)),
    ("gate/bias", P(TENSOR)),
    ("up/bias", P(TENSOR)),
    *((f"{name}/lora_a", P(FSDP, None)) for name in ("q", "k", "v", "gate", "up")),
    *((f"{name}/lora_b", P(FSDP, TENSOR)) for name in ("q", "k", "v", "gate", "up")),
    *((f"{name}/lora_a", P(TENSOR, FSDP)) for name in ("o", "down")),
    *((f"{name}/lora_b", P(None, FSDP)) for name in ("o", "down")),
    ("linear_0/kernel", P(FSDP, None)),
    ("linear_1/kernel", P(None, FSDP)),
    ("embed/patch", P(None, None, None, FSDP)),
    ("embed/position", P(None, FSDP)),
)


@dataclasses.dataclass(frozen=True)
class Partition:
    """How a model is sharded over a mesh; without a mesh its methods return their arguments unchanged.

    Hashable, so that it can be a static argument of `jax.jit`.
    """

    config: LlavaConfig = dataclasses.field(default_factory=LlavaConfig)
    mesh: Mesh | None = None

    def size(self, axis: str) -> int:
        """Devices along an axis of the mesh."""
        return self.mesh.shape[axis] if self.mesh else 1

    @property
    def device_count(self) -> int:
        return self.mesh.size if self.mesh else 1

    @property
    def row_shards(self) -> int:
        """The number of shards of a dimension of rows."""
        return row_multiple(self.mesh) if self.mesh else 1

    @property
    def tile_shards(self) -> int:
        """The number of shards of a dimension of tiles; inside `map_rows` of the device's own tiles."""
        return self.size(TENSOR) if fsdp.in_map_rows() else self.device_count

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform if self.mesh else jax.default_backend()

    @property
    def _mesh(self) -> Mesh:
        assert self.mesh is not None, "there is no mesh to shard over"
        return self.mesh

    # ---------------------------------------------------------------- parameters

    def spec(self, path: str, shape: tuple[int, ...]) -> P:
        """How the parameter at `path` (`decoder/layers/0/attention/q/kernel`) is sharded; replicated if no rule fits.

        Rows are sharded along `fsdp` instead of columns if nothing else shards them and `fsdp` divides them: XLA for
        TPUs turns the reduce-scatter of narrow columns into an all-reduce, which sends twice as much.
        """
        spec = next((spec for tail, spec in RULES if path.endswith("/" + tail)), None)
        if spec is None or self.mesh is None:
            return P()
        if path.startswith("vision/"):
            spec = fsdp.without(spec, TENSOR)  # its tiles are sharded along it instead
        axes = [axis if axis and self._divides(path, n, axis) else None for axis, n in zip(spec, shape, strict=True)]
        rows_are_free = len(axes) == 2 and (axes[0] is None or self.size(axes[0]) == 1)
        if rows_are_free and spec[1] == FSDP and self._divides(path, shape[0], FSDP):
            axes = [FSDP, None]
        return P(*axes)

    def _divides(self, path: str, n: int, axis: str) -> bool:
        *_, layer, _ = path.split("/")
        if axis == TENSOR and layer in ("q", "k", "v", "o"):
            n = self.config.text.kv_heads if layer in ("k", "v") else self.config.text.heads
        return n % self.size(axis) == 0

    def stacked_sharding(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of the parameter at `path` in a tree whose layers are stacked along a leading axis, which is not
        sharded."""
        stacked = "/layers/" in path
        return NamedSharding(self._mesh, P(None, *self.spec(path, shape[1:])) if stacked else self.spec(path, shape))

    def shardings(self, params: Any) -> Any:
        """A tree like `params` (arrays or shapes) of `NamedSharding`."""
        return jax.tree_util.tree_map_with_path(
            lambda path, x: NamedSharding(self._mesh, self.spec(path_of(path), x.shape)), params
        )

    def gather(self, params: Any, path: str) -> Any:
        """The parameters below `path`, all-gathered along `fsdp` for use. (Norms and biases are replicated anyway.)

        Without this constraint the compiler may send activations instead, which grow with the sequence.
        """
        if self.size(FSDP) == 1:
            return params

        def gathered(tail, x):
            if fsdp.is_shard(x):
                x = fsdp.gather_shard(x, self._mesh)
            elif not fsdp.in_map_rows():
                spec = self.spec("/".join(filter(None, (path, path_of(tail)))), x.shape)
                x = jax.lax.with_sharding_constraint(x, NamedSharding(self._mesh, fsdp.without(spec, FSDP)))
            return checkpoint_name(x, GATHERED)

        return jax.tree_util.tree_map_with_path(gathered, params, is_leaf=fsdp.is_shard)

    def map_rows(self, f: Callable, params: Any, rows: Any, *others: Any) -> jax.Array:
        """The sum over devices of the scalar `f(params, rows, *others)` of each device's shard of the rows.

        `fsdp.map_rows` for parameters whose layers are stacked.
        """
        if self.row_shards == 1:
            return f(params, rows, *others)
        specs = jax.tree_util.tree_map_with_path(
            lambda path, x: self.stacked_sharding(path_of(path), x.shape).spec, params
        )
        return fsdp.map_rows(f, params, specs, rows, *others, mesh=self._mesh)

    # ---------------------------------------------------------------- activations

    def constrain(self, x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
        """Shard an activation as named, one entry for each dimension: `BATCH`, `TILES`, `TENSOR` or None.

        Axes that do not divide their dimension are left out.
        """
        if self.device_count == 1:
            return x
        mesh: Mesh | AbstractMesh = self._mesh
        if fsdp.in_map_rows():
            if self.size(TENSOR) == 1:
                return x
            mesh = jax.sharding.get_abstract_mesh()
            axes = tuple(TENSOR if axis in (TENSOR, TILES) else None for axis in axes)

        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, self.activation_spec(x.shape, *axes)))

    def activation_spec(self, shape: tuple[int, ...], *axes: str | tuple[str, ...] | None) -> P:
        """The spec of an activation: one axis for each dimension, left out where it does not divide it."""

        def divides(axis, n):
            return n % math.prod(map(self.size, axis if isinstance(axis, tuple) else (axis,))) == 0

        return P(*(axis if axis and divides(axis, n) else None for axis, n in zip(axes, shape, strict=True)))

    def map_heads(self, f: Callable, *heads_BSHN: jax.Array, rows_BS: tuple[jax.Array, ...] = ()) -> jax.Array:
        """`f(*heads_BSHN, *rows_BS)` [B, S, H, N], run by each device on its shard of rows and heads.

        Rows are replicated where the mesh does not divide them; `tensor` must divide the heads.
        """
        arrays, in_rows = (*heads_BSHN, *rows_BS), fsdp.in_map_rows()
        if self.device_count == 1:
            return f(*arrays)
        rows = BATCH if not in_rows and arrays[0].shape[0] % self.row_shards == 0 else None
        return jax.shard_map(
            f,
            mesh=jax.sharding.get_abstract_mesh() if in_rows else self._mesh,
            axis_names={TENSOR} if in_rows else set(AXES),
            in_specs=(P(rows, None, TENSOR),) * len(heads_BSHN) + (P(rows),) * len(rows_BS),
            out_specs=P(rows, None, TENSOR),
            check_vma=False,
        )(*arrays)


UNSHARDED = Partition()


def path_of(keys) -> str:
    """`decoder/layers/0/...` for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(k, "key", k)) for k in keys)


# ---------------------------------------------------------------- batches


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays whose first dimension is rows."""
    return NamedSharding(mesh, P(BATCH))


def put_rows(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """A host array [B, ...], the same on all processes, sharded by rows over the mesh."""
    return jax.make_array_from_callback(array.shape, batch_sharding(mesh), lambda index: array[index])


def put_tiles(tiles_THW3: np.ndarray, mesh: Mesh) -> jax.Array:
    """Tiles on the host, the same on all processes, sharded over all of the mesh, which divides their number."""
    sharding = NamedSharding(mesh, P(TILES))
    return jax.make_array_from_callback(tiles_THW3.shape, sharding, lambda index: tiles_THW3[index])
