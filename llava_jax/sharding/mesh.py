"""Where arrays lie: the mesh, one table from parameter paths to partition specs, batches to devices.

Three mesh axes:

    data    rows of the batch; every replica holds all parameters
    fsdp    rows of the batch too; parameters are cut along it and gathered, layer by layer, where they are used
    tensor  heads, feed-forward width and vocabulary of each layer

An axis that does not divide a dimension is left out of its spec (heads count as whole ones), so that every mesh
runs every model; `tensor` beyond the number of key/value heads keeps copies of those.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, shorten

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
BATCH = (DATA, FSDP)  # a dimension of rows is cut along both

# ---------------------------------------------------------------- mesh


def parse_mesh(text: str) -> dict[str, int]:
    """`"data=1,fsdp=8,tensor=-1"` as a dictionary; -1, once, takes the devices that are left.

    Raises:
      InputError: an axis is unknown, named twice, or no number from 1 to 999999.
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"([a-z]+)=(-1|[1-9][0-9]{0,5})", part.strip())
        axis, size = match.groups() if match else ("", "")
        if axis not in AXES or axis in sizes:
            raise InputError(
                f"mesh {shorten(text)!r}: write it as data=1,fsdp=8,tensor=1 with sizes up to 999999 (one may be -1)"
            )
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise InputError(f"mesh {shorten(text)!r}: only one axis may be -1")
    return sizes


def format_mesh(sizes: Mapping[str, int]) -> str:
    """`parse_mesh` backwards; a mesh's `shape` will do."""
    return ",".join(f"{axis}={n}" for axis, n in sizes.items())


def make_mesh(sizes: dict[str, int], devices: list | None = None) -> Mesh:
    """A mesh of the axes `data`, `fsdp`, `tensor` over all devices; axes not named have size 1.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    named = math.prod(n for n in sizes.values() if n > 0)
    sizes = {axis: n if n > 0 else max(len(devices) // named, 1) for axis, n in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise InputError(
            f"mesh {format_mesh(sizes)} needs {math.prod(sizes.values())} devices, here are {len(devices)} "
            f"({devices[0].platform}); the sizes must multiply to that"
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)  # the default differs between JAX releases
    if devices[0].platform == "tpu" and (ordered := _by_place(devices, sizes)):
        return Mesh(np.array(ordered).reshape(tuple(sizes.values())), AXES, axis_types=kinds)
    return jax.make_mesh(tuple(sizes.values()), AXES, kinds, devices=devices)


def _by_place(devices: list, sizes: dict[str, int]) -> list | None:
    """TPUs in the order of their coordinates, for `fsdp_lines`, where slices are whole: one along `fsdp`, or several
    along `data` (which are the slower network). None where the mesh is cut otherwise."""

    def place(device):
        return getattr(device, "slice_index", 0), *device.coords

    slices = {place(device)[0] for device in devices}
    if len({place(device) for device in devices}) != len(devices) or sizes[FSDP] * len(slices) != len(devices):
        if len(slices) > 1 and sizes[DATA] % len(slices) == 0:
            return sorted(devices, key=place)
        if len(slices) > 1:
            raise InputError(
                f"with {len(slices)} slices `data` must be a multiple of that: only it may go between them"
            )
        return None
    return sorted(devices, key=place)


def inference_mesh(config: LlavaConfig, devices: list | None = None) -> Mesh:
    """The mesh for generation when none is named: as much `tensor` as whole key/value heads allow, rest `fsdp`."""
    devices = jax.devices() if devices is None else devices
    tensor = math.gcd(len(devices), config.text.kv_heads)
    return make_mesh({TENSOR: tensor, FSDP: len(devices) // tensor}, devices)


# ---------------------------------------------------------------- parameters

# (last parts of a path, spec). q, k, v and o are cut by heads: see `_divides`. LoRA's two factors of a kernel are
# cut where the kernel is, and along their rank. What is cut by columns along `fsdp` is so only where it must: see
# `param_spec`.
_RULES: tuple[tuple[str, P], ...] = (
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
    ("linear_0/kernel", P(FSDP, TENSOR)),
    ("linear_0/bias", P(TENSOR)),
    ("linear_1/kernel", P(TENSOR, FSDP)),
    ("embed/patch", P(None, None, None, FSDP)),
    ("embed/position", P(None, FSDP)),
)


def param_spec(path: str, shape: tuple[int, ...], config: LlavaConfig, mesh: Mesh) -> P:
    """How the parameter at `path` (`decoder/layers/0/attention/q/kernel`) is cut. All others are whole everywhere.

    Columns along `fsdp` are its rows instead, where these divide and `tensor` leaves them whole: XLA's TPU compiler
    scatters narrow columns by reductions, which move twice as much.
    """
    spec = next((spec for tail, spec in _RULES if path.endswith("/" + tail)), None)
    if spec is None:
        return P()
    if path.startswith("projector/") and config.projector == "linear":
        spec = P(FSDP, None) if len(shape) == 2 else P(None)  # one layer: its result is wanted whole
    cut = [
        axis if axis and _divides(path, n, axis, config, mesh) else None for axis, n in zip(spec, shape, strict=True)
    ]
    free = len(cut) == 2 and (cut[0] is None or mesh.shape[cut[0]] == 1)
    if free and spec[1] == FSDP and _divides(path, shape[0], FSDP, config, mesh):
        cut = [FSDP, None]
    return P(*cut)


def _divides(path: str, n: int, axis: str, config: LlavaConfig, mesh: Mesh) -> bool:
    parts = path.split("/")
    if axis == TENSOR and parts[-2] in ("q", "k", "v", "o"):
        if parts[0] == "vision":
            n = config.vision.heads
        else:
            n = config.text.kv_heads if parts[-2] in ("k", "v") else config.text.heads
    return n % mesh.shape[axis] == 0


def param_shardings(params: Any, config: LlavaConfig, mesh: Mesh) -> Any:
    """A tree like `params` (arrays or shapes) of `NamedSharding`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, param_spec(path_of(path), x.shape, config, mesh)), params
    )


