"""The training loop: load, start or resume, then for each step batch, step, metrics, evaluation, save; export.

Steps are dispatched ahead: while the devices compute step n, the host makes the batch of step n + 1, dispatches it, and
only then reads the metrics of step n.
"""

import contextlib
import math
import signal
from typing import Any

import jax
from jax.sharding import Mesh

from llava_jax.aot.programs import limit_programs
from llava_jax.console import InputError, elapsed, note, plural
from llava_jax.data.splice import Batch
from llava_jax.models.llava import Params
from llava_jax.processes import RESTART, StopSignal, share
from llava_jax.sharding.mesh import format_mesh
from llava_jax.sharding.partition import batch_sharding
from train.evaluation import score_benchmarks
from train.loader import Data
from train.parameters import load_dtype
from train.profiling import Trace
from train.recorder import Recorder
from train.results import export
from train.run import Run
from train.states import SaveClock
from train.step import EvalFn, StepFn, TrainState, setup

AGREE_EVERY = 50  # steps between exchanges of bad samples between processes


def train(run: Run) -> int:
    """Run the remaining steps, and write the result.

    Returns:
      The exit status: 0, or 128 plus the number of the signal that stopped the run.

    Raises:
      InputError: the devices run out of memory; the loss stays non-finite; the result cannot be written.
    """
    try:
        if run.output.is_finished(run.total, run.checkpoints.latest):
            steps = plural(run.total, "step")
            note(f"{run.output.root} holds the finished run: {steps}, model in {run.output.root / 'model'}")
            return 0
        return _train(run)
    except (InputError, OSError) as error:
        if isinstance(error, InputError) or jax.process_count() == 1:  # an OSError is that of one process alone
            run.checkpoints.settle()  # complete a save in progress
        raise
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().split("\n")[0][:300]
        if "RESOURCE_EXHAUSTED" in reason:
            raise InputError(
                f"the devices have too little memory ({reason}): increase fsdp or tensor in --mesh, or --accumulate, "
                "or use --remat full"
            ) from None
        if jax.process_count() > 1:
            raise InputError(f"another process of this run died or is unreachable ({reason}); {RESTART}") from None
        raise
    finally:
        for data in filter(None, (run.data, run.eval_data)):
            data.close()
        run.output.close()


def _train(run: Run) -> int:
    frozen, state, step_fn, eval_fn = load(run)
    state = start_or_resume(run, state)
    batches, step, stopped_by = iter(run.data), run.start, 0
    clock = SaveClock(run.config.save_minutes, step)
    trace = Trace(run.traced, run.output.files / "profile")
    with Recorder(run, skipped=int(state.skipped)) as recorder, StopSignal() as stop:
        while step < run.total and not stopped_by:
            batch, info = recorder.waiting(lambda: next(batches))
            limit_programs()
            trace.start(step + 1)
            with elapsed("compiling the first step") if step == run.start else contextlib.nullcontext():
                state, metrics = step_fn(frozen, state, put_batch(batch, run.mesh, run.data.rows))
            step += 1
            recorder.add(step, metrics, info, batch)
            last = step == run.total
            trace.stop(step, recorder.read, last=last)
            stopped_by = stop.at(step)

            eval_loss, best = math.nan, False
            evaluates = last or is_multiple(step, run.config.eval_every)
            if evaluates and run.eval_data:
                recorder.read()
                eval_loss = evaluate(run.eval_data, run.mesh, frozen, state, eval_fn)
                best = recorder.evaluated(eval_loss)
            if evaluates and run.benchmarks:
                recorder.read()
                recorder.scored(score_benchmarks(run, step, frozen, state.trained, stop))

            due = stopped_by or last or best or is_multiple(step, run.config.save_every) or clock.is_due(step)
            if jax.process_count() > 1 and (due or step % AGREE_EVERY == 0):
                run.data.bad.agree(share)
            if due:
                recorder.catch_up()  # so that metrics are written up to the saved step
                save(run, step, state, eval_loss)
                clock.saved(step)
        trace.stop(step, recorder.read, last=True)
    run.checkpoints.finish()
    if step < run.total:
        name = signal.Signals(stopped_by).name
        note(f"stopped by {name} after step {step} of {run.total}; the same command resumes from there")
        return 128 + stopped_by
    export(run.output, run.checkpoint, run.model, run.config, state)
    run.output.push(last=True)
    note(f"{plural(run.total, 'step')} done; the model is in {run.output.root / 'model'}")
    return 0


def load(run: Run) -> tuple[Params, TrainState, StepFn, EvalFn]:
    """Load the input checkpoint's weights onto the mesh, and make the step functions; see `step.setup`."""
    params = run.checkpoint.load(run.mesh, lambda path: load_dtype(path, run.config))
    frozen, state, step_fn, eval_fn = setup(params, run.model, run.config, run.mesh, run.total)
    trained, kept = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.trained, frozen))
    note(
        f"{trained:,} parameters are trained, {kept:,} are frozen; {run.mesh.size} x "
        f"{run.mesh.devices.flat[0].device_kind}, {format_mesh(run.mesh.shape)}; compiling the first step"
    )
    return frozen, state, step_fn, eval_fn


def start_or_resume(run: Run, state: TrainState) -> TrainState:
    """Restore the latest state of the run; without one, return `state`."""
    if run.progress:
        state = run.checkpoints.restore(state)
        note(f"resuming after step {run.start} of {run.total}")
    elif run.output.resumed:
        note("no checkpoint yet; starting from step 0")
    return state


def is_multiple(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; never if `every` is 0."""
    return every > 0 and step % every == 0


def put_batch(batch: Batch, mesh: Mesh, rows: int) -> Batch:
    """Put this process's rows of a batch on its devices; `rows` is the number of rows of the global batch."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:])), batch)


def evaluate(data: Data, mesh: Mesh, frozen: Params, state: TrainState, eval_fn: EvalFn) -> float:
    """Mean loss over the labelled positions of `data`; NaN, with a warning, if the data cannot be used."""
    loss = labelled = 0.0
    try:
        for batch, _ in data:
            sums = jax.device_get(eval_fn(frozen, state, put_batch(batch, mesh, data.rows)))
            loss, labelled = loss + float(sums["loss_sum"]), labelled + float(sums["labelled"])
    except InputError as error:  # raised on all processes: errors of a single one are raised only by `agree`
        note(f"warning: no evaluation: {error}")
        return math.nan
    return loss / max(labelled, 1.0)


def save(run: Run, step: int, state: TrainState, eval_loss: float) -> None:
    """Save the state with the position in the data, and `eval_loss` if it is finite."""
    progress: dict[str, Any] = {
        "step": step,
        "total": run.total,
        "data": run.data.get_state(),
        "bad": run.data.bad.get_state(),
    }
    run.checkpoints.save(step, state, progress, eval_loss if math.isfinite(eval_loss) else None)
    run.output.push()
