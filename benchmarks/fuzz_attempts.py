"""The attempts of `fuzz.py`: a reader or command, and a valid file or command line for it, changed at random.

Each function in `READERS` and `COMMANDS` sets up an attempt in the empty current directory, and returns it.
"""

import argparse
import base64
import contextlib
import functools
import importlib
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fuzz_inputs import BASE, GOLDEN, change, change_one, damage, fetch_inputs

from llava_jax.console import run_main

TRAIN = "--preset v1.5-pretrain --global-batch-size 2 --max-length 512 --dtype float32 --warmup-ratio 0 --steps 1"


class Attempt(NamedTuple):
    """`own` are the paths that `run` may write; `command` is what it runs, for display."""

    run: Callable[[], Any]
    own: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


# ---------------------------------------------------------------- readers


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
            found.decode(ids), found.decode_settled(ids)

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
    from infer import evaluate
    from llava_jax import config
    from llava_jax.data.tokenizer import load_tokenizer
    from train.samples import BadSample, Sample, Samples

    fetch_inputs("images", "data.json", "data.jsonl", "mix.yaml")
    name = pick.choice(["data.json", "data.jsonl", "mix.yaml"])
    change(Path(pick.choice([name, name, "data.json"])), pick)
    words = load_tokenizer(GOLDEN / "tokenizer")

    def run():
        if pick.random() < 0.3:
            questions = evaluate.read_questions(Path(name), Path())
            return evaluate.check_answers(questions, evaluate.choose_metric(questions))
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


READERS = (config, tensors, tokenizer, template, adapter, image, data, prepared, questions, scienceqa,
           captions, mix, instruct)  # fmt: skip


# ---------------------------------------------------------------- commands

OUTPUTS = ("answers", "output", "destination", "paths")
UNUSED = ("help", "coordinator", "process_id", "processes", "heartbeat", "profile_steps", "tensorboard", "list_presets")
FLAG_VALUES = (
    *("0", "-1", "1", "2", "3", "8", "2147483648", "18446744073709551616", "1e9", "0.5", "-0.1", "1e-300", "1e400"),
    *("nan", "inf", "1_0", "0x10", "", " ", "none", "auto", "data=1", "data=1,fsdp=-1", "data=1,fsdp=1,tensor=8"),
    *("\x1b[31m", "a\nb", "\udcff", "x" * 5000, "-", "--", "=", "v1", "llava_v0", "projector", "q,v", "5GB", "1B"),
)
PATHS = (
    *("original", "v1.5", "orbax", "transformers", "adapter", "images", "data.json", "data.jsonl", "mix.yaml"),
    *("questions.jsonl", "answers.jsonl", "metrics.jsonl", "images/rgb.png", "images/16.png", "prepared"),
    *("original/config.json", "nowhere", "coco_captions.json", "coco_instances.json", "records.jsonl", "results.jsonl"),
    *("fifo", "loop", "data.json/x", "..", "v1.5/model.safetensors", "v1.5/vision_tower", "new", "new/new"),
)
DEVICES = ("/dev/full", "/dev/zero", "/dev/null", "file:///dev/zero", "http://127.0.0.1:9/x", "data:,x", "/", "/root")
STARTS = (
    ("infer.generate", "--checkpoint original --prompt Hi --image images/rgb.png --max-new-tokens 2"),
    ("infer.generate", "--checkpoint v1.5 --questions questions.jsonl --answers answers.jsonl --max-new-tokens 2"),
    ("infer.evaluate", "--checkpoint v1.5 --data data.json --max-new-tokens 2"),
    ("train.preview", "--checkpoint v1.5 --data data.json --template v1"),
    ("train.plot", "metrics.jsonl --metrics loss --output new.png"),
    ("train.datasets.scienceqa", "--base-dir . --split train"),
    ("train.datasets.captions", "--captions captions.jsonl --image-folder . --output new"),
    ("train.datasets.captions", "--captions captions.tar --output new"),
    ("train.datasets.mix", "--data data.json --data data.jsonl=1.5 --image-folder . --output new"),
    ("train.datasets.mix", "--data data.jsonl --checkpoint v1.5 --report-only"),
    ("train.datasets.instruct", "--captions records.jsonl --model m --output new --write-batch batch.jsonl"),
    ("train.datasets.instruct", "--captions records.jsonl --model m --output new --endpoint http://127.0.0.1:9/v1"),
    ("train.datasets.shapes", "--output new --examples 4 --tests 2"),
    ("train.datasets.prepare", "--data data.json --output new --workers 1"),
    ("train.datasets.prepare", "--output prepared --verify --workers 1"),
    ("convert", "to-orbax v1.5 new"),
    ("convert", "to-orbax adapter new --base v1.5"),
    ("convert", "to-hf original new"),
    ("convert", "inspect transformers"),
    ("convert", "verify v1.5 orbax"),
)