def gather(params: Any, path: str, config: LlavaConfig, mesh: Mesh | None) -> Any:
    """The parameters below `path`, gathered along `fsdp` for use.

    Without this constraint the compiler may move activations, which grow with the sequence, instead.
    """
    if mesh is None or mesh.shape[FSDP] == 1:
        return params

    def whole(tail, x):
        if isinstance(x, Piece):
            x = _gather_piece(x.piece, x.dtype, x.piece.ndim + x.axis, mesh)
        elif FSDP not in manual_axes():
            spec = param_spec("/".join(filter(None, (path, path_of(tail)))), x.shape, config, mesh)
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _without(spec, {FSDP})))
        return checkpoint_name(x, "gathered")

    return jax.tree_util.tree_map_with_path(whole, params, is_leaf=lambda x: isinstance(x, Piece))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_piece(piece: jax.Array, dtype: jax.typing.DTypeLike, axis: int, mesh: Mesh) -> jax.Array:
    """Along one dimension of the slice after the other, back the way that `_scatter_gradient` goes: of a gather over
    64 chips at once XLA's TPU compiler makes reductions."""
    whole = piece.astype(dtype)
    for groups in reversed(fsdp_lines(mesh)):
        whole = jax.lax.all_gather(
            whole, FSDP, axis=axis, tiled=True, axis_index_groups=[list(line) for line in groups]
        )
    return whole


def _gather_forward(piece: jax.Array, dtype: jax.typing.DTypeLike, axis: int, mesh: Mesh):
    return _gather_piece(piece, dtype, axis, mesh), jax.numpy.zeros((), piece.dtype)


