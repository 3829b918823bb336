"""Reference figures for benchmarks, measured in the same process: the device's matmul throughput and memory bandwidth.
Also models with random weights, in the dimensions of a released model or small enough for CPUs.
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
    """The configuration of a released model, or v1.6 with a decoder of 209M parameters (`SMALL`).

    The vocabulary of a released model is padded as in transformers' conversions, which add tokens.
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
    """Random weights with standard deviation 0.02, created in their shards, with the dtype of each path."""
    shapes = llava.param_shapes(model)
    shardings = flatten_dict(Partition(model, mesh).shardings(shapes), sep="/")
    return unflatten_dict(
        {
            path: _random(jax.random.key(i), x.shape, dtype_of(path), shardings[path])
            for i, (path, x) in enumerate(flatten_dict(shapes, sep="/").items())
        },
        sep="/",
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _random(key: jax.Array, shape: tuple[int, ...], dtype: str, sharding: jax.sharding.Sharding) -> jax.Array:
    bound = 0.02 * 3**0.5
    x = jax.random.uniform(key, shape, dtype, -bound, bound) if len(shape) > 1 else jnp.ones(shape, dtype)
    return jax.lax.with_sharding_constraint(x, sharding)


def matmul_peak(dtype: str) -> float:
    """FLOP/s of one device in matmuls of large square random matrices, the best of a few runs."""
    n, pairs = (2048, 1) if jax.default_backend() == "cpu" else (8192, 8)
    x, w = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    w = w / n**0.5

    @jax.jit
    def multiply(x, w):  # in pairs, since a matmul cannot overwrite its input
        return jax.lax.fori_loop(0, pairs, lambda _, x: (x @ w) @ w, x)

    return pairs * 4 * n**3 / fastest(lambda: multiply(x, w))


def read_bandwidth(dtype: str) -> float:
    """Bytes/s at which one device reads a matrix larger than its caches, for a matrix-vector product or a sum."""
    n, times = (2**14, 1) if jax.default_backend() == "cpu" else (2**15, 16)
    w, x = jnp.ones((n, n), dtype), jnp.ones((1, n), dtype)
    size = times * n * n * w.dtype.itemsize
    ways = (jax.jit(lambda x, w: x @ w), jax.jit(lambda x, w: jnp.sum(w, dtype=jnp.float32)))
    return max(size / fastest(lambda way=way: [way(x, w) for _ in range(times)]) for way in ways)


def fastest(run: Callable) -> float:
    """Seconds of the fastest of a few runs, after one to compile."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(TRIES):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def device_kind() -> str:
    return jax.local_devices()[0].device_kind


def memory_limit() -> int | None:
    """Bytes of one device that a program may use; None if unknown, as on CPUs."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def noise_image(size: tuple[int, int], seed: int) -> np.ndarray:
    """An image of noise, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
