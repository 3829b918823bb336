"""What commands write over, and what they never touch: directories of checkpoints, and files."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from etils import epath

from convert import __main__ as convert
from helpers import GOLDEN, contents, files_of_at_most, put_file
from llava_jax.checkpoints import outputs
from llava_jax.checkpoints.outputs import new_directory, write_file
from llava_jax.console import InputError
from train.config import TrainConfig
from train.datasets.shapes import __main__ as shapes
from train.run_directory import Output

MISTRAL = GOLDEN / "checkpoints" / "v1.6-mistral"
TRAINED = ("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json")


@pytest.fixture
def models(tmp_path):
    """`models/m`, a checkpoint with its vision tower."""
    copy_model(tmp_path / "models" / "m")
    shutil.copytree(MISTRAL / "vision_tower", tmp_path / "models" / "m" / "vision_tower")
    return tmp_path / "models"


def copy_model(directory):
    directory.mkdir(parents=True)
    for name in TRAINED:
        shutil.copy(MISTRAL / name, directory)


def refused(run_cli, *arguments):
    status, _, err = run_cli(convert.main, *arguments)
    assert (status, err.count("\n")) == (1, 1) and len(err) < 300, err
    return err


# ---------------------------------------------------------------- sources


def link_to_parent(models):
    (models.parent / "alias").symlink_to("models")
    return models / "m", models.parent / "alias" / "m"


def link_to_source(models):
    (models.parent / "alias").symlink_to(models / "m")
    return models / "m", models.parent / "alias"


def source_through_links(models):
    (models.parent / "alias").symlink_to("models")
    return models.parent / "alias" / "m", models / "m"


def shards_linked_from_elsewhere(models):
    shutil.copytree(models / "m", models / "linked")
    (models / "linked" / "model.safetensors").unlink()
    (models / "linked" / "model.safetensors").symlink_to(models / "m" / "model.safetensors")
    return models / "linked", models / "m"


def tower_in_the_destination(models):
    copy_model(models / "other")
    (models / "other" / "vision_tower").symlink_to(models / "m" / "vision_tower")
    return models / "other", models / "m"


def tower_that_the_configuration_names(models):
    shutil.move(models / "m" / "vision_tower", models / "tower")
    fields = json.loads((models / "m" / "config.json").read_text())
    (models / "m" / "config.json").write_text(json.dumps(fields | {"mm_vision_tower": str(models / "tower")}))
    return models / "m", models / "tower"


@pytest.mark.parametrize(
    "make",
    [
        link_to_parent, link_to_source, source_through_links, shards_linked_from_elsewhere, tower_in_the_destination,
        tower_that_the_configuration_names,
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [("to-hf", "--part", "projector"), ("to-orbax",)])
def test_what_is_read_under_whatever_name_is_not_replaced(run_cli, models, make, command):
    source, destination = make(models)
    before = contents(models.parent)
    kind, *flags = command
    assert "overlaps an input of this command" in refused(run_cli, kind, source, destination, *flags, "--overwrite")
    assert contents(models.parent) == before


def test_what_is_read_in_an_object_store_is_not_replaced(models):
    """A local directory stands for it: what is compared are names."""
    before = contents(models)
    for source in (models / "m", models / "m" / "vision_tower"):
        arguments = (epath.Path(models / "m"), "m", True, [source])
        with (
            pytest.raises(InputError, match="overlaps an input of this command"),
            outputs._remote_directory(*arguments),
        ):
            pass
    assert contents(models) == before


@pytest.mark.parametrize("url", ["file:///tmp/x", "http://127.0.0.1:9/x", "memory://x"])
def test_a_url_that_is_no_object_store_is_no_destination(run_cli, models, monkeypatch, url):
    monkeypatch.chdir(models)
    before = contents(models)
    assert "is not a supported object store" in refused(run_cli, "to-orbax", "m", url)
    assert "is not a supported object store" in refused(run_cli, "inspect", url)
    with pytest.raises(InputError, match="is not a supported object store"):
        Output(TrainConfig(output=url))
    status, _, err = run_cli(shapes.main, "--examples", "1", "--output", url)
    assert (status, err.count("\n")) == (1, 1) and "must be a local directory" in err
    assert contents(models) == before


def test_a_link_as_destination_leads_to_what_is_replaced(run_cli, models, tmp_path):
    with new_directory(tmp_path / "real") as staged:
        for name in TRAINED:
            shutil.copy(MISTRAL / name, staged)
    (tmp_path / "link").symlink_to("real")
    arguments = ("to-hf", models / "m", tmp_path / "link", "--part", "projector")
    assert "--overwrite" in refused(run_cli, *arguments)
    assert run_cli(convert.main, *arguments, "--overwrite")[0] == 0
    assert os.readlink(tmp_path / "link") == "real"
    assert sorted(os.listdir(tmp_path / "real")) == ["config.json", "mm_projector.safetensors"]


# ---------------------------------------------------------------- what is no checkpoint

STRANGERS = {
    "a directory": ("thesis", lambda d: put_file(d / "thesis" / "a.txt")),
    "an empty directory": ("thesis", lambda d: (d / "thesis").mkdir()),
    "a file": ("notes.txt", lambda d: put_file(d / "notes.txt")),
    "a hidden file": (".bashrc", lambda d: put_file(d / ".bashrc")),
    "among the arrays": ("params/a.txt", lambda d: put_file(d / "params" / "a.txt")),
    "among their data": ("params/d/a.txt", lambda d: put_file(d / "params" / "d" / "a.txt")),
    "beside the arrays": ("params-old", lambda d: (d / "params-old").mkdir()),
    "in the tower": ("vision_tower", lambda d: put_file(d / "vision_tower" / "a.txt")),
    "a pipe": ("model-2.safetensors", lambda d: os.mkfifo(d / "model-2.safetensors")),
    "a link to a directory": ("tokenizer.json", lambda d: (d / "tokenizer.json").symlink_to(d.parent)),
    "a checkpoint in it": ("m", lambda d: copy_model(d / "m")),
    "no weights": ("not a checkpoint", lambda d: (d / "model.safetensors").unlink()),
    "no model's configuration": ("not a checkpoint", lambda d: put_file(d / "config.json", '{"name": "web app"}')),
    "no configuration": ("not a checkpoint", lambda d: (d / "config.json").unlink()),
    "broken configuration": ("not a checkpoint", lambda d: put_file(d / "config.json", "[" * 99_999)),
}


@pytest.mark.parametrize("what", STRANGERS)
def test_only_what_is_a_checkpoint_as_a_whole_is_replaced(run_cli, models, what):
    names, spoil = STRANGERS[what]
    copy_model(models / "old")
    spoil(models / "old")
    before = contents(models)
    assert names in refused(run_cli, "to-hf", models / "m", models / "old", "--part", "projector", "--overwrite")
    assert contents(models) == before


def test_what_comes_into_the_destination_meanwhile_is_kept(models):
    copy_model(models / "old")
    with pytest.raises(InputError, match="thesis"), new_directory(models / "old", overwrite=True) as staged:
        put_file(staged / "config.json")
        put_file(models / "old" / "thesis" / "a.txt")
    assert sorted(os.listdir(models)) == ["m", "old"]
    with pytest.raises(InputError, match="exists already"), new_directory(models / "new") as staged:
        put_file(staged / "config.json")
        put_file(models / "new" / "thesis" / "a.txt")
    assert (models / "new" / "thesis" / "a.txt").read_text() == "precious"


def test_directories_of_others_beside_it_are_left_alone(run_cli, models):
    for name in (".out.incomplete", ".out.replaced", ".out.0123abcd.incomplete"):
        put_file(models / name / "mine")
    before = contents(models)
    assert run_cli(convert.main, "to-hf", models / "m", models / "out", "--part", "projector")[0] == 0
    assert contents(models) == before | {
        name: value for name, value in contents(models).items() if name.partition("/")[0] == "out"
    }


def test_a_new_directory_has_the_usual_permissions(tmp_path):
    with new_directory(tmp_path / "new"):
        pass
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_failure_leaves_no_parents_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "a" / "b" / "c") as staged:
        (staged / "file").write_text("x")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with new_directory(tmp_path / "a" / "b" / "c") as staged:
        (staged / "file").write_text("x")
    assert (tmp_path / "a" / "b" / "c" / "file").read_text() == "x" and len(list(tmp_path.rglob("*"))) == 4


# ---------------------------------------------------------------- two at once, and killed


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_that_write_the_same_the_later_is_refused(models, overwrite, capsys):
    if overwrite:
        copy_model(models / "out")
    says = "another command wrote it in the meantime" if overwrite else "exists already"
    with pytest.raises(InputError, match=says), new_directory(models / "out", overwrite=overwrite) as first:
        with new_directory(models / "out", overwrite=overwrite) as second:
            assert first != second
            for name in TRAINED:
                shutil.copy(MISTRAL / name, second)
            put_file(first / "config.json")
        assert f"out: is also being written by another command (process {os.getpid()} on " in capsys.readouterr().err
    assert sorted(os.listdir(models)) == ["m", "out"]
    assert sorted(os.listdir(models / "out")) == sorted(TRAINED)


KILLED = """
import os, sys
from llava_jax.checkpoints import outputs
path, moment = sys.argv[1:]
if moment == "moving":
    outputs.Path.rename, rename = lambda a, b: (rename(a, b), os._exit(9)), outputs.Path.rename
