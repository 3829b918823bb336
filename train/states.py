"""States of a run: saved while it continues, restored onto any mesh.

    checkpoints/N/state      trained parameters and optimizer after N steps (Orbax)
    checkpoints/N/progress   position in the data, and other state of the loop (JSON)

Orbax copies the state to the host, and writes it while the devices compute the next steps. A checkpoint gets its name
when it is complete; older ones are removed only after that.
"""

import contextlib
import logging
import time
from typing import Annotated, Any, NotRequired, TypedDict

import jax
import orbax.checkpoint as ocp
from etils import epath
from msgspec import Meta

from llava_jax.checkpoints.orbax_files import silence_late_futures
from llava_jax.console import InputError, first_line, note, shorten
from llava_jax.files import check_tree
from llava_jax.json_files import check_json, parse_json
from llava_jax.processes import share

_policies = ocp.checkpoint_managers
REMOVE_CHECKPOINT = "remove this directory to resume from the previous checkpoint"
MAX_STEPS_BETWEEN_READS = 50  # of the clock of process 0, by all processes


class DataProgress(TypedDict):
    """The position in the data (`Data.get_state`)."""

    conversations: int
    rows: Annotated[int, Meta(ge=1, le=1_000_000)]
    per_row: NotRequired[Annotated[float, Meta(ge=1, le=1_000_000)] | None]
    whole: NotRequired[bool]
    packing: NotRequired[Annotated[int, Meta(ge=1)]]
    place: dict[str, Any]  # grain's own


class RunProgress(TypedDict):
    """The JSON saved with a state."""

    step: Annotated[int, Meta(ge=1)]
    total: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    data: DataProgress
    bad: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]]  # `BadSamples.get_state`


class Losses(TypedDict):
    """The JSON saved with a state that was evaluated."""

    eval_loss: float


