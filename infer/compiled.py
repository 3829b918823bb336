"""The engine's jitted functions. Their static shapes depend only on the slots (B of M positions) and on short ladders:

    encode      (T)        uint8 tiles -> features
    image_table (T, n)     the features of one image of n tiles
    embed       (S)        token ids -> input embeddings of a chunk of a prompt
    place       (S, n)     the features of one image, where the chunk has them: one gather
    prefill     (S, span)  input embeddings -> keys and values in a slot; after the last chunk, the first token
    copy        (span)     keys and values of one slot -> another
    score       (S, span)  log probabilities of what may follow a prompt
    decode      (span)     a `while_loop` over decode steps of all slots, which ends when all have ended

`span` is the number of positions that are read of each slot. A prefill has A rows, one for each shard of the slots.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from infer.next_token import Controls, History, Logprobs, choose, count_tokens, log_probabilities
from infer.sampling import MAX_LOGPROBS, Sampling
from llava_jax.models import cache, llama, llava
from llava_jax.sharding.mesh import BATCH, TENSOR
from llava_jax.sharding.partition import Partition

STEPS = 16  # the most decode steps of a dispatch
NONE = -1  # the token of a slot that has ended


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "tokens", "lengths", "generated", "limits", "done", "ignore_eos", "wants", "keys", "controls",
                 "history"],
    meta_fields=[],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Slots:
    """All slots: their cache, and [B] arrays."""

    cache: cache.Cache
    tokens: jax.Array  # the last chosen, not yet in the cache
    lengths: jax.Array  # positions in the cache
    generated: jax.Array  # tokens chosen so far
    limits: jax.Array  # the most tokens
    done: jax.Array  # or without a question
    ignore_eos: jax.Array
    wants: jax.Array  # whether log probabilities are wanted
    keys: jax.Array
    controls: Controls
    history: History


class Rows(NamedTuple):
    """A chunk of a prompt for each of A slots; arrays [A] of what the slots' answers need."""

    slots: jax.Array  # counted within the shard
    starts: jax.Array  # positions before the chunk
    counts: jax.Array  # of the chunk; 0 for a row without a prompt
    limits: jax.Array
    final: jax.Array  # whether it is the prompt's last chunk
    ignore_eos: jax.Array
    wants: jax.Array
    keys: jax.Array
    controls: Controls
    history: History


class Chosen(NamedTuple):
    """Tokens, `NONE` where a slot had ended: [A], or [B, steps]."""

    tokens: jax.Array
    logprobs: Logprobs


# ---------------------------------------------------------------- images and embeddings


@functools.partial(jax.jit, static_argnames="partition")
def encode(params, tiles_THW3, *, partition: Partition) -> jax.Array:
    """Features [T, P, D]."""
    return llava.encode_tiles(params, partition.config, tiles_THW3, partition)


@functools.partial(jax.jit, static_argnames=("tiles", "partition"))
def image_table(params, features_TPD, first, *, tiles: int, partition: Partition) -> jax.Array:
    """The feature table [R, D] of the image of `tiles` tiles from `first` on, replicated."""
    features_1TPD = jax.lax.dynamic_slice_in_dim(features_TPD, first, tiles)[None]
    return partition.constrain(llava.feature_table(params, partition.config, features_1TPD, partition)[0], None, None)


@functools.partial(jax.jit, static_argnames="partition")
def embed(params, ids_AS, *, partition: Partition) -> jax.Array:
    """Token embeddings [A, S, D]."""
    return partition.constrain(llama.embed(params["decoder"], ids_AS, partition), BATCH, None, None)


@functools.partial(jax.jit, static_argnames="partition")
def place(x_ASD, table_RD, rows_AS, *, partition: Partition) -> jax.Array:
    """Replace embeddings by rows of an image's feature table, where `rows_AS` is not negative."""
    features_ASD = table_RD.at[jnp.maximum(rows_AS, 0)].get(mode="promise_in_bounds")
    x_ASD = jnp.where((rows_AS < 0)[..., None], x_ASD, features_ASD.astype(x_ASD.dtype))
    return partition.constrain(x_ASD, BATCH, None, None)


# ---------------------------------------------------------------- slots


