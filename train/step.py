"""One update: loss, gradient with respect to what is trained, optimiser; and the way in and out of it.

    params --setup--> frozen (compute dtype)                                  --export_params--> params
                      state  (float32 masters, optimiser) --step_fn--> state

Both trees are those of `llava_jax.llava`, layers stacked along a leading axis, and have no leaf in common; the
model sees their union. Only the masters are differentiated, so nothing else has a gradient or optimiser state.
"""

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

from llava_jax import decoder, llava
from llava_jax.config import LlavaConfig
from llava_jax.console import InputError
from llava_jax.llava import Params
from llava_jax.sharding import BATCH, TENSOR, constrain, gather, param_spec, row_multiple
from llava_jax.splice import IGNORE, Batch
from train import lora
from train.config import TrainConfig
from train.optim import make_optimizer, part_of, peak, schedule

PIECE = 512  # positions of a row whose logits are computed at once, at most
PIECE_LOGITS = 2**26  # logits that a device holds at once

Metrics = dict[str, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "trained", "opt_state", "skipped", "skipped_total"],
    meta_fields=[],
)
@dataclasses.dataclass
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
      params: as `llava_jax.checkpoint` loads them, best in the types of `load_dtype`. They are taken apart: the
        dictionary is empty afterwards, so that no weight is there twice for longer than it takes to stack it.
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
    frozen, trained = _place(params, model, config, mesh)
    if config.tune == "lora":
        trained |= _start_lora(frozen, model, config, mesh)
    if not trained:
        raise InputError(f"--tune {config.tune}: a model with projector {model.projector!r} has nothing to train there")
    frozen, trained = unflatten_dict(frozen, sep="/"), unflatten_dict(trained, sep="/")
    optimizer = make_optimizer(config, total_steps)
    whole = NamedSharding(mesh, P())
    cuts = jax.tree.map(lambda x: x.sharding, trained)
    opt_cuts = optax.tree_map_params(
        optimizer,
        lambda _, cut: cut,
        jax.eval_shape(optimizer.init, trained),
        cuts,
        transform_non_params=lambda _: whole,
    )
    opt_state = jax.jit(optimizer.init, out_shardings=opt_cuts)(trained)
    zeros = [jax.device_put(jnp.zeros((), jnp.int32), whole) for _ in range(3)]
    state = TrainState(zeros[0], trained, opt_state, *zeros[1:])

    share = schedule(config, total_steps)
    top_rate = peak(part_of(min(flatten_dict(trained, sep="/"))), config)
    forward = functools.partial(loss_sum, model=model, config=config, mesh=mesh)

    def step(frozen: Params, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        labelled = jnp.sum(next_tokens(batch) != IGNORE)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def part_loss(trained, part, number):
            key_of_part = jax.random.fold_in(key, number) if config.tune == "lora" and config.lora_dropout else None
            return forward(_union(frozen, trained), part, key=key_of_part) / jnp.maximum(labelled, 1)

        loss, grads = 0.0, None
        if config.accumulate == 1:
            loss, grads = jax.value_and_grad(part_loss)(state.trained, batch, 0)
            grads = jax.lax.with_sharding_constraint(grads, cuts)
        else:

            def add(total, part):
                new = jax.value_and_grad(part_loss)(state.trained, *part)
                loss, grads = jax.tree.map(jnp.add, total, new)
                return (loss, jax.lax.with_sharding_constraint(grads, cuts)), None

            parts = (_split(batch, config.accumulate, mesh), jnp.arange(config.accumulate))
            (loss, grads), _ = jax.lax.scan(add, (0.0, jax.tree.map(jnp.zeros_like, state.trained)), parts)

        norm = optax.global_norm(grads)
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        new, old = (optax.apply_updates(state.trained, updates), opt_state), (state.trained, state.opt_state)
        trained, opt_state = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, old)
        skipped = jnp.where(ok, 0, state.skipped + 1)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": top_rate * share(state.step - state.skipped_total),
            "labelled": labelled,
            "ok": ok,
        }
        return TrainState(state.step + 1, trained, opt_state, skipped, state.skipped_total + ~ok), metrics

    def evaluate(frozen: Params, state: TrainState, batch: Batch) -> Metrics:
        labelled = jnp.sum(next_tokens(batch) != IGNORE)
        return {"loss_sum": forward(_union(frozen, state.trained), batch), "labelled": labelled}

    state_cuts = jax.tree.map(lambda x: x.sharding, state)
    step_fn = jax.jit(step, donate_argnums=1, out_shardings=(state_cuts, whole))
    return frozen, state, step_fn, jax.jit(evaluate, out_shardings=whole)


