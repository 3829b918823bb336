"""A run from its configuration to its result: prepare, update, evaluate, save, export.

Updates are dispatched ahead: while the devices compute update n, the host makes the batch of update n + 1, and only
after that has been dispatched are the metrics of update n read.
"""

import collections
import contextlib
import dataclasses
import json
import math
import re
import signal
import time
from typing import Any

import jax
from jax.sharding import Mesh

from llava_jax.aot.programs import limit_programs
from llava_jax.checkpoints.checkpoint import Checkpoint, open_checkpoint
from llava_jax.checkpoints.hf_files import check_expressible
from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, Progress, elapsed, note, plural, shorten
from llava_jax.data.splice import Batch
from llava_jax.sharding.mesh import FSDP, format_mesh, make_mesh, parse_mesh, row_multiple
from llava_jax.sharding.partition import batch_sharding
from train.config import TrainConfig, check_preset
from train.loader import Data, check_batch, open_data
from train.metrics import MetricsFiles, device_memory, device_peak, flops_of_batch
from train.optim import check_rates
from train.processes import AGAIN, StopSignal, share, together
from train.results import export
from train.run_directory import Output
from train.states import Checkpoints, RunProgress, SaveClock
from train.step import TrainState, load_dtype, setup

AGREE_EVERY = 50  # updates after which processes tell each other which images of theirs are broken
MOST_SKIPPED = 10  # updates in a row that may be left out for a loss or gradient that is not finite


@dataclasses.dataclass
class Run:
    """Everything that is known before the first weight is read."""

    config: TrainConfig
    mesh: Mesh
    output: Output
    found: Checkpoint
    model: LlavaConfig  # the checkpoint's, with the run's image settings
    checkpoints: Checkpoints
    progress: dict[str, Any] | None  # of the checkpoint to go on from
    data: Data
    eval_data: Data | None
    total: int  # updates

    @property
    def start(self) -> int:
        """Updates that an earlier process made."""
        return self.progress["step"] if self.progress else 0


def train(run: Run) -> int:
    """Make the updates that are left, and write the result.

    Returns:
      The exit status: 0, or 128 and the number of the signal that ended the run early.

    Raises:
      InputError: the devices are too small; the loss stays infinite; the result cannot be written.
    """
    try:
        if run.output.is_finished(run.total, run.checkpoints.latest):
            updates = plural(run.total, "update")
            note(f"{run.output.root} holds the finished run: {updates}, the model in {run.output.root / 'model'}")
            return 0
        return _train(run)
    except InputError:
        run.checkpoints.settle()  # a save under way is worth waiting for
        raise
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().split("\n")[0][:300]
        if "RESOURCE_EXHAUSTED" in reason:
            raise InputError(
                f"the devices have too little memory ({reason}): give --mesh more fsdp or tensor, or --accumulate more "
                "parts, or --remat full"
            ) from None
        if jax.process_count() > 1:
            raise InputError(f"another process of this run is gone or out of reach ({reason}); {AGAIN}") from None
        raise
    finally:
        for data in filter(None, (run.data, run.eval_data)):
            data.close()
        run.output.close()


# ---------------------------------------------------------------- before


def prepare(config: TrainConfig) -> Run:
    """Look at all input, read no weight, compile nothing.

    Raises:
      InputError: on all processes, if anything is wrong for one of them.
      OSError: the output directory cannot be written.
    """
    mesh = make_mesh(parse_mesh(config.mesh) if config.mesh else {FSDP: -1})
    check_batch(config, mesh)
    opened: dict[str, Any] = {}
    try:
        return _open(config, mesh, opened)
    except BaseException:
        if "output" in opened:
            opened["output"].withdraw()
            opened["output"].close()
        raise


