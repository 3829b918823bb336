"""What an installation brings: every module that is imported, declared by name."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}


def imported(path: Path) -> set[str]:
    """Top-level modules that a file imports, anywhere in it, that are neither Python's own nor the project's."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return {name.partition(".")[0] for name in found} - sys.stdlib_module_names - {*PACKAGES}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_declared(package):
    declared = names(PROJECT["project"]["dependencies"])
    distributions = importlib.metadata.packages_distributions()
    for path in (ROOT / package).rglob("*.py"):
        for module in imported(path):
            provided = {name.lower().replace("_", "-") for name in distributions[module]}
            assert provided & declared, f"{path.relative_to(ROOT)} imports {module}"
