"""Prepare a run: open and check all input, before any weight is read and anything is compiled."""

import collections
import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llava_jax.checkpoints.checkpoint import Checkpoint, open_checkpoint
from llava_jax.checkpoints.transformers_config import check_expressible
from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, note, plural
from llava_jax.processes import together
from llava_jax.sharding.mesh import FSDP, format_mesh, make_mesh, parse_mesh, row_multiple
from llava_jax.sharding.partition import batch_sharding
from train.config import TrainConfig, check_preset
from train.evaluation import Task, open_benchmarks
from train.loader import Data, check_batch, open_data
from train.optim import check_rates
from train.profiling import parse_profile_steps
from train.run_directory import Output
from train.states import Checkpoints, RunProgress


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is ready to start or to resume.

    config       of the run
    mesh         of all devices
    checkpoint   the model to start from, opened, its weights not read
    output       the run's directory, locked
    model        the checkpoint's configuration, with the run's image settings
    checkpoints  the run's own states
    progress     saved with the latest state; None without a state
    data         batches to train on, at the position of the latest state
    eval_data    batches to evaluate on, if any
    benchmarks   to score in evaluations
    traced       steps to trace
    total        steps of the whole run
    """

    config: TrainConfig
    mesh: Mesh
    checkpoint: Checkpoint
    output: Output
    model: LlavaConfig
    checkpoints: Checkpoints
    progress: dict[str, Any] | None
    data: Data
    eval_data: Data | None
    benchmarks: tuple[Task, ...]
    traced: range
    total: int

    @property
    def start(self) -> int:
        """Steps completed by earlier processes."""
        return self.progress["step"] if self.progress else 0


def prepare(config: TrainConfig) -> Run:
    """Open and check all input, without reading weights or compiling. A refused run leaves no files.

    Raises:
      InputError: on all processes, if the input of one is invalid.
      OSError: the output directory cannot be written.
    """
    mesh = make_mesh(parse_mesh(config.mesh) if config.mesh else {FSDP: -1})
    check_batch(config, mesh)
    benchmarks = open_benchmarks(config)
    with contextlib.ExitStack() as undo:  # undoes what follows unless all of it succeeds
        traced, checkpoint, output = together(
            "a configuration or data",
            lambda: open_input(config, undo),
            same=lambda opened: json.dumps(opened[-1].described),
        )
        checkpoints = Checkpoints(output.root / "checkpoints", config.keep)
        progress = checkpoints.progress(RunProgress)
        data, eval_data = together(
            f"checkpoints in {output.root}",
            lambda: open_all_data(config, checkpoint, mesh, output.files, progress, undo),
            same=lambda _: str(checkpoints.latest),
        )
        total = progress["total"] if progress else data.total_steps
        if not progress:
            check_rates(config, total, data.wanted)
        if traced and traced[0] > total:
            raise InputError(f"--profile-steps {config.profile_steps}: the run has {plural(total, 'step')}")
        model = checkpoint.config
        if config.aspect_ratio:
            model = model.replace(aspect_ratio=config.aspect_ratio)
        if config.export_hf:
            check_expressible(model)
        if output.first and not output.resumed:
            output.write_config()
        undo.pop_all()
    return Run(
        config, mesh, checkpoint, output, model, checkpoints, progress, data, eval_data, benchmarks, traced, total
    )


def open_input(config: TrainConfig, undo: contextlib.ExitStack) -> tuple[range, Checkpoint, Output]:
    """Open the steps to trace, the input checkpoint, and the run's directory.

    Args:
      undo: receives the calls that undo this.

    Raises:
      InputError: one of them cannot be used.
    """
    traced = parse_profile_steps(config.profile_steps)
    checkpoint = open_checkpoint(config.checkpoint, vision_tower=config.vision_tower)
    check_preset(config, checkpoint.config)
    output = Output(config, process=jax.process_index())
    undo.callback(output.close)
    undo.callback(output.undo)  # the last is called first
    return traced, checkpoint, output


def open_all_data(
    config: TrainConfig,
    checkpoint: Checkpoint,
    mesh: Mesh,
    files: Path,
    progress: dict[str, Any] | None,
    undo: contextlib.ExitStack,
) -> tuple[Data, Data | None]:
    """Open the training data, at the position of `progress`, and the evaluation data.

    Args:
      files: directory of the list of bad samples.
      undo: receives the calls that close the data.

    Raises:
      InputError: the data cannot be used.
    """
    part, parts = rows_part(mesh)
    open_part = functools.partial(
        open_data,
        config,
        checkpoint.config,
        checkpoint.tokenizer,
        rows_multiple=row_multiple(mesh) * config.accumulate,
        process=part,
        processes=parts,
        folder=files,
    )
    data = open_part()
    undo.callback(data.close)
    eval_data = open_part(path=config.eval_data, train=False) if config.eval_data else None
    if eval_data:
        undo.callback(eval_data.close)
    for each in filter(None, (data, eval_data)):
        each.check_memory()
    if progress:
        data.set_state(progress["data"])
        data.bad.set_state(progress["bad"])
        if empty := data.rows - data.rows_in_use:
            note(
                f"warning: this mesh does not divide the {plural(data.rows_in_use, 'row')} of a batch; each gets "
                f"{empty} more, which stay empty: a batch holds about "
                f"{plural(round(data.estimate()['conversations']), 'conversation')}, as before"
            )
    return data, eval_data


def rows_part(mesh: Mesh) -> tuple[int, int]:
    """The index of this process's shard of a batch's rows, and the number of shards; processes may share a shard.

    Raises:
      InputError: the mesh shards rows unevenly over processes.
    """
    rows_of = collections.defaultdict(set)
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((row_multiple(mesh),)).items():
        rows_of[device.process_index].add(rows.start or 0)  # type: ignore[attr-defined]  # jaxlib's types lack it
    parts = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    if sum(map(len, parts)) != row_multiple(mesh) or len({len(part) for part in parts}) > 1:
        axes = format_mesh(mesh.shape)
        raise InputError(f"--mesh {axes}: shards rows unevenly over processes; make tensor a divisor of their devices")
    return parts.index(tuple(sorted(rows_of[jax.process_index()]))), len(parts)