def _open(config: TrainConfig, mesh: Mesh, opened: dict[str, Any]) -> Run:
    """The rest of `prepare`. `opened` keeps what has been opened so far."""

    def open_all() -> str:
        parse_profile_steps(config.profile_steps)
        opened["found"] = open_checkpoint(config.checkpoint, vision_tower=config.vision_tower)
        check_preset(config, opened["found"].config)
        opened["output"] = Output(config, process=jax.process_index())
        return json.dumps(opened["output"].described)

    together("a configuration or data", open_all)
    found, output = opened["found"], opened["output"]
    checkpoints = Checkpoints(output.root / "checkpoints", config.keep)
    progress = checkpoints.progress(RunProgress)
    part, parts = rows_part(mesh)

    def open_rows() -> str:
        arguments = dict(
            rows_multiple=row_multiple(mesh) * config.accumulate, process=part, processes=parts, folder=output.files
        )
        opened["data"] = open_data(config, found.config, found.tokenizer, **arguments)
        opened["eval"] = None
        if config.eval_data:
            arguments |= dict(path=config.eval_data, train=False)
            opened["eval"] = open_data(config, found.config, found.tokenizer, **arguments)
        for data in filter(None, (opened["data"], opened["eval"])):
            data.check_memory()
        if progress:
            data = opened["data"]
            data.set_state(progress["data"])
            data.bad.set_state(progress["bad"])
            if empty := data.rows - data.rows_in_use:
                note(
                    f"warning: this mesh does not divide the {plural(data.rows_in_use, 'row')} of a batch; each gets "
                    f"{empty} more, which stay empty: a batch holds about "
                    f"{plural(round(data.estimate()['conversations']), 'conversation')}, as before"
                )
        return str(checkpoints.latest)

    together(f"checkpoints in {output.root}", open_rows)
    total = progress["total"] if progress else opened["data"].total_steps
    if not progress:
        check_rates(config, total, opened["data"].wanted)
    if (traced := parse_profile_steps(config.profile_steps)) and traced[0] > total:
        raise InputError(f"--profile-steps {config.profile_steps}: the run has {plural(total, 'step')}")
    model = found.config.replace(aspect_ratio=config.aspect_ratio) if config.aspect_ratio else found.config
    if config.export_hf:
        check_expressible(model)
    if output.first and not output.resumed:
        output.write_config()
    return Run(config, mesh, output, found, model, checkpoints, progress, opened["data"], opened["eval"], total)


def rows_part(mesh: Mesh) -> tuple[int, int]:
    """Which part of a batch's rows the devices of this process hold, of how many; processes may share one."""
    rows_of = collections.defaultdict(set)
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((row_multiple(mesh),)).items():
        rows_of[device.process_index].add(rows.start or 0)
    parts = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    if sum(map(len, parts)) != row_multiple(mesh) or len({len(part) for part in parts}) > 1:
        axes = format_mesh(mesh.shape)
        raise InputError(f"--mesh {axes}: cuts rows across processes; make tensor a divisor of their devices")
    return parts.index(tuple(sorted(rows_of[jax.process_index()]))), len(parts)


def parse_profile_steps(text: str | None) -> range:
    """`"A:B"` as the steps A to B, counted from 1.

    Raises:
      InputError: it is not that.
    """
    if text is None:
        return range(0)
    numbers = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    first, last = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= first <= last:
        raise InputError(
            f"--profile-steps {shorten(text)}: write A:B, the first and the last step to trace, counted from 1"
        )
    return range(first, last + 1)


# ---------------------------------------------------------------- updates