class Checkpoints:
    """The checkpoints of one run. All processes make every call.

    Args:
      keep: the number of latest checkpoints to keep, in addition to the one with the lowest `eval_loss`.

    Raises:
      InputError: the directory cannot be read.
    """

    def __init__(self, directory: epath.Path, keep: int):
        for name in ("absl", "asyncio"):  # errors are reported here, in one line
            logging.getLogger(name).setLevel(logging.CRITICAL)
        silence_late_futures()
        by_loss = lambda metrics: metrics["eval_loss"]  # noqa: E731
        best = _policies.BestN(get_metric_fn=by_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        _check_losses(directory)
        try:
            self.manager = ocp.CheckpointManager(
                directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_policies.AnyPreservationPolicy([_policies.LatestN(keep), best]),
                    best_fn=by_loss,
                    best_mode="min",
                    cleanup_tmp_directories=True,
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                ),
            )
        except (TypeError, ValueError) as error:  # Orbax raises them for damaged files
            raise InputError(
                f"{shorten(directory)}: cannot be read ({shorten(first_line(error))}); remove the damaged checkpoint"
            ) from None
        self.failed: str | None = None  # why the last attempt failed

    @property
    def latest(self) -> int | None:
        """The step of the latest checkpoint."""
        return max(self.manager.all_steps(read=True), default=None)

    def save(self, step: int, state: Any, progress: dict[str, Any], eval_loss: float | None = None) -> None:
        """Start to save. A failure, now or later, logs a warning; the next call retries.

        Args:
          progress: JSON-able.
          eval_loss: of this state, if evaluated and finite.
        """
        self.settle()
        if step == self.latest:
            return
        try:
            if self.failed:
                self.manager.reload()  # list the checkpoints that exist, without the failed one
            self.manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)),
                metrics=None if eval_loss is None else {"eval_loss": eval_loss},
                force=True,
            )
            self.failed = None
        except Exception as error:  # from the file system, TensorStore or Orbax, of any type
            self._warn(step, error)

    def settle(self) -> None:
        """Wait for the save in progress, if any."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            self._warn(None, error)

    def finish(self) -> None:
        """Wait for the last save.

        Raises:
          InputError: it failed.
        """
        self.settle()
        if self.failed:
            self._clean()  # again: a write in progress may have recreated its directory
            raise InputError(f"{self.manager.directory}: the last state is not saved ({self.failed}); {self._left()}")

    def progress(self, kind: Any = dict[str, Any]) -> dict[str, Any] | None:
        """The JSON saved with the latest state; None if there is no checkpoint.

        Args:
          kind: its required type, such as `RunProgress`.

        Raises:
          InputError: it cannot be read, or has another type.
        """
        if self.latest is None:
            return None
        progress = self._read(progress=ocp.args.JsonRestore())["progress"]
        where = self.manager.directory / str(self.latest)
        try:
            check_json(progress, kind, f"{shorten(where)}: progress")
            if progress.get("step", self.latest) != self.latest:
                raise InputError(f"{shorten(where)}: progress is that of step {shorten(progress['step'], 20)}")
        except InputError as error:
            raise InputError(f"{error}; {REMOVE_CHECKPOINT}") from None
        return progress

    def restore(self, like: Any) -> Any:
        """Restore the latest state.

        Args:
          like: a state with the shapes, dtypes and shardings of the result; its arrays are deleted.

        Raises:
          InputError: the state cannot be read.
        """
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        jax.tree.map(lambda x: x.delete(), like)  # to free memory
        return self._read(state=ocp.args.StandardRestore(wanted))["state"]

    def _read(self, **items) -> Any:
        check_tree(self.manager.directory / str(self.latest))
        try:
            return self.manager.restore(self.latest, args=ocp.args.Composite(**items))
        except Exception as error:
            raise InputError(
                f"{self.manager.directory / str(self.latest)}: cannot be read ({first_line(error)}); "
                f"{REMOVE_CHECKPOINT}"
            ) from None

    def best_loss(self) -> float | None:
        """The lowest evaluation loss of the existing checkpoints."""
        best = self.manager.best_step()
        metrics = None if best is None else self.manager.metrics(best)
        return metrics and metrics["eval_loss"]

    def close(self) -> None:
        self.manager.close()

    def _warn(self, step: int | None, error: Exception) -> None:
        self.failed = first_line(error)
        if jax.process_index():
            return
        self._clean()
        what = "the checkpoint" if step is None else f"checkpoint {step}"
        note(f"warning: {what} could not be saved ({self.failed}); the run continues, {self._left()}")

    def _clean(self) -> None:
        """Remove incomplete checkpoints of failed saves, to free disk space."""
        directory = self.manager.directory
        with contextlib.suppress(OSError):  # a write is still in progress
            for path in directory.iterdir() if directory.is_dir() else ():
                if "orbax-checkpoint-tmp" in path.name:
                    path.rmtree(missing_ok=True)

    def _left(self) -> str:
        return "there is none yet" if self.latest is None else f"the last one is that of step {self.latest}"


def _check_losses(directory: epath.Path) -> None:
    """Raise an InputError if the saved evaluation loss of a state is invalid; Orbax reads all of them at once."""
    for step in directory.iterdir() if directory.is_dir() else ():
        file = step / "metrics" / "metrics"
        if not (step.name.isdecimal() and file.exists()):
            continue
        try:
            check_json(parse_json(file.read_bytes()), Losses, "no evaluation loss")
        except (InputError, OSError) as error:
            raise InputError(
                f"{shorten(file)}: cannot be read ({shorten(first_line(error))}); remove {shorten(file.parent)}, and "
                "the run continues without it"
            ) from None


class SaveClock:
    """Decides when `minutes` have passed since the last checkpoint.

    With several processes all use the clock of process 0. Reading it waits for the devices, so process 0 also
    estimates, from the time per step, after how many steps to read it again.
    """

    def __init__(self, minutes: float, step: int):
        """`minutes`: between checkpoints, 0 for no limit; `step`: the last completed step."""
        self.seconds = 60 * minutes
        self.saved(step)

    def saved(self, step: int) -> None:
        """Called when this step's checkpoint is written, or being written: restart the clock."""
        self.last, self.begun, self.check_at = step, time.monotonic(), step + 1

    def is_due(self, step: int) -> bool:
        """Whether to save after this step. All processes call it after each step, with the same result."""
        if not self.seconds or step < self.check_at:
            return False
        passed = time.monotonic() - self.begun
        left = self.seconds - passed
        if jax.process_count() == 1:
            return left <= 0
        steps = left * (step - self.last) / max(passed, 1e-9)  # until a save is due
        first, *_ = share(str(0 if left <= 0 else int(min(max(steps, 1), MAX_STEPS_BETWEEN_READS))))
        self.check_at = step + int(first)
        return first == "0"
