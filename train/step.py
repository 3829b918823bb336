"""One update: loss, gradient with respect to what is trained, optimiser; and the way in and out of it.

    params --setup--> frozen (compute dtype)                                  --export_params--> params
                      state  (float32 masters, optimiser) --step_fn--> state

Both trees are those of `llava_jax.models.llava`, layers stacked along a leading axis, and have no leaf in common; the
model sees their union. Only the masters are differentiated, so nothing else has a gradient or optimiser state.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError
from llava_jax.data.splice import IGNORE, Batch
from llava_jax.models import llama, llava
from llava_jax.models.llava import Params
from llava_jax.sharding.fsdp import gradient_options, is_shard
from llava_jax.sharding.mesh import BATCH, TENSOR
from llava_jax.sharding.partition import UNSHARDED, Partition
from train import lora
from train.config import TrainConfig
from train.optim import make_optimizer, part_of, peak, schedule

PIECE = 512  # positions of a row whose logits are computed at once, at most
PIECE_LOGITS = 2**26  # logits that a device holds at once
LAYER = re.compile(r"/layers/\d+/")  # in a path, which loses the number when layers are stacked

Metrics = dict[str, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "trained", "opt_state", "skipped", "skipped_total"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an update changes.

    step           int32: updates tried
    trained        master weights, float32, layers stacked
    opt_state      of optax, for these only
    skipped        int32: updates in a row, up to the last, that were left out for a loss or gradient that is not finite
    skipped_total  int32: all of them
    """

    step: jax.Array
    trained: Params
    opt_state: Any
    skipped: jax.Array
    skipped_total: jax.Array


StepFn = Callable[[Params, TrainState, Batch], tuple[TrainState, Metrics]]
EvalFn = Callable[[Params, TrainState, Batch], Metrics]


def setup(
    params: Params, model: LlavaConfig, config: TrainConfig, mesh: Mesh, total_steps: int
) -> tuple[Params, TrainState, StepFn, EvalFn]:
    """All that a run needs to update a model.

    Args:
      params: as `checkpoints.checkpoint` loads them, best in the types of `load_dtype`. They are taken apart: the
        dictionary is empty afterwards, so that no weight is there twice for longer than it takes to stack it.
        Or their shapes (`llava.param_shapes`): then `frozen` and `state` are shapes too, to compile ahead of time.
      total_steps: updates of the whole run, for the schedule.

    Returns:
      frozen: what is not trained, in the compute dtype.
      state: the start.
      step_fn: (frozen, state, batch) -> (state, metrics), compiled for each shape of batch; the state given is
        consumed. Metrics are scalars: `loss` (mean over all labelled positions of the global batch), `grad_norm` (of
        all that is trained, before clipping), `learning_rate` (of the decoder, or of the first part trained),
        `labelled` (positions), `ok` (False: the update was left out).
      eval_fn: (frozen, state, batch) -> `loss_sum` and `labelled`.

    Raises:
      InputError: nothing would be trained; later, from `step_fn`, a batch whose rows the mesh does not divide.
    """
    partition = Partition(model, mesh)
    frozen, trained = _place(params, config, partition)
    if config.tune == "lora":
        trained |= _start_lora(frozen, config, partition)
    if not trained:
        raise InputError(f"--tune {config.tune}: a model with projector {model.projector!r} has nothing to train there")
    top_rate = peak(part_of(min(trained)), config)
    frozen, trained = unflatten_dict(frozen, sep="/"), unflatten_dict(trained, sep="/")
    optimizer, share = make_optimizer(config, total_steps), schedule(config, total_steps)

    whole = NamedSharding(mesh, P())
    cuts = jax.tree.map(lambda x: x.sharding, trained)
    opt_cuts = optax.tree_map_params(
        optimizer,
        lambda _, cut: cut,
        jax.eval_shape(optimizer.init, trained),
        cuts,
        transform_non_params=lambda _: whole,
    )

    def start(trained):
        return optimizer.init(trained), [jnp.zeros((), jnp.int32) for _ in range(3)]

    opt_state, zeros = _made(start, (opt_cuts, [whole] * 3), trained)
    state = TrainState(zeros[0], trained, opt_state, *zeros[1:])

    def step(frozen: Params, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        labelled = jnp.sum(next_tokens(batch) != IGNORE)
        # For dropout, which takes a number for each input of each adapter: "rbg" is one operation, which TPUs have in
        # hardware; JAX's usual generator makes a number by some fifty.
        key = jax.random.fold_in(jax.random.key(config.seed, impl="rbg"), state.step)

        def loss_of_part(trained, part, number):
            params = union(frozen, trained)
            dropout = jax.random.fold_in(key, number) if config.tune == "lora" and config.lora_dropout else None
            return loss_sum(params, part, model, config, partition, dropout) / jnp.maximum(labelled, 1)

        loss, grads = _gradients(loss_of_part, state.trained, batch, config.accumulate, partition, cuts)
        norm = optax.tree.norm(grads)
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        new, old = (optax.apply_updates(state.trained, updates), opt_state), (state.trained, state.opt_state)
        trained, opt_state = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, old)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": top_rate * share(state.step - state.skipped_total),
            "labelled": labelled,
            "ok": ok,
        }
        skipped = jnp.where(ok, 0, state.skipped + 1)
        return TrainState(state.step + 1, trained, opt_state, skipped, state.skipped_total + ~ok), metrics

    def evaluate(frozen: Params, state: TrainState, batch: Batch) -> Metrics:
        params = union(frozen, state.trained)
        sum_of_part = lambda part: loss_sum(params, part, model, config, partition)  # noqa: E731
        return {
            "loss_sum": jnp.sum(jax.lax.map(sum_of_part, _parts(batch, config.accumulate, partition))),
            "labelled": jnp.sum(next_tokens(batch) != IGNORE),
        }

    state_cuts = TrainState(whole, cuts, opt_cuts, whole, whole)
    step_fn = jax.jit(
        step, donate_argnums=1, out_shardings=(state_cuts, whole), compiler_options=gradient_options(mesh)
    )
    return frozen, state, step_fn, jax.jit(evaluate, out_shardings=whole)


