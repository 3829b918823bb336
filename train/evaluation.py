"""Benchmarks during training: `infer`'s engine answers their questions with the weights in training.

    frozen, trained --local_params--> params on the process's own devices --Engine--> answers --> scores

The one module of `train` that imports `infer`, inside its functions: a run without benchmarks loads nothing of it.

Each process answers its shard of the questions on its own devices, with a copy of the whole model, since an engine
reads tokens on the host, and decides by the clock what it dispatches. The copy is freed afterwards; compiled functions
stay. Training is not touched: its arrays are only read, greedy answers draw no random numbers, no data is consumed.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, first_line, flag_of, note, plural, shorten
from llava_jax.models.llava import Params
from llava_jax.processes import StopSignal, share, together
from llava_jax.sharding.mesh import inference_mesh
from llava_jax.sharding.partition import Partition
from train.config import TrainConfig
from train.parameters import inference_params
from train.results import result_config

if TYPE_CHECKING:
    from infer.benchmarks.benchmark import Answer, Benchmark, Question, Score
    from infer.engine import Engine
    from train.run import Run

STOPPING = "a signal stops the run"
OPTIONS = ("eval_data_dir", "eval_limit")  # that only benchmarks read


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark to score.

    Attributes:
      questions: all of them, or the first ones.
      limit: how many are asked; None for all.
    """

    benchmark: "Benchmark"
    directory: Path
    questions: Sequence["Question"]
    limit: int | None

    @property
    def key(self) -> str:
        """The name of its score in the metrics."""
        return f"eval_{self.benchmark.name}" + ("" if self.limit is None else f"_first_{self.limit}")

    def score(self, answers: Sequence["Answer"]) -> "Score":
        """Score answers as `infer.evaluate` does.

        Raises:
          InputError: as `Benchmark.score`.
        """
        from infer.benchmarks.scoring import score_first

        return score_first(self.benchmark, self.directory, self.questions, answers, self.limit)


# ---------------------------------------------------------------- before the run


def open_benchmarks(config: TrainConfig) -> tuple[Task, ...]:
    """Read the questions of the benchmarks to score in evaluations. All processes call it.

    Raises:
      InputError: on all processes, if a benchmark is unknown, its files are missing or invalid, or processes have
        different ones.
    """

    def digest(tasks: tuple[Task, ...]) -> str:
        asked = [(task.key, question.id, question.prompt) for task in tasks for question in task.questions]
        return hashlib.sha256(repr(asked).encode()).hexdigest()

    return together("files of benchmarks", lambda: _open_benchmarks(config), same=digest)


def _open_benchmarks(config: TrainConfig) -> tuple[Task, ...]:
    if not config.eval_benchmarks:
        for name in OPTIONS:
            if getattr(config, name) is not None:
                raise InputError(f"{flag_of(name)}: is for --eval-benchmarks, which is not given")
        return ()
    if config.eval_data_dir is None:
        raise InputError("--eval-benchmarks needs --eval-data-dir, the directory of the benchmarks' files")
    if len(set(config.eval_benchmarks)) < len(config.eval_benchmarks):
        raise InputError("--eval-benchmarks: names a benchmark twice")
    return tuple(
        _open_benchmark(name, Path(config.eval_data_dir), config.eval_limit) for name in config.eval_benchmarks
    )


def _open_benchmark(name: str, root: Path, limit: int | None) -> Task:
    from infer.benchmarks import find_benchmark
    from infer.benchmarks.scoring import first_questions, score_empty

    benchmark = find_benchmark(name)
    if benchmark.judged or benchmark.server:
        how = "a language model scores" if benchmark.judged else f"{benchmark.server} scores"
        raise InputError(f"--eval-benchmarks {name}: {how} its answers, so it cannot be scored during training")
    directory = root / (benchmark.directory or benchmark.name)
    directory = directory if directory.is_dir() else root  # as in `infer.evaluate`
    questions = first_questions(benchmark.questions(directory, benchmark.protocols[0]), limit)
    problems = [problem for question in questions if (problem := question.problem or _missing_image(question))]
    if len(problems) == len(questions):
        raise InputError(f"--eval-benchmarks {name}: no question can be asked ({problems[0]})")
    if problems:
        note(
            f"warning: {len(problems):,} of {plural(len(questions), 'question')} of {name} cannot be asked, and count "
            f"as wrong; the first: {problems[0]}"
        )
    task = Task(benchmark, directory, questions, limit)
    score_empty(questions, task.score)  # reads its files
    return task


def _missing_image(question: "Question") -> str:
    for image in question.images:
        if isinstance(image, (str, Path)) and not Path(image).is_file():
            return f"{question.name}: {shorten(image)}: no such image"
    return ""


