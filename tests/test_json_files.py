"""Whatever stands in a JSON file, it is read, or refused in one line."""

import argparse
import contextlib
import json
import resource
import shutil
import struct
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from convert.combine import merge_lora
from helpers import GOLDEN, ROOT, turns
from infer import questions
from infer.answers import AnswersFile
from infer.benchmarks import conversations
from json_mutations import mutations
from llava_jax import config as c
from llava_jax.checkpoints import safetensors_files, sources
from llava_jax.checkpoints.chat_template import read_chat_template
from llava_jax.checkpoints.checkpoint import open_checkpoint
from llava_jax.checkpoints.config_json import read_config
from llava_jax.console import InputError, printable
from llava_jax.data.conversations import read_conversation
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.json_files import parse_json, read_json
from train import run_directory as output
from train.bad_samples import BadSamples
from train.datasets import scienceqa
from train.metrics import MetricsFiles
from train.samples import BadSample
from train.states import Checkpoints, RunProgress

SHAPES = ROOT / "infer/shapes"
MISTRAL, LLAMA = (GOLDEN / "checkpoints" / name for name in ("v1.6-mistral", "v1.5-llama"))
TURNS = turns("<image>\nWhat?", "A cat.")
ROW = {"id": 1, "image": "a.png", "conversations": TURNS, "system": "Be brief.", "kinds": ["what"]}
PARTS = [{"type": "image", "index": 0}, {"type": "text", "text": "Why?"}]
MESSAGES = {
    "images": ["a.png"],
    "messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "x"}],
}
ASKED = {"question_id": 1, "image": "a.png", "text": "What?"}
ANSWERED = {"question_id": 1, "prompt": "What?", "text": "A cat.", "answer_id": "a", "model_id": "m", "metadata": {}}
PROBLEM = {
    "question": "What?", "hint": "", "choices": ["a", "b"], "lecture": "", "solution": "", "answer": 1, "image": None,
}  # fmt: skip
RUN = {"steps": 3, "data": ["a.json"], "data_sha256": "a" * 64, "checkpoint_fingerprint": "b" * 64}
PROGRESS = {
    "step": 2, "total": 9, "bad": [0, 5],
    "data": {"conversations": 9, "rows": 4, "per_row": None, "whole": False, "place": {"next": [3]}},
}  # fmt: skip
ADDED = {"<a>": 1000, "<b>": 1001}
SETTINGS = {
    "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "additional_special_tokens": ["<a>"],
    "legacy": False, "tokenizer_class": "LlamaTokenizer", "chat_template": [{"name": "default", "template": "x"}],
    "added_tokens_decoder": {"1000": {"content": "<a>", "special": True}},
}  # fmt: skip
ADAPTER = {
    "r": 2, "lora_alpha": 4, "peft_type": "LORA", "use_rslora": True, "init_lora_weights": True,
    "rank_pattern": {"q_proj": 2}, "alpha_pattern": {},
}  # fmt: skip


def copy(source, directory, *names):
    directory.mkdir()
    for name in names:
        (shutil.copytree if (source / name).is_dir() else shutil.copy)(source / name, directory / name)
    return directory


def configured(directory):
    """What opening a checkpoint reads before its tensors."""
    fields = read_json(directory / "config.json")
    tower = sources.find_tower(directory, fields or {}, None)
    sources.configure(fields or {}, directory, tower, name="m")


def shapes(t):
    names = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
    return copy(SHAPES, t / "m", *names, "tokenizer.model", "tokenizer_config.json")


def original(t):
    names = ("config.json", "generation_config.json", "vision_tower", "tokenizer.model", "special_tokens_map.json")
    return copy(MISTRAL, t / "m", *names)


