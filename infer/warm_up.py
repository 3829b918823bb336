"""Compile everything that a scheduler may need, so that no request waits for a compilation."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from infer import compiled
from infer.inputs import inputs, rows
from infer.scheduler import Scheduler
from llava_jax.aot.programs import compilations
from llava_jax.data.splice import TEXT
from llava_jax.sharding.partition import put_rows


def warm_up(scheduler: Scheduler, on_program: Callable[[str], object] = lambda name: None) -> int:
    """Compile for all sizes of images and prompts. The scheduler must be idle; what its slots hold stays.

    Args:
      on_program: called with the name of each program that is ready.

    Returns:
      How many functions were compiled.
    """
    before, params, partition = compilations(), scheduler.params, scheduler.partition
    buckets, context, A = scheduler.buckets, scheduler.context, partition.row_shards
    static = dict(partition=partition)
    assert scheduler.idle and partition.mesh is not None
    none = put_rows(np.zeros(A, np.int32), partition.mesh)
    tables = scheduler.features.warm_up()
    on_program("encode")
    for S in buckets.chunk_sizes(context):
        x_ASD, no_rows = inputs(params, partition, {}, S), put_rows(np.full((A, S), TEXT, np.int32), partition.mesh)
        for table in tables:
            compiled.place(x_ASD, table, no_rows, **static)
        for span in buckets.prefill_spans(context):
            scheduler.slots, _ = compiled.prefill(
                params, scheduler.slots, x_ASD, rows(partition, {}), span=span, eos_ids=scheduler.eos_ids, **static
            )
            on_program(f"prefill of {S} positions after {span}")
    slots = len(scheduler.table.slots)
    stopped, steps = put_rows(np.zeros(slots, bool), partition.mesh), jnp.int32(0)
    for count in buckets.decode_rows(slots) if scheduler.decodes_some else (slots,):
        some = None if count == slots else put_rows(np.arange(count, dtype=np.int32), partition.mesh)
        for span in buckets.decode_spans(context):
            scheduler.slots, _ = compiled.decode(
                params, scheduler.slots, stopped, steps, some, span=span, eos_ids=scheduler.eos_ids, **static
            )
            on_program(f"decode of {count} slots after {span} positions")
    for span in buckets.prefill_spans(context)[1:]:
        scheduler.slots = compiled.copy(scheduler.slots, none, none, none, span=span, **static)
        on_program(f"copy of {span} positions")
    return compilations() - before
