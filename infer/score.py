"""Log probabilities of given answers."""

import dataclasses

import numpy as np

from infer import compiled
from infer.inputs import Chunk, inputs
from infer.prompt import Prompt, Request
from infer.scheduler import Scheduler
from infer.slots import common_prefix
from llava_jax.console import InputError, show_value
from llava_jax.data.buckets import round_up
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.sharding.partition import put_rows


@dataclasses.dataclass(frozen=True)
class Score:
    text: str  # of the candidate
    token_ids: list[int]
    logprobs: list[float]  # of each token, after the prompt and those before it
    is_greedy: bool  # whether each of them is the most likely token

    @property
    def logprob(self) -> float:
        """Of the whole text; what would end the answer is not part of it."""
        return sum(self.logprobs)


def with_answer(request: Request, answer: str) -> Request:
    """A question with an answer.

    Raises:
      InputError: the answer is not a text, is empty, or would place an image.
    """
    if not isinstance(answer, str):
        raise InputError(f"a candidate answer is {show_value(answer)}; must be a string")
    if not answer.strip():
        raise InputError("a candidate answer is empty")
    if IMAGE_TOKEN in answer:
        raise InputError(f"a candidate answer contains {IMAGE_TOKEN}, which is for questions")
    return dataclasses.replace(request, turns=(*request.turns, answer))


def score_answer(scheduler: Scheduler, question: Prompt, answered: Prompt, answer: str) -> Score:
    """The log probabilities of an answer's tokens.

    Args:
      scheduler: idle, with `question` in one of its slots.
      answered: the question with its answer and whatever ends it.
      answer: its text.
    """
    start = common_prefix(question.keys, answered.keys)
    ids = answered.ids[start:].tolist()
    texts = (scheduler.tokenizer.decode(ids[:n]).strip() for n in range(1, len(ids)))
    n = next((n for n, text in enumerate(texts, 1) if text == answer.strip()), len(ids))

    table, buckets = scheduler.table, scheduler.buckets
    slot = max(table.slots, key=lambda slot: common_prefix(slot.keys, question.keys))
    assert scheduler.idle and common_prefix(slot.keys, question.keys) >= start - 1
    tables = {i: scheduler.features.table(answered.images[i]) for i in answered.images_in(start - 1, start + n)}
    chunk = Chunk(answered, start - 1, start + n - 1, tables)
    S, shard, shards = buckets.up("lengths", n), table.shard(slot), scheduler.shards
    starts, slots, targets = np.zeros(shards, np.int32), np.zeros(shards, np.int32), np.zeros((shards, S), np.int32)
    starts[shard], slots[shard] = chunk.start, slot.index % table.per_shard
    targets[shard, :n] = ids[:n]
    partition, mesh = scheduler.partition, scheduler.partition.mesh
    assert mesh is not None
    logprobs, greedy = compiled.score(
        scheduler.params, scheduler.slots, inputs(scheduler.params, partition, {shard: chunk}, S),
        *(put_rows(x, mesh) for x in (starts, slots, targets)),
        span=round_up(buckets.prefill_spans(scheduler.context), chunk.start), partition=partition,
    )  # fmt: skip
    is_greedy = bool(np.asarray(greedy)[shard, :n].all())
    return Score(answer, ids[:n], np.asarray(logprobs)[shard, :n].tolist(), is_greedy)
