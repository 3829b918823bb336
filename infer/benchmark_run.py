"""A run of benchmarks: ask a model their questions, score its answers, write the results.

OUTPUT/results.json, results.md     all benchmarks, as JSON and as a table
OUTPUT/NAME/answers.jsonl           the answers (evaluation.py)
OUTPUT/NAME/results.json            its score, by part and in all
OUTPUT/NAME/wrong.html              its wrong answers to look at
OUTPUT/NAME/...                     the file for its server, the reviews of its judge
"""

import argparse
import dataclasses
import functools
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infer.answers import model_name, path_text
from infer.benchmarks import BENCHMARKS
from infer.benchmarks.benchmark import Answer, Benchmark, Question, Score
from infer.benchmarks.conversations import Conversations
from infer.benchmarks.files import find
from infer.benchmarks.scoring import (
    Judge,
    Scored,
    describe,
    first_questions,
    limit_score,
    score_answers,
    score_empty,
    score_first,
)
from infer.evaluation import Outcome, Run, Shard, answer, left_to_ask, merge, questions_checksum
from infer.evaluation_page import wrong_page
from infer.flags import load_engine
from infer.results import RESULTS, Result, heading, score_table, versions, write_output, write_results, write_summary
from llava_jax.console import InputError, note, plural, quiet, shorten, terminal_safe
from llava_jax.json_files import read_json
from llava_jax.locks import InUseError, LockedFile
from llava_jax.processes import connect

if TYPE_CHECKING:
    from infer.engine import Engine

OUTPUT, PAGE, REPLIES = "results", "wrong.html", "judge.jsonl"
CONVERSATION_TOKENS = 64
MODEL_SETTINGS = ("vision_tower", "template", "dtype", "int8_cache", "image_rules")
OF_ANSWERS = ("engine", "versions", "asked", "seconds", "tokens_per_second")  # results that say how it was answered
HEARTBEAT = 40  # seconds of silence after which a process counts as dead
LONGEST_WAIT = 7 * 86400  # seconds that processes wait for each other at the end
SIGNALLED = 128  # the exit status of a command that a signal stopped is this and the signal


def run_benchmarks(args: argparse.Namespace, chosen: Sequence[tuple[Benchmark, Path]]) -> int:
    """Ask and score benchmarks, and write the results.

    Returns:
      The exit status: 1 if a question of any failed, or `SIGNALLED` and the signal that stopped a judge.

    Raises:
      InputError: the only benchmark cannot be run.
    """
    from llava_jax.checkpoints.directories import fingerprint  # imports JAX, which scoring a file does not need

    part = own_shard(args)
    given = {name: getattr(args, name) for name in MODEL_SETTINGS}
    settings = {
        "model": model_name(args.checkpoint),
        "checkpoint": path_text(args.checkpoint),
        "checkpoint_fingerprint": fingerprint(args.checkpoint),
        **{name: value if isinstance(value, bool | None) else path_text(value) for name, value in given.items()},
    }
    most = max(tokens_of(args, benchmark) for benchmark, _ in chosen)
    load = functools.cache(lambda: load_engine(argparse.Namespace(**vars(args) | {"max_new_tokens": most})))
    output = Path(args.output or OUTPUT) if args.output or args.data is None else None
    status, unusable = 0, []
    for benchmark, directory in chosen:
        try:
            status = max(status, run_benchmark(args, benchmark, directory, settings, output, part, load))
            if status > SIGNALLED:
                return status
        except InputError as error:
            if len(chosen) == 1:
                raise
            note(f"error: {benchmark.name}: {error}")
            unusable.append(benchmark.name)
            status = 1
    if output is not None and any(output.glob(f"*/{RESULTS}")):
        asked = [benchmark.name for benchmark, _ in chosen if benchmark.name not in unusable]
        table = write_summary(output, settings, [*BENCHMARKS], asked)
        if not args.json and args.data is None and asked:
            print(terminal_safe(table))
    if unusable:
        note(f"error: not scored, see above: {', '.join(unusable)}")
    return status


def evaluate(
    engine: "Engine", benchmark: Benchmark, directory: Path, *, rows: int, max_new_tokens: int, limit: int | None = None
) -> Score:
    """Ask and score a benchmark, by its first protocol, and write nothing.

    Args:
      limit: ask only the first questions.

    Raises:
      InputError: its files are missing or invalid.
    """
    questions = first_questions(benchmark.questions(directory, benchmark.protocols[0]), limit)
    run = Run(benchmark, questions, {"model": ""}, None)
    outcome = answer(run, lambda: engine, rows=rows, max_new_tokens=max_new_tokens)
    return score_first(benchmark, directory, questions, outcome.answers, limit)


def own_shard(args: argparse.Namespace) -> Shard:
    """The shard that this process asks: that of `--shard`, or of several processes its own."""
    if args.shard:
        return Shard(*args.shard)
    connect(args.coordinator, args.process_id, args.processes, HEARTBEAT, LONGEST_WAIT)
    import jax

    if jax.process_count() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX would only note it; what is answered is on the disk
        if args.data is not None and args.output is None:
            raise InputError("several processes need --output, a directory that they share")
    return Shard(jax.process_index(), jax.process_count())