# ---------------------------------------------------------------- loss


def next_tokens(batch: Batch) -> jax.Array:
    """[B, S]: the label that each position has to predict, its successor's in the same segment; `IGNORE` if none."""
    same = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] > 0)
    return jnp.pad(jnp.where(same, batch.labels[:, 1:], IGNORE), ((0, 0), (0, 1)), constant_values=IGNORE)


def loss_sum(
    params: Params,
    batch: Batch,
    *,
    model: LlavaConfig,
    config: TrainConfig,
    mesh: Mesh,
    key: jax.Array | None = None,
) -> jax.Array:
    """Cross entropy summed over all labelled positions, float32.

    Args:
      params: the whole model, layers stacked; it computes in `config.dtype`.
      key: for LoRA's dropout; None drops nothing.
    """
    params = jax.tree.map(lambda x: x.astype(config.dtype), params)
    if key is not None:
        layers = lora.add_dropout(params["decoder"]["layers"], key)
        params = params | {"decoder": params["decoder"] | {"layers": layers}}
    with lora.adapted(config):
        x_BSD = llava.embed_batch(params, model, batch, mesh, config.remat)
        x_BSD = decoder.decode(
            params["decoder"], model, x_BSD, batch.positions, batch.segments, mesh=mesh, remat=config.remat
        )
    return _head_loss(params["decoder"], x_BSD, next_tokens(batch), model, mesh)


