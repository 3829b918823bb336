"""Logits as the processors of transformers leave them, in the order in which its `generate` applies them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as tf
from scipy import stats

from infer.next_token import Controls, History, choose, penalize, row_keys, sort_and_filter
from infer.sampling import Sampling
from torch_models import make_model

V, EOS = 300, (2, 7)  # the vocabulary; one end token is likely, one is not
SAMPLINGS = [
    dict(),
    dict(temperature=0.6),
    dict(temperature=2.0),
    dict(top_k=1),
    dict(top_k=17),
    dict(top_p=0.05),
    dict(top_p=0.9),
    dict(min_p=0.02),
    dict(min_p=1),
    dict(repetition_penalty=1.4),
    dict(repetition_penalty=0.7),
    dict(logit_bias={4: 3.0, 9: -100.0, 299: 7.5}),
    dict(min_new_tokens=6),
    dict(min_new_tokens=5),
    dict(temperature=1.3, top_k=50, top_p=0.8, min_p=0.05),
    dict(temperature=0.4, top_p=0.97, repetition_penalty=1.2, logit_bias={2: 9.0, 11: 2.0}, min_new_tokens=30),
    dict(
        temperature=1.7, top_k=60, top_p=0.95, min_p=0.03, repetition_penalty=1.1, logit_bias={5: -4.0, 6: 4.0},
        min_new_tokens=6,
    ),
]  # fmt: skip
B, LENGTH = len(SAMPLINGS), 5  # tokens of each answer so far


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llava", "llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def batch():
    """Logits [B, V], prompts [B, 12] and answers [B, 5], random but for frequent repetitions."""
    random = np.random.default_rng(5)
    logits = 3 * random.standard_normal((B, V), np.float32)
    logits[:, 2] = logits.max(-1) + 0.5
    likely = np.argsort(-logits, axis=-1)[:, :30]
    return logits, random.permuted(likely, axis=-1)[:, :12], random.permuted(likely, axis=-1)[:, :LENGTH]


def reference(model, settings: dict, logits, prompt, answer) -> np.ndarray:
    """Scores of a row after the processors that `generate` would use."""
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    if bias := options.pop("logit_bias", {}):
        options["sequence_bias"] = {(token,): value for token, value in bias.items()}
    config = tf.GenerationConfig(do_sample=True, eos_token_id=list(EOS), **options)
    config._eos_token_tensor = torch.tensor(EOS)  # `generate` sets it
    processors = model._get_logits_processor(config, input_ids_seq_length=len(prompt), device="cpu")
    assert len(processors) == sum(options[name] != off for name, off in OFF.items() if name in options)
    ids = torch.tensor(np.concatenate([prompt, answer]))[None]
    return processors(ids, torch.tensor(logits)[None])[0].numpy()


OFF = {
    "temperature": 1, "top_k": 0, "top_p": 1, "min_p": None, "repetition_penalty": 1, "sequence_bias": None,
    "min_new_tokens": 0,
}  # fmt: skip


def ours(samplings: list[Sampling], logits, prompts, answers):
    """The arguments of `choose`."""
    in_prompt_BV, counts_BV = np.zeros((B, V), bool), np.zeros((B, V), np.int32)
    for b in range(B):
        in_prompt_BV[b, prompts[b]] = True
        np.add.at(counts_BV[b], answers[b], 1)
    history = History(in_prompt_BV, counts_BV, np.stack([sampling.bias_row(V) for sampling in samplings]))
    return jnp.array(logits), Controls.of(samplings), history, np.full(B, LENGTH, np.int32)


def sampling_of(settings: dict) -> Sampling:
    return Sampling(**{"temperature": 1.0} | settings)


@pytest.fixture(scope="module")
def scores(model, batch):
    return np.stack([reference(model, settings, *row) for settings, *row in zip(SAMPLINGS, *batch, strict=True)])


def test_scores_are_those_of_transformers(batch, scores):
    """The same tokens are excluded, and the others have the same scores; every row with its own controls."""
    logits_BV, controls, history, generated = ours(list(map(sampling_of, SAMPLINGS)), *batch)
    logits_BV = penalize(logits_BV, controls, history, generated < controls.min_new_tokens, EOS)
    sorted_BV, order_BV, _ = jax.jit(jax.vmap(sort_and_filter))(logits_BV, controls)
    got = np.empty_like(sorted_BV)
    np.put_along_axis(got, np.asarray(order_BV), np.asarray(sorted_BV), axis=-1)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(scores))
    np.testing.assert_allclose(got, scores, rtol=1e-5)
    kept = np.isfinite(scores).sum(-1)
    assert kept.min() == 1 and kept[0] == V and len(set(kept.tolist())) >= 8


def test_draws_follow_the_scores_of_transformers(batch, scores):
    """2,000 draws of each row, against its probabilities; and greedy choice is of the most likely token."""
    samplings, draws = list(map(sampling_of, SAMPLINGS)), 2000
    logits_BV, controls, history, generated = ours(samplings, *batch)
    jitted = jax.jit(jax.vmap(lambda keys: choose(logits_BV, keys, controls, history, generated, EOS)))
    keys = row_keys(1, range(draws * B)).reshape(draws, B)
    drawn = np.asarray(jitted(keys))
    greedy = controls._replace(temperature=np.zeros(B, np.float32))
    np.testing.assert_array_equal(choose(logits_BV, keys[0], greedy, history, generated, EOS), scores.argmax(-1))
    for b in range(B):
        p = np.exp(scores[b].astype(float) - scores[b].max())
        want, seen = p / p.sum() * draws, np.bincount(drawn[:, b], minlength=V)
        assert not seen[want == 0].any()
        rare = (want > 0) & (want < 5)  # too rare for the test one by one
        want, seen = (np.append(x[want >= 5], [x[rare].sum()] * int(rare.any())) for x in (want, seen))
        assert len(want) == 1 or stats.chisquare(seen, want).pvalue > 1e-3, SAMPLINGS[b]
