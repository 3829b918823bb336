"""Choose the next token of each row, greedily or by sampling. Rows belong to different requests: all controls differ.

The order is that of transformers' logits processors (`GenerationMixin._get_logits_processor`): logit bias, repetition
penalty, minimum length, temperature, top-k, top-p, min-p. Presence and frequency penalties, which transformers lacks,
follow the repetition penalty, as in vLLM.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infer.sampling import MAX_LOGPROBS, Sampling
from llava_jax.sharding.mesh import BATCH, TENSOR
from llava_jax.sharding.partition import UNSHARDED, Partition

FEW = 1024  # tokens that are sorted first


class Controls(NamedTuple):
    """The options of `Sampling` that `choose` takes, one value per row: [B], float32 or int32."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    min_new_tokens: jax.Array

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> "Controls":
        """The controls of a batch: NumPy arrays, to be put on the devices."""
        params = [row.params() for row in rows]
        columns: Any = (np.stack([param[name] for param in params]) for name in cls._fields)
        return cls(*columns)

    def of_running(self, running_B: jax.Array) -> "Controls":
        """The same, but greedy, which costs least, for rows whose token nobody needs."""
        return self._replace(temperature=jnp.where(running_B, self.temperature, 0))


class History(NamedTuple):
    """What the controls of each row refer to."""

    in_prompt_BV: jax.Array  # bool: the token is in the prompt
    counts_BV: jax.Array  # int32: how often it is in the answer so far
    bias_BV: jax.Array  # float32: `Sampling.bias_row`


class Logprobs(NamedTuple):
    """Log probabilities, float32, of the chosen tokens and of the T = `MAX_LOGPROBS` most likely ones."""

    token_B: jax.Array
    top_ids_BT: jax.Array  # int32, most likely first
    top_BT: jax.Array


def choose(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    controls: Controls,
    history: History,
    generated_B: jax.Array,
    eos_ids: tuple[int, ...] = (),
    partition: Partition = UNSHARDED,
) -> jax.Array:
    """The next token of each row, int32 [B]. It depends on the values of its row alone, not on the row's position.

    A batch of greedy rows pays for an argmax only, and one whose rows all leave the history unused does not read it,
    except the bias.

    Args:
      logits_BV: float32. With the vocabulary sharded along `tensor`, greedy choice needs no gather, and sampling
        gathers the logits once (without the constraint the compiler sorts over the network).
      keys_B: a random key for each row and step.
      generated_B: int32, the number of tokens of each answer so far.
      eos_ids: the tokens that end an answer, which `min_new_tokens` excludes until then.
    """
    logits_BV = partition.constrain(logits_BV, BATCH, TENSOR)
    history = History(*(partition.constrain(x_BV, BATCH, TENSOR) for x_BV in history))
    is_short_B = generated_B < controls.min_new_tokens
    uses_history_B = (
        (controls.repetition_penalty != 1)
        | (controls.presence_penalty != 0)
        | (controls.frequency_penalty != 0)
        | jnp.any(history.bias_BV != 0, axis=-1)
    )
    logits_BV = jax.lax.cond(
        jnp.any(uses_history_B | is_short_B),
        lambda: penalize(logits_BV, controls, history, is_short_B, eos_ids),
        lambda: logits_BV,
    )
    logits_BV = partition.constrain(logits_BV, BATCH, TENSOR)
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    samples_B = controls.temperature > 0
    drawn_B = jax.lax.cond(
        jnp.any(samples_B),
        lambda: draw(partition.constrain(logits_BV, BATCH, None), keys_B, controls),
        lambda: greedy_B,
    )
    return jnp.where(samples_B, drawn_B, greedy_B)


def draw(logits_BV: jax.Array, keys_B: jax.Array, controls: Controls) -> jax.Array:
    """A token of each row, drawn from its distribution: the largest sum of a logit and its token's Gumbel noise.

    Which tokens are sorted depends on all rows, but not the result. Rows without top-k, top-p and min-p need no order,
    and of most others the first `FEW` tokens are enough: sorting 16 x 32,000 logits takes a CPU 16 times as long.
    """
    V = logits_BV.shape[-1]
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (V,)))(keys_B)
    samples_B = controls.temperature > 0
    is_filtered_B = samples_B & ((controls.top_k > 0) | (controls.top_p < 1) | (controls.min_p > 0))

    def among(n: int) -> tuple[jax.Array, jax.Array]:
        sorted_BN, order_BN, is_complete_B = jax.vmap(functools.partial(sort_and_filter, n=n))(logits_BV, controls)
        best_B = jnp.argmax(sorted_BN + jnp.take_along_axis(noise_BV, order_BN, axis=-1), axis=-1)
        return jnp.take_along_axis(order_BN, best_B[:, None], axis=-1)[:, 0].astype(jnp.int32), is_complete_B

    temperature_B = jnp.where(samples_B, controls.temperature, 1)
    drawn_B = jnp.argmax(logits_BV / temperature_B[:, None] + noise_BV, axis=-1).astype(jnp.int32)
    few_B, is_complete_B = jax.lax.cond(
        jnp.any(is_filtered_B), lambda: among(min(FEW, V)), lambda: (drawn_B, jnp.ones_like(is_filtered_B))
    )
    filtered_B = jax.lax.cond(
        jnp.any(is_filtered_B & ~is_complete_B), lambda: jnp.where(is_complete_B, few_B, among(V)[0]), lambda: few_B
    )
    return jnp.where(is_filtered_B, filtered_B, drawn_B)


