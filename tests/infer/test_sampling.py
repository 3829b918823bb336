"""Tokens are drawn as their probabilities, temperature, top-k and top-p say."""

import jax.numpy as jnp
import numpy as np
import pytest

from infer.next_token import choose, row_keys
from infer.sampling import Sampling
from llava_jax.console import InputError


def draw(n: int, logits, **settings):
    sampling = Sampling(temperature=1.0, **settings)
    return np.asarray(
        choose(jnp.tile(jnp.array(logits, jnp.float32), (n, 1)), row_keys(0, range(n)), sampling.params())
    )


def test_draws_follow_the_distribution():
    p = np.array([0.5, 0.05, 0.3, 0.15])
    shares = np.bincount(draw(20000, np.log(p)), minlength=4) / 20000
    np.testing.assert_allclose(shares, p, atol=0.015)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (dict(top_k=2), [0, 2]),
        (dict(top_k=1), [0]),
        (dict(top_p=0.5), [0]),  # the first has half already
        (dict(top_p=0.51), [0, 2]),
        (dict(top_p=0.9), [0, 2, 3]),
        (dict(top_k=3, top_p=0.6), [0, 2]),  # of the three, the first two have 0.84
        (dict(top_p=1e-9), [0]),
    ],
)
def test_top_k_and_top_p(settings, kept):
    p = np.array([0.5, 0.05, 0.3, 0.15])
    draws = draw(5000, np.log(p), **settings)
    assert sorted(set(draws.tolist())) == kept
    shares = np.bincount(draws, minlength=4)[kept] / 5000
    np.testing.assert_allclose(shares, p[kept] / p[kept].sum(), atol=0.03)


def test_temperature():
    p = np.array([0.5, 0.05, 0.3, 0.15])
    sampling = Sampling(temperature=0.5)
    draws = choose(jnp.tile(jnp.log(jnp.array(p)), (20000, 1)), row_keys(3, range(20000)), sampling.params())
    np.testing.assert_allclose(np.bincount(draws) / 20000, p**2 / (p**2).sum(), atol=0.015)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(temperature=-1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_p=0), "top-p"),
        (dict(top_p=1.1), "top-p"),
        (dict(top_k=-1), "top-k"),
        (dict(seed=-1), "seed"),
        (dict(max_new_tokens=0), "max-new-tokens"),
    ],
)
def test_settings_out_of_range(settings, says):
    with pytest.raises(InputError, match=says):
        Sampling(**settings)
