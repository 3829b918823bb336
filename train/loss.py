"""The loss: cross entropy of the next token, at labelled positions.

Logits are the largest arrays of a step, so they are computed only at labelled positions, in chunks, and each chunk's
gradient is computed with its logits.
"""

import functools

import jax
import jax.numpy as jnp

from llava_jax.config import LlavaConfig
from llava_jax.data.splice import IGNORE, Batch
from llava_jax.models import llama, llava
from llava_jax.models.llava import Params
from llava_jax.sharding.fsdp import is_shard
from llava_jax.sharding.mesh import BATCH, TENSOR
from llava_jax.sharding.partition import UNSHARDED, Partition
from train import lora
from train.config import TrainConfig
from train.parameters import is_trained

CHUNK = 512  # maximum positions per row of a chunk of logits
CHUNK_LOGITS = 2**26  # logits per chunk on a device

Chunks = tuple[jax.Array, jax.Array, jax.Array]  # bool [c]: needed; int [c, B, n]: positions, and their targets


def next_tokens(batch: Batch) -> jax.Array:
    """[B, S]: the target of each position, the label of the next position of its segment; `IGNORE` if there is none."""
    same = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] > 0)
    return jnp.pad(jnp.where(same, batch.labels[:, 1:], IGNORE), ((0, 0), (0, 1)), constant_values=IGNORE)


def loss_sum(
    params: Params,
    batch: Batch,
    model: LlavaConfig,
    config: TrainConfig,
    partition: Partition = UNSHARDED,
    dropout: jax.Array | None = None,
) -> jax.Array:
    """Cross entropy summed over all labelled positions, float32.

    Args:
      params: the whole model, layers stacked; cast to `config.dtype`.
      dropout: the key of LoRA's dropout; None: no dropout.
    """

    def compute_dtype(params: Params) -> Params:
        return jax.tree.map(lambda x: x.astype(config.dtype), params, is_leaf=is_shard)

    def of_rows(params: Params, batch: Batch, dropout: jax.Array | None) -> jax.Array:
        params = compute_dtype(params)
        if dropout is not None:
            layers = lora.add_dropout(params["decoder"]["layers"], dropout)
            params = params | {"decoder": params["decoder"] | {"layers": layers}}
        with lora.adapted(config):
            x_BSD = llava.embed_batch(params, model, batch, partition, config.remat)
            x_BSD = llama.forward(
                params["decoder"], model.text, x_BSD, batch.positions, batch.segments,
                partition=partition, remat=config.remat,
            )  # fmt: skip
        trained = is_trained("decoder/head/kernel", config)
        return head_loss(params["decoder"], x_BSD, next_tokens(batch), model, partition, trained)

    if config.reduce_dtype in (None, config.dtype):
        params = compute_dtype(params)  # before `map_rows`, so that gradients are summed in this dtype
    return partition.map_rows(of_rows, params, batch, dropout)


# ---------------------------------------------------------------- the head


def head_loss(
    params: Params, x_BSD: jax.Array, targets_BS: jax.Array, model: LlavaConfig, partition: Partition, trained: bool
) -> jax.Array:
    """The cross entropy of the logits, summed over the positions that have a target, in chunks.

    Args:
      params: the decoder's.
      trained: whether the head has a gradient.
    """
    chunks = _make_chunks(targets_BS, model, partition)
    names = ("norm", "embed" if model.text.tied_head else "head")
    # Gathered once, not in each chunk.
    params = {name: partition.gather(params[name], f"decoder/{name}") for name in names}
    return _chunked_loss(params, x_BSD, chunks, model, partition, trained)


