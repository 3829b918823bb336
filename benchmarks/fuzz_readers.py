"""The readers that `fuzz.py` tries: what reads a file, and a valid file for it, changed at random.

Each function in `READERS` sets up an attempt in the empty current directory, and returns it.
"""

import argparse
import base64
import contextlib
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fuzz_inputs import GOLDEN, change, change_one, damage, fetch_inputs


class Attempt(NamedTuple):
    """`own` are the paths that `run` may write; `command` is what it runs, for display."""

    run: Callable[[], Any]
    own: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


def config(pick: random.Random) -> Attempt:
    from llava_jax.checkpoints.checkpoint import open_checkpoint
    from llava_jax.data.templates import choose_template, explain_template

    fetch_inputs(name := pick.choice(["original", "v1.5", "transformers", "orbax", "bin"]))
    change_one(name, pick, (".json", ".jinja"))

    def run():
        found = open_checkpoint(name)
        found.source()
        explain_template(found.config), choose_template(found.config)

    return Attempt(run)


def tensors(pick: random.Random) -> Attempt:
    from llava_jax.checkpoints.checkpoint import open_any

    fetch_inputs(name := pick.choice(["v1.5", "bin"]))
    change_one(name, pick, (".safetensors", ".bin"))
    return Attempt(lambda: [tensor.read() for tensor in open_any(name).tensors.values()])


def tokenizer(pick: random.Random) -> Attempt:
    from llava_jax.data.tokenizer import load_tokenizer

    fetch_inputs("tokenizers")
    name = pick.choice(sorted(path.name for path in Path("tokenizers").iterdir()))
    change_one(f"tokenizers/{name}", pick, (".json", ".model"))

    def run():
        found = load_tokenizer(f"tokenizers/{name}")
        found.add_special(["<im_start>"])
        for text in ("USER: It's  2024!\n猫 🙂 é</s>", "a" * 500, ""):
            ids = found.encode(text)[0]
            found.decode(ids), list(map(found.stream().add, ids))

    return Attempt(run)


@functools.cache
def shorten_limits() -> None:
    """Limit untrusted programs to one second."""

    from llava_jax import sandbox

    sandbox._shared = sandbox.Worker(seconds=1)


def template(pick: random.Random) -> Attempt:
    from llava_jax.data.templates import get_template, render

    shorten_limits()
    parts = (
        *("{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ messages[0] }}", "{{ messages | tojson }}"),
        *("<image>", "{{ 'a' * 10 ** 9 }}", "{% for i in range(99999) %}", "{% if x %}", "{% endif %}", "(" * 999),
        *("{% macro f(n) %}{{ f(n) }}{% endmacro %}", "{{ f(1) }}", "{{ '%99999d' % 3 }}", "{{ (9 ** 9) ** 9999 }}"),
        *("{% set x = messages %}", "{{ x | join('a' * 9999) }}", "{{ raise_exception('\x1b') }}", "{{ lipsum(n=9) }}"),
        *("{% generation %}", "{% endgeneration %}", "{{ '\ud800' }}", "{{ ''.__class__.__mro__ }}", "{% break %}"),
        *("{{ range(9) | batch(10 ** 8, 1) | list }}", "{{ strftime_now('%Y') }}", "{{ cycler(1).next() }}", "{{"),
    )
    program = "{{ 1 }}" + "".join(pick.choices(parts, k=pick.randrange(1, 8)))
    return Attempt(
        lambda: render(get_template(program), ["<image>\nHi", None], system=pick.choice([None, "Be brief."]))
    )


def adapter(pick: random.Random) -> Attempt:
    from convert.combine import combine

    shorten_limits()
    fetch_inputs("v1.5", "adapter")
    change_one("adapter", pick, (".json", ".json", ".safetensors"))

    def run():
        source, _ = combine(Path("adapter"), base=Path("v1.5"))
        for tensor in source.tensors.values():
            tensor.read()

    return Attempt(run)