def _train(run: Run) -> int:
    config, mesh = run.config, run.mesh
    params = run.found.load(mesh, lambda path: load_dtype(path, config))
    frozen, state, step_fn, eval_fn = setup(params, run.model, config, mesh, run.total)
    trained, kept = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.trained, frozen))
    note(
        f"{trained:,} parameters are trained, {kept:,} are not; {mesh.size} x {mesh.devices.flat[0].device_kind}, "
        f"{format_mesh(mesh.shape)}; compiling the first step"
    )
    if run.progress:
        state = run.checkpoints.restore(state)
        note(f"going on after update {run.start} of {run.total}")
    elif run.output.resumed:
        note("no checkpoint yet; starting from step 0")
    traced, tracing = parse_profile_steps(config.profile_steps), False
    batches = iter(run.data)
    step = run.start
    clock = SaveClock(config.save_minutes, step)
    with Recorder(run, skipped=int(state.skipped)) as recorder, StopSignal() as stop:
        while step < run.total:
            batch, info = recorder.waiting(lambda: next(batches))
            if step + 1 in traced and not tracing:
                jax.profiler.start_trace(str(run.output.files / "profile"))
                tracing = True
            limit_programs()
            with elapsed("compiling the first step") if step == run.start else contextlib.nullcontext():
                state, metrics = step_fn(frozen, state, put_batch(batch, mesh, run.data.rows))
            step += 1
            recorder.add(step, metrics, info, batch)
            if tracing and (step + 1 not in traced or step == run.total):
                recorder.read()
                jax.profiler.stop_trace()
                tracing = False
            number, last, best = stop.at(step), step == run.total, False
            eval_loss = math.nan
            if run.eval_data and (last or (config.eval_every and step % config.eval_every == 0)):
                recorder.read()
                eval_loss = evaluate(run, frozen, state, eval_fn)
                best = recorder.evaluated(eval_loss)
            saving = number or last or best or (config.save_every and step % config.save_every == 0)
            saving = saving or clock.is_due(step)
            if jax.process_count() > 1 and (saving or step % AGREE_EVERY == 0):
                run.data.bad.agree(share)
            if saving:
                recorder.catch_up()  # so that what is written of updates is never behind the state to go on from
                progress = dict(step=step, total=run.total, data=run.data.get_state(), bad=run.data.bad.get_state())
                run.checkpoints.save(step, state, progress, eval_loss if math.isfinite(eval_loss) else None)
                clock.saved(step)
                run.output.push()
            if number and not last:
                break
        if tracing:
            recorder.read()
            jax.profiler.stop_trace()
    run.checkpoints.finish()
    if step < run.total:
        name = signal.Signals(number).name
        note(f"stopped by {name} after update {step} of {run.total}; the same command goes on from there")
        return 128 + number
    export(run.output, run.found, run.model, config, state)
    run.output.push(last=True)
    note(f"{plural(run.total, 'update')} done; the model is in {run.output.root / 'model'}")
    return 0


def put_batch(batch: Batch, mesh: Mesh, rows: int) -> Batch:
    """This process's rows of a batch, to the devices."""
    cut = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(cut, x, (rows, *x.shape[1:])), batch)


def evaluate(run: Run, frozen: Any, state: TrainState, eval_fn) -> float:
    """Mean loss over the labelled positions of the evaluation data; NaN, and a word about it, if it cannot be used."""
    loss = labelled = 0.0
    try:
        for batch, _ in run.eval_data:
            sums = jax.device_get(eval_fn(frozen, state, put_batch(batch, run.mesh, run.eval_data.rows)))
            loss, labelled = loss + float(sums["loss_sum"]), labelled + float(sums["labelled"])
    except InputError as error:  # on all processes: what only one knows of is raised by `agree`, not asked for here
        note(f"warning: no evaluation: {error}")
        return math.nan
    return loss / max(labelled, 1.0)


# ---------------------------------------------------------------- what is told of them


