"""Building blocks of towers and decoders: linear layers, norms, activations, and applying a list of layers."""

from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_policies

from llava_jax.sharding.partition import GATHERED

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


SAVED_LORA, SAVED_ATTENTION = "lora", "attention"  # names of low-rank activations; of attention's inputs and outputs


def _all_but_weights(primitive, *_, **parameters) -> bool:
    """Everything but gathered weights, of which each device keeps its shard."""
    return primitive.name != "all_gather" and parameters.get("name") != GATHERED


# What a layer saves for the backward pass, which recomputes the rest.
REMAT = {
    "full": checkpoint_policies.save_only_these_names(SAVED_LORA),
    "minimal": checkpoint_policies.save_only_these_names(SAVED_LORA, SAVED_ATTENTION),
    "dots": checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": _all_but_weights,
}


def Dense(features: int, *, bias: bool = False, name: str | None = None) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, kernel_init=nn.initializers.normal(0.02), name=name)


class RMSNorm(nn.Module):
    """Root mean square layer norm (Zhang and Sennrich 2019), computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm (Ba et al. 2016), computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale + bias).astype(x.dtype)


def init_module(module: nn.Module, keys: Iterator[jax.Array], *args) -> dict:
    """A module's random parameters, from the next key."""
    return module.init(next(keys), *args).get("params", {})


def init_layers(number: int, module: nn.Module, keys: Iterator[jax.Array], *args) -> dict:
    """Random parameters of `number` identical layers, one key each: `{"0": ..., "1": ...}`. Traces the module once."""
    init = jax.jit(lambda key: module.init(key, *args)["params"])
    return {str(i): init(next(keys)) for i in range(number)}


def run_layers(block, x: jax.Array, layers: dict, span: range, remat: str = "none") -> jax.Array:
    """Apply `x = block(x, layer)` for the layers numbered `span`.

    Args:
      layers: parameters, one entry for each layer (`"0"`, `"1"`, ...), or, in training, stacked along a leading axis.
        Stacked layers are scanned, so that the size of the program does not depend on their number.
      remat: of stacked layers: a key of `REMAT`.
    """
    if "0" in layers or not span:
        for i in span:
            x = block(x, layers[str(i)])
        return x
    block = jax.checkpoint(block, policy=REMAT[remat], prevent_cse=False)
    if len(span) < jax.tree.leaves(layers)[0].shape[0]:
        layers = jax.tree.map(lambda w: w[span.start : span.stop], layers)
    return jax.lax.scan(lambda x, layer: (block(x, layer), None), x, layers)[0]
