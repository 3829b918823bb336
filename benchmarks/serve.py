"""The server under load, compared with other ways to run the same model on the same machine.

    python benchmarks/serve.py                                # the bundled model, then 513M random parameters
    python benchmarks/serve.py --model 513M --json serve.json
    python benchmarks/serve.py --model 513M --parts second    # only the second question about an image

Clients stream answers over HTTP, greedy and of given lengths: a fixed number of them, each with one question at a time
(closed loop), and questions that arrive at random (open loop). In the same rounds, with questions of the same lengths
that nobody has asked before, and medians over the rounds:

    batches       the same server, but batches of questions that all wait for the longest answer (static batching);
                  goal: at most 1 / 1.5 of the server's tokens per second
    transformers  `transformers serve` with the same weights in the same dtype; goal: at most 1 / 2
    alone         one client; goal: per token, at least 0.95 of the speed of `Engine.generate` with one question
    second        a second question about an image of five tiles (of the 513M model): goal: at most 10 % of the first
                  one's time to the first token, and the answer of an engine that has seen nothing

`transformers serve` has no continuous batching for models with images: it answers one question after the other. With
`--decoder`, text questions alone are also put to a server of the decoder's weights alone, which does batch.

Exits with 1 if a goal is missed.
"""

import argparse
import asyncio
import contextlib
import dataclasses
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

