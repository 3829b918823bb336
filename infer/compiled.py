"""The engine's jitted functions: four, one after the other, for a batch of questions, and `logits` without a cache.

Their static shapes depend only on (B rows, S positions, T tiles, N new tokens):

    encode   (B, T)      uint8 tiles -> feature table
    splice   (B, S, T)   token ids, feature table -> input embeddings: one gather
    prefill  (B, S, N)   input embeddings -> cache, first token
    decode   (B, S, N)   a `while_loop` that ends when all rows have ended, cache updated in place
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from infer.next_token import Controls, History, choose
from llava_jax.models import llama, llava
from llava_jax.sharding.partition import Partition


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "lengths", "limits", "step", "done", "out", "keys", "cache"],
    meta_fields=["prompt_slots"],
)
@dataclasses.dataclass(frozen=True)
class State:
    """A batch during decoding. The cache has `prompt_slots` slots for the padded prompt, then one per decode step."""

    tokens: jax.Array  # [B] the last chosen, not yet in the cache
    lengths: jax.Array  # [B] of the prompts
    limits: jax.Array  # [B] maximum number of tokens of each row
    step: jax.Array  # number of tokens chosen so far, minus one
    done: jax.Array  # [B]
    out: jax.Array  # [B, N] tokens chosen
    keys: jax.Array  # [B]
    cache: llama.Cache
    prompt_slots: int


@functools.partial(jax.jit, static_argnames="partition")
def encode(params, tiles_BTHW3, *, partition: Partition) -> jax.Array:
    """Feature table [B, R, D]."""
    return llava.encode_tiles(params, partition.config, tiles_BTHW3, partition)


@functools.partial(jax.jit, static_argnames="partition")
def splice(params, features_BRD, ids_BS, feature_rows_BS, *, partition: Partition) -> jax.Array:
    """Input embeddings [B, S, D]."""
    return llava.splice_embeddings(params, partition.config, features_BRD, ids_BS, feature_rows_BS, partition)


@functools.partial(jax.jit, static_argnames=("partition", "eos_ids", "new_tokens", "int8_cache"))
def prefill(
    params, x_BSD, lengths, limits, keys, sampling_params, *, partition, eos_ids, new_tokens, int8_cache=False
) -> State:
    """Fill a new cache with the prompts, and choose the first token of each answer."""
    config, (B, S, _) = partition.config.text, x_BSD.shape
    decoder, slots = params["decoder"], S + new_tokens
    x_BD, cache = llama.prefill(decoder, config, x_BSD, lengths, slots, int8=int8_cache, partition=partition)
    logits_BV = llama.logits(decoder, config, x_BD, partition)
    tokens = _choose(logits_BV, keys, jnp.int32(0), sampling_params, eos_ids, partition)
    out = jnp.zeros((B, new_tokens), jnp.int32).at[:, 0].set(tokens)
    done = (lengths == 0) | _is_end(tokens, eos_ids) | (limits <= 1)
    return State(tokens, lengths, limits, jnp.int32(0), done, out, keys, cache, S)


def _decode(params, state: State, stopped, steps, sampling_params, *, partition, eos_ids) -> State:
    """Up to `steps` decode steps, for the rows that are neither done nor `stopped` [B]."""
    config = partition.config.text
    last_step = jnp.minimum(state.step + steps, state.out.shape[1] - 1)
    slots_M = jnp.arange(state.cache[0].keys_BKNM.shape[3])
    S = state.prompt_slots

    def body(state: State) -> State:
        slot = S + state.step
        positions = state.lengths + state.step
        slot_positions = jnp.where(slots_M < S, slots_M, state.lengths[:, None] + slots_M - S)
        visible_BM = (slots_M < state.lengths[:, None]) | ((slots_M >= S) & (slots_M < slot))
        if config.sliding_window:
            visible_BM &= positions[:, None] - slot_positions < config.sliding_window
        x_BD = llama.embed(params["decoder"], state.tokens, partition)
        x_BD, cache = llama.decode_step(
            params["decoder"], config, x_BD, positions, visible_BM, slot, state.cache, partition
        )
        step = state.step + 1
        logits_BV = llama.logits(params["decoder"], config, x_BD, partition)
        tokens = _choose(logits_BV, state.keys, step, sampling_params, eos_ids, partition)
        tokens = jnp.where(state.done, state.tokens, tokens)
        out = jnp.where(
            state.done[:, None], state.out, jax.lax.dynamic_update_slice(state.out, tokens[:, None], (0, step))
        )
        done = state.done | _is_end(tokens, eos_ids) | (step + 1 >= state.limits)
        return dataclasses.replace(state, tokens=tokens, step=step, done=done, out=out, cache=cache)

    state = dataclasses.replace(state, done=state.done | stopped)
    return jax.lax.while_loop(lambda s: (s.step < last_step) & ~jnp.all(s.done), body, state)


@functools.cache
def decode_on(platform: str):
    """`_decode`, jitted. On CPUs XLA copies the whole cache at each decode step without this option."""
    options = {"xla_cpu_copy_insertion_use_region_analysis": True} if platform == "cpu" else {}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except Exception:  # this JAX release lacks the option
        options = {}
    return jax.jit(_decode, static_argnames=("partition", "eos_ids"), donate_argnames="state", compiler_options=options)


def _choose(logits_BV, keys, step, sampling_params, eos_ids, partition) -> jax.Array:
    """The next token of each row, all with the same options and without a history."""
    rows = jnp.zeros(logits_BV.shape[:1], jnp.int32)
    controls = Controls(*(jnp.broadcast_to(sampling_params[name], rows.shape) for name in Controls._fields))
    history = History(*(jnp.zeros(logits_BV.shape, dtype) for dtype in (bool, jnp.int32, jnp.float32)))
    return choose(logits_BV, _fold(keys, step), controls, history, rows + step, eos_ids, partition)


def _is_end(tokens: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    return jnp.isin(tokens, jnp.array(eos_ids, jnp.int32)) if eos_ids else jnp.zeros_like(tokens, bool)


def _fold(keys: jax.Array, step) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)


@functools.partial(jax.jit, static_argnames="partition")
def logits(params, x_BSD, lengths, *, partition: Partition) -> jax.Array:
    """Logits [B, S, V] of whole conversations, without a cache."""
    config, (B, S, _) = partition.config.text, x_BSD.shape
    positions_BS = jnp.broadcast_to(jnp.arange(S), (B, S))
    segments_BS = (positions_BS < lengths[:, None]).astype(jnp.int32)
    x_BSD = llama.forward(params["decoder"], config, x_BSD, positions_BS, segments_BS, partition=partition)
    return llama.logits(params["decoder"], config, x_BSD, partition)