def _head_loss(params: Params, x_BSD: jax.Array, targets_BS: jax.Array, model: LlavaConfig, mesh: Mesh) -> jax.Array:
    """Logits and their cross entropy, only where there is a label, and only a piece of them at a time.

    Each row's labelled positions come first; after the last of them, in the row that has most, pieces are skipped.
    That is decided as the program runs: nothing is compiled anew for another share of labels.
    """
    B, S = targets_BS.shape
    logits_of_position = -(-B // row_multiple(mesh)) * -(-model.text.vocab_size // mesh.shape[TENSOR])
    n = min(S, PIECE, max(128, PIECE_LOGITS // logits_of_position // 128 * 128))
    pieces = -(-S // n)
    order_BS = jnp.argsort(targets_BS == IGNORE, axis=1, stable=True)
    targets_BS = jnp.take_along_axis(targets_BS, order_BS, axis=1)
    most = jnp.max(jnp.sum(targets_BS != IGNORE, axis=1))
    spare = ((0, 0), (0, pieces * n - S))
    order_pBn = jnp.pad(order_BS, spare).reshape(B, pieces, n).swapaxes(0, 1)
    targets_pBn = jnp.pad(targets_BS, spare, constant_values=IGNORE).reshape(B, pieces, n).swapaxes(0, 1)
    # Gathered here, not in each piece.
    params = {
        name: gather(params[name], f"decoder/{name}", model, mesh)
        for name in ("norm", "embed" if model.text.tied_head else "head")
    }

    @jax.checkpoint
    def piece(params, x_BSD, order_Bn, targets_Bn):
        picked_BnD = constrain(jnp.take_along_axis(x_BSD, order_Bn[..., None], axis=1), mesh, BATCH, None, None)
        logits_BnV = constrain(decoder.logits(params, model, picked_BnD), mesh, BATCH, None, TENSOR)
        wanted = jnp.arange(logits_BnV.shape[-1]) == targets_Bn[..., None]
        right_Bn = jnp.sum(jnp.where(wanted, logits_BnV, 0), axis=-1)
        return jnp.sum(jnp.where(targets_Bn != IGNORE, jax.nn.logsumexp(logits_BnV, axis=-1) - right_Bn, 0))

    def add(total, part):
        number, order_Bn, targets_Bn = part
        loss = jax.lax.cond(number * n < most, piece, lambda *_: 0.0, params, x_BSD, order_Bn, targets_Bn)
        return total + loss, None

    return jax.lax.scan(add, jnp.zeros(()), (jnp.arange(pieces), order_pBn, targets_pBn))[0]


def _split(batch: Batch, parts: int, mesh: Mesh) -> Batch:
    """[B, ...] to [parts, B / parts, ...]: every device cuts up its own rows."""

    def split(x):
        cut = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(cut, mesh, None, BATCH, *(None,) * (x.ndim - 1))

    return jax.tree.map(split, batch)


# ---------------------------------------------------------------- parameters in and out


def is_trained(path: str, config: TrainConfig) -> bool:
    """Whether the parameter at `path`, stacked or not, is trained."""
    return part_of(path) in ("projector" if config.tune == "lora" else config.tune).split(",")


def load_dtype(path: str, config: TrainConfig) -> str:
    """The type in which the parameter at `path` is wanted: float32 if trained, the compute dtype if not."""
    return "float32" if is_trained(path, config) else config.dtype


def _place(params: Params, model: LlavaConfig, config: TrainConfig, mesh: Mesh):
    """Frozen and trained parameters by path: layers stacked, each cast and cut. Empties `params` on the way."""
    flat = flatten_dict(params, sep="/")
    params.clear()
    members: dict[str, list[tuple[int, str]]] = {}
    for path in flat:
        number = re.search(r"(?<=/layers/)\d+/", path)
        stacked = path.replace(number[0], "", 1) if number else path
        members.setdefault(stacked, []).append((int(number[0][:-1]) if number else 0, path))
    frozen, trained = {}, {}
    for path, numbered in members.items():
        leaves = [flat.pop(member) for _, member in sorted(numbered)]
        shape = ((len(leaves),) if "/layers/" in path else ()) + leaves[0].shape
        cut = _cut(path, shape, model, mesh)
        placed = _placed(leaves, jnp.dtype(load_dtype(path, config)), "/layers/" in path, cut)
        (trained if is_trained(path, config) else frozen)[path] = placed
    return frozen, trained


@functools.partial(jax.jit, static_argnames=("dtype", "stack", "cut"))
def _placed(leaves: list[jax.Array], dtype, stack: bool, cut: NamedSharding) -> jax.Array:
    leaves = [x.astype(dtype) for x in leaves]
    return jax.lax.with_sharding_constraint(jnp.stack(leaves) if stack else leaves[0], cut)


def _cut(path: str, shape: tuple[int, ...], model: LlavaConfig, mesh: Mesh) -> NamedSharding:
    """Where a parameter of these trees lies: as `sharding.param_spec` has it, the axis of layers whole."""
    if "/layers/" in path:
        return NamedSharding(mesh, P(None, *param_spec(path, shape[1:], model, mesh)))
    return NamedSharding(mesh, param_spec(path, shape, model, mesh))


def _start_lora(frozen: dict[str, jax.Array], model: LlavaConfig, config: TrainConfig, mesh: Mesh):
    kernels = {path: frozen[path] for path in lora.adapted_kernels(frozen, config)}
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in kernels.items()}
    make = functools.partial(lora.init_lora, shapes, config)
    cuts = {path: _cut(path, x.shape, model, mesh) for path, x in jax.eval_shape(make, jax.random.key(0)).items()}
    return jax.jit(make, out_shardings=cuts)(jax.random.key(config.seed))


def _union(a: Params, b: Params) -> Params:
    return a | {key: _union(a[key], value) if key in a else value for key, value in b.items()}


def export_params(frozen: Params, state: TrainState, dtype=None) -> Params:
    """The model, one entry for each layer; LoRA's factors beside their kernels (`lora.merge` adds them up).

    Args:
      dtype: of what was trained; None for the masters' float32. What was not is as it came, bit for bit.
    """
    exported = {}
    for tree, wanted in ((frozen, None), (state.trained, dtype)):
        for path, x in flatten_dict(tree, sep="/").items():
            head, layers, tail = path.partition("/layers/")
            parts = _unstacked(x, jnp.dtype(wanted or x.dtype), bool(layers), x.sharding)
            exported |= {f"{head}/layers/{i}/{tail}" if layers else path: part for i, part in enumerate(parts)}
    return unflatten_dict(exported, sep="/")


@functools.partial(jax.jit, static_argnames=("dtype", "stacked", "cut"))
def _unstacked(x: jax.Array, dtype, stacked: bool, cut: NamedSharding) -> list[jax.Array]:
    if not stacked:
        return [x.astype(dtype)]
    cut = NamedSharding(cut.mesh, P(*cut.spec[1:]))
    return [jax.lax.with_sharding_constraint(layer.astype(dtype), cut) for layer in x]