BUNDLED = load.ROOT / "infer" / "shapes"
MODELS = ("shapes", devices.SMALL)
PARTS = ("load", "alone", "second")
GOALS = {"batches": 1.5, "transformers": 2.0}  # the server's tokens per second, of theirs
ALONE = 0.95  # speed per token with one client, of `Engine.generate`'s
SECOND = 0.1  # time to the first token, of the first question's
SECOND_TOKENS = 16
OPEN = 0.7  # requests per second in the open loop, of the closed loop's


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to serve: its directory, the side of its tiles, and positions of a slot."""

    name: str
    directory: Path
    side: int
    context: int


# ---------------------------------------------------------------- models


def find_model(name: str, scratch: Path, dtype: str) -> Model:
    """The bundled model, or one of random weights, created in `scratch` if missing."""
    if name == "shapes":
        return Model(name, BUNDLED, 60, 2048)
    directory = scratch / name
    if not (directory / "config.json").exists():
        from generate import make_weights

        maker = multiprocessing.get_context("spawn").Process(target=make_weights, args=(name, directory, dtype))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit("no weights were made")
        write_processor(directory)
    return Model(name, directory, devices.model_config(name).vision.image_size, 4096)


def write_processor(directory: Path) -> None:
    """Write the tokenizer, the chat template and the image processor of a random model: those of the bundled one, with
    a word for each further token id."""
    config = json.loads((directory / "config.json").read_text())
    image, vision = config["image_token_index"], config["vision_config"]
    files = {path.name: json.loads(path.read_text()) for path in BUNDLED.glob("*.json")}
    moved = {640: image, 641: image + 1}  # the ids of the image and padding tokens
    tokenizer, settings = files["tokenizer.json"], files["tokenizer_config.json"]
    tokenizer["model"]["vocab"] |= {f"\u2581w{i}": i for i in range(640, image)}
    for token in tokenizer["added_tokens"]:
        token["id"] = moved.get(token["id"], token["id"])
    settings["added_tokens_decoder"] = {
        str(moved.get(int(i), i)): token for i, token in settings["added_tokens_decoder"].items()
    }
    processor, images = files["processor_config.json"], files["preprocessor_config.json"]
    processor["patch_size"], side = vision["patch_size"], vision["image_size"]
    images |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    images["image_grid_pinpoints"] = config["image_grid_pinpoints"]
    config["conversation_template"] = files["config.json"]["conversation_template"]
    for name, value in (
        ("tokenizer.json", tokenizer), ("tokenizer_config.json", settings), ("processor_config.json", processor),
        ("preprocessor_config.json", images), ("config.json", config),
    ):  # fmt: skip
        (directory / name).write_text(json.dumps(value, indent=2))
    (directory / "chat_template.jinja").write_text((BUNDLED / "chat_template.jinja").read_text())


def write_decoder(model: Model, directory: Path, dtype: str) -> None:
    """Write the decoder of a model as a model of its own, with transformers."""
    import torch
    import transformers as tf

    whole = tf.LlavaNextForConditionalGeneration.from_pretrained(model.directory, dtype=getattr(torch, dtype))
    decoder = tf.AutoModelForCausalLM.from_config(whole.config.text_config, dtype=getattr(torch, dtype))
    decoder.model.load_state_dict(whole.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(whole.lm_head.state_dict())
    decoder.generation_config = whole.generation_config
    decoder.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).write_text((model.directory / name).read_text())


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

    def __init__(self, model: Model, dtype: str):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        context.Process(target=_run_engine, args=(theirs, model.directory, dtype), daemon=True).start()

    def ask(self, way: str, question: Question) -> tuple[str, float]:
        """The answer, and seconds per token after the first.

        Args:
          way: "stream", "generate", or "fresh" for an engine that has seen nothing.
        """
        self._pipe.send((way, question))
        return self._pipe.recv()

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *_) -> None:
        self._pipe.send(None)


def _run_engine(pipe, directory: Path, dtype: str) -> None:
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
            [(_, answer)] = used.generate([Request(question.turns, images)], Sampling(**sampling), rows=1)
        pipe.send((answer.text, 1 / answer.decode_tokens_per_second))


# ---------------------------------------------------------------- the parts


def run_load(model: Model, ours: Server, theirs: dict[str, Send], args) -> dict[str, Any]:
    """Rounds of the closed loop by each contender, and the open loop."""
    served = ask_ours(ours)
    contenders = {"server": served, "batches": served, **theirs}
    rounds: dict[str, list[dict]] = {name: [] for name in contenders}
    for number in range(args.rounds):
        for name, send in contenders.items():
            questions = load.mixed(args.requests, number, f"{name} {number}", model.side)
            if name == "batches":
                replies = load.batches(send, questions, args.slots)
            else:
                replies = load.closed_loop(send, questions, args.clients)
            rounds[name].append(figures := load.figures(asyncio.run(replies)))
            say(f"{model.name}, round {number + 1} of {args.rounds}, {name}: {describe(figures)}")
    result: dict[str, Any] = {name: medians(each) for name, each in rounds.items()}
    for name in contenders.keys() - {"server"}:
        result[name]["ratio"] = ratio(rounds["server"], rounds[name], "tokens_per_second")
    rate = args.rate or OPEN * result["server"]["requests_per_second"]
    questions = load.mixed(args.requests, args.rounds, "open", model.side)
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
        (text, streamed), (_, generated) = (engine.ask(way, question) for way in ("stream", "generate"))
        seconds = {"server": reply.per_token, "stream": streamed, "generate": generated}
        if number:  # the engine compiled in the first one
            rounds.append(seconds | {"same_answer": text == reply.text})
            times = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items())
            say(f"{model.name}, one client: {times} per token")
    ratios = {
        f"{name}_ratio": statistics.median(r[name] / r["server"] for r in rounds) for name in ("stream", "generate")
    }
    return medians(rounds) | ratios | {"same_answers": all(r["same_answer"] for r in rounds)}


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


def ratio(ours: list[dict], theirs: list[dict], key: str) -> float:
    """The median over the rounds of ours / theirs."""
    return statistics.median(a[key] / b[key] for a, b in zip(ours, theirs, strict=True))


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
    flags = ("--checkpoint", str(model.directory), "--dtype", args.dtype, "--slots", str(args.slots))
    with contextlib.ExitStack() as stack:
        begin = time.perf_counter()
        say(f"{name}: compiling")
        log = scratch / f"{name}.log"
        ours = stack.enter_context(load.our_server(log, *flags, "--context", str(model.context), "--warm-up"))
        result["start_seconds"] = time.perf_counter() - begin
        if "load" in args.parts:
            theirs = start_theirs(model, scratch, stack, args)
            result["load"] = run_load(model, ours, theirs, args)
        if {"alone", "second"} & set(args.parts):
            engine = stack.enter_context(LocalEngine(model, args.dtype))
            if "alone" in args.parts:
                result["alone"] = run_alone(model, ours, engine, args)
            if "second" in args.parts and name != "shapes":
                result["second"] = run_second(model, ours, engine, args)
    return result


def start_theirs(model: Model, scratch: Path, stack: contextlib.ExitStack, args) -> dict[str, Send]:
    """The servers that ours is compared with."""
    if args.no_transformers:
        return {}
    send = {}
    directories = {"transformers": model.directory}
    for contender, directory in directories.items():
        log = scratch / f"{model.name}-{contender}.log"
        server = stack.enter_context(load.their_server(log, str(directory), "--dtype", args.dtype))
        send[contender] = ask_theirs(server, directory)
        asyncio.run(load.closed_loop(send[contender], load.mixed(2, 0, "warm-up", model.side), 1))
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
    p.add_argument("--clients", type=int, default=16, help="of the closed loop (default 16)")
    p.add_argument("--slots", type=int, default=16, help="of the server, and questions of a batch (default 16)")
    p.add_argument("--rate", type=float, help=f"requests/s of the open loop; default: {OPEN:g} of the closed loop's")
    p.add_argument("--alone-tokens", type=int, default=64, help="of the answers to one client (default 64)")
    p.add_argument("--no-transformers", action="store_true", help="without `transformers serve`")
    p.add_argument("--directory", type=Path, help="of weights and logs, kept; default: a temporary one")
    p.add_argument("--json", type=Path, metavar="FILE")
    args = p.parse_args()
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