def command(pick: random.Random) -> Attempt:
    """A command in this process, with random flags, on files of which one may be changed."""
    module, start = pick.choice(STARTS)
    destination = pick.choice(["new", "new", "transformers", "images", "data.json", "data.json/x"])
    arguments = [destination if argument == "new" else argument for argument in start.split()]
    fetch_inputs(*(name for name in PATHS if re.match(r"\w[^/]*$", name) and (BASE / name).exists()))
    fetch_inputs("problems.json", "pid_splits.json", "captions.jsonl", "captions.tar")
    os.mkfifo("fifo")
    os.symlink("loop", "loop")
    arguments += random_flags(module, arguments, pick)
    own = owned(arguments) + ["answers.jsonl"] * (module == "infer.generate")
    if module == "convert" and "--overwrite" in arguments and "transformers" not in arguments[:2]:
        own.append("transformers")
    if module == "train.plot" and "--overwrite" in arguments:
        own += [given for flag, given in itertools.pairwise(arguments) if flag == "--output"]
    if pick.random() < 0.5:
        change_one(".", pick, (".json", ".jsonl", ".png"))

    def run():
        sys.argv = [f"python -m {module}", *arguments]
        run_main(module_of(module).main)

    return Attempt(run, tuple(own), (module, *arguments))


def owned(arguments: list[str]) -> list[str]:
    """The outputs of a command that do not exist yet."""
    flags = ("--answers", "--output", "--write-batch")
    named = [arguments[i + 1] for i, flag in enumerate(arguments[:-1]) if flag in flags]
    return [name for name in ("new", "llava_train_QCM-LEA.json", *named) if name and not os.path.lexists(name)]


def module_of(name: str):
    return importlib.import_module(f"{name}.__main__" if name in ("convert", "train") else name)


def random_flags(module: str, arguments: list[str], pick: random.Random) -> list[str]:
    """A few flags of a command, with arbitrary values."""
    made = getattr(module_of(module), "parser", None)
    parser = made() if made else argparse.ArgumentParser()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parser = action.choices[arguments[0]]
            break
    actions = [action for action in parser._actions if action.option_strings and action.dest not in UNUSED]
    given = []
    for action in pick.sample(actions, min(len(actions), pick.choice([0, 1, 1, 2, 4]))):
        flag = pick.choice(action.option_strings)
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            given.append(flag)
        elif action.choices and pick.random() < 0.8:
            given += [flag, pick.choice(list(action.choices))]
        elif action.dest in OUTPUTS:
            given += [flag, pick.choice(PATHS)]
        else:
            given += [flag, pick.choice([*FLAG_VALUES, *PATHS, *DEVICES])]
    return given


def process(pick: random.Random) -> Attempt:
    """A command or a training run in a separate process, in an unusual environment."""
    if pick.random() < 0.5:
        attempt = command(pick)
    else:
        fetch_inputs("v1.5", "images", "train.json")
        if pick.random() < 0.5:
            change_one(".", pick, (".json", ".png"))
        arguments = f"{TRAIN} --checkpoint v1.5 --data train.json --template v1 --output new".split()
        arguments += random_flags("train", arguments, pick)
        attempt = Attempt(print, tuple(owned(arguments)), ("train", *arguments))
    environment = dict(os.environ)
    if pick.random() < 0.3:
        environment |= {"PYTHONIOENCODING": "ascii"}
    if pick.random() < 0.3:
        environment.pop("HOME")

    def run():
        try:
            arguments = [os.fsencode(argument) for argument in attempt.command[1:] if "\0" not in argument]
            done = subprocess.run([sys.executable, "-m", attempt.command[0], *arguments], env=environment)
        except UnicodeEncodeError:
            return
        sys.exit(done.returncode)

    return attempt._replace(run=run)


def resume(pick: random.Random) -> Attempt:
    """A training run that resumes in a directory in which one file is changed."""
    run = BASE / "run"
    fixed = f"{TRAIN} --checkpoint {BASE}/v1.5 --data {BASE}/train.json --image-folder {BASE} --template v1".split()
    if not run.exists():
        made = subprocess.run([sys.executable, "-m", "train", *fixed, "--output", run], capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
    fetch_inputs("run")
    if pick.random() < 0.5:  # as if the run had been interrupted
        shutil.rmtree("run/model")
    change_one("run", pick, (".json", ".jsonl", "", ".safetensors"))
    arguments = [*fixed, "--output", "run"]
    done = lambda: sys.exit(subprocess.run([sys.executable, "-m", "train", *arguments]).returncode)  # noqa: E731
    return Attempt(done, ("run",), ("train", *arguments))


COMMANDS = (process, resume)
