"""Ask a model the questions of benchmarks, and score its answers; or score answers that are there.

python -m infer.evaluate --benchmark pope --data-dir eval/pope --checkpoint DIR --output results
python -m infer.evaluate --benchmark all --data-dir eval --checkpoint DIR
python -m infer.evaluate --score answers.jsonl --benchmark textvqa --data-dir eval/textvqa
python -m infer.evaluate --checkpoint DIR --data test.json --image-folder images
python -m infer.evaluate --list
"""

import argparse
import sys
from pathlib import Path

from infer.benchmark_run import CONVERSATION_TOKENS, OUTPUT, SIGNALLED, read_judge, run_benchmarks, show
from infer.benchmarks import ALL, BENCHMARKS, find_benchmark, find_benchmarks
from infer.benchmarks.answers import read_answers
from infer.benchmarks.benchmark import Benchmark, File
from infer.benchmarks.conversations import METRICS, Conversations
from infer.benchmarks.scoring import describe, score_answers
from infer.evaluation import MAX_SHARDS
from infer.flags import add_batch_size_flag, add_model_flags
from infer.generate import TRAINED_ON, use_bundled
from infer.sampling import Sampling
from llava_jax.console import InputError, Parser, flag_of, integer, note, number, print_json, ranges, run_main, shorten
from llava_jax.processes import are_several, watched

MAX_LIMIT = 10**9
NOT_WITH_SCORE = (
    "checkpoint", "vision_tower", "template", "dtype", "int8_cache", "mesh", "image_rules", "output", "batch_size",
    "max_new_tokens", "limit", "shard", "coordinator", "process_id", "processes",
)  # fmt: skip


# ---------------------------------------------------------------- flags


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m infer.evaluate", description="Score a model on benchmarks, or score its answers.")
    add_model_flags(p, default=f"the bundled model, trained on {TRAINED_ON}")
    g = p.add_argument_group("what to ask: benchmarks, or a file of conversations")
    g.add_argument("--benchmark", metavar="NAMES", help="one, several with commas between them, or all that are there")
    g.add_argument("--data-dir", metavar="DIR", help="the files of the benchmark, or the directory of all benchmarks'")
    g.add_argument("--data", metavar="FILE", help="conversations, with reference answers: a JSON list or JSON lines")
    g.add_argument("--image-folder", metavar="DIR", help="of --data; default: the current directory")
    g.add_argument(
        "--metric", choices=METRICS,
        help="of --data. exact_match: the same words; scienceqa: the same option, as the reference parses it; default: "
        "scienceqa if every reference answer names an option (\"The answer is B.\"), otherwise exact_match",
    )  # fmt: skip
    g.add_argument("--protocol", metavar="NAME", help="how to ask and score; default: the benchmark's first (--list)")
    g.add_argument("--limit", type=integer(1, MAX_LIMIT), metavar="N", help="ask the first N questions")
    g.add_argument("--list", action="store_true", help="print the benchmarks and where their files are, and exit")
    g.add_argument("--score", metavar="FILE", help="score a file of answers instead of asking a model")

    g = p.add_argument_group("the run")
    g.add_argument("--output", metavar="DIR", help=f"default: {OUTPUT}; with --data, nothing is written")
    add_batch_size_flag(g, default=32)
    g.add_argument(
        "--max-new-tokens", type=ranges(Sampling)["max_new_tokens"], metavar="N",
        help=f"default: as the reference, or {CONVERSATION_TOKENS} with --data",
    )  # fmt: skip
    g.add_argument("--shard", type=shard, metavar="I/N", help="ask a shard of the questions, from 0/N to N-1/N")
    g.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes: address of process 0, a free port")
    g.add_argument("--process-id", type=integer(0, MAX_SHARDS - 1), metavar="N", help="number of this process, from 0")
    g.add_argument("--processes", type=integer(1, MAX_SHARDS), metavar="N", help="number of processes")
    g.add_argument("--json", action="store_true", help="print one JSON object for each benchmark")

    g = p.add_argument_group("the judge of some benchmarks, a language model")
    g.add_argument("--judge", metavar="URL", help="an OpenAI-compatible endpoint; OPENAI_API_KEY is its key, if any")
    g.add_argument("--judge-model", metavar="NAME", help="the endpoint's name of the model")
    g.add_argument("--price-in", type=number(0, 1e6), metavar="DOLLARS", help="per million tokens of requests")
    g.add_argument("--price-out", type=number(0, 1e6), metavar="DOLLARS", help="per million tokens of replies")
    return p


def shard(text: str) -> tuple[int, int]:
    """Parse `I/N`.

    Raises:
      argparse.ArgumentTypeError: it is not a shard of N.
    """
    index, _, count = text.partition("/")
    if not (index.isascii() and index.isdigit() and count.isascii() and count.isdigit() and len(text) < 12):
        raise argparse.ArgumentTypeError(f"{shorten(text)!r}: must be I/N, such as 0/4")
    if not 0 <= int(index) < int(count) <= MAX_SHARDS:
        raise argparse.ArgumentTypeError(f"{shorten(text)!r}: must be from 0/N to N-1/N, N at most {MAX_SHARDS:,}")
    return int(index), int(count)


