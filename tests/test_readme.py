"""What the README says runs."""

import importlib
import re
import shlex
import subprocess
import sys

import pytest

from helpers import ROOT, user_environment
from llava_jax.data import templates

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("page", "says"), [("README.md", "\ntriangle\nAnswer("), ("docs/generate.md", "brief\n4 -")])
def test_the_python_runs(capsys, monkeypatch, page, says):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(templates, "TEMPLATES", dict(templates.TEMPLATES))
    for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S):
        exec(code, {})
    assert says in capsys.readouterr().out


def test_the_first_commands_run():
    """Those that need no checkpoint, the installation before them aside."""
    commands = re.findall(r"^python -m infer\.generate(?: --image infer.*)?$", README, re.M)
    for command, answer in zip(commands, ("5", "left"), strict=True):
        command = command.replace("python", sys.executable, 1)
        run = subprocess.run(command, shell=True, cwd=ROOT, env=user_environment(), capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == answer


def test_every_flag_in_the_documents_exists():
    from convert.__main__ import parser as convert
    from infer.evaluate import parser as evaluate
    from infer.generate import parser as generate
    from infer.plan import parser as infer_plan
    from train.__main__ import parser as train
    from train.datasets.captions.__main__ import parser as captions
    from train.datasets.instruct.__main__ import parser as instruct
    from train.datasets.mix.__main__ import parser as mix
    from train.datasets.prepare.__main__ import parser as prepare
    from train.datasets.shapes.__main__ import parser as shapes
    from train.plan import parser as train_plan
    from train.plot import parser as plot
    from train.preview import parser as preview

    commands = [
        generate(),
        evaluate(),
        train(),
        preview(),
        captions(),
        mix(),
        shapes(),
        prepare(),
        instruct(),
        train_plan(),
        infer_plan(),
        plot(),
        *convert()._subparsers._group_actions[0].choices.values(),
    ]
    known = {flag for command in commands for flag in re.findall(r"--[a-z][a-z-]+", command.format_help())}
    known |= {"--help", "--check", "--logdir", "--write"}
    known |= {
        "--batch_size",
        "--force_simple",
        "--model_args",
        "--output_path",
        "--tasks",
        "--work-dir",
    }  # harnesses
    known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / "train" / "datasets" / "scienceqa.py").read_text()))
    for path in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', path.read_text()))
    pages = {ROOT / "README.md", *(ROOT / "docs").glob("*.md")}
    foreign = {ROOT / "docs" / name for name in ("tpu-pod.md", "serve.md")}  # most flags are other programs'
    for page in pages - foreign:  # ours are tested by test_train_command.py and test_documents.py
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", page.read_text()):
            assert flag in known, (page.name, flag)


def test_the_commands_for_datasets_parse():
    from train.datasets.__main__ import find_commands

    folder, shown = ROOT / "train" / "datasets", set()
    for page in ("data.md", "datasets.md", "tpu-pod.md"):
        text = (ROOT / "docs" / page).read_text().replace("\\\n", " ")
        for name, flags in re.findall(r"^python -m train\.datasets\.(\w+) (.*)$", text, re.M):
            module = f"train.datasets.{name}" + ".__main__" * (folder / name).is_dir()
            importlib.import_module(module).parser().parse_args(shlex.split(flags))
            shown.add(name)
    assert shown == {command.name for command in find_commands()}
