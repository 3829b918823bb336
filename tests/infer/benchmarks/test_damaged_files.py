"""Each file of each benchmark, damaged: one line that begins with the file's name."""

import re
from pathlib import Path

import pytest

from infer.benchmarks.benchmark import REFERENCE
from infer.benchmarks.gqa import GQA
from infer.benchmarks.mme import MME
from infer.benchmarks.pope import POPE
from infer.benchmarks.textvqa import TextVQA
from infer.benchmarks.vizwiz import VizWiz, VizWizVal
from infer.benchmarks.vqav2 import TEST_DEV, VQAv2, VQAv2Val
from llava_jax.console import InputError
from vqa_miniatures import write

FILES = [
    (benchmark, file.path)
    for benchmark in (TextVQA(), VQAv2(), VQAv2Val(), VizWiz(), VizWizVal(), GQA(), POPE(), MME())
    for file in benchmark.files
    if "." in file.path
]
each_file = pytest.mark.parametrize(
    ("benchmark", "path"), FILES, ids=[f"{benchmark.name} {path.split('/')[-1]}" for benchmark, path in FILES]
)

DEEP = b'{"a": ' * 5000 + b"1" + b"}" * 5000
A_TEXT = rb'"(question|text|label|answer)": "[^"]*"'
DAMAGES = {
    "not JSON": lambda data: b"x" + data,
    "not UTF-8": lambda data: data.replace(b"square", b"squ\xe4re", 1),
    "truncated": lambda data: data[:-9],
    "empty": lambda data: b"",
    "blank": lambda data: b"\n \n",
    "NaN": lambda data: re.sub(A_TEXT, rb'"\1": NaN', data, count=1),
    "deep": lambda data: data + DEEP if data.endswith(b"\n") else DEEP,
    "a list": lambda data: b'["a", 1]\n' + data if data.endswith(b"\n") else b'["a", 1]',
    "a missing key": lambda data: re.sub(A_TEXT, b'"other": ""', data),
}


def read(benchmark, directory) -> list:
    """Everything that a benchmark reads. A benchmark without right answers reads the rest for its submission."""
    asked = benchmark.questions(directory, REFERENCE)
    if benchmark.server:
        return [asked, benchmark.submission(directory, [])]
    return [asked, benchmark.score(directory, [], REFERENCE)]


@pytest.fixture(autouse=True)
def _short_paths(tmp_path, monkeypatch):
    """Errors shorten long paths."""
    monkeypatch.chdir(tmp_path)


@each_file
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged(benchmark, path, damage):
    directory = write(benchmark.name, Path())
    data = (directory / path).read_bytes()
    damaged = DAMAGES[damage](data)
    assert damaged != data
    (directory / path).write_bytes(damaged)
    with pytest.raises(InputError) as error:
        read(benchmark, directory)
    line = r" line \d+" if data.endswith(b"\n") and damage not in ("empty", "blank") else ""
    assert re.fullmatch(f"{re.escape(f'{directory}/{path}')}{line}: .+", str(error.value))


@each_file
def test_missing_or_a_directory(benchmark, path):
    directory = write(benchmark.name, Path())
    (directory / path).unlink()
    if path != TEST_DEV.path:  # without which the whole test set is asked
        with pytest.raises(InputError, match=rf"{path}: not found \(.*; it is in .*http"):
            read(benchmark, directory)
    (directory / path).mkdir()
    with pytest.raises(InputError, match=rf"{path}: a directory, not a file"):
        read(benchmark, directory)


@each_file
def test_line_endings_and_byte_order_marks(benchmark, path):
    """Neither changes anything."""
    directory = write(benchmark.name, Path())
    before = read(benchmark, directory)
    (directory / path).write_bytes(b"\xef\xbb\xbf" + (directory / path).read_bytes().replace(b"\n", b"\r\n"))
    assert read(benchmark, directory) == before
