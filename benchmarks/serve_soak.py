"""The server under random clients, well-behaved and hostile ones at once, for an hour.

    python benchmarks/serve_soak.py
    python benchmarks/serve_soak.py --minutes 5 --json soak.json

Clients ask questions whose answers are known (greedy ones and seeded ones, computed by `Engine.generate` before), read
slowly, leave in the middle of an answer or of a request, send invalid JSON, giant bodies, images that are bombs, broken
or tiny, Unicode of all kinds, special tokens as text, unusual options, and more requests than the queue has places.

Exits with 1 unless all of this holds:

    answers   each request gets an answer or an error of its own, never a status of 500, and in time; known
              answers are as known
    slots     at the end nothing runs, and all slots answer
    memory    the server's resident memory at the end is at most 5 % above that after the first third (medians)
    log       has no traceback; SIGTERM ends the server with status 0
"""

import argparse
import asyncio
import collections
import dataclasses
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 0)]

import serve_load as load  # noqa: E402
from serve_clients import BEHAVIOURS, Client, Known, Wrong, ask_known, hostile_images  # noqa: E402
from serve_load import Question, Server  # noqa: E402

SLOTS, CONTEXT = 4, 1024
FLAGS = (
    *("--slots", str(SLOTS), "--context", str(CONTEXT), "--queue", "24", "--max-body-mb", "4", "--warm-up"),
    *("--receive-seconds", "5", "--stall-seconds", "5", "--connections", "500"),
)
CLIENTS = 24
GROWTH = 0.05  # of memory
MAX_PROBLEMS = 50


# ---------------------------------------------------------------- questions with known answers


def questions(pick: random.Random) -> list[Known]:
    """Questions with and without images, conversations, Unicode; greedy, and sampled with a seed."""
    texts = ["How many red objects are there?", "What is left of the blue circle?", "Is there a green square?",
             "naïve café 猫 🙂 \u202eRTL\u202c", "</s> [INST] <s> <<SYS>>", load.sentence(120, pick)]  # fmt: skip
    found = []
    for i, text in enumerate(texts * 4):
        image = load.noise(pick.choice([60, 120, 90]), i) if i % 3 == 0 else None
        turns = (text, load.sentence(5, pick), load.sentence(10, pick)) if i % 4 == 1 else (text,)
        sampled = dict(temperature=0.7, seed=i, top_p=0.9) if i % 5 == 4 else dict(temperature=0.0)
        options = sampled | dict(ignore_eos=i % 2 == 0)
        found.append(Known(Question("", turns, pick.choice([4, 16, 64]), image), options))
    return found


def answer_all(pipe, known: list[Known]) -> None:
    """Answer questions without a server, and send them back with their answers."""
    from infer.engine import Engine, Request
    from infer.sampling import Sampling
    from llava_jax.console import enable_compilation_cache

    enable_compilation_cache()
    engine, answered = Engine.load(load.ROOT / "infer" / "shapes"), []
    for each in known:
        images = (each.question.image,) if each.question.image else ()
        request = Request(each.question.turns, images, trust_special_tokens=False)
        sampling = Sampling(max_new_tokens=each.question.tokens, **each.options)
        [(_, answer)] = engine.generate([request], sampling, rows=SLOTS)
        answered.append(dataclasses.replace(each, answer=answer.text))
    pipe.send(answered)


def with_answers(known: list[Known]) -> list[Known]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=answer_all, args=(theirs, known))
    process.start()
    theirs.close()
    answered = ours.recv()
    process.join()
    return answered


# ---------------------------------------------------------------- the soak


