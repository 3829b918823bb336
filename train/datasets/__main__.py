"""List the commands that make and convert datasets.

    python -m train.datasets

A command is a module or a package in here, and its parser describes it. Modules are parsed, not imported: listing needs
none of the libraries that they need.
"""

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llava_jax.console import Parser, run_main

PACKAGE = "train.datasets"


class Command(NamedTuple):
    """A command of this package: its module, the description of its parser, and the first example of its docstring."""

    name: str
    description: str
    example: str


def find_commands(folder: Path = Path(__file__).parent) -> Iterator[Command]:
    """The commands of the package, by name."""
    modules = {path.stem: path for path in folder.glob("[!_]*.py")}
    modules |= {path.parent.name: path for path in folder.glob("*/__main__.py")}
    for name, path in sorted(modules.items()):
        module = ast.parse(path.read_bytes(), name)
        functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
        if "parser" in functions:
            docstring = ast.get_docstring(module) or ""
            description = _description(functions["parser"]) or docstring.partition("\n")[0]
            yield Command(name, description, _example(docstring, f"python -m {PACKAGE}.{name}"))


def _description(function: ast.FunctionDef) -> str:
    """The `description` that a function gives to a parser, if it is a literal."""
    for node in ast.walk(function):
        if isinstance(node, ast.keyword) and node.arg == "description" and isinstance(node.value, ast.Constant):
            return str(node.value.value)
    return ""


def _example(docstring: str, command: str) -> str:
    """The first paragraph of a docstring that begins with the command, its lines joined; else the command's --help."""
    for paragraph in docstring.split("\n\n"):
        if paragraph.strip().startswith(f"{command} "):
            lines = (line.strip().removesuffix("\\").strip() for line in paragraph.split("\n"))
            first = " ".join(lines).split(f" {PACKAGE}.")[1]  # of several commands, the first
            return f"python -m {PACKAGE}.{first.removesuffix(' python -m')}"
    return f"{command} --help"


def parser() -> argparse.ArgumentParser:
    return Parser(prog=f"python -m {PACKAGE}", description="List the commands that make and convert datasets.")


def main() -> None:
    parser().parse_args()
    for name, description, example in find_commands():
        print(f"{name}\n    {description}\n    {example}\n")
    print(f"python -m {PACKAGE}.NAME --help lists the flags of a command.")


if __name__ == "__main__":
    run_main(main)
