"""The engine's programs: what they copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import golden_engine
from infer import compiled
from infer.inputs import inputs, rows
from llava_jax.sharding.partition import put_rows

SLOTS, CONTEXT, S, SPAN = 32, 512, 64, 256


@pytest.mark.parametrize("name", ["prefill", "decode", "decode of some", "copy"])
def test_the_cache_is_changed_in_place(name):
    """XLA keeps a copy of a donated array if it does not see that a program reads it before writing to it."""
    engine = golden_engine("v1.6-mistral")
    scheduler = engine.scheduler(SLOTS, CONTEXT)
    params, slots, mesh, static = engine.params, scheduler.slots, engine.mesh, dict(partition=engine.partition)
    none, stopped = (put_rows(np.zeros(n, kind), mesh) for n, kind in ((1, np.int32), (SLOTS, bool)))
    if name == "prefill":
        chunk = inputs(params, engine.partition, {}, S)
        lowered = compiled.prefill.lower(
            params, slots, chunk, rows(engine.partition, {}), span=SPAN, eos_ids=(), **static
        )
    elif name == "copy":
        lowered = compiled.copy.lower(slots, none, none, none, span=SPAN, **static)
    else:
        some = none if name == "decode of some" else None
        lowered = compiled.decode.lower(
            params, slots, stopped, jnp.int32(4), some, span=SPAN, eos_ids=(), **static
        )  # fmt: skip
    memory = lowered.compile().memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves(slots.cache))
    read = held * SPAN // CONTEXT if name == "decode" else 0  # before the loop, once per dispatch
    assert memory.temp_size_in_bytes - read < held / 4


def test_a_dispatch_has_enough_steps_to_make_up_for_what_it_copies():
    engine = golden_engine("v1.6-mistral")
    scheduler = engine.scheduler(SLOTS, CONTEXT, dispatch_seconds=1e-9)  # a step takes longer
    few, many = (compiled.copied(engine.params, scheduler.slots, rows, SPAN) for rows in (1, SLOTS))
    held = sum(x.nbytes for x in jax.tree.leaves(scheduler.slots.cache))
    weights = sum(x.nbytes for x in jax.tree.leaves(engine.params["decoder"]))
    assert many == pytest.approx(2 * held / 2 / (weights + held / 2))
    scheduler.pace._step_seconds = 1.0
    assert scheduler.pace.steps() == 1 <= scheduler.pace.steps(few) < scheduler.pace.steps(many) <= compiled.STEPS