def image(pick: random.Random) -> Attempt:
    from llava_jax import config
    from llava_jax.data import images

    fetch_inputs("images")
    path = pick.choice(sorted(Path("images").iterdir()))
    if pick.random() < 0.9:
        change(path, pick)
    source = str(path)
    if pick.random() < 0.2 and path.is_file():
        source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        source = damage(source.encode(), pick).decode("latin-1") if pick.random() < 0.5 else source
    model = pick.choice([config.tiny(), config.preset("v1.6-mistral-7b"), config.preset("v1.5-7b")])

    def run():
        images.image_size(source)
        opened = images.open_image(source)
        images.tile_image(opened, images.tile_layout(opened.size, model), model)

    return Attempt(run)


def data(pick: random.Random) -> Attempt:
    from infer.benchmarks import conversations
    from llava_jax import config
    from llava_jax.data.tokenizer import load_tokenizer
    from train.samples import BadSample, Sample, Samples

    fetch_inputs("images", "data.json", "data.jsonl", "mix.yaml")
    name = pick.choice(["data.json", "data.jsonl", "mix.yaml"])
    change(Path(pick.choice([name, name, "data.json"])), pick)
    words = load_tokenizer(GOLDEN / "tokenizer")

    def run():
        if pick.random() < 0.3:
            return conversations.Conversations(Path(name), Path()).questions(Path(), "reference")
        samples = Samples(name, "", config.tiny(), words, template="v1", max_length=pick.choice([None, 8, 512]))
        for i in range(min(len(samples), 8)):
            found = samples.measure(i, 0)
            found = samples.load(found) if isinstance(found, Sample) else found
            if isinstance(found, BadSample):
                found.describe()

    return Attempt(run)


def questions(pick: random.Random) -> Attempt:
    from infer.answers import AnswersFile
    from infer.questions import read_questions

    fetch_inputs("images", "questions.jsonl", "answers.jsonl")
    change(Path(pick.choice(["questions.jsonl", "answers.jsonl"])), pick)
    args = argparse.Namespace(questions="questions.jsonl", image_folder=pick.choice([None, "."]))

    def run():
        with AnswersFile("answers.jsonl", args.questions) as answers:
            return read_questions(args, answers)

    return Attempt(run)


