"""The device mesh: the names of its axes, parsing, and the order of devices.

data    rows of the batch; every replica holds all parameters
fsdp    rows of the batch too; parameters are sharded along it and gathered, layer by layer, where they are used
tensor  heads and feed-forward width of each layer of the decoder, and the vocabulary of the head

Tiles are sharded along all three, and the weights of the vision tower and the projector along `fsdp` alone: a tower is
small, and sharded by heads it would send two all-reduces per layer.
"""

import functools
import math
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, shorten

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
BATCH = (DATA, FSDP)  # a dimension of rows is sharded along both
TILES = AXES  # a dimension of tiles is sharded along all


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
    if devices[0].platform == "tpu" and (ordered := _by_coordinates(devices, sizes)):
        return Mesh(np.array(ordered).reshape(tuple(sizes.values())), AXES, axis_types=kinds)
    return jax.make_mesh(tuple(sizes.values()), AXES, kinds, devices=devices)


def _by_coordinates(devices: list, sizes: dict[str, int]) -> list | None:
    """TPUs sorted by their coordinates, as `fsdp_lines` needs them: one slice along `fsdp`, or several along `data`,
    which is the slower network. None for any other mesh."""

    def place(device):
        return getattr(device, "slice_index", 0), *device.coords

    slices = {place(device)[0] for device in devices}
    if len(slices) > 1 and sizes[DATA] % len(slices):
        raise InputError(
            f"with {len(slices)} slices `data` must be a multiple of that: it is the only axis that may span slices"
        )
    one_core_a_chip = len({place(device) for device in devices}) == len(devices)
    whole_slices_along_fsdp = one_core_a_chip and sizes[FSDP] * len(slices) == len(devices)
    return sorted(devices, key=place) if len(slices) > 1 or whole_slices_along_fsdp else None


def inference_mesh(config: LlavaConfig, devices: list | None = None) -> Mesh:
    """The mesh for generation when none is named: as much `tensor` as whole key/value heads allow, rest `fsdp`."""
    devices = jax.devices() if devices is None else devices
    tensor = math.gcd(len(devices), config.text.kv_heads)
    return make_mesh({TENSOR: tensor, FSDP: len(devices) // tensor}, devices)


@functools.cache
def fsdp_lines(mesh: Mesh) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """For each dimension of a TPU slice the lines of chips along it, as indices of `fsdp`; other devices are one line.

    This needs devices sorted by their coordinates, the last one changing fastest (`make_mesh`); in any other order they
    are one line.
    """
    devices = mesh.devices[0, :, 0]
    everyone = np.arange(len(devices))
    sides: tuple[int, ...] = (len(devices),)
    if devices[0].platform == "tpu":
        coords = np.array([device.coords for device in devices])
        coords = coords - coords.min(axis=0)
        extents = tuple(coords.max(axis=0) + 1)
        if math.prod(extents) == len(devices) and (np.ravel_multi_index(coords.T, extents) == everyone).all():
            sides = tuple(int(n) for n in extents if n > 1)
    numbers = everyone.reshape(sides)
    lines = (np.moveaxis(numbers, k, -1).reshape(-1, n) for k, n in enumerate(sides))
    return tuple(tuple(map(tuple, dimension.tolist())) for dimension in lines)


def row_multiple(mesh: Mesh) -> int:
    """The number of shards that a dimension of rows has: the rows of a batch must be a multiple of it."""
    return mesh.shape[DATA] * mesh.shape[FSDP]
