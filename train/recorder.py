"""Read the metrics of steps one step late, write and show them, and stop a run whose loss stays non-finite."""

import collections
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from llava_jax.aot.chips import device_peak
from llava_jax.aot.flops import step_flops
from llava_jax.console import InputError, Progress, note
from llava_jax.data.splice import Batch
from train.loader import Info
from train.metrics import MetricsFiles, device_memory
from train.run import Run

MAX_SKIPPED = 10  # consecutive steps with a non-finite loss or gradient that stop the run

T = TypeVar("T")


class Recorder:
    """Reads the metrics of each step after the next one is dispatched, so that devices never wait for the host."""

    def __init__(self, run: Run, skipped: int):
        """`skipped`: consecutive steps before the start that were skipped."""
        self.run, self.config = run, run.config
        self.files = MetricsFiles(run.output.files, run.start) if run.output.first else None
        self.bar = Progress("training", run.total, "steps", every=10.0, done=run.start)
        self.peak = device_peak(run.mesh.devices.flat[0].device_kind)
        self.skipped = skipped
        self.nonfinite: collections.deque[dict[str, Any]] = collections.deque(maxlen=MAX_SKIPPED)
        self.best = run.checkpoints.best_loss()
        self.waited = 0.0
        self.pending: tuple | None = None  # dispatched, not yet read
        self.record: dict[str, Any] = {}  # read, not yet written
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

    def waiting(self, work: Callable[[], T]) -> T:
        """Do `work` that the next step waits for, and measure the wait.

        The whole time counts as waiting if the devices are idle at its end, so the reported share is an upper bound.
        """
        begun = time.monotonic()
        done = work()
        idle = self.pending is None or self.pending[1]["loss"].is_ready()
        self.waited = time.monotonic() - begun if idle else 0.0
        return done

    def add(self, step: int, metrics: dict[str, jax.Array], info: Info, batch: Batch) -> None:
        """Called after `step` is dispatched: read the metrics of the previous step."""
        self.catch_up()
        self.pending = (step, metrics, info, (*batch.ids.shape[1:], *batch.tiles.shape[1:2]), self.waited)

    def catch_up(self) -> None:
        """Read the pending step's metrics, and write all that are not yet written."""
        self.read()
        if self.record and self.files:
            step = self.record["step"]
            evaluated = any(name.startswith("eval_") for name in self.record)
            if step % self.config.log_every == 0 or step == self.run.total or evaluated:
                self.files.write(self.record)
        self.record = {}

    def evaluated(self, loss: float) -> bool:
        """Record the evaluation loss after the last step read (NaN for none). Returns whether it is the best so far."""
        self.last_read = time.monotonic()  # evaluation time does not count for the next step
        if math.isnan(loss):
            return False
        assert self.record
        self.record["eval_loss"] = loss
        note(f"evaluation after step {self.record['step']}: loss {loss:.4f}")
        better = math.isfinite(loss) and (self.best is None or loss < self.best)
        self.best = loss if better else self.best
        return better

    def scored(self, scores: Mapping[str, float]) -> None:
        """Record the scores of benchmarks after the last step read."""
        self.last_read = time.monotonic()
        self.record |= scores

    def read(self) -> None:
        """Wait for the pending step, if any, and read its metrics.

        Raises:
          InputError: the loss or gradient was not finite in too many consecutive steps.
        """
        if self.pending is None:
            return
        step, metrics, info, shape, waited = self.pending
        self.pending = None
        values = {name: x.item() for name, x in jax.device_get(metrics).items()}
        now = time.monotonic()
        seconds, self.last_read = now - self.last_read, now
        self._check_finite(step, values["ok"], info["ids"])
        self.record = self._record(step, values, info, shape, seconds, waited)
        if step == self.run.start + 1:
            note(f"first step, with compilation, after {seconds:.1f} s: loss {values['loss']:.4f}")
        speed = f"{self.record['tokens_per_second']:,.0f} tokens/s"
        self.bar.advance(1, f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  {speed}")

    def _record(
        self, step: int, values: dict[str, Any], info: Info, shape: tuple[int, int], seconds: float, waited: float
    ) -> dict[str, Any]:
        """A line of `metrics.jsonl`."""
        record = {
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
            record["device_memory_gb"] = memory
        if self.peak:
            needed = step_flops(self.run.model, self.config.tune, self.run.data.rows, *shape, layers_only=True)
            record["peak_share"] = needed / seconds / (self.peak * self.run.mesh.size)
        return record

    def _check_finite(self, step: int, ok: bool, ids: list) -> None:
        self.skipped = 0 if ok else self.skipped + 1
        if ok:
            return
        self.nonfinite.append({"step": step, "ids": ids})
        if self.skipped == 1:
            note(f"warning: step {step} is skipped: its loss or gradient is not finite")
        if self.skipped >= MAX_SKIPPED:
            path = self.run.output.files / "nonfinite.json"
            if self.run.output.first:
                path.write_text(json.dumps(list(self.nonfinite)) + "\n")
                self.run.output.push()
            raise InputError(
                f"step {step}: the loss or the gradient is not finite, the {self.skipped}th time in a row; the "
                f"conversations are listed in {self.run.output.root / path.name}; try a lower --learning-rate"
            )