def tokens_of(args: argparse.Namespace, benchmark: Benchmark) -> int:
    """How many tokens an answer may have."""
    return args.max_new_tokens or (CONVERSATION_TOKENS if args.data is not None else benchmark.max_new_tokens)


def own_protocol(args: argparse.Namespace, benchmark: Benchmark) -> str | None:
    """The protocol that the flags name, if the benchmark has it: with several benchmarks, not each of them does."""
    return args.protocol if args.protocol in benchmark.protocols else None


def will_score(args: argparse.Namespace, benchmark: Benchmark) -> bool:
    """Whether the answers will be scored or submitted; not without a judge, and some questions are not submitted."""
    return not (benchmark.judged and args.judge is None) and not (benchmark.server and args.limit is not None)


def find_files(benchmark: Benchmark, directory: Path, needed: str) -> None:
    """Find the files of a benchmark that are needed for "score" or "images".

    Raises:
      InputError: one is missing.
    """
    for file in benchmark.files:
        if file.needed == needed:
            find(directory, file)


def describe_engine(engine: "Engine") -> dict[str, str]:
    """What a model runs on and with, where flags leave it to the checkpoint and the machine."""
    import jax

    from llava_jax.sharding.mesh import format_mesh

    return {
        "template": engine.template_name,
        "dtype": str(jax.tree.leaves(engine.params)[0].dtype),
        "device": engine.mesh.devices.flat[0].device_kind,
        "mesh": format_mesh(engine.mesh.shape),
    }


def check_scoring(
    args: argparse.Namespace, benchmark: Benchmark, directory: Path, questions: Sequence[Question], protocol: str
) -> None:
    """Read the files that the answers will be scored by, before any question is asked.

    Raises:
      InputError: as `score_empty`.
    """
    if not will_score(args, benchmark):
        return
    with quiet():
        if benchmark.judged:
            from infer.benchmarks.judge import JudgedBenchmark

            assert isinstance(benchmark, JudgedBenchmark)
            score_empty(questions, functools.partial(benchmark.judge_messages, directory))
        elif benchmark.server:
            score_empty(questions, functools.partial(benchmark.submission, directory))
        else:
            score_empty(questions, functools.partial(benchmark.score, directory, protocol=protocol))


def run_benchmark(
    args: argparse.Namespace,
    benchmark: Benchmark,
    directory: Path,
    model: Mapping[str, Any],
    output: Path | None,
    part: Shard,
    load: Callable[[], "Engine"],
) -> int:
    """Ask and score one benchmark.

    Args:
      model: the settings of the model.

    Returns:
      The exit status: 1 if a question failed, or `SIGNALLED` and the signal that stopped the judge.

    Raises:
      InputError: its files or the output directory cannot be used.
    """
    protocol = own_protocol(args, benchmark) or benchmark.protocols[0]
    if will_score(args, benchmark):
        find_files(benchmark, directory, "score")
    every = benchmark.questions(directory, protocol)
    questions = first_questions(every, args.limit)
    tokens = tokens_of(args, benchmark)
    settings = {
        "benchmark": benchmark.name,
        "protocol": protocol,
        "questions_sha256": questions_checksum(every),
        **model,
        "max_new_tokens": tokens,
    }
    folder = output and output / benchmark.name
    run = Run(benchmark, questions, settings, folder, part)

    engine: dict[str, str] = {}

    def load_checked() -> "Engine":
        find_files(benchmark, directory, "images")
        check_scoring(args, benchmark, directory, questions, protocol)
        engine.update(describe_engine(load()))
        return load()

    outcome = answer(run, load_checked, rows=args.batch_size, max_new_tokens=tokens)
    outcome = dataclasses.replace(outcome, engine=engine)
    status = int(outcome.failed > 0)
    if folder is None:
        score_run(args, run, directory, outcome)
        return status
    if part.count > 1 and (left := left_to_ask(run, outcome.answers)):
        n = plural(len(left), "question")
        note(f"{benchmark.name}: {n} left to other shards; the last one scores, or the same command without shards")
        return status
    try:
        with LockedFile(folder / ".lock", f"--output {shorten(folder)}", "a command that scores"):
            merge(folder, questions)
            return score_run(args, run, directory, outcome) or status
    except InUseError as error:
        note(str(error))
        return status