class Recorder:
    """Reads metrics one update late, writes them down, shows how it goes, and stops a run that makes no progress."""

    def __init__(self, run: Run, skipped: int):
        self.run, self.config = run, run.config
        self.files = MetricsFiles(run.output.files, run.start) if run.output.first else None
        self.bar = Progress("training", run.total, "updates", every=10.0, done=run.start)
        self.peak = device_peak(run.mesh.devices.flat[0].device_kind)
        self.skipped, self.lost = skipped, collections.deque(maxlen=MOST_SKIPPED)
        self.best = run.checkpoints.best_loss()
        self.waited = 0.0
        self.pending: tuple | None = None  # dispatched, not yet read
        self.record: dict[str, Any] | None = None  # read, not yet written
        self.last_read = time.monotonic()

    def __enter__(self) -> "Recorder":
        self.bar.__enter__()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.catch_up()
        self.bar.__exit__(kind, error, trace)
        if self.files:
            self.files.close()

    def waiting(self, work):
        """Do what the next update has to wait for. It counts where the devices have nothing to do at the end of it,
        so the share that is told is, if anything, too high."""
        begun = time.monotonic()
        done = work()
        idle = self.pending is None or self.pending[1]["loss"].is_ready()
        self.waited = time.monotonic() - begun if idle else 0.0
        return done

    def add(self, step: int, metrics: dict[str, jax.Array], info: dict[str, Any], batch: Batch) -> None:
        """Update `step` has been dispatched: the moment to read the one before it."""
        self.catch_up()
        self.pending = (step, metrics, info, (*batch.ids.shape[1:], *batch.tiles.shape[1:2]), self.waited)

    def catch_up(self) -> None:
        """Read the update that has not been read yet, when it is done, and write down what there is to write."""
        self.read()
        if self.record and self.files:
            step = self.record["step"]
            if step % self.config.log_every == 0 or step == self.run.total or "eval_loss" in self.record:
                self.files.write(self.record)
        self.record = None

    def evaluated(self, loss: float) -> bool:
        """The evaluation after the update read last gave this. Whether it is the best so far."""
        self.last_read = time.monotonic()  # it is no part of the next update
        if math.isnan(loss):
            return False
        self.record["eval_loss"] = loss
        note(f"evaluation after update {self.record['step']}: loss {loss:.4f}")
        better = math.isfinite(loss) and (self.best is None or loss < self.best)
        self.best = loss if better else self.best
        return better

    def read(self) -> None:
        if self.pending is None:
            return
        step, metrics, info, shape, waited = self.pending
        self.pending = None
        values = {name: x.item() for name, x in jax.device_get(metrics).items()}
        now = time.monotonic()
        seconds, self.last_read = now - self.last_read, now
        self._check_finite(step, values["ok"], info["ids"])
        self.record = {
            "step": step,
            "loss": values["loss"],
            "learning_rate": values["learning_rate"],
            "grad_norm": values["grad_norm"],
            "tokens_per_second": round(info["tokens"] / seconds, 2),
            "images_per_second": round(info["images"] / seconds, 2),
            "seconds": round(seconds, 4),
            "data_wait": round(min(1.0, waited / seconds), 4),
            "tokens": info["tokens"],
            "labelled": values["labelled"],
            "padding": round(info["padding"], 4),
            "epoch": info["epoch"],
            "skipped": self.skipped,
            "bad_samples": info["bad"],
        }
        if (memory := device_memory()) is not None:
            self.record["device_memory_gb"] = memory
        if self.peak:
            needed = flops_of_batch(self.run.model, self.config, self.run.data.rows, *shape)
            self.record["peak_share"] = needed / seconds / (self.peak * self.run.mesh.size)
        if step == self.run.start + 1:
            note(f"first step, with compilation, after {seconds:.1f} s: loss {values['loss']:.4f}")
        speed = f"{self.record['tokens_per_second']:,.0f} tokens/s"
        self.bar.advance(1, f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  {speed}")

    def _check_finite(self, step: int, ok: bool, ids: list) -> None:
        self.skipped = 0 if ok else self.skipped + 1
        if ok:
            return
        self.lost.append({"step": step, "ids": ids})
        if self.skipped == 1:
            note(f"warning: update {step} is left out: its loss or gradient is not finite")
        if self.skipped >= MOST_SKIPPED:
            path = self.run.output.files / "nonfinite.json"
            if self.run.output.first:
                path.write_text(json.dumps(list(self.lost)) + "\n")
                self.run.output.push()
            raise InputError(
                f"update {step}: the loss or the gradient is not finite, the {self.skipped}th time in a row; the "
                f"conversations are listed in {self.run.output.root / path.name}; try a lower --learning-rate"
            )
