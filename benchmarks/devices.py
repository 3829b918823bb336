"""What other benchmarks are held against, measured in the same process: how fast this device multiplies matrices and
reads its memory. And models of random weights, with a released model's dimensions or of a size for CPUs.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from llava_jax import config as c
from llava_jax.models import llava
from llava_jax.sharding.partition import Partition

SMALL = "513M"
TRIES = 5


def model_config(name: str) -> c.LlavaConfig:
    """A released model's dimensions, or v1.6 with a decoder of 209M parameters (`SMALL`).

    A released model's vocabulary has room for the marks of transformers' dialect.
    """
    if name != SMALL:
        base = c.preset(name)
        return base.replace(text=dataclasses.replace(base.text, vocab_size=-(-base.text.vocab_size // 64) * 64 + 64))
    text = c.TextConfig(
        vocab_size=32064, width=1024, ffn_width=2816, layers=12, heads=16, kv_heads=8, head_width=64,
        max_positions=8192, rope_theta=1e6, family="mistral",
    )  # fmt: skip
    return c.preset("v1.6-mistral-7b").replace(text=text)


def random_params(model: c.LlavaConfig, mesh: Mesh, dtype_of: Callable[[str], str]) -> llava.Params:
    """Random weights of deviation 0.02, made where they are to lie, in the type that each path's is to have."""
    shapes = llava.param_shapes(model)
    places = flatten_dict(Partition(model, mesh).shardings(shapes), sep="/")
    return unflatten_dict(
        {
            path: _random(jax.random.key(i), x.shape, dtype_of(path), places[path])
            for i, (path, x) in enumerate(flatten_dict(shapes, sep="/").items())
        },
        sep="/",
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _random(key: jax.Array, shape: tuple[int, ...], dtype: str, place: jax.sharding.Sharding) -> jax.Array:
    most = 0.02 * 3**0.5
    x = jax.random.uniform(key, shape, dtype, -most, most) if len(shape) > 1 else jnp.ones(shape, dtype)
    return jax.lax.with_sharding_constraint(x, place)


def matmul_peak(dtype: str) -> float:
    """FLOP/s of one device in products of large square matrices of random numbers, the best of a few."""
    n, pairs = (2048, 1) if jax.default_backend() == "cpu" else (8192, 8)
    x, w = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    w = w / n**0.5

    @jax.jit
    def multiply(x, w):  # in pairs: a product cannot be written over what it is made of
        return jax.lax.fori_loop(0, pairs, lambda _, x: (x @ w) @ w, x)

    return pairs * 4 * n**3 / fastest(lambda: multiply(x, w))


def read_bandwidth(dtype: str) -> float:
    """Bytes/s at which one device reads a matrix that no cache holds, to multiply a vector by it or to add it up."""
    n, times = (2**14, 1) if jax.default_backend() == "cpu" else (2**15, 16)
    w, x = jnp.ones((n, n), dtype), jnp.ones((1, n), dtype)
    size = times * n * n * w.dtype.itemsize
    ways = (jax.jit(lambda x, w: x @ w), jax.jit(lambda x, w: jnp.sum(w, dtype=jnp.float32)))
    return max(size / fastest(lambda way=way: [way(x, w) for _ in range(times)]) for way in ways)


def fastest(run: Callable) -> float:
    """Seconds of the fastest of a few runs, after one that compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(TRIES):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def device_kind() -> str:
    return jax.local_devices()[0].device_kind


def room() -> int | None:
    """Bytes that a program may use of one device; None where it is not told, as of a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def picture(size: tuple[int, int], seed: int) -> np.ndarray:
    """Noise, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
