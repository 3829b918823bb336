"""Tokens are chosen as the controls of their row say, whatever the other rows of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from infer.next_token import (
    MAX_LOGPROBS,
    Controls,
    History,
    choose,
    count_tokens,
    log_probabilities,
    penalize,
    row_keys,
    sort_and_filter,
)
from infer.sampling import Sampling
from llava_jax import config as c
from llava_jax.sharding.mesh import BATCH, TENSOR, make_mesh, parse_mesh
from llava_jax.sharding.partition import Partition

P = np.array([0.5, 0.05, 0.3, 0.15])
ALONE = Partition()
jitted = jax.jit(choose, static_argnums=(5, 6))


def history(samplings, vocab_size, prompts=(), answers=()) -> History:
    rows = len(samplings)
    in_prompt_BV, counts_BV = np.zeros((rows, vocab_size), bool), np.zeros((rows, vocab_size), np.int32)
    for b, prompt in enumerate(prompts):
        in_prompt_BV[b, list(prompt)] = True
    for b, answer in enumerate(answers):
        np.add.at(counts_BV[b], list(answer), 1)
    return History(in_prompt_BV, counts_BV, np.stack([sampling.bias_row(vocab_size) for sampling in samplings]))


def draw(n: int, logits, **settings):
    """`n` rows with the same logits and settings, each with its own key."""
    samplings = [Sampling(**{"temperature": 1.0} | settings)] * n
    logits_BV = jnp.tile(jnp.array(logits, jnp.float32), (n, 1))
    keys, past = row_keys(0, range(n)), history(samplings[:1], len(logits))
    past = History(*(np.repeat(x, n, axis=0) for x in past))
    return np.asarray(jitted(logits_BV, keys, Controls.of(samplings), past, np.zeros(n, np.int32)))


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (dict(), [0, 1, 2, 3]),
        (dict(top_k=2), [0, 2]),
        (dict(top_k=1), [0]),
        (dict(top_k=5), [0, 1, 2, 3]),
        (dict(top_p=0.5), [0]),  # the first has half already
        (dict(top_p=0.51), [0, 2]),
        (dict(top_p=0.9), [0, 2, 3]),
        (dict(top_p=1e-9), [0]),
        (dict(min_p=0.05), [0, 1, 2, 3]),
        (dict(min_p=0.2), [0, 2, 3]),  # at least 0.1
        (dict(min_p=0.59), [0, 2]),
        (dict(min_p=0.61), [0]),
        (dict(min_p=1), [0]),
        (dict(top_k=3, top_p=0.6), [0, 2]),  # of the three, the first two have 0.84
        (dict(top_k=3, top_p=0.9, min_p=0.4), [0, 2]),
        (dict(logit_bias={0: -100, 1: -100}), [2, 3]),
    ],
)
def test_draws_follow_the_distribution(settings, kept):
    draws = np.bincount(draw(20000, np.log(P), **settings), minlength=4)
    assert np.flatnonzero(draws).tolist() == kept
    if len(kept) > 1:
        assert stats.chisquare(draws[kept], P[kept] / P[kept].sum() * 20000).pvalue > 0.001


@pytest.mark.parametrize("temperature", [0.5, 2])
def test_temperature(temperature):
    p = P ** (1 / temperature)
    draws = np.bincount(draw(20000, np.log(P), temperature=temperature))
    assert stats.chisquare(draws, p / p.sum() * 20000).pvalue > 0.001


def test_top_p_of_one_keeps_every_token():
    """Even after one whose probability is 1 in float32."""
    logits_V = jnp.zeros(100).at[3].set(40)
    for top_p, kept in ((1, 100), (0.999999, 1)):
        controls = jax.tree.map(lambda x: x[0], Controls.of([Sampling(temperature=1, top_p=top_p)]))
        sorted_V, order_V, _ = sort_and_filter(logits_V, controls)
        assert (jnp.isfinite(sorted_V).sum(), order_V[0]) == (kept, 3)


# ---------------------------------------------------------------- history

LOGITS, PROMPT, ANSWER = [2, 1, 0.5, -1, -2], (0, 3), (1, 1, 4)
INF = np.inf
PENALIZED = [
    (dict(), [2, 1, 0.5, -1, -2]),
    (dict(repetition_penalty=2), [1, 0.5, 0.5, -2, -4]),
    (dict(repetition_penalty=0.5), [4, 2, 0.5, -0.5, -1]),
    (dict(presence_penalty=0.5), [2, 0.5, 0.5, -1, -2.5]),
    (dict(frequency_penalty=0.5), [2, 0, 0.5, -1, -2.5]),
    (dict(frequency_penalty=-2), [2, 5, 0.5, -1, 0]),
    (dict(logit_bias={2: 3}), [2, 1, 3.5, -1, -2]),
    (dict(logit_bias={0: -3}, repetition_penalty=2), [-2, 0.5, 0.5, -2, -4]),  # the bias comes first
    (dict(repetition_penalty=2, presence_penalty=0.5, frequency_penalty=0.25), [1, -0.5, 0.5, -2, -4.75]),
    (dict(min_new_tokens=3), [2, 1, 0.5, -1, -2]),
    (dict(min_new_tokens=4), [-INF, 1, -INF, -1, -2]),
    (dict(min_new_tokens=4, logit_bias={0: 100}), [-INF, 1, -INF, -1, -2]),
]


def test_penalties_bias_and_minimum_length():
    """Rows that differ in all of them, together and one by one; they apply to greedy choice too."""
    samplings = [Sampling(**settings) for settings, _ in PENALIZED]
    want, B = np.array([logits for _, logits in PENALIZED], np.float32), len(PENALIZED)
    logits_BV, controls = jnp.tile(jnp.array(LOGITS, jnp.float32), (B, 1)), Controls.of(samplings)
    past = history(samplings, 5, [PROMPT] * B, [ANSWER] * B)
    generated, eos_ids = np.full(B, 3, np.int32), (0, 2)
    got = penalize(logits_BV, controls, past, generated < controls.min_new_tokens, eos_ids)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    arguments = logits_BV, row_keys(0, range(B)), controls, past, generated
    np.testing.assert_array_equal(jitted(*arguments, eos_ids), want.argmax(-1))
    alone = [jitted(*jax.tree.map(lambda x, b=b: x[b : b + 1], arguments), eos_ids)[0] for b in range(B)]
    np.testing.assert_array_equal(alone, want.argmax(-1))


def test_counting_tokens():
    counts = jnp.array([[0, 1, 0], [0, 0, 5], [1, 1, 1]])
    counted = count_tokens(counts, jnp.array([1, 2, 0]), jnp.array([True, True, False]))
    assert counted.dtype == counts.dtype
    assert counted.tolist() == [[0, 2, 0], [0, 0, 6], [1, 1, 1]]


# ---------------------------------------------------------------- batches

MIXED = [
    Sampling(),
    Sampling(temperature=1),
    Sampling(temperature=0.7, top_k=40, seed=3),
    Sampling(repetition_penalty=1.3, logit_bias={5: 4.0}),
    Sampling(temperature=1.5, top_p=0.8, presence_penalty=0.5),
    Sampling(temperature=1, min_p=0.1, frequency_penalty=-0.3, min_new_tokens=9),
    Sampling(min_new_tokens=3),
    Sampling(temperature=3, top_k=500, top_p=0.99, min_p=0.01, repetition_penalty=0.9, presence_penalty=-1),
]


def mixed_batch(vocab_size: int):
    """Arguments of `choose` for 8 rows, with a history that changes greedy rows too."""
    random = np.random.default_rng(vocab_size)
    logits_BV = random.standard_normal((8, vocab_size), np.float32)
    prompts, answers = ([logits_BV[b].argsort()[-n:] for b in range(8)] for n in (3, 2))
    keys_B = jnp.stack([row_keys(sampling.seed, [b])[0] for b, sampling in enumerate(MIXED)])
    past = history(MIXED, vocab_size, prompts, answers)
    return jnp.array(logits_BV), keys_B, Controls.of(MIXED), past, np.arange(8, dtype=np.int32)


@pytest.mark.parametrize("order", [[b] for b in range(8)] + [[7, 3, 1], [6, 0, 3], [5, 4, 3, 2, 1, 0, 7, 6]], ids=str)
def test_a_row_does_not_depend_on_the_others(order):
    batch = mixed_batch(1000)
    want = jitted(*batch, (3,))
    got = jitted(*jax.tree.map(lambda x: x[np.array(order)], batch), (3,))
    np.testing.assert_array_equal(got, want[np.array(order)])
    assert len(set(want.tolist())) == 8


@pytest.mark.parametrize("vocab_size", [1000, 1001])
def test_a_mesh_chooses_the_same(vocab_size):
    """Also where nothing divides the vocabulary. Counting tokens sends nothing."""
    partition = Partition(c.tiny(), make_mesh(parse_mesh("data=2,tensor=4")))
    batch, tokens = mixed_batch(vocab_size), jnp.arange(8)

    def step(logits_BV, keys_B, controls, past, generated, partition):
        logits_BV = partition.constrain(logits_BV, BATCH, TENSOR)
        chosen = choose(logits_BV, keys_B, controls, past, generated, (3,), partition)
        return chosen, log_probabilities(logits_BV, tokens, partition)

    want, got = (jax.jit(step, static_argnums=5)(*batch, at) for at in (ALONE, partition))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), got, want)

    def count(counts_BV):
        return count_tokens(partition.constrain(counts_BV, BATCH, TENSOR), tokens, tokens < 4)

    compiled = jax.jit(count).lower(batch[3].counts_BV).compile()
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "scatter", "permute"))


def primitives(jaxpr, inside=False):
    """The primitives of a function, and whether each is in a branch of a conditional."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, inside
        is_jaxpr = lambda x: hasattr(x, "eqns")  # noqa: E731
        for inner in filter(is_jaxpr, jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)):
            yield from primitives(inner, inside or equation.primitive.name == "cond")


