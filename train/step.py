"""A training step: loss, gradient of the trained parameters, optimizer; and the evaluation of a batch.

    params --setup--> frozen (compute dtype)
                      state  (float32 masters, optimizer) --step_fn--> state

Only the masters are differentiated, so nothing else has a gradient or optimizer state.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError
from llava_jax.data.splice import IGNORE, Batch
from llava_jax.models.llava import Params
from llava_jax.sharding.fsdp import gradient_options
from llava_jax.sharding.mesh import BATCH
from llava_jax.sharding.partition import Partition
from train.config import TrainConfig
from train.loss import loss_sum, next_tokens
from train.optim import make_optimizer, part_of, peak, schedule
from train.parameters import make_sharded, split_params, union

Metrics = dict[str, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "trained", "opt_state", "skipped", "skipped_total"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a step updates.

    step           int32: steps, including skipped ones
    trained        master weights, float32, layers stacked
    opt_state      of optax, for the trained parameters only
    skipped        int32: latest consecutive steps skipped because the loss or gradient was not finite
    skipped_total  int32: all skipped steps
    """

    step: jax.Array
    trained: Params
    opt_state: Any
    skipped: jax.Array
    skipped_total: jax.Array


class StepFn(Protocol):
    def __call__(self, frozen: Params, state: TrainState, batch: Batch, /) -> tuple[TrainState, Metrics]: ...
    def lower(self, frozen: Params, state: TrainState, batch: Batch, /) -> jax.stages.Lowered: ...


EvalFn = Callable[[Params, TrainState, Batch], Metrics]