with outputs.new_directory(path, overwrite=True) as staged:
    (staged / "config.json").write_text("new")
    if moment == "writing":
        os._exit(9)
"""


@pytest.mark.parametrize("moment", ["writing", "moving"])
def test_the_next_command_cleans_up_after_one_that_was_killed(run_cli, models, moment):
    copy_model(models / "out")
    before = contents(models / "out")
    assert subprocess.run([sys.executable, "-c", KILLED, models / "out", moment]).returncode == 9
    assert len(os.listdir(models)) > 2
    shutil.copytree(models, models.parent / "killed")
    with pytest.raises(ZeroDivisionError), new_directory(models / "out", overwrite=True):
        raise ZeroDivisionError
    assert sorted(os.listdir(models)) == ["m", "out"]
    assert contents(models / "out") == before
    with new_directory(models.parent / "killed" / "out", overwrite=True) as staged:
        put_file(staged / "config.json", "newer")
    assert contents(models.parent / "killed" / "out") == {"config.json": b"newer"}


def test_what_a_killed_command_moved_away_is_not_another_ones(models):
    names = ["x" * 254 + end for end in "ab"]
    copy_model(models / names[0])
    assert subprocess.run([sys.executable, "-c", KILLED, models / names[0], "moving"]).returncode == 9
    for name in reversed(names):
        with pytest.raises(ZeroDivisionError), new_directory(models / name, overwrite=True):
            raise ZeroDivisionError
    assert sorted(os.listdir(models)) == ["m", names[0]]


def test_a_lock_that_goes_while_it_is_looked_for_is_not_made_anew(models, monkeypatch):
    monkeypatch.setattr("llava_jax.checkpoints.outputs.Path.iterdir", lambda path: iter([path / ".out.0123abcd.lock"]))
    with new_directory(models / "out"):
        pass
    assert sorted(os.listdir(models)) == ["m", "out"]


@pytest.mark.parametrize("text", ["", "mine", '{"process": 1, "host": "another"}', "[" * 99_999, "5"])
def test_what_looks_like_a_lock_but_is_none_of_this_machine_is_left_alone(models, text):
    put_file(models / ".out.0123abcd.lock", text)
    put_file(models / ".out.0123abcd.incomplete" / "mine")
    before = contents(models)
    with new_directory(models / "out"):
        pass
    assert contents(models) == before | {"out": False}


@pytest.mark.parametrize("size", [0, 10])
def test_where_there_is_no_room_for_the_lock_none_is_left(models, size):
    copy_model(models / "out")
    before = contents(models)
    full = files_of_at_most(size)
    with full, pytest.raises(InputError, match="File too large"), new_directory(models / "out", overwrite=True):
        pass
    assert contents(models) == before


def test_names_as_long_as_a_file_system_takes(tmp_path):
    for name in ("x" * 255, "ü" * 127, "\udcff" * 255):
        with new_directory(tmp_path / name) as staged:
            put_file(staged / "config.json")
        assert os.listdir(tmp_path) == [name]
        shutil.rmtree(tmp_path / name)
    with pytest.raises(InputError, match="File name too long"), new_directory(tmp_path / ("x" * 256)):
        pass
    with new_directory(tmp_path / ("x/" * 1500) / "y") as staged:
        put_file(staged / "config.json")
    assert (tmp_path / ("x/" * 1500) / "y" / "config.json").exists()
    with pytest.raises(InputError, match="File name too long"), new_directory(tmp_path / "z" / ("x/" * 2100)):
        pass
    assert os.listdir(tmp_path) == ["x"]
    subprocess.run(["rm", "-r", tmp_path / "x"], check=True)  # too deep for Python's own
    with pytest.raises(InputError, match="not a valid directory name"), new_directory("a\0b"):
        pass


def test_a_file_is_written_whole_through_a_link(tmp_path):
    put_file(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", b"new")
    assert sorted(os.listdir(tmp_path)) == ["link", "real"] and (tmp_path / "real").read_bytes() == b"new"
    for name in ("x" * 255, "猫" * 85):
        write_file(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    (tmp_path / "loop").symlink_to("loop")
    for other in (tmp_path, "/dev/null", tmp_path / "loop"):
        with pytest.raises(InputError, match="not a file"):
            write_file(other, b"")
    assert os.readlink(tmp_path / "loop") == "loop"