def test_only_batches_that_sample_sort():
    found = set(primitives(jax.make_jaxpr(lambda *batch: choose(*batch, (3,)))(*mixed_batch(64)).jaxpr))
    assert {("top_k", True), ("argmax", False)} <= found
    assert not {("top_k", False), ("sort", False), ("cumsum", False), ("exp", False)} & found


# ---------------------------------------------------------------- log probabilities


def test_log_probabilities():
    logits_BV = np.random.default_rng(0).standard_normal((3, 500), np.float32) * np.array([[0.1], [1], [30]], "f4")
    tokens = np.array([7, 499, logits_BV[2].argmin()])
    want = logits_BV - np.log(np.exp(logits_BV.astype(float)).sum(-1, keepdims=True))
    got = log_probabilities(jnp.array(logits_BV), jnp.array(tokens))
    order = np.argsort(-logits_BV, axis=-1)[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(got.top_ids_BT, order)
    np.testing.assert_allclose(got.top_BT, np.take_along_axis(want, order, -1), atol=1e-5)
    np.testing.assert_allclose(got.token_B, want[np.arange(3), tokens], rtol=1e-6, atol=1e-5)
    assert (got.token_B.dtype, got.top_ids_BT.dtype, got.top_BT.shape) == (np.float32, np.int32, (3, 20))
