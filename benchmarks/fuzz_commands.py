"""The commands that `fuzz.py` tries, on valid files and command lines that are changed at random.

`command` and each function in `COMMANDS` set up an attempt in the empty current directory, and return it.
"""

import argparse
import importlib
import itertools
import os
import random
import re
import shutil
import subprocess
import sys

from fuzz_inputs import BASE, change_one, fetch_inputs
from fuzz_readers import Attempt

from llava_jax.console import run_main

TRAIN = "--preset v1.5-pretrain --global-batch-size 2 --max-length 512 --dtype float32 --warmup-ratio 0 --steps 1"
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
    ("infer.chat", "--checkpoint v1.5 --image images/rgb.png --max-new-tokens 2"),
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
    found = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(found, "__path__") else found  # a package


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
