"""`python -m train.datasets` lists all commands that make and convert datasets, and imports none of them."""

import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, user_environment
from train.datasets import __main__ as command

COMMANDS = {one.name: one for one in command.find_commands()}


def module_of(path: Path):
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def test_all_are_listed():
    assert {"captions", "instruct", "mix", "prepare", "scienceqa", "shapes"} <= COMMANDS.keys()
    folder = Path(command.__file__).parent
    paths = {path.stem: path for path in folder.glob("[!_]*.py")}
    paths |= {path.name: path / "__main__.py" for path in folder.iterdir() if (path / "__init__.py").exists()}
    assert COMMANDS.keys() == {name for name, path in paths.items() if hasattr(module_of(path), "parser")}


@pytest.mark.parametrize("name", COMMANDS)
def test_of_each_what_its_parser_says(name):
    path = Path(command.__file__).parent / name
    one, parser = COMMANDS[name], module_of(path / "__main__.py" if path.is_dir() else path).parser()
    assert one.description == parser.description and one.description
    python, _, module, *flags = shlex.split(one.example)
    assert (python, module) == ("python", f"train.datasets.{name}") and one.example.count("python") == 1
    if flags != ["--help"]:
        parser.parse_args(flags)


def test_what_is_printed(run_cli):
    status, out, err = run_cli(command.main)
    assert (status, err) == (0, "")
    for one in COMMANDS.values():
        assert f"\n{one.name}\n    {one.description}\n    {one.example}\n" in f"\n{out}"
    assert run_cli(command.main, "mixx")[2] == "error: unrecognized arguments: mixx (--help lists all flags)\n"


def test_a_command_without_an_example(tmp_path):
    (tmp_path / "a.py").write_text('"""Make it."""\n\ndef parser():\n    return Parser(prog="x", description=NAME)\n')
    (tmp_path / "b.py").write_text("def main():\n    pass\n")
    assert list(command.find_commands(tmp_path)) == [
        command.Command("a", "Make it.", "python -m train.datasets.a --help")
    ]


def test_listing_imports_no_library_of_theirs():
    code = "import sys; from train.datasets.__main__ import main; main(); print(*sys.modules, file=sys.stderr)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=user_environment(), capture_output=True, text=True
    )  # fmt: skip
    assert run.returncode == 0 and "shapes\n" in run.stdout
    assert not {"jax", "numpy", "spacy", "matplotlib", "grain", "msgspec"} & set(run.stderr.split())