class InPlace:
    """`jax.jit` of a function that changes `slots`, which are donated: the cache stays where it is."""

    def __init__(self, f: Callable, *static_argnames: str):
        functools.update_wrapper(self, f)
        self.function, self.static_argnames = f, (*static_argnames, "span", "partition")
        self._jitted: dict[str, Any] = {}

    def on(self, platform: str):
        """The jitted function. On CPUs XLA copies the whole cache without this option where a program reads it too."""
        if platform not in self._jitted:
            options = {"xla_cpu_copy_insertion_use_region_analysis": True} if platform == "cpu" else {}
            self._jitted[platform] = jax.jit(
                self.function, static_argnames=self.static_argnames, donate_argnames="slots",
                compiler_options=_supported(options),
            )  # fmt: skip
        return self._jitted[platform]

    def __call__(self, *arguments, partition: Partition, **static):
        return self.on(partition.platform)(*arguments, partition=partition, **static)

    def lower(self, *arguments, partition: Partition, **static):
        return self.on(partition.platform).lower(*arguments, partition=partition, **static)


def in_place(*static_argnames: str):
    """Decorator: `InPlace`."""
    return lambda f: InPlace(f, *static_argnames)


def _supported(options: dict[str, Any]) -> dict[str, Any]:
    """Compiler options, or none if this release of JAX lacks them."""
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:  # there is no such option
        return {}
    return options


@functools.partial(jax.jit, static_argnames=("slots", "positions", "dtype", "int8", "partition"))
def new_slots(*, slots: int, positions: int, dtype, int8: bool, partition: Partition) -> Slots:
    """Empty slots; `partition.row_shards` divides their number."""
    text = partition.config.text
    keys = jax.vmap(jax.random.key)(jnp.zeros(slots, jnp.uint32))
    numbers, flags = jnp.zeros(slots, jnp.int32), jnp.zeros(slots, bool)
    controls = Controls(*(jnp.full(slots, x) for x in Controls.of([Sampling()])))
    words_BV = jnp.zeros((slots, text.vocab_size), jnp.int32)
    history = History(words_BV.astype(bool), words_BV, words_BV.astype(jnp.float32))
    return _constrained(
        Slots(
            cache.new_cache(text, slots, positions, dtype, int8=int8, partition=partition),
            tokens=numbers, lengths=numbers, generated=numbers, limits=numbers, done=~flags, ignore_eos=flags,
            wants=flags, keys=keys, controls=controls, history=history,
        ),
        partition,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("positions", "partition"))
def grow(slots: Slots, *, positions: int, partition: Partition) -> Slots:
    """The same slots, with more positions each."""
    return dataclasses.replace(slots, cache=cache.grown(slots.cache, positions, partition))


@in_place("eos_ids")
def prefill(
    params, slots: Slots, x_ASD, rows: Rows, *, span: int, eos_ids: tuple[int, ...], partition: Partition
) -> tuple[Slots, Chosen]:
    """Fill slots with a chunk of their prompts; after the last one, choose the first token of the answer."""
    text, decoder = partition.config.text, params["decoder"]
    x_AD, filled = llama.prefill(
        decoder, text, x_ASD, rows.starts, rows.counts, slots.cache, rows.slots, span=span, partition=partition
    )
    logits_AV = llama.logits(decoder, text, x_AD, partition)
    zeros = jnp.zeros_like(rows.starts)
    controls = rows.controls.of_running(rows.final)
    tokens = choose(logits_AV, _fold(rows.keys, zeros), controls, rows.history, zeros, eos_ids, partition)
    logprobs = _logprobs(logits_AV, tokens, rows.wants & rows.final, partition)
    ended = (_is_end(tokens, eos_ids) & ~rows.ignore_eos) | (rows.limits <= 1)
    history = _counted(rows.history, tokens, jnp.ones_like(ended))
    new = dict(
        tokens=tokens, lengths=rows.starts + rows.counts, generated=jnp.ones_like(tokens), limits=rows.limits,
        done=ended | ~rows.final, ignore_eos=rows.ignore_eos, wants=rows.wants, keys=rows.keys,
        controls=rows.controls, history=history,
    )  # fmt: skip
    per_shard = len(slots.tokens) // len(rows.slots)
    hit_B = ((jnp.arange(per_shard) == rows.slots[:, None]) & (rows.counts > 0)[:, None]).reshape(-1)

    def put(x, new):
        new = jnp.repeat(new, per_shard, axis=0, total_repeat_length=len(x))
        return jnp.where(hit_B.reshape(-1, *(1,) * (x.ndim - 1)), new, x)

    updated = {name: jax.tree.map(put, getattr(slots, name), value) for name, value in new.items()}
    chosen = Chosen(jnp.where(rows.final & (rows.counts > 0), tokens, NONE), logprobs)
    return _constrained(Slots(filled, **updated), partition), chosen