def penalize(
    logits_BV: jax.Array, controls: Controls, history: History, is_short_B: jax.Array, eos_ids: tuple[int, ...]
) -> jax.Array:
    """Logits with bias and penalties, and without end tokens where the answer is too short.

    Rows that use none of these are unchanged.
    """
    column = Controls(*(x_B[:, None] for x_B in controls))
    logits_BV += history.bias_BV
    penalized_BV = jnp.where(
        logits_BV < 0, logits_BV * column.repetition_penalty, logits_BV / column.repetition_penalty
    )
    in_answer_BV = history.counts_BV > 0
    logits_BV = jnp.where(history.in_prompt_BV | in_answer_BV, penalized_BV, logits_BV)
    logits_BV -= column.presence_penalty * in_answer_BV + column.frequency_penalty * history.counts_BV
    is_end_V = jnp.isin(jnp.arange(logits_BV.shape[-1]), jnp.array(eos_ids, jnp.int32))
    return jnp.where(is_short_B[:, None] & is_end_V, -jnp.inf, logits_BV)


def sort_and_filter(
    logits_V: jax.Array, controls: Controls, n: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `n` largest logits of a row (None for all), divided by the temperature and in descending order, with -inf for
    what top-k, top-p and min-p exclude; the token ids in that order; and whether no other token is to be kept.

    Greedy rows, whose result is not used, have temperature 1.
    """
    V = logits_V.shape[-1]
    n = V if n is None else n
    scaled_V = logits_V / jnp.where(controls.temperature > 0, controls.temperature, 1)
    sorted_N, order_N = jax.lax.top_k(scaled_V, n)
    rank_N = jnp.arange(n)
    sorted_N = jnp.where((rank_N < controls.top_k) | (controls.top_k == 0), sorted_N, -jnp.inf)
    by_rank = (controls.top_k > 0) & (controls.top_k <= n)
    total = jnp.where(by_rank, jax.nn.logsumexp(sorted_N), jax.nn.logsumexp(scaled_V))
    probabilities_N = jnp.exp(sorted_N - total)
    until_N = jnp.cumsum(probabilities_N)
    keep_N = (until_N - probabilities_N < controls.top_p) | (controls.top_p >= 1)  # rounded sums may exceed 1
    distance_N = sorted_N - sorted_N[0]  # from the most likely token
    keep_N &= distance_N >= jnp.log(controls.min_p)
    by_probability = (controls.top_p < 1) & (until_N[-1] >= controls.top_p)
    by_distance = distance_N[-1] < jnp.log(controls.min_p)
    is_complete = by_rank | by_probability | by_distance | (n == V)
    return jnp.where(keep_N | (rank_N == 0), sorted_N, -jnp.inf), order_N, is_complete


def count_tokens(counts_BV: jax.Array, tokens_B: jax.Array, live_B: jax.Array) -> jax.Array:
    """`History.counts_BV` after a step that chose `tokens_B` for the rows `live_B`.

    A comparison and no scatter: each device updates its shard of the vocabulary.
    """
    is_token_BV = jnp.arange(counts_BV.shape[-1]) == tokens_B[:, None]
    return counts_BV + (is_token_BV & live_B[:, None])


def log_probabilities(logits_BV: jax.Array, tokens_B: jax.Array, partition: Partition = UNSHARDED) -> Logprobs:
    """Log probabilities of the model's own distribution, before temperature, penalties and bias, as vLLM's default.

    Gathers logits that are sharded along `tensor`, as sampling does.
    """
    logprobs_BV = jax.nn.log_softmax(partition.constrain(logits_BV.astype(jnp.float32), BATCH, None))
    token_B = jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=-1)[:, 0]
    top_BT, top_ids_BT = jax.lax.top_k(logprobs_BV, MAX_LOGPROBS)
    return Logprobs(token_B, top_ids_BT.astype(jnp.int32), top_BT)


def row_keys(seed: int, rows) -> jax.Array:
    """A random key per row, from the seed and the row's number."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.asarray(rows, jnp.uint32))