# ---------------------------------------------------------------- in the run


def score_benchmarks(run: "Run", step: int, frozen: Params, trained: Params, stop: StopSignal) -> dict[str, float]:
    """Ask the questions of the run's benchmarks after a step, and score the answers. All processes call it.

    Args:
      stop: nothing more is asked once there is a signal.

    Returns:
      Scores by their names in the metrics, on the scale of tables: percent, or points. If they cannot be had a
      warning is logged, and the run continues.
    """
    try:
        return _score_benchmarks(run, step, frozen, trained, stop)
    except InputError as error:  # on all processes
        note(f"warning: no scores after step {step}: {error}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or jax.process_count() > 1:
            raise
        note(
            f"warning: no scores after step {step}: the devices have too little memory ({first_line(error)}): "
            "decrease --eval-batch-size"
        )
    return {}


def _score_benchmarks(run: "Run", step: int, frozen: Params, trained: Params, stop: StopSignal) -> dict[str, float]:
    from infer.engine import Engine

    if stop.number:
        raise InputError(STOPPING)
    model, scores = result_config(run.model, run.config), {}
    params, mesh = local_params(frozen, trained, model, run.config, run.mesh)
    engine = Engine(params, model, run.checkpoint.tokenizer, mesh)
    del params
    try:
        for task in run.benchmarks:
            answers = ask_all(engine, task, run.config.eval_batch_size, stop)
            score = together("scores", functools.partial(task.score, answers), same=lambda score: str(score.value))
            scores[task.key] = score.value * score.scale
            asked = plural(len(task.questions), "question")
            title = f"{task.benchmark.title}, {score.metric}"
            note(f"evaluation after step {step}: {title} {scores[task.key]:.2f}, {asked}")
    finally:
        engine.close()
    return scores


class Answers(list[dict[str, Any]]):
    """Lines of answers; the next one is refused once there is a signal to stop."""

    def __init__(self, stop: StopSignal):
        super().__init__()
        self.stop = stop

    def append(self, answer: dict[str, Any]) -> None:
        if self.stop.number:
            raise InputError(STOPPING)
        super().append(answer)


def ask_all(engine: "Engine", task: Task, rows: int, stop: StopSignal) -> list["Answer"]:
    """The answers to the questions of a benchmark, in their order, each process asking its shard.

    Raises:
      InputError: on all processes, if there is a signal to stop, or one process cannot ask.
    """
    from infer.benchmarks.answers import answer_key
    from infer.benchmarks.benchmark import Answer
    from infer.evaluation import Failures, Shard, ask, in_order, questions_of

    valid = [question for question in task.questions if not question.problem]
    own = questions_of(Shard(jax.process_index(), jax.process_count()), valid)
    answers, failures, most = Answers(stop), Failures(), task.benchmark.max_new_tokens
    together(
        "answers",
        lambda: ask(engine, own, answers, failures, name=task.benchmark.name, rows=rows, max_new_tokens=most, model=""),
        same=lambda _: "",
    )
    lines = [line for text in share(json.dumps(answers)) for line in json.loads(text)]
    if failed := len(task.questions) - len(lines):
        asked = plural(len(task.questions), "question")
        note(f"warning: {failed:,} of {asked} of {task.benchmark.name} could not be asked, and count as wrong")
    found = [Answer(line["question_id"], line["prompt"], line["text"], line) for line in lines]
    return in_order({answer_key(one.id, one.prompt, one.extra): one for one in found}, task.questions)[0]


# ---------------------------------------------------------------- the weights


def local_params(
    frozen: Params, trained: Params, model: LlavaConfig, config: TrainConfig, mesh: Mesh
) -> tuple[Params, Mesh]:
    """A copy of the weights in training on this process's own devices, for an engine: parameters and their mesh.

    Each parameter is gathered on all devices, one after the other, and then sharded over those of a process.

    Args:
      model: the configuration of the engine.
      mesh: that of the run.
    """
    local = inference_mesh(model, list(mesh.local_devices))
    partition = Partition(model, local)

    def place(path: str, x: jax.Array) -> jax.Array:
        shards = jax.device_put(x, NamedSharding(mesh, P())).addressable_shards
        whole = jax.make_array_from_single_device_arrays(
            x.shape, NamedSharding(local, P()), [shard.data for shard in shards]
        )
        spec = partition.spec(path, x.shape)
        return jax.block_until_ready(jax.device_put(whole, NamedSharding(local, spec)))  # before the next is gathered

    return inference_params(frozen, trained, config, place), local
