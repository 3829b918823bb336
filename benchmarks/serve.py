"""The server under load, compared with other ways to run the same model on the same machine.

    python benchmarks/serve.py                                # the bundled model, then 513M random parameters
    python benchmarks/serve.py --model 513M --json serve.json
    python benchmarks/serve.py --model 513M --parts second    # only the second question about an image

Clients stream answers over HTTP, greedy and of given lengths: a fixed number of them, each with one question at a time
(closed loop), and questions that arrive at random (open loop). In the same rounds, with questions of the same lengths
that nobody has asked before, and medians over the rounds:

    static        batches of questions that all wait for the longest answer, by the same server with static shapes: each
                  step computes the whole batch; goal: at most 1 / 1.5 of the server's tokens per second
    batches       the same with what the server does on CPUs: steps compute only the rows that have not ended
    transformers  `transformers serve` with the same weights in the same dtype; goal: at most 1 / 2
    alone         one client; goal: per token, at least 0.95 of the speed of `Engine.generate` with one slot; beside it
                  `Engine.stream`, and `Engine.generate` with as many slots as the server
    second        a second question about an image of five tiles (of the 513M model): goal: at most 10 % of the first
                  one's time to the first token, and the answer of an engine that has seen nothing

`transformers serve` has no continuous batching for models with images: it answers one question after the other. With
`--decoder`, text questions are also put to a server of the decoder's weights alone, which does batch; same goal.

Exits with 1 if a goal is missed.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 0)]

import devices  # noqa: E402
import serve_load as load  # noqa: E402
from serve_load import Question, Reply, Send, Server  # noqa: E402
from serve_models import Model, find_model, write_decoder  # noqa: E402

MODELS = ("shapes", devices.SMALL)
PARTS = ("load", "alone", "second")
GOALS = {"static": 1.5, "transformers": 2.0, "decoder": 2.0}  # the server's tokens per second, of theirs
ALONE = 0.95  # speed per token with one client, of `Engine.generate`'s
SECOND = 0.1  # time to the first token, of the first question's
SECOND_TOKENS = 16
WAYS = ("stream", "generate", "slots")  # to answer one question without a server
BATCHING = ("--continuous-batching", "--cb-num-blocks", "1024", "--cb-max-batch-tokens", "512")  # bounds its memory
OPEN = 0.7  # requests per second in the open loop, of the closed loop's


# ---------------------------------------------------------------- who answers


def ask_ours(server: Server):
    """How to send a question to our server."""

    async def send(question: Question) -> Reply:
        body = dict(
            messages=question.messages, max_tokens=question.tokens, temperature=0, ignore_eos=True, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        return await load.ask(server.port, body)

    return send


def ask_theirs(server: Server, directory: Path):
    """How to send a question to `transformers serve`, which has another way to ignore end tokens."""

    async def send(question: Question) -> Reply:
        config = json.dumps({"min_new_tokens": question.tokens, "do_sample": False})
        body = dict(
            model=str(directory), messages=question.messages, max_tokens=question.tokens, temperature=0, stream=True,
            generation_config=config,
        )  # fmt: skip
        return await load.ask(server.port, body)

    return send


class LocalEngine:
    """An engine in a process of its own, without a server."""

    def __init__(self, model: Model, dtype: str, slots: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        context.Process(target=_run_engine, args=(theirs, model.directory, dtype, slots), daemon=True).start()

    def ask(self, way: str, question: Question) -> tuple[str, float]:
        """The answer, and seconds per token after the first.

        Args:
          way: "stream"; "generate" with one slot, "slots" with as many as the server; or "fresh", with an engine that
            has seen nothing.
        """
        self._pipe.send((way, question))
        return self._pipe.recv()

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *_) -> None:
        self._pipe.send(None)


def _run_engine(pipe, directory: Path, dtype: str, slots: int) -> None:
    from infer.engine import Engine, Request
    from infer.sampling import Sampling
    from llava_jax.console import enable_compilation_cache

    enable_compilation_cache()
    engine = Engine.load(directory, dtype=dtype)
    while work := pipe.recv():
        way, question = work
        images = (question.image,) if question.image else ()
        sampling = dict(max_new_tokens=question.tokens, ignore_eos=True)
        if way == "stream":
            *_, answer = engine.stream(question.turns, images, **sampling)
        else:
            used = Engine(engine.params, engine.config, engine.tokenizer, engine.mesh) if way == "fresh" else engine
            rows = slots if way == "slots" else 1
            [(_, answer)] = used.generate([Request(question.turns, images)], Sampling(**sampling), rows=rows)
        pipe.send((answer.text, 1 / answer.decode_tokens_per_second))


# ---------------------------------------------------------------- the parts


def run_load(model: Model, ours: Server, static: Server, theirs: dict[str, Send], args) -> dict[str, Any]:
    """Rounds of the closed loop by each contender, and the open loop."""
    served = ask_ours(ours)
    contenders = {"server": served, "static": ask_ours(static), "batches": served, **theirs}
    if "decoder" in theirs:
        contenders["server, text"] = served
    rounds: dict[str, list[dict]] = {name: [] for name in contenders}
    for number in range(args.rounds):
        for name, send in contenders.items():
            questions = load.mixed(args.requests, number, f"{name} {number}", model.side, args.images)
            if name in ("decoder", "server, text"):
                questions = [question for question in questions if question.kind != "image"]
            if name in ("static", "batches"):
                replies = load.batches(send, questions, args.slots)
            else:
                replies = load.closed_loop(send, questions, args.clients)
            rounds[name].append(figures := load.figures(asyncio.run(replies)))
            say(f"{model.name}, round {number + 1} of {args.rounds}, {name}: {describe(figures)}")
    result: dict[str, Any] = {name: medians(each) for name, each in rounds.items()}
    for name in ("static", "batches", *theirs):
        alike = rounds["server, text" if name == "decoder" else "server"]
        speeds = [(a["tokens_per_second"], b["tokens_per_second"]) for a, b in zip(alike, rounds[name], strict=True)]
        result[name]["ratio"] = statistics.median(ours / others for ours, others in speeds)
    result["same_answers"] = {name: count_same(model, served, send) for name, send in theirs.items()}
    rate = args.rate or OPEN * result["server"]["requests_per_second"]
    questions = load.mixed(args.requests, args.rounds, "open", model.side, args.images)
    figures = load.figures(asyncio.run(load.open_loop(served, questions, rate)))
    say(f"{model.name}, open loop, {rate:.2f} requests/s: {describe(figures)}")
    return result | {"open": figures | {"rate": rate}}


def run_alone(model: Model, ours: Server, engine: LocalEngine, args) -> dict[str, Any]:
    """One client, compared with an engine without a server."""
    send, pick = ask_ours(ours), random.Random("alone")
    rounds = []
    for number in range(args.rounds + 1):
        question = Question("short", (load.sentence(30, pick),), args.alone_tokens)
        reply = asyncio.run(send(question))
        answers = {way: engine.ask(way, question) for way in WAYS}
        seconds = {"server": reply.per_token} | {way: value for way, (_, value) in answers.items()}
        if number:  # the engine compiled in the first one
            rounds.append(seconds | {"same": all(text == reply.text for text, _ in answers.values())})
            times = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items())
            say(f"{model.name}, one client: {times} per token")
    ratios = {f"{way}_ratio": statistics.median(each[way] / each["server"] for each in rounds) for way in WAYS}
    return medians(rounds) | ratios | {"same_answers": all(each["same"] for each in rounds)}


def run_second(model: Model, ours: Server, engine: LocalEngine, args) -> dict[str, Any]:
    """Two questions about an image, each in a conversation of its own; then another one in the second conversation."""
    send, pick, rounds = ask_ours(ours), random.Random("second"), []
    for number in range(args.rounds):
        image, texts = load.noise(2 * model.side, number), [load.sentence(12, pick) for _ in range(3)]
        seconds, same, reply = {}, True, Reply(0.0)
        for i, name in enumerate(("first", "second", "next_turn")):
            turns = (texts[1], reply.text, texts[2]) if name == "next_turn" else (texts[i],)
            question = Question("image", turns, SECOND_TOKENS, image)
            reply = asyncio.run(send(question))
            same &= engine.ask("fresh", question)[0] == reply.text
            seconds |= {name: reply.to_first, f"{name}_cached": reply.cached}
        rounds.append(seconds | {"same_answer": same})
        say(
            f"{model.name}, to the first token: first {seconds['first']:.3f} s, second {seconds['second']:.3f} s, next "
            f"turn {seconds['next_turn']:.3f} s; answers {'' if same else 'NOT '}those of an engine without a cache"
        )
    shares = {
        f"{name}_share": statistics.median(r[name] / r["first"] for r in rounds) for name in ("second", "next_turn")
    }
    return medians(rounds) | shares | {"same_answers": all(r["same_answer"] for r in rounds)}


def medians(rounds: list[dict]) -> dict[str, float]:
    return {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}


def count_same(model: Model, ours: Send, theirs: Send) -> str:
    """How many of a few short greedy answers are the same."""
    asked = [dataclasses.replace(each, tokens=16) for each in load.mixed(12, 0, "same", model.side)]
    asked = [each for each in asked if each.kind == "short"]
    answers = [[reply.text for reply in asyncio.run(load.closed_loop(send, asked, 1))] for send in (ours, theirs)]
    return f"{sum(a.strip() == b.strip() for a, b in zip(*answers, strict=True))} of {len(asked)}"


def describe(figures: dict[str, float]) -> str:
    first, between = ([1000 * figures[f"{name}_p{p}"] for p in (50, 99)] for name in ("first_token", "between_tokens"))
    return (
        f"{figures['tokens_per_second']:.1f} tokens/s, {figures['requests_per_second']:.2f} requests/s; p50/p99: first "
        f"token {first[0]:.0f}/{first[1]:.0f} ms, between tokens {between[0]:.0f}/{between[1]:.0f} ms"
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the command


def run_model(name: str, scratch: Path, args) -> dict[str, Any]:
    """All parts with a model."""
    model = find_model(name, scratch, args.dtype)
    result: dict[str, Any] = {}
    flags = ["--checkpoint", str(model.directory), "--dtype", args.dtype, "--slots", str(args.slots)]
    flags += ["--context", str(model.context), "--warm-up"]
    with contextlib.ExitStack() as stack:
        begin = time.perf_counter()
        say(f"{name}: compiling")
        log = scratch / f"{name}.log"
        ours = stack.enter_context(load.our_server(log, *flags))
        result["start_seconds"] = time.perf_counter() - begin
        if "load" in args.parts:
            theirs = start_theirs(model, scratch, stack, args)
            static = stack.enter_context(load.all_slots_server(scratch / f"{name}-static.log", *flags))
            result["load"] = run_load(model, ours, static, theirs, args)
        if {"alone", "second"} & set(args.parts):
            engine = stack.enter_context(LocalEngine(model, args.dtype, args.slots))
            if "alone" in args.parts:
                result["alone"] = run_alone(model, ours, engine, args)
            if "second" in args.parts and name != "shapes":
                result["second"] = run_second(model, ours, engine, args)
    return result


def start_theirs(model: Model, scratch: Path, stack: contextlib.ExitStack, args) -> dict[str, Send]:
    """The servers that ours is compared with."""
    if args.no_transformers:
        return {}
    directories, send = {"transformers": model.directory}, {}
    if args.decoder:
        directories["decoder"] = scratch / f"{model.name}-decoder"
        if not directories["decoder"].exists():
            write_decoder(model, directories["decoder"], args.dtype)
    for contender, directory in directories.items():
        flags = ("--dtype", args.dtype, *(BATCHING if contender == "decoder" else ()))
        log = scratch / f"{model.name}-{contender}.log"
        server = stack.enter_context(load.their_server(log, str(directory), *flags))
        send[contender] = ask_theirs(server, directory)
        warm_up = [each for each in load.mixed(6, 0, "warm-up", model.side) if each.kind == "short"]
        asyncio.run(load.closed_loop(send[contender], warm_up[:2], 1))
    return send


def missed(name: str, result: dict[str, Any]) -> list[str]:
    """The goals that a model's results miss."""
    misses = []
    if found := result.get("load"):
        for other, goal in GOALS.items():
            if other in found and found[other]["ratio"] < goal:
                misses.append(f"{name}: {found[other]['ratio']:.2f} x the tokens per second of {other}, goal {goal:g}")
    if (found := result.get("alone")) and found["generate_ratio"] < ALONE:
        misses.append(f"{name}: one client has {found['generate_ratio']:.2f} x the speed of generate, goal {ALONE:g}")
    if found := result.get("second"):
        if found["second_share"] > SECOND:
            misses.append(
                f"{name}: the second question about an image takes {found['second_share']:.0%} of the first's time to "
                f"the first token, goal {SECOND:.0%}"
            )
        if not found["same_answers"]:
            misses.append(f"{name}: answers differ from those of an engine without a cache")
    return misses


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model", action="append", help=f"{', '.join(MODELS)} or a v1.6 model's name; repeatable; default: both"
    )
    p.add_argument(
        "--parts", type=lambda text: text.split(","), default=list(PARTS), help=f"default: {','.join(PARTS)}"
    )
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--requests", type=int, default=64, help="of a round (default 64)")
    p.add_argument("--images", type=float, default=0.2, help="share of questions about an image (default 0.2)")
    p.add_argument("--clients", type=int, default=16, help="of the closed loop (default 16)")
    p.add_argument("--slots", type=int, default=16, help="of the server, and questions of a batch (default 16)")
    p.add_argument("--rate", type=float, help=f"requests/s of the open loop; default: {OPEN:g} of the closed loop's")
    p.add_argument("--alone-tokens", type=int, default=64, help="of the answers to one client (default 64)")
    p.add_argument("--no-transformers", action="store_true", help="without `transformers serve`")
    p.add_argument("--decoder", action="store_true", help="also `transformers serve` of the decoder, with batching")
    p.add_argument("--directory", type=Path, help="of weights and logs, kept; default: a temporary one")
    p.add_argument("--json", type=Path, metavar="FILE")
    args = p.parse_args()
    if "load" in args.parts and not args.no_transformers and not importlib.util.find_spec("fastapi"):
        raise SystemExit("`transformers serve` needs fastapi: pip install fastapi; or leave it out: --no-transformers")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.3")  # of a GPU's memory: three processes use it
    results, misses = {}, []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.directory or Path(temporary)
        scratch.mkdir(exist_ok=True)
        for name in args.model or MODELS:
            results[name] = run_model(name, scratch, args)
            misses += missed(name, results[name])
    if args.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        report = {"mix": load.MIX, "settings": settings, "models": results, "missed": misses}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    print("\n".join(misses) if misses else "all goals are met")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