def setup(
    params: Params, model: LlavaConfig, config: TrainConfig, mesh: Mesh, total_steps: int
) -> tuple[Params, TrainState, StepFn, EvalFn]:
    """Make the initial state and the step functions of a run.

    Args:
      params: as `checkpoints.checkpoint` loads them, preferably in the dtypes of `load_dtype`; empty afterwards. Or
        their shapes (`llava.param_shapes`): then `frozen` and `state` are shapes too, to compile ahead of time.
      total_steps: of the whole run, for the schedule.

    Returns:
      frozen: the frozen parameters, in the compute dtype.
      state: the initial state.
      step_fn: (frozen, state, batch) -> (state, metrics), compiled for each batch shape; it donates its `state`.
        Metrics are scalars: `loss` (mean over all labelled positions of the global batch), `grad_norm` (of
        all trained parameters, before clipping), `learning_rate` (of the decoder, or of the first trained part),
        `labelled` (positions), `ok` (False: the step was skipped).
      eval_fn: (frozen, state, batch) -> `loss_sum` and `labelled`.

    Raises:
      InputError: nothing would be trained; later, from `step_fn`, a batch whose rows the mesh does not divide.
    """
    partition = Partition(model, mesh)
    frozen, trained = split_params(params, config, partition)
    if not trained:
        raise InputError(
            f"--tune {config.tune}: a model with projector {model.projector!r} has no parameters to train there"
        )
    top_rate = peak(part_of(min(trained)), config)
    frozen, trained = unflatten_dict(frozen, sep="/"), unflatten_dict(trained, sep="/")
    optimizer = make_optimizer(config, total_steps)
    state = start_state(trained, optimizer, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    steps = Steps(model, config, partition, optimizer, schedule(config, total_steps), top_rate, shardings.trained)
    replicated = NamedSharding(mesh, P())
    step_fn = jax.jit(
        steps.step, donate_argnums=1, out_shardings=(shardings, replicated), compiler_options=gradient_options(mesh)
    )
    return frozen, state, step_fn, jax.jit(steps.evaluate, out_shardings=replicated)


def start_state(trained: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step: moments are sharded as their parameters, the rest is replicated."""
    replicated = NamedSharding(mesh, P())
    opt_shardings = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trained),
        jax.tree.map(lambda x: x.sharding, trained),
        transform_non_params=lambda _: replicated,
    )

    def start(trained):
        return optimizer.init(trained), [jnp.zeros((), jnp.int32) for _ in range(3)]

    opt_state, zeros = make_sharded(start, (opt_shardings, [replicated] * 3), trained)
    return TrainState(zeros[0], trained, opt_state, *zeros[1:])


# ---------------------------------------------------------------- compiled


@dataclasses.dataclass(frozen=True)
class Steps:
    """The functions to compile, and their static values.

    schedule   step -> share of the peak learning rate
    top_rate   peak of the learning rate in the metrics
    shardings  of the trained parameters
    """

    model: LlavaConfig
    config: TrainConfig
    partition: Partition
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    top_rate: float
    shardings: Any

    def step(self, frozen: Params, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One step; if the loss or the gradient is not finite, only the counts change."""
        labelled = jnp.sum(next_tokens(batch) != IGNORE)
        loss, grads = self.loss_and_gradients(frozen, state, batch, labelled)
        norm = optax.tree.norm(grads)
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.trained)
        new, old = (optax.apply_updates(state.trained, updates), opt_state), (state.trained, state.opt_state)
        trained, opt_state = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, old)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": self.top_rate * self.schedule(state.step - state.skipped_total),
            "labelled": labelled,
            "ok": ok,
        }
        skipped = jnp.where(ok, 0, state.skipped + 1)
        return TrainState(state.step + 1, trained, opt_state, skipped, state.skipped_total + ~ok), metrics

    def loss_and_gradients(self, frozen: Params, state: TrainState, batch: Batch, labelled: jax.Array):
        """Mean loss over the labelled positions and its gradient, summed over the accumulated parts."""
        config = self.config
        # For dropout, which needs a number for each input of each adapter: "rbg" is a single operation that TPUs have
        # in hardware; JAX's default generator takes about fifty per number.
        key = jax.random.fold_in(jax.random.key(config.seed, impl="rbg"), state.step)

        def loss_of_part(trained, part, number):
            params = union(frozen, trained)
            dropout = jax.random.fold_in(key, number) if config.tune == "lora" and config.lora_dropout else None
            return loss_sum(params, part, self.model, config, self.partition, dropout) / jnp.maximum(labelled, 1)

        def of_part(part, number):
            loss, grads = jax.value_and_grad(loss_of_part)(state.trained, part, number)
            return loss, jax.lax.with_sharding_constraint(grads, self.shardings)

        def add(total, part):
            return jax.tree.map(jnp.add, total, of_part(*part)), None

        parts = split_batch(batch, config.accumulate, self.partition)
        if config.accumulate == 1:
            return of_part(batch, 0)
        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trained))
        return jax.lax.scan(add, zeros, (parts, jnp.arange(config.accumulate)))[0]

    def evaluate(self, frozen: Params, state: TrainState, batch: Batch) -> Metrics:
        """The sum of the loss over a batch, and the number of its labelled positions."""
        params = union(frozen, state.trained)
        sum_of_part = lambda part: loss_sum(params, part, self.model, self.config, self.partition)  # noqa: E731
        return {
            "loss_sum": jnp.sum(jax.lax.map(sum_of_part, split_batch(batch, self.config.accumulate, self.partition))),
            "labelled": jnp.sum(next_tokens(batch) != IGNORE),
        }


def split_batch(batch: Batch, parts: int, partition: Partition) -> Batch:
    """Reshape leaves [B, ...] to [parts, B / parts, ...]; each device splits its shard of the rows.

    Raises:
      InputError: the rows do not divide evenly.
    """
    rows, shards = batch.ids.shape[0], partition.row_shards
    if rows % (shards * parts):
        raise InputError(
            f"a batch of {rows} rows does not divide into {parts} equal parts for each of the mesh's {shards} shards"
        )

    def split(x):
        x = x.reshape(rows // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return partition.constrain(x, None, BATCH, *(None,) * (x.ndim - 2))

    return jax.tree.map(split, batch)