def check_flags(args: argparse.Namespace) -> None:
    """Raises:
    InputError: flags are missing, or do not go together.
    """
    if (args.benchmark is None) == (args.data is None):
        raise InputError("give either --benchmark NAME --data-dir DIR, or --data FILE (--list lists the benchmarks)")
    if args.benchmark is not None and args.data_dir is None:
        raise InputError("--benchmark needs --data-dir, the directory of its files (--list says which)")
    wrong = ("data_dir", "protocol") if args.data is not None else ("image_folder", "metric")
    for name in wrong:
        if getattr(args, name) is not None:
            raise InputError(f"{flag_of(name)} needs {'--benchmark' if args.data is not None else '--data'}")
    if (args.judge is None) != (args.judge_model is None):
        raise InputError("--judge URL and --judge-model NAME go together")
    if (args.price_in is None) != (args.price_out is None):
        raise InputError("--price-in and --price-out go together")
    if args.price_in is not None and args.judge is None:
        raise InputError("--price-in needs --judge")
    if args.output == "":
        raise InputError("--output: is empty; give a directory")
    if args.score is not None:
        defaults = parser()
        for name in NOT_WITH_SCORE:
            if getattr(args, name) != defaults.get_default(name):
                raise InputError(f"{flag_of(name)}: is not for --score, which asks no model")
    several = any(value is not None for value in (args.coordinator, args.process_id, args.processes))
    if several and args.shard:
        raise InputError("--shard is for processes that do not know each other; leave --coordinator out")
    if args.data is not None and args.output is None and (several or args.shard):
        raise InputError("several processes need --output, a directory that they share")


# ---------------------------------------------------------------- benchmarks and their files


def choose(args: argparse.Namespace) -> list[tuple[Benchmark, Path]]:
    """The benchmarks that the flags name, and their directories. Of all, those whose files are there.

    Raises:
      InputError: a name or the protocol is not known, or no benchmark's files are there.
    """
    if args.data is not None:
        return [(Conversations(Path(args.data), Path(args.image_folder or "."), args.metric), Path())]
    root, chosen = Path(args.data_dir), []
    if not root.is_dir():
        raise InputError(f"--data-dir {shorten(root)}: no such directory")
    for benchmark in find_benchmarks(args.benchmark):
        directory = root / (benchmark.directory or benchmark.name)
        if args.benchmark == ALL:
            if missing := [file.path for file in missing_files(benchmark, directory)]:
                note(f"{benchmark.name}: left out, since {shorten(directory)} has no {', '.join(missing)}")
                continue
        elif args.protocol is not None and args.protocol not in benchmark.protocols:
            known = ", ".join(benchmark.protocols)
            raise InputError(f"--protocol {shorten(args.protocol)}: {benchmark.title} has the protocols {known}")
        chosen.append((benchmark, directory if directory.is_dir() else root))
    if not chosen:
        raise InputError(
            f"--data-dir {shorten(root)}: has all files of no benchmark; --benchmark {ALL} needs the directory of all "
            "benchmarks', and --list says which files they are"
        )
    if args.protocol is not None and not any(args.protocol in benchmark.protocols for benchmark, _ in chosen):
        raise InputError(f"--protocol {shorten(args.protocol)}: none of the benchmarks has it; --list says which do")
    return chosen


def missing_files(benchmark: Benchmark, directory: Path) -> list[File]:
    """The files that a run needs, and that are not there."""
    return [file for file in benchmark.files if file.needed and not (directory / file.path).exists()]


def list_benchmarks(args: argparse.Namespace) -> int:
    """Print which files each benchmark needs, and where they are published."""
    for name in BENCHMARKS:
        benchmark = find_benchmark(name)
        directory = benchmark.directory or name
        if args.json:
            files = [{"path": f.path, "source": f.source, "size": f.size, "needed": f.needed} for f in benchmark.files]
            more = {"protocols": list(benchmark.protocols), "judged": benchmark.judged, "server": benchmark.server}
            print_json({"benchmark": name, "title": benchmark.title, "directory": directory, **more, "files": files})
            continue
        how = "judged by a language model" if benchmark.judged else f"scored by {benchmark.server}"
        print(f"{name}: {benchmark.title}; protocols {', '.join(benchmark.protocols)}" + (
            f"; {how}" if benchmark.judged or benchmark.server else ""
        ))  # fmt: skip
        for file in benchmark.files:
            print(f"    {directory}/{file.path}  [{file.needed or 'optional'}, {file.size}]  {file.source}")
    return 0


# ---------------------------------------------------------------- what the command does


def score_file(args: argparse.Namespace, benchmark: Benchmark, directory: Path) -> int:
    """Score a file of answers.

    Raises:
      InputError: the file is invalid, or as `Benchmark.score`.
    """
    answers = read_answers(args.score)
    try:
        scored = score_answers(
            benchmark, directory, answers, args.protocol, judge=read_judge(args), replies=Path(f"{args.score}.judge")
        )
    except InputError as error:
        raise InputError(str(error).replace("answers line ", f"{shorten(args.score)} line ", 1)) from None
    if scored.signal:
        return SIGNALLED + scored.signal
    show(args, benchmark, describe(benchmark, scored.scores))
    return 0


def main() -> int:
    args = parser().parse_args()
    if args.list:
        return list_benchmarks(args)
    check_flags(args)
    chosen = choose(args)
    if args.judge is not None and not any(benchmark.judged for benchmark, _ in chosen):
        raise InputError("--judge: scores none of these benchmarks, which need no language model (--list)")
    if args.score is not None:
        if len(chosen) != 1:
            raise InputError("--score is of one benchmark")
        return score_file(args, *chosen[0])
    if args.checkpoint is None:
        use_bundled(args)
    return run_benchmarks(args, chosen)


def run() -> None:
    """The command `llava-evaluate`."""
    run_main(lambda: watched(main) if are_several(sys.argv[1:]) else main())


if __name__ == "__main__":
    run()
