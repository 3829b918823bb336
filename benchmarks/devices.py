"""What other benchmarks are held against, measured in the same process: how fast this device multiplies matrices and
reads its memory. And models of random weights, with a released model's dimensions or of a size for CPUs.
"""

import dataclasses
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from llava_jax import config as c
from llava_jax import llava
from llava_jax.sharding import param_shardings

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
    """Random weights, made where they are to lie, in the type that each path's is to have."""
    shapes = llava.param_shapes(model)
    places = flatten_dict(param_shardings(shapes, model, mesh), sep="/")
    made = {}
    for i, (path, x) in enumerate(flatten_dict(shapes, sep="/").items()):
        # Numbers of one period per tensor: drawing billions takes longer than what is to be measured.
        def fill(i=i, x=x, path=path):
            wave = jnp.sin(jnp.arange(math.prod(x.shape), dtype=jnp.uint32).astype(jnp.float32) * (i + 1.7))
            return (1.0 if x.ndim == 1 else 0.02 * wave.reshape(x.shape)) * jnp.ones(x.shape, dtype_of(path))

        made[path] = jax.jit(fill, out_shardings=places[path])()
    return unflatten_dict(made, sep="/")


def matmul_peak(dtype: str) -> float:
    """FLOP/s of one device in products of large square matrices, the best of a few."""
    on_cpu = jax.default_backend() == "cpu"
    n, products = (2048, 2) if on_cpu else (8192, 16)
    x, w = (jnp.ones((n, n), dtype) / n for _ in range(2))

    @jax.jit
    def multiply(x, w):
        return jax.lax.fori_loop(0, products, lambda _, x: (x @ w).astype(x.dtype), x)

    return products * 2 * n**3 / fastest(lambda: multiply(x, w))


def read_bandwidth(dtype: str) -> float:
    """Bytes/s at which one device reads a matrix that no cache holds, to multiply a vector by it or to add it up."""
    n = 2**14 if jax.default_backend() == "cpu" else 2**15
    w, x = jnp.ones((n, n), dtype), jnp.ones((1, n), dtype)
    size = n * n * w.dtype.itemsize
    ways = (jax.jit(lambda x, w: x @ w), jax.jit(lambda x, w: jnp.sum(w, dtype=jnp.float32)))
    return max(size / fastest(lambda way=way: way(x, w)) for way in ways)


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
    return jax.devices()[0].device_kind


def room() -> int | None:
    """Bytes that a program may use of one device; None where it is not told, as of a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def picture(size: tuple[int, int], seed: int) -> np.ndarray:
    """Noise, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