def benchmark(pick: random.Random) -> Attempt:
    from infer.benchmarks import BENCHMARKS, find_benchmark
    from infer.benchmarks.answers import read_answers
    from infer.benchmarks.scoring import describe

    found = find_benchmark(pick.choice([*BENCHMARKS]))
    fetch_inputs("eval")
    directory, protocol = Path("eval") / (found.directory or found.name), pick.choice(found.protocols)
    said = [
        pick.choice(["Yes", "B", "B. red", "The answer is A.", "\ud800", "", "2 red, blue", "\0"]) for _ in range(60)
    ]
    asked = zip(found.questions(directory, protocol), said, strict=False)
    lines = [{"question_id": q.id, "prompt": q.prompt, "text": text, **q.extra} for q, text in asked]
    Path("eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if pick.random() < 0.3:
        change(Path("eval.jsonl"), pick)
    else:
        change_one(str(directory), pick, (".json", ".jsonl", ".tsv", ".txt"))

    def run():
        found.questions(directory, protocol)
        answers = read_answers("eval.jsonl")
        found.submission(directory, answers)
        if not found.server and not found.judged:
            describe(found, [found.score(directory, answers, protocol)])

    return Attempt(run)


def conversation(pick: random.Random) -> Attempt:
    from infer.conversation import load

    fetch_inputs("images", "data.json", "data.jsonl")
    name = pick.choice(["data.json", "data.jsonl"])
    change(Path(name), pick)
    return Attempt(lambda: load(name))


def scienceqa(pick: random.Random) -> Attempt:
    from train.datasets.scienceqa import convert

    fetch_inputs("problems.json", "pid_splits.json")
    change(Path(pick.choice(["problems.json", "pid_splits.json"])), pick)
    return Attempt(lambda: convert(Path(), pick.choice(["train", "test", "x"]), pick.choice(["QCM-LEA", "x", "CQM-A"])))


def captions(pick: random.Random) -> Attempt:
    from train.datasets.captions.__main__ import make_row
    from train.datasets.captions.sources import Fields, Pair, read_captions

    fetch_inputs(name := pick.choice(["captions.jsonl", "captions.csv", "captions.tsv", "captions.tar", "coco.json"]))
    change(Path(name), pick)
    image_name = pick.choice([None, "{row:9}.jpg"])

    def run():
        for found in read_captions(name, Fields(image_name=image_name)):
            if isinstance(found, Pair):
                make_row(found, ["What is it?"], 0)

    return Attempt(run)


def prepared(pick: random.Random) -> Attempt:
    from llava_jax.checkpoints.checkpoint import open_checkpoint
    from train.datasets.prepare import verify as verify_prepared
    from train.prepared import PreparedDataset
    from train.samples import BadSample, Samples

    fetch_inputs("prepared", "v1.5")
    change_one("prepared", pick, (".json", ".jsonl", ".safetensors", ".tar"))

    def run():
        found = open_checkpoint("v1.5")
        samples = Samples("prepared", "", found.config, found.tokenizer, template="v1")
        for i in range(min(len(samples), 8)):
            sample = samples.measure(i, 0)
            if not isinstance(sample, BadSample):
                samples.load(sample)
        dataset = PreparedDataset("prepared")
        for job in verify_prepared.jobs_of(dataset):
            verify_prepared.verify_shard(job, lambda count, size: None)

    return Attempt(run)


def mix(pick: random.Random) -> Attempt:
    from llava_jax.data.image_folder import ImageFolder
    from train import mixture
    from train.datasets.mix.files import mark_duplicates, measure_file
    from train.datasets.mix.images import check_images
    from train.datasets.mix.report import render, summarize
    from train.datasets.mix.rows import choose, left_out, write_mix

    fetch_inputs("images", "data.json", "data.jsonl")
    change_one(".", pick, (".json", ".json", ".jsonl", ".png"))

    def run():
        files = [measure_file(name) for name in ("data.json", "data.jsonl")]
        earlier = mark_duplicates(files)
        images = check_images(files, ImageFolder(""), decode=pick.random() < 0.5) if pick.random() < 0.7 else None
        mix = choose(mixture.read_parts(["data.json", "data.jsonl=1.5"]), files, images, 0)
        write_mix(mix, Path("mix.json"))
        list(left_out(files, earlier, images))
        render(summarize(mix, None), [])

    return Attempt(run, ("mix.json",))


def instruct(pick: random.Random) -> Attempt:
    from llava_jax.batch_files import read_results
    from llava_jax.replies import Replies
    from train.datasets.instruct.answers import BadAnswer, Checker
    from train.datasets.instruct.coco import read_records
    from train.datasets.instruct.messages import read_prompt

    fetch_inputs("coco_captions.json", "coco_instances.json", "records.jsonl", "replies.jsonl", "results.jsonl")
    change_one(".", pick, (".json", ".jsonl"))
    checker = Checker("conversation", read_prompt(None, "conversation"))
    parts = ["Question:", "Answer:", "===", "\n", "A cat.", "**", "[", '{"a": 1}', "<image>", "\ud800", "\0", "```"]
    reply = "".join(pick.choices(parts, k=pick.randrange(30)))

    def run():
        with contextlib.suppress(BadAnswer):
            checker.turns(reply)
        read_records("coco_captions.json", "coco_instances.json"), read_records("records.jsonl")
        list(read_results("results.jsonl")), Replies("replies.jsonl").close()

    return Attempt(run, ("replies.jsonl",))


READERS = (config, tensors, tokenizer, template, adapter, image, data, prepared, questions, benchmark, conversation,
           scienceqa, captions, mix, instruct)  # fmt: skip