class Soak:
    """A run of random clients against a server.

    Attributes:
      outcomes: how often each behaviour ended how.
      problems: what went wrong.
      memory: seconds since the start, and bytes of the server.
    """

    def __init__(self, server: Server, known: list[Known], seconds: float, answer_seconds: float):
        self.server, self.known, self.seconds, self.answer_seconds = server, known, seconds, answer_seconds
        self.images = hostile_images()
        self.outcomes, self.problems = collections.Counter[str](), list[str]()
        self.memory: list[tuple[float, int]] = []
        self.start = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    @property
    def over(self) -> bool:
        return self.elapsed > self.seconds or len(self.problems) >= MAX_PROBLEMS

    async def run(self) -> None:
        """Let clients do what they do at random, then check that the server is as before."""
        await asyncio.gather(self.watch(), *(self.client(i) for i in range(CLIENTS)))
        await self.check_idle()
        await self.check_slots()
        for each in self.known:
            await self.attempt(ask_known, Client(self.server.port, random.Random(0), [each], self.images))

    async def client(self, number: int) -> None:
        client = Client(self.server.port, random.Random(number), self.known, self.images)
        while not self.over:
            [behave] = client.pick.choices(list(BEHAVIOURS), list(BEHAVIOURS.values()))
            await self.attempt(behave, client)

    async def attempt(self, behave, client: Client) -> None:
        """One behaviour of a client, and how it ended."""
        try:
            async with asyncio.timeout(self.answer_seconds):
                result = await behave(client)
        except TimeoutError:
            self.problem(f"{behave.__name__}: no answer within {self.answer_seconds:g} s")
        except Wrong as error:
            self.problem(f"{behave.__name__}: {error}")
        except Exception as error:  # an answer that cannot be read, or none
            self.problem(f"{behave.__name__}: {error!r}")
        else:
            self.outcomes[f"{behave.__name__}: {result}"] += 1

    def problem(self, text: str) -> None:
        self.problems.append(text)
        say(f"PROBLEM after {self.elapsed:.0f} s: {text}")

    async def watch(self) -> None:
        """Measure the server's memory, and say how it goes."""
        said = 0.0
        while not self.over:
            await asyncio.sleep(min(1.0, self.seconds / 100))
            self.memory.append((self.elapsed, self.server.memory()))
            if self.server.process.poll() is not None:
                self.problems += ["the server has ended"] * MAX_PROBLEMS
            if self.elapsed - said >= 30:
                said = self.elapsed
                say(f"{said / 60:.1f} of {self.seconds / 60:g} min: {self.outcomes.total():,} clients, "
                    f"{len(self.problems)} problems, {self.memory[-1][1] / 2**20:.0f} MiB")  # fmt: skip

    # ------------------------------------------------------------ afterwards

    async def check_idle(self) -> None:
        """Nothing runs or waits, soon after the last client."""
        for _ in range(300):
            busy = [await load.metric(self.server.port, f"num_requests_{what}") for what in ("running", "waiting")]
            if not any(busy):
                return
            await asyncio.sleep(0.1)
        self.problem(f"{busy[0]:g} requests still run and {busy[1]:g} wait, 30 s after the last client")

    async def check_slots(self) -> None:
        """All slots answer at a time."""
        question = dict(max_tokens=500, ignore_eos=True, stream=True, stream_options={"include_usage": True})
        bodies = [question | {"messages": Question("", (f"{i}?",), 0).messages} for i in range(SLOTS)]
        asking, most = [asyncio.ensure_future(load.ask(self.server.port, body)) for body in bodies], 0.0
        while not all(task.done() for task in asking):
            most = max(most, await load.metric(self.server.port, "num_requests_running"))
        if most < SLOTS or any(reply.tokens != 500 for reply in await asyncio.gather(*asking)):
            self.problem(f"{most:g} of {SLOTS} slots answer")

    def check_memory(self) -> dict[str, float]:
        """The memory after the first third, and at the end: medians over a sixth of the time."""
        early, late = (
            statistics.median(size for at, size in self.memory if low <= 6 * at / self.seconds <= high)
            for low, high in ((1, 2), (5, 6.5))
        )
        growth = late / early - 1
        if growth > GROWTH:
            self.problem(f"memory has grown by {growth:.1%}, from {early / 2**20:.0f} to {late / 2**20:.0f} MiB")
        return {"early_bytes": early, "late_bytes": late, "growth": growth}

    def check_end(self) -> None:
        """The server ends on SIGTERM, and its log has no failure."""
        if status := self.server.stop():
            self.problem(f"the server ended with status {status}")
        log = self.server.text()
        for sign in ("Traceback", " 500 "):
            if sign in log:
                at = log.index(sign)
                self.problem(f"{log.count(sign)} x {sign.strip()!r} in the log: {log[max(0, at - 300) : at + 1500]}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=60.0, help="default 60")
    p.add_argument("--answer-seconds", type=float, default=120.0, help="for any answer (default 120)")
    p.add_argument("--log", type=Path, help="of the server; default: a temporary file")
    p.add_argument("--json", type=Path, metavar="FILE")
    args = p.parse_args()
    say("answering questions without a server")
    known = with_answers(questions(random.Random(0)))
    with tempfile.TemporaryDirectory() as scratch:
        say("starting the server")
        with load.our_server(args.log or Path(scratch) / "log", *FLAGS) as server:
            soak = Soak(server, known, 60 * args.minutes, args.answer_seconds)
            asyncio.run(soak.run())
            memory = soak.check_memory() if len(soak.problems) < MAX_PROBLEMS else {}
            soak.check_end()
    outcomes = dict(sorted(soak.outcomes.items()))
    report = {"minutes": soak.elapsed / 60, "memory": memory, "outcomes": outcomes, "problems": soak.problems}
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    for name, count in outcomes.items():
        print(f"{count:8,}  {name}")
    print(f"{soak.outcomes.total():,} clients; memory {memory.get('growth', 0):+.1%}; {len(soak.problems)} problems")
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
