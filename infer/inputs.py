"""A prefill's arguments: input embeddings, which are those of tokens with image features in their places, and rows."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from infer import compiled
from infer.next_token import Controls, History, row_keys
from infer.prompt import Prompt
from infer.sampling import Sampling
from llava_jax.data.splice import TEXT
from llava_jax.models import llava
from llava_jax.sharding.partition import Partition, put_rows

DEFAULT = Sampling()


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Positions `start` to `end` of a prompt, and the feature tables of its images there, by their numbers."""

    prompt: Prompt
    start: int
    end: int
    tables: Mapping[int, jax.Array]
    slot: int = 0  # within its shard
    sampling: Sampling = DEFAULT
    limit: int = 1  # the most tokens of the answer

    @property
    def count(self) -> int:
        return self.end - self.start

    @property
    def is_final(self) -> bool:
        """Whether a token is chosen after it."""
        return self.end == self.prompt.length


def inputs(params: llava.Params, partition: Partition, chunks: Mapping[int, Chunk], S: int) -> jax.Array:
    """Input embeddings [A, S, D] of chunks, by their row; one row for each shard of rows, padded on the right."""
    assert partition.mesh is not None
    mesh, A = partition.mesh, partition.row_shards
    ids = np.zeros((A, S), np.int32)
    for row, chunk in chunks.items():
        ids[row, : chunk.count] = chunk.prompt.ids[chunk.start : chunk.end]
    x_ASD = compiled.embed(params, put_rows(ids, mesh), partition=partition)
    for row, chunk in chunks.items():
        prompt, positions = chunk.prompt, slice(chunk.start, chunk.end)
        for i in prompt.images_in(chunk.start, chunk.end):
            rows = np.full((A, S), TEXT, np.int32)
            rows[row, : chunk.count] = np.where(prompt.places[positions] == i, prompt.rows[positions], TEXT)
            x_ASD = compiled.place(x_ASD, chunk.tables[i], put_rows(rows, mesh), partition=partition)
    return x_ASD


def rows(partition: Partition, chunks: Mapping[int, Chunk]) -> compiled.Rows:
    """What `compiled.prefill` needs to know of chunks, by their row; a row without one has no positions."""
    assert partition.mesh is not None
    A = partition.row_shards
    numbers, flags = np.zeros((4, A), np.int32), np.zeros((3, A), bool)
    samplings, seeds = [DEFAULT] * A, [(0, 0)] * A
    for row, chunk in chunks.items():
        sampling = chunk.sampling
        numbers[:, row] = chunk.slot, chunk.start, chunk.count, chunk.limit
        flags[:, row] = chunk.is_final, sampling.ignore_eos, sampling.top_logprobs is not None
        samplings[row], seeds[row] = sampling, (sampling.seed, chunk.prompt.request.number)

    def put(x, mesh=partition.mesh) -> jax.Array:
        return put_rows(np.asarray(x), mesh)

    slots, starts, counts, limits = map(put, numbers)
    final, ignore_eos, wants = map(put, flags)
    keys = jnp.concatenate([row_keys(seed, [number]) for seed, number in seeds])
    controls = Controls(*map(put, Controls.of(samplings)))
    used = {row: chunk for row, chunk in chunks.items() if chunk.is_final and _uses_history(chunk.sampling)}
    history = _history(partition, used) if used else _no_history(partition)
    return compiled.Rows(slots, starts, counts, limits, final, ignore_eos, wants, keys, controls, history)


def _uses_history(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1 or bool(sampling.logit_bias)


def _history(partition: Partition, chunks: Mapping[int, Chunk]) -> History:
    """What penalties and biases refer to before the first token."""
    assert partition.mesh is not None
    A, V = partition.row_shards, partition.config.text.vocab_size
    in_prompt, counts, bias = np.zeros((A, V), bool), np.zeros((A, V), np.int32), np.zeros((A, V), np.float32)
    for row, chunk in chunks.items():
        if chunk.sampling.repetition_penalty != 1:
            in_prompt[row, chunk.prompt.ids[chunk.prompt.places == TEXT]] = True
        if chunk.sampling.logit_bias:
            bias[row] = chunk.sampling.bias_row(V)
    return History(*(put_rows(x, partition.mesh) for x in (in_prompt, counts, bias)))


@functools.lru_cache(maxsize=4)
def _no_history(partition: Partition) -> History:
    """Kept on the devices, since most prompts need no other."""
    return _history(partition, {})