def _scatter_gradient(dtype, axis: int, mesh: Mesh, like: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    """In the precision of the piece.

    One dimension of the slice after the other: XLA's TPU compiler turns a scatter over all of a 4x4 slice into a
    reduction, which moves twice as much, but leaves those along lines of chips as they are.
    """
    gradient = gradient.astype(like.dtype)
    for groups in fsdp_lines(mesh):
        gradient = jax.lax.psum_scatter(
            gradient, FSDP, scatter_dimension=axis, tiled=True, axis_index_groups=[list(line) for line in groups]
        )
    return (gradient,)


_gather_piece.defvjp(_gather_forward, _scatter_gradient)


@functools.cache
def fsdp_lines(mesh: Mesh) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """For each dimension of the slice the lines of chips along it, as indices of `fsdp`; other devices are one line.

    Their order is that of coordinates, the last one changing fastest (`make_mesh`); of any other, all are one line.
    """
    devices = mesh.devices[0, :, 0]
    everyone = np.arange(len(devices))
    sides = (len(devices),)
    if devices[0].platform == "tpu":
        coords = np.array([device.coords for device in devices])
        coords = coords - coords.min(axis=0)
        extents = tuple(coords.max(axis=0) + 1)
        if math.prod(extents) == len(devices) and (np.ravel_multi_index(coords.T, extents) == everyone).all():
            sides = tuple(int(n) for n in extents if n > 1)
    numbers = everyone.reshape(sides)
    lines = (np.moveaxis(numbers, k, -1).reshape(-1, n) for k, n in enumerate(sides))
    return tuple(tuple(map(tuple, dimension.tolist())) for dimension in lines)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Piece:
    """What a device has of a parameter that is cut along `fsdp`, within `on_own_rows`. `gather` makes it whole, in
    `dtype`; its gradient is reduced in the piece's own."""

    piece: jax.Array
    axis: int = dataclasses.field(metadata=dict(static=True))  # counted from the last, which stacked layers leave be
    dtype: jax.typing.DTypeLike = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.piece.shape

    def astype(self, dtype) -> "Piece":
        return dataclasses.replace(self, dtype=dtype)


def on_own_rows(f: Callable, params: Any, specs: Any, rows: Any, *others: Any, mesh: Mesh) -> Any:
    """`f(params, rows, *others)` on each device's own rows: a scalar, summed over all of them.

    Left to itself the compiler reduces gradients as whole arrays, those of the head once for each piece of the
    sequence. Here nothing is moved along `data` and `fsdp` but what `gather` gathers, and, backward, its gradients,
    each of which is scattered once.

    Args:
      specs: how `params` are cut; a tree like it.
      rows: arrays whose first dimension is rows, a multiple of `row_multiple`.
      others: whole everywhere; arrays or None.
    """

    def local(params, rows, *others):
        def piece(x, spec):
            axes = [i for i, axis in enumerate(spec) if axis == FSDP]
            return Piece(x, axes[0] - x.ndim, x.dtype) if axes and mesh.shape[FSDP] > 1 else x

        return f(jax.tree.map(piece, params, specs), rows, *others)[None]

    if row_multiple(mesh) == 1:
        return f(params, rows, *others)
    cuts = jax.tree.map(lambda _, spec: _without(spec, {TENSOR}), params, specs)
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        axis_names=set(BATCH),
        in_specs=(cuts, P(BATCH), *(P() for _ in others)),
        out_specs=P(BATCH),
        check_vma=False,
    )
    return jax.numpy.sum(mapped(params, rows, *others))


def gradient_options(mesh: Mesh) -> dict[str, str]:
    """`compiler_options` for a program that differentiates `on_own_rows`; none but on CPUs.

    JAX puts a sharding constraint into the reduction of a `psum` over some of a mesh's axes. The pass of XLA's CPU
    compiler that widens bfloat16 reductions to float32 aborts the process when it finds one there. Without that pass
    they are reduced in bfloat16, as on TPUs.
    """
    on_cpus = mesh.devices.flat[0].platform == "cpu"
    return {"xla_disable_hlo_passes": "all-reduce-promotion"} if on_cpus else {}


def row_index() -> jax.Array | int:
    """Which of the shards of rows this is, within `on_own_rows`; 0 elsewhere."""
    return jax.lax.axis_index(BATCH) if FSDP in manual_axes() else 0


def _without(spec: P, axes: set[str] | frozenset[str]) -> P:
    return P(*(None if axis in axes else axis for axis in spec))


def manual_axes() -> tuple[str, ...]:
    """Mesh axes that the program being traced deals with by itself (`on_own_rows`)."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def path_of(keys) -> str:
    """`decoder/layers/0/...` for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(k, "key", k)) for k in keys)


# ---------------------------------------------------------------- activations


def constrain(x: jax.Array, mesh: Mesh | None, *axes) -> jax.Array:
    """Keep an activation cut as named, one entry for each dimension (`BATCH`, `TENSOR` or None).

    Axes that do not divide their dimension are left out; without a mesh nothing happens.
    """
    if mesh is None or mesh.size == 1:
        return x
    if FSDP in manual_axes():  # rows are the device's own
        if mesh.shape[TENSOR] == 1:
            return x
        mesh, axes = jax.sharding.get_abstract_mesh(), [axis if axis == TENSOR else None for axis in axes]

    def fits(axis, n):
        size = math.prod(mesh.shape[a] for a in (axis if isinstance(axis, tuple) else (axis,)))
        return n % size == 0

    spec = P(*(axis if axis and fits(axis, n) else None for axis, n in zip(axes, x.shape, strict=True)))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays whose first dimension is rows."""
    return NamedSharding(mesh, P(BATCH))


def row_multiple(mesh: Mesh) -> int:
    """Rows of a batch must be a multiple of this."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


def put_rows(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """A host array [B, ...], alike on all processes, cut by rows over the mesh."""
    return jax.make_array_from_callback(array.shape, batch_sharding(mesh), lambda index: array[index])