@in_place()
def copy(slots: Slots, sources_A, targets_A, counts_A, *, span: int, partition: Partition) -> Slots:
    """Copy the first `counts_A` positions of slots to others."""
    copied = cache.copy_slots(slots.cache, sources_A, targets_A, counts_A, span, partition)
    return dataclasses.replace(slots, cache=copied)


@in_place("eos_ids")
def decode(
    params, slots: Slots, stopped, steps, some=None, *, span: int, eos_ids: tuple[int, ...], partition: Partition
) -> tuple[Slots, Chosen]:
    """Up to `steps` decode steps, at most `STEPS`, of the slots that are neither done nor `stopped` [B].

    Args:
      some: numbers of different slots, of which no others are decoded, and which have the rows of the result; None for
        all. They are copied for it, which pays where rows cost time, on CPUs.
    """
    text, decoder = partition.config.text, params["decoder"]
    slots = dataclasses.replace(slots, done=slots.done | stopped)
    whole = dataclasses.replace(slots, cache=())
    start = whole if some is None else jax.tree.map(lambda x: x[some], whole)
    B, dtype = len(start.tokens), decoder["embed"]["embedding"].dtype

    def first(held: cache.Cache) -> cache.Cache:
        parts = tuple(cache.first_positions(layer, span) for layer in held)
        return parts if some is None else jax.tree.map(lambda x: x[some], parts)

    before_loop = first(slots.cache)
    recent = cache.new_cache(text, B, STEPS, dtype, partition=partition)
    chosen = Chosen(jnp.full((B, STEPS), NONE), _no_logprobs(B, STEPS))

    def body(carry):
        step, now, recent, chosen = carry
        read = before_loop
        if partition.platform == "tpu":  # where a slice in the loop is part of the matmul, and one before it a copy
            held, _ = jax.lax.optimization_barrier((slots.cache, step))
            read = first(held)
        x_BD = llama.embed(decoder, now.tokens, partition)
        x_BD, recent = llama.decode_step(decoder, text, x_BD, start.lengths, read, recent, step, partition)
        logits_BV = llama.logits(decoder, text, x_BD, partition)
        running, keys = ~now.done, _fold(now.keys, now.generated)
        controls = now.controls.of_running(running)
        tokens = choose(logits_BV, keys, controls, now.history, now.generated, eos_ids, partition)
        logprobs = _logprobs(logits_BV, tokens, now.wants & running, partition)
        chosen = jax.tree.map(
            lambda all, new: jax.lax.dynamic_update_slice_in_dim(all, new[:, None], step, 1),
            chosen,
            Chosen(jnp.where(running, tokens, NONE), logprobs),
        )
        generated = now.generated + running
        ended = (_is_end(tokens, eos_ids) & ~now.ignore_eos) | (generated >= now.limits)
        now = dataclasses.replace(
            now,
            tokens=jnp.where(running, tokens, now.tokens),
            lengths=now.lengths + running,
            generated=generated,
            done=now.done | ended,
            history=_counted(now.history, tokens, running),
        )
        return step + 1, now, recent, chosen

    last_step = jnp.minimum(steps, STEPS)
    carry = jnp.int32(0), start, recent, chosen
    _, now, recent, chosen = jax.lax.while_loop(lambda c: (c[0] < last_step) & ~jnp.all(c[1].done), body, carry)
    int8 = slots.cache[0].is_int8
    new = tuple(cache.quantized(layer) if int8 else layer for layer in recent)
    each = jnp.tile(jnp.arange(B // partition.row_shards), partition.row_shards) if some is None else some
    each = partition.constrain(each, BATCH)
    written = cache.write_slots(slots.cache, new, each, start.lengths, now.lengths - start.lengths, partition)
    if some is not None:
        now = jax.tree.map(lambda x, new: x.at[some].set(new), whole, now)
    return _constrained(dataclasses.replace(now, cache=written), partition), chosen


def copied(params, slots: Slots, rows: int, span: int) -> float:
    """Bytes that `decode` copies on a CPU before its loop, the first positions of its rows, per byte that a step reads.

    Args:
      rows: that it decodes.
    """
    held = sum(x.nbytes for x in jax.tree.leaves(slots.cache))
    read = held * rows * span / (len(slots.tokens) * slots.cache[0].positions)
    return 2 * read / (sum(x.nbytes for x in jax.tree.leaves(params["decoder"])) + read)


def _counted(history: History, tokens_B: jax.Array, running_B: jax.Array) -> History:
    return history._replace(counts_BV=count_tokens(history.counts_BV, tokens_B, running_B))


def _is_end(tokens: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    return jnp.isin(tokens, jnp.array(eos_ids, jnp.int32)) if eos_ids else jnp.zeros_like(tokens, bool)


def _fold(keys: jax.Array, numbers: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in)(keys, numbers)


def _no_logprobs(*rows: int) -> Logprobs:
    top = (*rows, MAX_LOGPROBS)
    return Logprobs(jnp.zeros(rows), jnp.zeros(top, jnp.int32), jnp.zeros(top))


def _logprobs(logits_BV, tokens_B, wanted_B, partition: Partition) -> Logprobs:
    """Log probabilities, or zeros if no row wants them."""
    return jax.lax.cond(
        jnp.any(wanted_B),
        lambda: log_probabilities(logits_BV, tokens_B, partition),
        lambda: _no_logprobs(len(tokens_B)),
    )


def _constrained(slots: Slots, partition: Partition) -> Slots:
    """All but the cache, which is constrained where it is made, sharded by slots and vocabulary.

    On one device everything is constrained to it: new slots, which are made from nothing, would have no mesh otherwise,
    and the first program that takes them would be compiled again for slots that another program returns.
    """
    if partition.device_count == 1:
        assert partition.mesh is not None
        return jax.lax.with_sharding_constraint(slots, NamedSharding(partition.mesh, P()))

    def constrain(x):
        return partition.constrain(x, *(BATCH, TENSOR)[: x.ndim])

    parts = {
        field.name: jax.tree.map(constrain, getattr(slots, field.name))
        for field in dataclasses.fields(slots)
        if field.name != "cache"
    }
    return dataclasses.replace(slots, **parts)


@functools.partial(jax.jit, static_argnames=("span", "partition"))
def score(
    params, slots: Slots, x_ASD, starts, slots_A, targets_AS, *, span: int, partition: Partition
) -> tuple[jax.Array, jax.Array]:
    """Log probabilities [A, S] of tokens, each after those before it, and whether none is more likely: prompts in
    slots, and the inputs `x_ASD`."""
    text, decoder = partition.config.text, params["decoder"]
    x_ASD = llama.continue_prompts(decoder, text, x_ASD, starts, slots.cache, slots_A, span=span, partition=partition)
    logprobs_ASV = jax.nn.log_softmax(llama.logits(decoder, text, x_ASD, partition))
    logprobs_AS = jnp.take_along_axis(logprobs_ASV, targets_AS[..., None], axis=-1)[..., 0]
    return logprobs_AS, jnp.argmax(logprobs_ASV, axis=-1) == targets_AS


# ---------------------------------------------------------------- without a cache


@functools.partial(jax.jit, static_argnames="partition")
def logits(params, x_BSD, lengths, *, partition: Partition) -> jax.Array:
    """Logits [B, S, V] of whole conversations."""
    config, (B, S, _) = partition.config.text, x_BSD.shape
    positions_BS = jnp.broadcast_to(jnp.arange(S), (B, S))
    segments_BS = (positions_BS < lengths[:, None]).astype(jnp.int32)
    x_BSD = llama.forward(params["decoder"], config, x_BSD, positions_BS, segments_BS, partition=partition)
    return llama.logits(params["decoder"], config, x_BSD, partition)