def score_run(args: argparse.Namespace, run: Run, directory: Path, outcome: Outcome) -> int:
    """Score the answers of a run, write the results, and print them.

    Returns:
      1 if the file to submit could not be made, `SIGNALLED` and the signal that stopped the judge, or 0.

    Raises:
      InputError: the answers cannot be scored, or the results cannot be written.
    """
    benchmark, folder, protocol = run.benchmark, run.folder, own_protocol(args, run.benchmark)
    status = 0 if folder is None or args.limit is not None else submit(benchmark, directory, folder, outcome.answers)
    judge, scored = read_judge(args), Scored([])
    before = (read_json(folder / RESULTS, Result) if folder else None) or {}
    if benchmark.judged and judge is None:
        if before.get("judge") and not outcome.speed.questions and before["limit"] == args.limit:
            note(f"{benchmark.name}: keeps its score by the judge {before['judge']}, since there are no new answers")
            show(args, benchmark, before)
            return status
        note(f"{benchmark.title} is scored by a language model: give --judge URL and --judge-model NAME")
    elif not benchmark.server:
        replies = (folder or Path()) / REPLIES
        scored = score_answers(benchmark, directory, outcome.answers, protocol, judge=judge, replies=replies)
    if scored.signal:
        return SIGNALLED + scored.signal
    failed, scores = len(run.questions) - len(outcome.answers), scored.scores
    if args.limit is not None:
        scores = [limit_score(score, run.questions, failed) for score in scores]
    result = describe(benchmark, scores) if scores else no_score(run, failed)
    result |= about_run(args, run, outcome, failed) | {"judge": judge.model if judge and benchmark.judged else None}
    if not outcome.speed.questions:  # there are no new answers
        result |= {name: before[name] for name in OF_ANSWERS if name in before}
    if args.limit is not None and before and before["limit"] is None:
        note(f"warning: {benchmark.name}: the results of all questions are replaced by those of --limit {args.limit}")
    if folder:
        for file in scored.files:
            write_output(folder / file.name, file.data)
        if scores:
            about = f"{run.settings['model']}, {scores[0].protocol} protocol."
            write_output(folder / PAGE, wrong_page(benchmark.title, about, scores[0].marks, run.questions))
        write_results(folder, result)
    if isinstance(benchmark, Conversations):
        result |= conversation_keys(benchmark, scores[0], result)
    show(args, benchmark, result, titled=args.data is None)
    return status


def submit(benchmark: Benchmark, directory: Path, folder: Path, answers: Sequence[Answer]) -> int:
    """Write the file for a benchmark's evaluation server, if it has one.

    Returns:
      1 if it cannot be made (a package is missing), which is noted: the answers have a score all the same. Otherwise 0.

    Raises:
      InputError: the file cannot be written.
    """
    try:
        submission = benchmark.submission(directory, answers)
    except InputError as error:
        note(f"error: {benchmark.name}: no file to submit: {error}")
        return 1
    if submission:
        write_output(folder / submission.name, submission.data)
        note(f"{shorten(folder / submission.name)}: to submit{f' to {benchmark.server}' if benchmark.server else ''}")
    return 0


def no_score(run: Run, failed: int) -> dict[str, Any]:
    """The result of answers that a server or a judge is to score, in the form of `describe`."""
    return {
        "benchmark": run.benchmark.name,
        "protocol": run.settings["protocol"],
        "metric": "not judged yet" if run.benchmark.judged else "scored by its server",
        "value": None,
        "stderr": None,
        "scale": 1,
        "totals": {},
        "parts": {},
        "questions": len(run.questions),
        "unanswered": failed,
    }


def about_run(args: argparse.Namespace, run: Run, outcome: Outcome, failed: int) -> dict[str, Any]:
    """What results say beside the score. The speed is that of the last command that asked, perhaps a part."""
    speed = outcome.speed
    return {
        "title": run.benchmark.title,
        "failed": failed,
        "limit": args.limit,
        "published": dict(run.benchmark.published),
        "published_protocol": run.benchmark.protocols[0],
        "model": run.settings["model"],
        "checkpoint_fingerprint": run.settings["checkpoint_fingerprint"],
        "settings": dict(run.settings) | {"batch_size": args.batch_size, "mesh": args.mesh},
        "engine": dict(outcome.engine),
        "versions": versions(),
        "asked": speed.questions,
        "seconds": round(speed.seconds, 3),
        "tokens_per_second": round(speed.tokens / speed.seconds, 1) if speed.seconds else None,
    }


def conversation_keys(benchmark: Conversations, score: Score, result: Mapping[str, Any]) -> dict[str, Any]:
    """Further keys of the result of `--data`; notes answers of which ScienceQA's metric can read no option."""
    keys: dict[str, Any] = {"accuracy": result["value"], "by_kind": result["parts"]}
    if benchmark.metric == "scienceqa":
        keys["no_option"] = sum(bool(mark.text) and not mark.read for mark in score.marks)
        if keys["no_option"]:
            note(f"{plural(keys['no_option'], 'answer')} without a single option, counted as wrong")
    return keys


def read_judge(args: argparse.Namespace) -> Judge | None:
    """The judge that the flags name, if any."""
    if args.judge is None:
        return None
    return Judge(args.judge, args.judge_model, None if args.price_in is None else (args.price_in, args.price_out))


def show(args: argparse.Namespace, benchmark: Benchmark, result: dict[str, Any], *, titled: bool = True) -> None:
    """Print the scores of a benchmark, by each protocol."""
    if args.json:
        print(json.dumps(result))
        return
    for one in (result, *result.get("also", ())):
        text = score_table(one) if one["totals"] else ""
        print(terminal_safe("\n".join([heading(benchmark, one), *[text] * bool(text), ""]) if titled else text))