def engine(t):
    """Without most of its vocabulary, which would be most of what is changed."""
    directory = copy(SHAPES, t / "m", "tokenizer.json", "tokenizer_config.json")
    fields = json.loads((directory / "tokenizer.json").read_text())
    fields["model"] |= {"vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "\u2581": 4}, "merges": []}
    (directory / "tokenizer.json").write_text(json.dumps(fields))
    (directory / "tokenizer_config.json").write_text("{}")
    return directory


def indexed(t):
    (t / "a.safetensors").touch()
    return t


def lora(t):
    directory = copy(LLAMA, t / "base", "config.json", "model.safetensors", "vision_tower")
    adapter = t / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    width = json.loads((directory / "config.json").read_text())["hidden_size"]
    factors = {"A": np.zeros((2, width), np.float32), "B": np.zeros((width, 2), np.float32)}
    pending = {
        name.format(side): safetensors_files.Pending(x.shape, x.dtype, lambda x=x: x) for side, x in factors.items()
    }
    safetensors_files.write(adapter / "adapter_model.safetensors", pending)
    return t


def header(t):
    """A header goes behind its length."""
    data = (t / "header.json").read_bytes()
    (t / "m.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + bytes(12))
    safetensors_files.File(t / "m.safetensors")


def progress(t):
    directory = epath.Path(t / "checkpoints")
    checkpoints = Checkpoints(directory, 2)
    checkpoints.save(2, {"x": jnp.zeros(1)}, PROGRESS)
    checkpoints.finish()
    checkpoints.close()
    return t / "checkpoints/2"


def read_progress(t):
    checkpoints = Checkpoints(epath.Path(t.parent), 2)
    try:
        checkpoints.progress(RunProgress)
    finally:
        checkpoints.close()


def ask(t):
    for name in ("q.jsonl", "a.jsonl"):
        if not (t / name).exists():
            (t / name).write_text(json.dumps(ASKED if name == "q.jsonl" else ANSWERED) + "\n")
    with AnswersFile(t / "a.jsonl", t / "q.jsonl") as answers:
        found = questions.read_questions(argparse.Namespace(questions=t / "q.jsonl", image_folder=str(t)), answers)
    for error in found.errors:
        raise InputError(error)


def read_data(t):
    for question in conversations.read_questions(t / "data.json", t):
        if question.problem:
            raise InputError(question.problem)


def science(t):
    for name, contents in (("problems.json", {"7": PROBLEM}), ("pid_splits.json", {"train": ["7"]})):
        if not (t / name).exists():
            (t / name).write_text(json.dumps(contents))
    scienceqa.convert(t, "train", "QCM-LEA")


def lines(*rows):
    return "\n".join(map(json.dumps, rows))


OURS = c.tiny(text=c.TextConfig(width=8, heads=2, kv_heads=1, head_width=4, rope_scaling=c.RopeScaling("linear", 2.0)))
CHAT = {"chat_template": {"default": "x", "tool": "y"}, "image_token": {"content": "<image>"}}
# A file, what it says (a copy's own where None), what makes the directory that it is in, how that is read.
FILES = {
    "ours": ("config.json", OURS.to_json(), None, lambda t: read_config(read_json(t / "config.json"), file=t)),
    "transformers": ("config.json", None, shapes, configured),
    "original": ("config.json", None, original, configured),
    "tower": ("vision_tower/config.json", None, original, configured),
    "generation": ("generation_config.json", {"eos_token_id": [1, 2]}, shapes, configured),
    "preprocessor": ("preprocessor_config.json", None, shapes, configured),
    "processor": ("processor_config.json", {"image_processor": {"size": 60, "crop_size": 60}}, shapes, configured),
    "chat template": ("chat_template.json", CHAT, shapes, read_chat_template),
    "tokenizer": ("tokenizer_config.json", SETTINGS, original, lambda t: [load_tokenizer(t), read_chat_template(t)]),
    "tokenizer.json": ("tokenizer.json", None, engine, load_tokenizer),
    "special tokens": ("special_tokens_map.json", None, original, load_tokenizer),
    "added tokens": ("added_tokens.json", ADDED, original, load_tokenizer),
    "index": (safetensors_files.INDEX, {"weight_map": {"a": "a.safetensors"}}, indexed, sources.tensor_files),
    "header": (
        "header.json", {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, "__metadata__": {}}, None, header,
    ),
    "adapter": ("adapter/adapter_config.json", ADAPTER, lora, lambda t: merge_lora(t / "base", t / "adapter", None)),
    "problems": ("problems.json", {"7": PROBLEM, "8": PROBLEM}, None, science),
    "splits": ("pid_splits.json", {"train": ["7"], "test": []}, None, science),
    "data": ("data.json", [ROW, MESSAGES], None, read_data),
    "data lines": ("data.json", lines(ROW, MESSAGES), None, read_data),
    "questions": ("q.jsonl", lines(ASKED, ASKED | {"question_id": "b", "image": ["a.png", "b.png"]}), None, ask),
    "answers": ("a.jsonl", lines(ANSWERED, ANSWERED | {"question_id": 2}), None, ask),
    "metrics": ("metrics.jsonl", lines({"step": 1, "loss": 2.0}, {"step": 2}), None, lambda t: MetricsFiles(t, 2)),
    "run": ("config.json", RUN, None, lambda t: output._compare(t / "config.json", RUN)),
    "progress": ("progress/metadata", None, progress, read_progress),
    "bad samples": (
        "bad_samples.jsonl", lines({"data": "a.json", "index": 3, "id": 3}), None, lambda t: BadSamples(None, None, t),
    ),
}  # fmt: skip


def one_line(message):
    message = printable(message)  # as commands print it
    assert message and "\n" not in message and len(message) < 300, message


@pytest.mark.parametrize("kind", FILES)
def test_whatever_a_file_says_it_is_read_or_refused_in_a_line(kind, tmp_path, capsys):
    name, contents, make, read = FILES[kind]
    directory = make(tmp_path) if make else tmp_path
    path = directory / name
    if contents is not None:
        path.write_text(contents + "\n" if isinstance(contents, str) else json.dumps(contents))
    data = path.read_bytes()
    read(directory)
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for what, mutated in mutations(
        data, seed=len(kind), n=12 if kind == "adapter" else 40, lines=isinstance(contents, str)
    ):
        path.write_bytes(mutated)
        began = time.monotonic()
        try:
            read(directory)
        except InputError as error:
            refused += 1
            one_line(str(error))
        except BaseException as error:
            error.add_note(f"{path}: {what}")
            raise
        assert time.monotonic() - began < 10, what
    assert refused > 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kB
    for line in filter(None, capsys.readouterr().err.split("\n")):
        one_line(line)


@pytest.mark.parametrize(
    ("kind", "data", "says"),
    [
        ("transformers", '{"model_type": "llava_next", "text_config": {"head_dim": true}}',
         "/config.json: text_config.head_dim: expected an integer or null, got a boolean"),
        ("transformers", '{"model_type": "llava", "text_config": {"num_hidden_layers": 100000}}',
         "/config.json: text_config.num_hidden_layers: expected an integer <= 1000"),
        ("ours", json.dumps(OURS.to_json() | {"padding_side": 3}), ": padding_side: expected a string, got an integer"),
        ("original", '{"mm_vision_tower": "vision_tower", "rope_scaling": {"type": "linear"}}',
         "config.json: rope scaling linear needs factor"),
        ("original", '{"mm_vision_tower": "vision_tower", "rms_norm_eps": 1e400}',
         "/config.json: not JSON (1e400 is too large a number)"),
        ("generation", '{"eos_token_id": "x"}',
         "/generation_config.json: eos_token_id: expected an integer, a list or null, got a string"),
        ("generation", '{"eos_token_id": [4294967296]}',
         "/generation_config.json: eos_token_id[0]: expected an integer <= 2,147,483,647"),
        ("generation", '{"a": NaN}', "/generation_config.json: not JSON (NaN, which JSON does not have)"),
        ("tokenizer", '{"added_tokens_decoder": {"0": {}}}',
         "/tokenizer_config.json: added_tokens_decoder[...].content is missing"),
        ("added tokens", '{"<x>": null}', "/added_tokens.json: <x>: expected an integer, got null"),
        ("index", '{"weight_map": {"a": 3}}',
         "/model.safetensors.index.json: weight_map[...]: expected a string, got an integer"),
        ("adapter", '{"r": 0}', "/adapter_config.json: r: expected an integer >= 1"),
        ("problems", '{"7": {}}', "/problems.json: problem 7 is not ScienceQA's: question is missing"),
        ("answers", '[' * 9999,
         "/a.jsonl: exists and is not an answers file (line 1: not JSON (nested too deeply))"),
        ("run", "null", "/config.json: expected an object, got null: --output holds something else than a run; name "
         "another directory"),
        ("metrics", '{"step": 1}\n{}\n',
         "/metrics.jsonl line 2: step is missing; correct or remove the line, or move the file away"),
        ("metrics", b"\xff\n",
         "/metrics.jsonl line 1: not UTF-8 (byte 0); correct or remove the line, or move the file away"),
        ("progress", '{"step": 2}',
         "/2: progress: total is missing; remove this directory to resume from the previous checkpoint"),
        ("bad samples", '{"data": "a"}\n',
         "/bad_samples.jsonl line 1: index is missing; this is not a list of bad samples: move the file away"),
    ],
)  # fmt: skip
def test_the_file_the_key_and_what_is_wrong_are_named(kind, data, says, tmp_path):
    name, _, make, read = FILES[kind]
    directory = make(tmp_path) if make else tmp_path
    data = data if isinstance(data, bytes) else data.encode()
    (directory / name).write_bytes(data + b"\n" * (kind == "answers"))
    with pytest.raises(InputError) as error:
        read(directory)
    assert str(error.value).endswith(says)


@pytest.mark.parametrize(
    ("part", "layers", "says"),
    [
        ("text_config", 1000, "config.json says that the decoder has 1,000 layers, but the files have 4"),
        ("text_config", 5, "config.json says that the decoder has 5 layers, but the files have 4"),
        ("vision_config", 900, "config.json says that the vision tower has 900 layers, but the files have 3"),
    ],
)
def test_files_with_fewer_layers_are_refused_before_shapes_of_all_are_made(part, layers, says, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "param_shapes", None)
    directory = copy(SHAPES, tmp_path / "m", "config.json", "model.safetensors", "tokenizer.json")
    fields = json.loads((directory / "config.json").read_text())
    fields[part]["num_hidden_layers"] = layers
    (directory / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError) as error:
        open_checkpoint(directory)
    assert str(error.value) == f"{directory}: {says}"


def test_a_row_with_half_a_character_is_one_bad_sample(tmp_path):
    bad = BadSamples(None, SimpleNamespace(name=lambda bad: "row 3"), tmp_path)
    half = {"id": "\ud800", "conversations": [{"from": "\udfff", "value": "a"}]}
    for row in (half, half | {"conversations": TURNS}, {"image": "\ud800.png", "conversations": TURNS}):
        with pytest.raises(InputError) as error:
            read_conversation(row)
        one_line(str(error.value))
    bad._list_one(BadSample(0, "a.json", 3, "\ud800", None, "\ud800"))
    assert json.loads((tmp_path / "bad_samples.jsonl").read_text())["id"] == "\ud800"
    assert BadSamples(None, None, tmp_path)._listed == {("a.json", 3)}


@pytest.mark.parametrize(
    ("id_", "says"),
    [([1], "id must be text or a number"), ({}, "id must be text or a number"), (None, ""), (2**70, "")],
)
def test_the_id_of_a_row_is_text_or_a_number(id_, says):
    with pytest.raises(InputError, match=says) if says else contextlib.nullcontext():
        read_conversation({"id": id_, "conversations": TURNS[1:]})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" + "[]," * 2**21 + "[]]", "more than 2,097,152 objects and lists"),
        ("[" * 101 + "]" * 101, "objects and lists nested more than 100 deep"),
        ("[" * 10**6, "not JSON (nested too deeply)"),
        ("9" * 101, "not JSON (a number of 101 digits)"),
        ("-1e999", "not JSON (-1e999 is too large a number)"),
        ("[-Infinity]", "not JSON (-Infinity, which JSON does not have)"),
        (b'"\xed\xa0\x80"', "not UTF-8 (byte 1)"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8 (byte 0)"),
        ("", "not JSON (Expecting value: line 1 column 1 (char 0))"),
    ],
    ids=range(9),
)
def test_json_that_is_refused(text, says):
    with pytest.raises(InputError) as error:
        parse_json(text)
    assert str(error.value) == says


def test_what_json_of_real_files_has():
    deep = "[" * 100 + "]" * 100
    assert parse_json(deep) == json.loads(deep)
    assert parse_json(b'\xef\xbb\xbf{"a": 1, "a": 1e30, "b": 1000000000000000019884624838656}') == {
        "a": 1e30, "b": 1000000000000000019884624838656
    }  # fmt: skip
