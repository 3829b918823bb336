"""Choose the next token: greedily, or by sampling with temperature, top-k and top-p."""

import jax
import jax.numpy as jnp

from llava_jax.sharding.mesh import BATCH, TENSOR
from llava_jax.sharding.partition import UNSHARDED, Partition


def choose(
    logits_BV: jax.Array, keys_B: jax.Array, sampling_params: dict[str, jax.Array], partition: Partition = UNSHARDED
) -> jax.Array:
    """The next token of each row, int32 [B].

    Args:
      logits_BV: float32. With the vocabulary sharded along `tensor`, greedy choice needs no gather, and sampling
        gathers the logits once (without the constraint the compiler sorts over the network).
      keys_B: a random key for each row.
      sampling_params: `Sampling.params()`.
    """
    logits_BV = partition.constrain(logits_BV, BATCH, TENSOR)

    def draw():
        return jax.vmap(_draw, in_axes=(0, 0, None))(
            partition.constrain(logits_BV, BATCH, None), keys_B, sampling_params
        )

    greedy = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.lax.cond(sampling_params["temperature"] > 0, draw, lambda: greedy)


def _draw(logits_V: jax.Array, key: jax.Array, sampling_params: dict[str, jax.Array]) -> jax.Array:
    """Sample with temperature, then top-k, then top-p, in the order of transformers' logits processors."""
    sorted_V, order_V = jax.lax.top_k(logits_V / sampling_params["temperature"], logits_V.shape[-1])
    rank_V = jnp.arange(logits_V.shape[-1])
    top_k = jnp.where(sampling_params["top_k"] > 0, sampling_params["top_k"], logits_V.shape[-1])
    sorted_V = jnp.where(rank_V < top_k, sorted_V, -jnp.inf)
    probabilities_V = jax.nn.softmax(sorted_V)
    before_V = jnp.cumsum(probabilities_V) - probabilities_V
    keep_V = (before_V < sampling_params["top_p"]) | (rank_V == 0)
    rank = jax.random.categorical(key, jnp.where(keep_V, sorted_V, -jnp.inf))
    return order_V[rank].astype(jnp.int32)


def row_keys(seed: int, rows) -> jax.Array:
    """A random key per row, from the seed and the row's number."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.asarray(rows, jnp.uint32))
