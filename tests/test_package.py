"""How the packages depend on each other and on others: in one direction only, and on what is declared."""

import ast
import importlib
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

from helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("llava_jax", "convert", "train", "infer")
EXTRAS = ("plots", "data", "serve", "eval", "lmms-eval")  # whose packages are imported, where they are there
ROOMS = ("data", "sharding", "models", "checkpoints", "aot")  # of llava_jax, each of which may import those before it


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}


def imported(path: Path, *, always: bool = False) -> set[str]:
    """What a file imports, anywhere in it: modules, and the names taken from them. With `always`, what is imported
    whenever it is: not inside functions, and not for types."""
    found, nodes = set(), [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        for_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if not (always and (for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_declared(package):
    """What users need not install, those of `EXTRAS`, is imported inside functions alone, or by the server's modules,
    which its command imports when it has checked that it can, and the model that lmms-eval imports."""
    required = names(PROJECT["project"]["dependencies"])
    optional = names([line for extra in EXTRAS for line in PROJECT["project"]["optional-dependencies"][extra]])
    distributions = importlib.metadata.packages_distributions()
    for path in (ROOT / package).rglob("*.py"):
        is_server = path.parent == ROOT / "infer" / "serve" and path.name != "__main__.py"
        is_extra = is_server or path.name == "lmms_eval_model.py"
        for always, declared in ((True, required | optional if is_extra else required), (False, required | optional)):
            modules = {name.partition(".")[0] for name in imported(path, always=always)}
            for module in modules - sys.stdlib_module_names - {*PACKAGES}:
                provided = {name.lower().replace("_", "-") for name in distributions.get(module, [module])}
                assert provided & declared, f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_the_library_alone(package):
    """But for the module that scores benchmarks during training, which imports the engine inside functions."""
    others = {*PACKAGES} - {package, *(["llava_jax"] if package != "llava_jax" else [])}
    for path in (ROOT / package).rglob("*.py"):
        always = path == ROOT / "train" / "evaluation.py"
        found = {name.partition(".")[0] for name in imported(path, always=always)} & others
        assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_one_module_of_training_imports_inference_alone():
    found = {name.partition(".")[0] for name in imported(ROOT / "train" / "evaluation.py")}
    assert found & {*PACKAGES} == {"llava_jax", "train", "infer"}


def room_of(name: str) -> int:
    """The place of a module's room among the rooms; -1 for what all of them share."""
    return next((i for i, room in enumerate(ROOMS) if name.startswith(f"llava_jax.{room}.")), -1)


def test_rooms_import_earlier_ones_alone():
    library = ROOT / "llava_jax"
    assert {path.parent.name for path in library.glob("*/__init__.py")} == {*ROOMS}
    for path in library.rglob("*.py"):
        room = room_of(".".join(("llava_jax", *path.relative_to(library).parts)))
        later = {name for name in imported(path) if room_of(f"{name}.") > room}
        assert not later, f"{path.relative_to(ROOT)} imports {later}"


@pytest.mark.parametrize("name", PROJECT["project"]["scripts"])
def test_commands_are_installed_by_name(name, monkeypatch, capsys):
    module, _, function = PROJECT["project"]["scripts"][name].partition(":")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        getattr(importlib.import_module(module), function)()
    assert stopped.value.code in (0, None) and "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_say_that_they_are_typed(package):
    assert (ROOT / package / "py.typed").exists()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["*"]


def test_no_module_is_called_like_a_dependency():
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    for path in files:
        assert path.stem not in {*names(PROJECT["project"]["dependencies"]), "orbax", "flax"}, path.relative_to(ROOT)
