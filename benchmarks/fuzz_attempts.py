"""What `fuzz.py` attempts: a valid file or command, changed at random, and the reader or command that is given it.

`make` writes what is changed, once. Each function of `READERS` and `COMMANDS` sets an attempt up in the current
directory, which is empty, and returns it.
"""

import argparse
import base64
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llava_jax.console import run_main

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
BASE = Path("../../base")  # from the current directory of an attempt
TRAIN = "--preset v1.5-pretrain --global-batch-size 2 --max-length 512 --dtype float32 --warmup-ratio 0 --steps 1"


class Attempt(NamedTuple):
    """`own` are the paths that `run` may write; `command` is what it runs, for people."""

    run: Callable[[], Any]
    own: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


# ---------------------------------------------------------------- what is changed


def make(base: Path) -> None:
    """Checkpoints of each kind, images of each format, files of data, questions and answers: all of them valid."""
    from safetensors.numpy import load_file, save_file

    from convert.to_hf import to_hf
    from convert.to_orbax import to_orbax
    from train.lora import _save_torch

    base.mkdir(parents=True)
    for name, golden in (("original", "v1.6-mistral"), ("v1.5", "v1.5-llama")):
        shutil.copytree(GOLDEN / "checkpoints" / golden, base / name, ignore=shutil.ignore_patterns("expected*"))
    to_hf(base / "original", base / "transformers")
    to_orbax(base / "v1.5", base / "orbax")
    shutil.copytree(base / "v1.5", base / "bin")
    tensors = load_file(base / "v1.5" / "model.safetensors")
    _save_torch(base / "bin" / "pytorch_model.bin", tensors)
    (base / "bin" / "model.safetensors").unlink()
    shutil.copytree(GOLDEN / "tokenizers", base / "tokenizers", ignore=shutil.ignore_patterns("*.py", "*.gz", "str*"))

    adapter, name = base / "adapter", "model.layers.0.self_attn.q_proj"
    adapter.mkdir()
    out, wide = tensors[f"{name}.weight"].shape
    factors = {"A": np.ones((4, wide), np.float32), "B": np.ones((out, 4), np.float32)}
    save_file(
        {f"base_model.model.{name}.lora_{side}.weight": x for side, x in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    settings = dict(
        peft_type="LORA", r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"], bias="none",
        rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.0\..*": 16},
    )  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(settings))

    images = base / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff", "ppm", "ico", "eps", "pdf"):
        image.save(images / f"rgb.{kind}")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(images / "16.png")
    image.convert("P").save(images / "palette.png")
    image.convert("CMYK").save(
        images / "cmyk.jpeg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    )
    image.save(images / "frames.gif", save_all=True, append_images=[image.rotate(90)])

    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    said = [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, {"role": "assistant", "content": "So."}]
    rows = [{"id": str(i), "image": "images/rgb.png", "conversations": turns} for i in range(4)]
    rows += [{"id": 4, "messages": said, "system": "Be brief."}, {"id": "5", "conversations": turns[:1] * 2}]
    rows[2] |= {"image": ["images/rgb.png"], "kinds": ["animal"]}
    problem = dict(question="Which?", choices=["cat", "dog"], answer=0, hint="", image=None, lecture="", solution="")
    asked = [{"question_id": i, "text": "What is it?", "image": "images/rgb.png"} for i in range(3)]
    answered = [{"question_id": 0, "prompt": "What is it?", "text": "A cat.", "answer_id": "a", "metadata": {}}]
    files = {
        "data.json": json.dumps(rows),
        "data.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "train.json": json.dumps(rows[:2]),
        "mix.yaml": "datasets:\n  - json_path: data.json\n    sampling_strategy: first:50%\n",
        "questions.jsonl": "".join(json.dumps(row) + "\n" for row in asked),
        "answers.jsonl": "".join(json.dumps(row) + "\n" for row in answered),
        "problems.json": json.dumps({str(i): problem for i in range(3)}),
        "pid_splits.json": json.dumps({"train": ["0", "1"], "test": ["2"]}),
    }
    for file, text in files.items():
        (base / file).write_text(text)


def bring(*names: str) -> None:
    """Copy what `make` made here."""
    for name in names:
        (shutil.copytree if (BASE / name).is_dir() else shutil.copy)(BASE / name, name)


# ---------------------------------------------------------------- changes

TEXTS = ("", "x", "0", "-1", "None", "x" * 5000, "\ud800", "\x1b[31m\n", "\0", "/", "..", "<image>", "猫", "(.*.*)*x")
NUMBERS = (0, 1, -1, 2, 3, 0.5, -0.0, 1e308, float("inf"), float("nan"), 2**31, 2**63, 2**64, -(2**70), 10**400)
VALUES = (None, True, False, [], {}, [None], [[[1]]], {"a": {}}, [1, 2], ["x"] * 1000, *TEXTS, *NUMBERS)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths to all that a JSON value holds."""
    for key in value if isinstance(value, dict) else range(min(len(value), 50)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def mutate(value: Any, pick: random.Random) -> Any:
    """A JSON value with something in it changed."""
    found = list(places(value))
    if not found or pick.random() < 0.02:
        return pick.choice(VALUES)
    *path, key = pick.choice(found)
    holder = value
    for step in path:
        holder = holder[step]
    match pick.randrange(8):
        case 0:
            del holder[key]
        case 1:
            holder[key] = [holder[key]] * pick.choice([0, 1, 2, 1000])
        case 2 if isinstance(holder, dict):
            holder[pick.choice(TEXTS)] = holder.pop(key)
        case 3 if isinstance(holder[key], int | float):
            holder[key] = pick.choice([-holder[key], holder[key] * 10**6, holder[key] + 1, str(holder[key])])
        case 4 if isinstance(holder[key], str):
            holder[key] += pick.choice(TEXTS)
        case _:
            holder[key] = pick.choice(VALUES)
    return value


def damage(data: bytes, pick: random.Random) -> bytes:
    """Some bytes changed, put in or cut off."""
    data = bytearray(data)
    for _ in range(pick.choice([1, 1, 2, 8])):
        at = pick.randrange(len(data) or 1) if pick.random() < 0.5 else pick.randrange(min(len(data), 256) or 1)
        match pick.randrange(6):
            case 0:
                data[at:at] = pick.randbytes(pick.randrange(9))
            case 1:
                del data[at : at + pick.choice([1, 8, len(data)])]
            case 2:
                data[at : at + 4] = pick.choice([b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff"])
            case _:
                data[at : at + 1] = pick.randbytes(1)
    return bytes(data)


def change(path: Path, pick: random.Random) -> None:
    """Change a file: what its JSON says, its bytes, or what kind of file it is."""
    chance, text = pick.random(), path.suffix in (".json", ".jsonl")
    if chance < 0.02:
        path.unlink()
        made = pick.randrange(4)
        if made == 0:
            os.mkfifo(path)
        elif made == 1:
            path.mkdir()
        elif made == 2:
            path.symlink_to(pick.choice(["/dev/zero", "nowhere", path.name]))
    elif text and chance < 0.85:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        for _ in range(pick.choice([1, 1, 1, 3])):
            at = pick.randrange(len(lines))
            lines[at] = json.dumps(mutate(json.loads(lines[at]), pick), ensure_ascii=pick.random() < 0.5)
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    elif text and chance < 0.9:
        data = path.read_text()
        whole = ("[" * 10**5, '{"a":' * 5000, "1" * 5000, "\ufeff" + data, " " * 5000 + data, data + data, "")
        path.write_text(pick.choice(whole), encoding=pick.choice(["utf-8", "utf-8", "utf-16"]))
    else:
        path.write_bytes(damage(path.read_bytes(), pick))


def change_one(directory: str, pick: random.Random, suffixes: tuple[str, ...]) -> None:
    found = sorted(path for path in Path(directory).rglob("*") if path.suffix in suffixes and path.is_file())
    change(pick.choice(found), pick)


# ---------------------------------------------------------------- readers


def config(pick: random.Random) -> Attempt:
    from llava_jax.checkpoint import open_checkpoint
    from llava_jax.templates import choose_template, explain_template

    bring(name := pick.choice(["original", "v1.5", "transformers", "orbax", "bin"]))
    change_one(name, pick, (".json", ".jinja"))

    def run():
        found = open_checkpoint(name)
        found.source()
        explain_template(found.config), choose_template(found.config)

    return Attempt(run)


def tensors(pick: random.Random) -> Attempt:
    from llava_jax.checkpoint import open_any

    bring(name := pick.choice(["v1.5", "bin"]))
    change_one(name, pick, (".safetensors", ".bin"))
    return Attempt(lambda: [tensor.read() for tensor in open_any(name).tensors.values()])


def tokenizer(pick: random.Random) -> Attempt:
    from llava_jax.tokenizer import load_tokenizer

    bring("tokenizers")
    name = pick.choice(sorted(path.name for path in Path("tokenizers").iterdir()))
    change_one(f"tokenizers/{name}", pick, (".json", ".model"))

    def run():
        found = load_tokenizer(f"tokenizers/{name}")
        found.add_special(["<im_start>"])
        for text in ("USER: It's  2024!\n猫 🙂 é</s>", "a" * 500, ""):
            ids = found.encode(text)[0]
            found.decode(ids), found.decode_settled(ids)

    return Attempt(run)


def template(pick: random.Random) -> Attempt:
    from llava_jax import limited
    from llava_jax.templates import get_template, render

    limited._shared = limited.Worker(seconds=1)
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
    from llava_jax import limited

    limited._shared = limited.Worker(seconds=1)
    bring("v1.5", "adapter")
    change_one("adapter", pick, (".json", ".json", ".safetensors"))

    def run():
        source, _ = combine(Path("adapter"), base=Path("v1.5"))
        for tensor in source.tensors.values():
            tensor.read()

    return Attempt(run)


def image(pick: random.Random) -> Attempt:
    from llava_jax import config, images

    bring("images")
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
        images.tiles(opened, images.layout(opened.size, model), model)

    return Attempt(run)


def data(pick: random.Random) -> Attempt:
    from infer import evaluate
    from llava_jax import config
    from llava_jax.tokenizer import load_tokenizer
    from train.samples import Sample, Samples

    bring("images", "data.json", "data.jsonl", "mix.yaml")
    name = pick.choice(["data.json", "data.jsonl", "mix.yaml"])
    change(Path(pick.choice([name, name, "data.json"])), pick)
    words = load_tokenizer(GOLDEN / "tokenizer")

    def run():
        if pick.random() < 0.3:
            questions = evaluate.read_questions(Path(name), Path())
            return evaluate.check_answers(questions, evaluate.choose_metric(questions))
        samples = Samples(name, "", config.tiny(), words, template="v1", max_length=pick.choice([None, 8, 512]))
        for i in range(min(len(samples), 8)):
            sample = samples.measure(i, 0)
            samples.name(samples.load(sample) if isinstance(sample, Sample) else sample)

    return Attempt(run)


def questions(pick: random.Random) -> Attempt:
    from infer.questions import read_questions

    bring("images", "questions.jsonl", "answers.jsonl")
    change(Path(pick.choice(["questions.jsonl", "answers.jsonl"])), pick)
    args = argparse.Namespace(
        questions="questions.jsonl", answers="answers.jsonl", image_folder=pick.choice([None, "."])
    )
    return Attempt(lambda: read_questions(args), ("answers.jsonl",))


def scienceqa(pick: random.Random) -> Attempt:
    from train.scienceqa import convert

    bring("problems.json", "pid_splits.json")
    change(Path(pick.choice(["problems.json", "pid_splits.json"])), pick)
    return Attempt(lambda: convert(Path(), pick.choice(["train", "test", "x"]), pick.choice(["QCM-LEA", "x", "CQM-A"])))


READERS = (config, tensors, tokenizer, template, adapter, image, data, questions, scienceqa)


# ---------------------------------------------------------------- commands

OUTPUTS = ("answers", "output", "destination", "paths")
UNUSED = ("help", "coordinator", "process_id", "processes", "heartbeat", "profile_steps", "tensorboard", "list_presets")
GIVEN = (
    *("0", "-1", "1", "2", "3", "8", "2147483648", "18446744073709551616", "1e9", "0.5", "-0.1", "1e-300", "1e400"),
    *("nan", "inf", "1_0", "0x10", "", " ", "none", "auto", "data=1", "data=1,fsdp=-1", "data=1,fsdp=1,tensor=8"),
    *("\x1b[31m", "a\nb", "\udcff", "x" * 5000, "-", "--", "=", "v1", "llava_v0", "projector", "q,v", "5GB", "1B"),
)
PATHS = (
    *("original", "v1.5", "orbax", "transformers", "adapter", "images", "data.json", "data.jsonl", "mix.yaml"),
    *("questions.jsonl", "answers.jsonl", "images/rgb.png", "images/16.png", "original/config.json", "nowhere"),
    *("fifo", "loop", "data.json/x", "..", "v1.5/model.safetensors", "v1.5/vision_tower", "new", "new/new"),
)
DEVICES = ("/dev/full", "/dev/zero", "/dev/null", "file:///dev/zero", "http://127.0.0.1:9/x", "data:,x", "/", "/root")
STARTS = (
    ("infer.generate", "--checkpoint original --prompt Hi --image images/rgb.png --max-new-tokens 2"),
    ("infer.generate", "--checkpoint v1.5 --questions questions.jsonl --answers answers.jsonl --max-new-tokens 2"),
    ("infer.evaluate", "--checkpoint v1.5 --data data.json --max-new-tokens 2"),
    ("train.preview", "--checkpoint v1.5 --data data.json --template v1"),
    ("train.scienceqa", "--base-dir . --split train"),
    ("train.shapes", "--output new --examples 4 --tests 2"),
    ("convert", "to-orbax v1.5 new"),
    ("convert", "to-orbax adapter new --base v1.5"),
    ("convert", "to-hf original new"),
    ("convert", "inspect transformers"),
    ("convert", "verify v1.5 orbax"),
)


def command(pick: random.Random) -> Attempt:
    """A command in this process, with flags at random, over files of which one may be changed."""
    module, start = pick.choice(STARTS)
    destination = pick.choice(["new", "new", "transformers", "images", "data.json", "data.json/x"])
    arguments = [destination if argument == "new" else argument for argument in start.split()]
    bring(*(name for name in PATHS if re.match(r"\w[^/]*$", name) and (BASE / name).exists()))
    bring("problems.json", "pid_splits.json")
    os.mkfifo("fifo")
    os.symlink("loop", "loop")
    arguments += random_flags(module, arguments, pick)
    own = owned(arguments) + ["answers.jsonl"] * (module == "infer.generate")
    if module == "convert" and "--overwrite" in arguments and "transformers" not in arguments[:2]:
        own.append("transformers")
    if pick.random() < 0.5:
        change_one(".", pick, (".json", ".jsonl", ".png"))

    def run():
        sys.argv = [f"python -m {module}", *arguments]
        run_main(module_of(module).main)

    return Attempt(run, tuple(own), (module, *arguments))


def owned(arguments: list[str]) -> list[str]:
    """What a command is told to write, and is not there yet."""
    named = [arguments[i + 1] for i, flag in enumerate(arguments[:-1]) if flag in ("--answers", "--output")]
    return [name for name in ("new", "llava_train_QCM-LEA.json", *named) if name and not os.path.lexists(name)]


def module_of(name: str):
    return importlib.import_module(f"{name}.__main__" if name in ("convert", "train") else name)


def random_flags(module: str, arguments: list[str], pick: random.Random) -> list[str]:
    """A few flags of a command, with values that may be anything."""
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
            given += [flag, pick.choice([*GIVEN, *PATHS, *DEVICES])]
    return given


def process(pick: random.Random) -> Attempt:
    """A command or a training run in a process of its own, in an unusual environment."""
    if pick.random() < 0.5:
        attempt = command(pick)
    else:
        bring("v1.5", "images", "train.json")
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
    """A training run that goes on in a directory of which one file is changed."""
    run = BASE / "run"
    fixed = f"{TRAIN} --checkpoint {BASE}/v1.5 --data {BASE}/train.json --image-folder {BASE} --template v1".split()
    if not run.exists():
        subprocess.run([sys.executable, "-m", "train", *fixed, "--output", run], check=True)
    bring("run")
    if pick.random() < 0.5:  # as of a run that was interrupted before its end
        shutil.rmtree("run/model")
    change_one("run", pick, (".json", ".jsonl", "", ".safetensors"))
    arguments = [*fixed, "--output", "run"]
    done = lambda: sys.exit(subprocess.run([sys.executable, "-m", "train", *arguments]).returncode)  # noqa: E731
    return Attempt(done, ("run",), ("train", *arguments))


COMMANDS = (process, resume)
