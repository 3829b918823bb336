"""Tokens are chosen as the controls of their row say, whatever the other rows of the batch."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from infer.next_token import Controls, History, choose, row_keys
from infer.sampling import Sampling

P = np.array([0.5, 0.05, 0.3, 0.15])


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
    return np.asarray(choose(logits_BV, keys, Controls.of(samplings), past, jnp.zeros(n, jnp.int32)))


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
