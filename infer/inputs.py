"""A prefill's arguments: input embeddings, which are those of tokens with image features in their places, and rows."""

import dataclasses
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
    A, V = partition.row_shards, partition.config.text.vocab_size
    numbers, flags = np.zeros((4, A), np.int32), np.zeros((3, A), bool)
    samplings, seeds = [DEFAULT] * A, [(0, 0)] * A
    in_prompt, bias = np.zeros((A, V), bool), np.zeros((A, V), np.float32)
    for row, chunk in chunks.items():
        prompt, sampling = chunk.prompt, chunk.sampling
        numbers[:, row] = chunk.slot, chunk.start, chunk.count, chunk.limit
        flags[:, row] = chunk.end == prompt.length, sampling.ignore_eos, sampling.top_logprobs is not None
        samplings[row], seeds[row] = sampling, (sampling.seed, prompt.request.number)
        if sampling.repetition_penalty != 1:
            in_prompt[row, prompt.ids[prompt.places == TEXT]] = True
        if sampling.logit_bias:
            bias[row] = sampling.bias_row(V)

    def put(x, mesh=partition.mesh) -> jax.Array:
        return put_rows(np.asarray(x), mesh)

    slots, starts, counts, limits = map(put, numbers)
    final, ignore_eos, wants = map(put, flags)
    keys = jnp.concatenate([row_keys(seed, [number]) for seed, number in seeds])
    controls = Controls(*map(put, Controls.of(samplings)))
    history = History(put(in_prompt), put(np.zeros((A, V), np.int32)), put(bias))
    return compiled.Rows(slots, starts, counts, limits, final, ignore_eos, wants, keys, controls, history)
