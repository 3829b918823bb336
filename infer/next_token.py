"""Choose the next token of each row, greedily or by sampling. Rows belong to different requests: all controls differ.

The order is that of transformers' logits processors (`GenerationMixin._get_logits_processor`): logit bias, repetition
penalty, minimum length, temperature, top-k, top-p, min-p. Presence and frequency penalties, which transformers lacks,
follow the repetition penalty, as in vLLM.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infer.sampling import MAX_LOGPROBS, Sampling
from llava_jax.sharding.mesh import BATCH, TENSOR
from llava_jax.sharding.partition import UNSHARDED, Partition


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

    def draw():
        sorted_BV, order_BV = jax.vmap(sort_and_filter)(partition.constrain(logits_BV, BATCH, None), controls)
        rank_B = jax.vmap(jax.random.categorical)(keys_B, sorted_BV)
        return jnp.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0].astype(jnp.int32)

    samples_B = controls.temperature > 0
    drawn_B = jax.lax.cond(jnp.any(samples_B), draw, lambda: greedy_B)
    return jnp.where(samples_B, drawn_B, greedy_B)


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


def sort_and_filter(logits_V: jax.Array, controls: Controls) -> tuple[jax.Array, jax.Array]:
    """Logits of a row divided by the temperature, in descending order, with -inf for what top-k, top-p and min-p
    exclude; and the token ids in that order. Greedy rows, whose result is not used, have temperature 1."""
    temperature = jnp.where(controls.temperature > 0, controls.temperature, 1)
    sorted_V, order_V = jax.lax.top_k(logits_V / temperature, logits_V.shape[-1])
    rank_V = jnp.arange(logits_V.shape[-1])
    top_k = jnp.where(controls.top_k > 0, controls.top_k, logits_V.shape[-1])
    sorted_V = jnp.where(rank_V < top_k, sorted_V, -jnp.inf)
    probabilities_V = jax.nn.softmax(sorted_V)
    before_V = jnp.cumsum(probabilities_V) - probabilities_V
    keep_V = (before_V < controls.top_p) | (controls.top_p >= 1)  # rounding makes sums of probabilities exceed 1
    keep_V &= sorted_V - sorted_V[0] >= jnp.log(controls.min_p)  # relative to the most likely token
    return jnp.where(keep_V | (rank_V == 0), sorted_V, -jnp.inf), order_V


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
