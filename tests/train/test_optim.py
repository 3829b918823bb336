"""The optimizer: its schedules, a rate for each part, weight decay and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import golden_json
from train import optim
from training import PLAIN

CURVES = golden_json("training.json")


@pytest.mark.parametrize("key", CURVES["cosine_schedules"])
def test_cosine_schedule_of_the_reference(key):
    total, ratio, peak = (float(part.split("=")[1]) for part in key.split(","))
    share = optim.schedule(PLAIN.replace(schedule="cosine", warmup_ratio=ratio), int(total))
    for count, rate in CURVES["cosine_schedules"][key].items():
        assert float(peak * share(jnp.int32(count))) == pytest.approx(rate, rel=2e-6)


def test_constant_schedule_warms_up_and_stays():
    share = optim.schedule(PLAIN.replace(warmup_ratio=0.25), 8)
    assert [float(share(i)) for i in (0, 1, 2, 7)] == [0.0, 0.5, 1.0, 1.0]


def test_each_part_has_its_rate_and_biases_and_norms_do_not_decay():
    config = PLAIN.replace(
        learning_rate=1.0, projector_learning_rate=2.0, vision_learning_rate=3.0, weight_decay=0.1, max_grad_norm=1.0
    )
    layer = {"q": {"kernel": 1.0, "bias": 1.0, "lora_a": 1.0}, "norm": {"scale": 1.0}}
    params = {"decoder": {"layers": layer}, "newline": 1.0, "projector": layer, "vision": {"layers": layer}}
    params = jax.tree.map(jnp.array, params)
    optimizer = optim.make_optimizer(config, 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)

    def decayed(rate):
        return {"q": {"kernel": -0.1 * rate, "bias": 0.0, "lora_a": -0.1 * rate}, "norm": {"scale": 0.0}}

    want = {
        "decoder": {"layers": decayed(1)}, "newline": -0.1, "projector": decayed(2), "vision": {"layers": decayed(3)}
    }  # fmt: skip
    jax.tree.map(np.testing.assert_allclose, updates, want)

    # Clipped together, to norm 1; Adam's first update would not show it, its moment does.
    gradients = jax.tree.map(lambda _: jnp.float32(30.0), params)
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    moment = next(part.mu for part in state if hasattr(part, "mu"))
    assert float(optax.tree.norm(moment)) == pytest.approx(0.1, rel=1e-5)
