"""Whatever reads a file of the user's or of a checkpoint: regular files only, and none that its kind cannot be."""

import argparse
import collections
import gc
import json
import os
import re
import shutil
import socket

import jax
import numpy as np
import pytest
from etils import epath

from convert.to_orbax import to_orbax
from helpers import GOLDEN, one_device
from infer.questions import read_questions
from llava_jax.checkpoints import safetensors_files, torch_files
from llava_jax.checkpoints.chat_template import read_chat_template
from llava_jax.checkpoints.checkpoint import open_checkpoint
from llava_jax.checkpoints.orbax_files import open_ours
from llava_jax.checkpoints.sources import tensor_files
from llava_jax.console import InputError
from llava_jax.data.data_files import read_rows
from llava_jax.data.images import image_size, open_image
from llava_jax.data.tokenizer import load_tokenizer
from train.mixture import checksum, read_parts
from train.states import Checkpoints

TOKENIZER = GOLDEN / "checkpoints" / "v1.5-llama" / "tokenizer.model"


def questions(path):
    none = argparse.Namespace(answered=collections.Counter())
    return read_questions(argparse.Namespace(questions=path, image_folder=None), none)


READERS = {  # the name of a file, and what reads it
    "a.png": open_image,
    "b.png": image_size,
    "a.safetensors": safetensors_files.File,
    "a.bin": torch_files.File,
    "a.jsonl": questions,
    "a.json": read_rows,
    "a.yaml": lambda path: read_parts(str(path)),
    "b.json": lambda path: checksum(read_parts(str(path))),
    "tokenizer.model": lambda path: load_tokenizer(path.parent),
    "tokenizer.json": lambda path: load_tokenizer(path.parent),
    "merges.txt": lambda path: load_tokenizer(path.parent),
    "chat_template.jinja": lambda path: read_chat_template(path.parent),
}


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as it:
        it.bind(str(path))


KINDS = {
    "a directory": os.mkdir,
    "a pipe": os.mkfifo,
    "a device": lambda path: os.symlink("/dev/zero", path),
    "cannot be read": make_socket,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_one_line_at_once(tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)  # a socket's path has about a hundred bytes
    path = tmp_path / name
    KINDS[kind](path if kind != "cannot be read" else name)
    with pytest.raises(InputError, match=kind) as error:
        READERS[name](path)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("a.safetensors", "a.bin", "b.json")])
def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path, name):
    path = tmp_path / name
    path.touch()
    os.truncate(path, 2**42)
    with pytest.raises(InputError, match=r"has 4,398,046,511,104 bytes"):
        READERS[name](path)


def test_links_are_followed(tmp_path):
    """The hub's cache consists of them."""
    (tmp_path / "blobs").mkdir()
    shutil.copy(TOKENIZER, tmp_path / "blobs" / "0123")
    (tmp_path / "tokenizer.model").symlink_to("blobs/0123")
    assert len(load_tokenizer(tmp_path)) == len(load_tokenizer(TOKENIZER.parent))


@pytest.mark.parametrize("outside", ["../{}", "{}/../{}", "sub/{}", "/etc/{}", "", ".", "..", "a\0b/c"])
def test_an_index_names_files_of_its_own_directory(tmp_path, outside):
    names = {"a": "a.safetensors", "b": outside.replace("{}", "a.safetensors")}
    safetensors_files.write(
        tmp_path / "a.safetensors", {"a": safetensors_files.Pending((2,), np.dtype("f4"), lambda: np.ones(2))}
    )
    (tmp_path / safetensors_files.INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(InputError, match="which is not a file of its directory"):
        tensor_files(tmp_path)


def test_an_index_of_thousands_of_missing_files_is_a_short_line(tmp_path):
    names = {str(i): "x" * 300 + f"{i}.safetensors" for i in range(2000)}
    (tmp_path / safetensors_files.INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(InputError, match="the index names missing files: .* and 1999 more") as error:
        tensor_files(tmp_path)
    assert len(str(error.value)) < 400


# ---------------------------------------------------------------- Orbax, which opens what it finds


def pipe_for(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "manifest.ocdbt", "d/*"])
def test_a_pipe_in_a_checkpoint_of_ours_is_not_waited_for(tmp_path, file):
    to_orbax(TOKENIZER.parent, tmp_path / "o")
    pipe_for(next((tmp_path / "o" / "params").glob(file)))
    for read in (open_ours, lambda directory: open_checkpoint(directory).load(one_device())):
        with pytest.raises(InputError, match="a pipe, not a file"):
            read(tmp_path / "o")


def test_a_link_to_a_directory_in_a_checkpoint_of_ours(tmp_path):
    to_orbax(TOKENIZER.parent, tmp_path / "o")
    (tmp_path / "linked").symlink_to("o")
    open_ours(tmp_path / "linked")
    (tmp_path / "o" / "params" / "d").rename(tmp_path / "d")
    (tmp_path / "o" / "params" / "d").symlink_to(tmp_path / "d")
    with pytest.raises(InputError, match="params/d: a link to a directory, not a file"):
        open_ours(tmp_path / "o")


@pytest.mark.parametrize("file", ["_METADATA", "manifest.ocdbt", "d/*", "ocdbt.process_0/d/*"])
def test_a_checkpoint_of_ours_without_some_of_its_files_is_an_error_and_nothing_else(tmp_path, capfd, file):
    """Bytes that are others in the middle of an array are not noticed: Orbax stores no checksums of them."""
    to_orbax(TOKENIZER.parent, tmp_path / "o")
    path = max((tmp_path / "o" / "params").glob(file), key=lambda path: path.stat().st_size)
    for contents in (path.read_bytes()[: path.stat().st_size // 2], None):
        path.unlink() if contents is None else path.write_bytes(contents)
        for read in (read_all, lambda directory: open_checkpoint(directory).load(one_device())):
            with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'o' / 'params'}: ")) as error:
                read(tmp_path / "o")
            assert "\n" not in str(error.value) and len(str(error.value)) < 300
    gc.collect()
    assert capfd.readouterr().err == ""


def read_all(directory):
    for tensor in open_ours(directory).tensors.values():
        tensor.read()


def test_a_pipe_in_a_state_of_training_is_not_waited_for(tmp_path):
    states = Checkpoints(epath.Path(tmp_path), 1)
    states.save(1, {"w": jax.numpy.zeros(2)}, {"rows": 3})
    states.finish()
    assert states.progress() == {"rows": 3}
    pipe_for(next((tmp_path / "1" / "state").rglob("_METADATA")))
    with pytest.raises(InputError, match="a pipe, not a file"):
        states.progress()
    states.close()