def _make_chunks(targets_BS: jax.Array, model: LlavaConfig, partition: Partition) -> Chunks:
    """The positions of each row in chunks of n, those with a target first.

    Chunks after the last target of a device's rows are skipped at run time, so that another share of labels does not
    recompile.
    """
    B, S = targets_BS.shape
    logits_of_position = B * -(-model.text.vocab_size // partition.size(TENSOR))
    n = min(S, CHUNK, max(128, CHUNK_LOGITS // logits_of_position // 128 * 128))
    chunks = -(-S // n)
    order_BS = jnp.argsort(targets_BS == IGNORE, axis=1, stable=True)
    targets_BS = jnp.take_along_axis(targets_BS, order_BS, axis=1)
    max_targets = jnp.max(jnp.sum(targets_BS != IGNORE, axis=1))
    padding = ((0, 0), (0, chunks * n - S))
    order_cBn = jnp.pad(order_BS, padding).reshape(B, chunks, n).swapaxes(0, 1)
    targets_cBn = jnp.pad(targets_BS, padding, constant_values=IGNORE).reshape(B, chunks, n).swapaxes(0, 1)
    return jnp.arange(chunks) * n < max_targets, order_cBn, targets_cBn


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _chunked_loss(
    params: Params, x_BSD: jax.Array, chunks: Chunks, model: LlavaConfig, partition: Partition, trained: bool
) -> jax.Array:
    def add_chunk(total, order_Bn, targets_Bn):
        return total + _loss_of_chunk(params, _pick(x_BSD, order_Bn, partition), targets_Bn, model, partition)

    return _over_chunks(add_chunk, jnp.zeros(()), chunks)


def _loss_and_gradients(
    params: Params, x_BSD: jax.Array, chunks: Chunks, model: LlavaConfig, partition: Partition, trained: bool
):
    """Compute each chunk's gradient with its logits, so that the backward pass does not recompute them; the head's
    gradient only if it is `trained`."""
    frozen, trainable = ({}, params) if trained else (params, {})

    def add_chunk(sums, order_Bn, targets_Bn):
        def of_both(trainable, picked_BnD):
            return _loss_of_chunk(frozen | trainable, picked_BnD, targets_Bn, model, partition)

        picked_BnD = _pick(x_BSD, order_Bn, partition)
        more, (d_more, d_BnD) = jax.value_and_grad(of_both, (0, 1))(trainable, picked_BnD)
        total, d_params, d_BSD = sums
        row_B1 = jnp.arange(x_BSD.shape[0])[:, None]
        return total + more, jax.tree.map(jnp.add, d_params, d_more), d_BSD.at[row_B1, order_Bn].add(d_BnD)

    zeros = jax.tree.map(jnp.zeros_like, (trainable, x_BSD))
    total, *gradients = _over_chunks(add_chunk, (jnp.zeros(()), *zeros), chunks)
    return total, gradients


def _scale_gradients(model: LlavaConfig, partition: Partition, trained: bool, gradients, by: jax.Array):
    d_params, d_BSD = jax.tree.map(lambda x: (by * x).astype(x.dtype), gradients)
    return d_params or None, d_BSD, None


_chunked_loss.defvjp(_loss_and_gradients, _scale_gradients)


def _over_chunks(add_chunk, sums, chunks: Chunks):
    """Call `add_chunk(sums, order_Bn, targets_Bn)` on each needed chunk in turn."""

    def step(sums, chunk):
        needed, order_Bn, targets_Bn = chunk
        return jax.lax.cond(needed, add_chunk, lambda sums, *_: sums, sums, order_Bn, targets_Bn), None

    return jax.lax.scan(step, sums, chunks)[0]


def _pick(x_BSD: jax.Array, order_Bn: jax.Array, partition: Partition) -> jax.Array:
    picked_BnD = jnp.take_along_axis(x_BSD, order_Bn[..., None], axis=1, mode="promise_in_bounds")
    return partition.constrain(picked_BnD, BATCH, None, None)


def _loss_of_chunk(
    params: Params, picked_BnD: jax.Array, targets_Bn: jax.Array, model: LlavaConfig, partition: Partition
) -> jax.Array:
    logits_BnV = partition.constrain(llama.logits(params, model.text, picked_BnD), BATCH, None, TENSOR)
    wanted = jnp.arange(logits_BnV.shape[-1]) == targets_Bn[..., None]
    right_Bn = jnp.sum(jnp.where(wanted, logits_BnV, 0), axis=-1)
    return jnp.sum(jnp.where(targets_Bn != IGNORE, jax.nn.logsumexp(logits_BnV, axis=-1) - right_Bn, 0))