def _gradients(loss_of_part, trained: Params, batch: Batch, parts: int, partition: Partition, cuts: Any):
    """Loss and gradient, summed over the parts that the batch's rows are computed in, one after the other."""

    def of_part(part, number):
        loss, grads = jax.value_and_grad(loss_of_part)(trained, part, number)
        return loss, jax.lax.with_sharding_constraint(grads, cuts)

    def add(total, part):
        return jax.tree.map(jnp.add, total, of_part(*part)), None

    split = _parts(batch, parts, partition)
    if parts == 1:
        return of_part(batch, 0)
    none = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
    return jax.lax.scan(add, none, (split, jnp.arange(parts)))[0]


def _parts(batch: Batch, parts: int, partition: Partition) -> Batch:
    """Leaves [B, ...] as [parts, B / parts, ...]: every device cuts up its own rows."""
    rows, shards = batch.ids.shape[0], partition.row_shards
    if rows % (shards * parts):
        raise InputError(
            f"a batch of {rows} rows does not divide into {parts} equal parts for each of the mesh's {shards} shards"
        )

    def split(x):
        x = x.reshape(rows // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return partition.constrain(x, None, BATCH, *(None,) * (x.ndim - 2))

    return jax.tree.map(split, batch)


# ---------------------------------------------------------------- loss


def next_tokens(batch: Batch) -> jax.Array:
    """[B, S]: the label that each position has to predict, its successor's in the same segment; `IGNORE` if none."""
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
      params: the whole model, layers stacked; it computes in `config.dtype`.
      dropout: key for LoRA's; None drops nothing.
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
            static = dict(partition=partition, remat=config.remat)
            x_BSD = llama.decode(params["decoder"], model, x_BSD, batch.positions, batch.segments, **static)
        trained = is_trained("decoder/head/kernel", config)
        return _head_loss(params["decoder"], x_BSD, next_tokens(batch), model, partition, trained)

    if config.reduce_dtype in (None, config.dtype):
        params = compute_dtype(params)  # before they are each device's own: so gradients are summed in it
    return partition.map_rows(of_rows, params, batch, dropout)


def _head_loss(
    params: Params, x_BSD: jax.Array, targets_BS: jax.Array, model: LlavaConfig, partition: Partition, trained: bool
) -> jax.Array:
    """Logits and their cross entropy, only where there is a label, and only a piece of them at a time.

    Each row's labelled positions come first; after the last of them, in the row that has most of a device's own, pieces
    are skipped. That is decided as the program runs: nothing is compiled anew for another share of labels.

    Where gradients are wanted, a piece's is taken while its logits are there, so that they are not computed a second
    time; that of the head only if it is `trained`.
    """
    B, S = targets_BS.shape
    logits_of_position = B * -(-model.text.vocab_size // partition.size(TENSOR))
    n = min(S, PIECE, max(128, PIECE_LOGITS // logits_of_position // 128 * 128))
    pieces = -(-S // n)
    order_BS = jnp.argsort(targets_BS == IGNORE, axis=1, stable=True)
    targets_BS = jnp.take_along_axis(targets_BS, order_BS, axis=1)
    most = jnp.max(jnp.sum(targets_BS != IGNORE, axis=1))
    spare = ((0, 0), (0, pieces * n - S))
    order_pBn = jnp.pad(order_BS, spare).reshape(B, pieces, n).swapaxes(0, 1)
    targets_pBn = jnp.pad(targets_BS, spare, constant_values=IGNORE).reshape(B, pieces, n).swapaxes(0, 1)
    parts = jnp.arange(pieces) * n < most, order_pBn, targets_pBn

    def pick(x_BSD, order_Bn):
        picked_BnD = jnp.take_along_axis(x_BSD, order_Bn[..., None], axis=1, mode="promise_in_bounds")
        return partition.constrain(picked_BnD, BATCH, None, None)

    def loss_of_piece(params, picked_BnD, targets_Bn):
        logits_BnV = partition.constrain(llama.logits(params, model, picked_BnD), BATCH, None, TENSOR)
        wanted = jnp.arange(logits_BnV.shape[-1]) == targets_Bn[..., None]
        right_Bn = jnp.sum(jnp.where(wanted, logits_BnV, 0), axis=-1)
        return jnp.sum(jnp.where(targets_Bn != IGNORE, jax.nn.logsumexp(logits_BnV, axis=-1) - right_Bn, 0))

    def over_pieces(add_piece, sums, parts):
        def step(sums, part):
            needed, order_Bn, targets_Bn = part
            return jax.lax.cond(needed, add_piece, lambda sums, *_: sums, sums, order_Bn, targets_Bn), None

        return jax.lax.scan(step, sums, parts)[0]

    @jax.custom_vjp
    def loss(params, x_BSD, parts):
        def add_piece(total, order_Bn, targets_Bn):
            return total + loss_of_piece(params, pick(x_BSD, order_Bn), targets_Bn)

        return over_pieces(add_piece, jnp.zeros(()), parts)

    def loss_and_gradients(params, x_BSD, parts):
        frozen, trainable = ({}, params) if trained else (params, {})

        def add_piece(sums, order_Bn, targets_Bn):
            def of_both(trainable, picked_BnD):
                return loss_of_piece(frozen | trainable, picked_BnD, targets_Bn)

            more, (d_more, d_BnD) = jax.value_and_grad(of_both, (0, 1))(trainable, pick(x_BSD, order_Bn))
            total, d_params, d_BSD = sums
            row_B1 = jnp.arange(B)[:, None]
            return total + more, jax.tree.map(jnp.add, d_params, d_more), d_BSD.at[row_B1, order_Bn].add(d_BnD)

        zeros = jax.tree.map(jnp.zeros_like, (trainable, x_BSD))
        total, *gradients = over_pieces(add_piece, (jnp.zeros(()), *zeros), parts)
        return total, gradients

    def scaled(gradients, by):
        d_params, d_BSD = jax.tree.map(lambda x: (by * x).astype(x.dtype), gradients)
        return d_params or None, d_BSD, None

    loss.defvjp(loss_and_gradients, scaled)
    # Gathered here, not in each piece.
    return loss(
        {
            name: partition.gather(params[name], f"decoder/{name}")
            for name in ("norm", "embed" if model.text.tied_head else "head")
        },
        x_BSD,
        parts,
    )


# ---------------------------------------------------------------- parameters in and out


def is_trained(path: str, config: TrainConfig) -> bool:
    """Whether the parameter at `path`, stacked or not, is trained."""
    return part_of(path) in ("projector" if config.tune == "lora" else config.tune).split(",")


def load_dtype(path: str, config: TrainConfig) -> str:
    """The type in which the parameter at `path` is wanted: float32 if trained, the compute dtype if not."""
    return "float32" if is_trained(path, config) else config.dtype


def _place(params: Params, config: TrainConfig, partition: Partition):
    """Frozen and trained parameters by path: layers stacked, each cast and cut. Empties `params` on the way."""
    flat = flatten_dict(params, sep="/")
    params.clear()
    layers_of = collections.Counter(LAYER.sub("/layers/", path) for path in flat)
    frozen, trained = {}, {}
    for path, layers in layers_of.items():
        stacked, dtype = "/layers/" in path, jnp.dtype(load_dtype(path, config))
        leaves = [flat.pop(path.replace("/layers/", f"/layers/{i}/")) for i in range(layers)]
        shape = ((len(leaves),) if stacked else ()) + leaves[0].shape
        cut = partition.stacked_sharding(path, shape)
        if isinstance(leaves[0], jax.ShapeDtypeStruct):
            placed = jax.ShapeDtypeStruct(shape, dtype, sharding=cut)
        else:
            placed = _stack(leaves, dtype, stacked, cut)
        (trained if is_trained(path, config) else frozen)[path] = placed
    return frozen, trained


@functools.partial(jax.jit, static_argnames=("dtype", "stacked", "cut"))
def _stack(leaves: list[jax.Array], dtype, stacked: bool, cut: NamedSharding) -> jax.Array:
    leaves = [x.astype(dtype) for x in leaves]
    return jax.lax.with_sharding_constraint(jnp.stack(leaves) if stacked else leaves[0], cut)


def _made(make: Callable, cuts: Any, *args: Any) -> Any:
    """What `make` gives, where `cuts` has it; shapes, if the arguments are shapes."""
    if isinstance(jax.tree.leaves(args)[0], jax.ShapeDtypeStruct):
        shapes = jax.eval_shape(make, *args)
        return jax.tree.map(lambda x, cut: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut), shapes, cuts)
    return jax.jit(make, out_shardings=cuts)(*args)


def _start_lora(frozen: dict[str, jax.Array], config: TrainConfig, partition: Partition):
    kernels = {path: frozen[path] for path in lora.adapted_kernels(frozen, config)}
    make = functools.partial(lora.init_lora, config=config)
    cuts = {path: partition.stacked_sharding(path, x.shape) for path, x in jax.eval_shape(make, kernels).items()}
    return _made(make, cuts, kernels)


def union(a: Params, b: Params) -> Params:
    return a | {key: union(a[key], value) if key in a else value for key, value in b.items()}


def export_params(frozen: Params, state: TrainState) -> Params:
    """The whole model, one entry for each layer; LoRA's factors stand beside their kernels.

    What was trained is float32, what was not (`{}` leaves it out) is as `setup` was given it, bit for bit, if that was
    in the compute dtype.
    """
    exported = {}
    for path, x in flatten_dict(union(frozen, state.trained), sep="/").items():
        head, layers, tail = path.partition("/layers/")
        if layers:
            cut = NamedSharding(x.sharding.mesh, P(*x.sharding.spec[1:]))
            exported |= {f"{head}/layers/{i}/{tail}": layer for i, layer in enumerate(_unstack(x, cut))}
        else:
            exported[path] = x
    return unflatten_dict(exported, sep="/")


@functools.partial(jax.jit, static_argnames="cut")
def _unstack(x: jax.Array, cut: NamedSharding) -> list[jax.Array]:
    return [jax.lax.with_sharding_constraint(layer, cut) for layer in x]
