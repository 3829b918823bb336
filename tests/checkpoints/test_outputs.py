"""What commands write over, and what they never touch: destinations, answers files, directories of runs."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from etils import epath

from convert import __main__ as convert
from helpers import GOLDEN, files_of_at_most
from infer.answers import AnswersFile, key_of
from llava_jax.checkpoints import outputs
from llava_jax.checkpoints.outputs import new_directory, write_file
from llava_jax.console import InputError
from llava_jax.locks import LockedFile
from train.config import TrainConfig
from train.datasets import shapes
from train.metrics import MetricsFiles
from train.run_directory import Output, fingerprint
from train.samples import BadSamples

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


def contents(directory):
    """Every path below a directory, with what a file holds and where a link leads."""

    def content(path):
        return os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()

    return {str(path.relative_to(directory)): content(path) for path in directory.rglob("*")}


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
    assert "holds what is to be read" in refused(run_cli, kind, source, destination, *flags, "--overwrite")
    assert contents(models.parent) == before


def test_what_is_read_in_an_object_store_is_not_replaced(models):
    """A local directory stands for it: what is compared are names."""
    before = contents(models)
    for source in (models / "m", models / "m" / "vision_tower"):
        arguments = (epath.Path(models / "m"), "m", True, [source])
        with pytest.raises(InputError, match="holds what is to be read"), outputs._remote_directory(*arguments):
            pass
    assert contents(models) == before


@pytest.mark.parametrize("url", ["file:///tmp/x", "http://127.0.0.1:9/x", "memory://x"])
def test_a_url_that_is_no_object_store_is_no_destination(run_cli, models, monkeypatch, url):
    monkeypatch.chdir(models)
    before = contents(models)
    assert "is no object store that is known" in refused(run_cli, "to-orbax", "m", url)
    assert "is no object store that is known" in refused(run_cli, "inspect", url)
    with pytest.raises(InputError, match="is no object store that is known"):
        Output(TrainConfig(output=url))
    status, _, err = run_cli(shapes.main, "--examples", "1", "--output", url)
    assert (status, err.count("\n")) == (1, 1) and "no local directory" in err
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


def write(path, text="precious"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


STRANGERS = {
    "a directory": ("thesis", lambda d: write(d / "thesis" / "a.txt")),
    "an empty directory": ("thesis", lambda d: (d / "thesis").mkdir()),
    "a file": ("notes.txt", lambda d: write(d / "notes.txt")),
    "a hidden file": (".bashrc", lambda d: write(d / ".bashrc")),
    "among the arrays": ("params/a.txt", lambda d: write(d / "params" / "a.txt")),
    "among their data": ("params/d/a.txt", lambda d: write(d / "params" / "d" / "a.txt")),
    "beside the arrays": ("params-old", lambda d: (d / "params-old").mkdir()),
    "in the tower": ("vision_tower", lambda d: write(d / "vision_tower" / "a.txt")),
    "a pipe": ("model-2.safetensors", lambda d: os.mkfifo(d / "model-2.safetensors")),
    "a link to a directory": ("tokenizer.json", lambda d: (d / "tokenizer.json").symlink_to(d.parent)),
    "a checkpoint in it": ("m", lambda d: copy_model(d / "m")),
    "no weights": ("no checkpoint", lambda d: (d / "model.safetensors").unlink()),
    "no model's configuration": ("no checkpoint", lambda d: write(d / "config.json", '{"name": "web app"}')),
    "no configuration": ("no checkpoint", lambda d: (d / "config.json").unlink()),
    "broken configuration": ("no checkpoint", lambda d: write(d / "config.json", "[" * 99_999)),
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
        write(staged / "config.json")
        write(models / "old" / "thesis" / "a.txt")
    assert sorted(os.listdir(models)) == ["m", "old"]
    with pytest.raises(InputError, match="exists already"), new_directory(models / "new") as staged:
        write(staged / "config.json")
        write(models / "new" / "thesis" / "a.txt")
    assert (models / "new" / "thesis" / "a.txt").read_text() == "precious"


def test_directories_of_others_beside_it_are_left_alone(run_cli, models):
    for name in (".out.incomplete", ".out.replaced", ".out.0123abcd.incomplete"):
        write(models / name / "mine")
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


# ---------------------------------------------------------------- two at once, and killed


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_that_write_the_same_the_later_is_refused(models, overwrite, capsys):
    if overwrite:
        copy_model(models / "out")
    says = "written by another command meanwhile" if overwrite else "exists already"
    with pytest.raises(InputError, match=says), new_directory(models / "out", overwrite=overwrite) as first:
        with new_directory(models / "out", overwrite=overwrite) as second:
            assert first != second
            for name in TRAINED:
                shutil.copy(MISTRAL / name, second)
            write(first / "config.json")
        assert f"out: is being written by another command (process {os.getpid()} on " in capsys.readouterr().err
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
        write(staged / "config.json", "newer")
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
    write(models / ".out.0123abcd.lock", text)
    write(models / ".out.0123abcd.incomplete" / "mine")
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
            write(staged / "config.json")
        assert os.listdir(tmp_path) == [name]
        shutil.rmtree(tmp_path / name)
    with pytest.raises(InputError, match="File name too long"), new_directory(tmp_path / ("x" * 256)):
        pass
    with new_directory(tmp_path / ("x/" * 1500) / "y") as staged:
        write(staged / "config.json")
    assert (tmp_path / ("x/" * 1500) / "y" / "config.json").exists()
    with pytest.raises(InputError, match="File name too long"), new_directory(tmp_path / "z" / ("x/" * 2100)):
        pass
    assert os.listdir(tmp_path) == ["x"]
    subprocess.run(["rm", "-r", tmp_path / "x"], check=True)  # too deep for Python's own
    with pytest.raises(InputError, match="no name of a directory"), new_directory("a\0b"):
        pass


def test_a_file_is_written_whole_through_a_link(tmp_path):
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", b"new")
    assert sorted(os.listdir(tmp_path)) == ["link", "real"] and (tmp_path / "real").read_bytes() == b"new"
    for name in ("x" * 255, "猫" * 85):
        write_file(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    for other in (tmp_path, "/dev/null"):
        with pytest.raises(InputError, match="not a file"):
            write_file(other, b"")


# ---------------------------------------------------------------- answers files

ANSWER = {"question_id": 1, "prompt": "a", "text": "b", "answer_id": "0", "model_id": "m", "metadata": {}}
LINE = json.dumps(ANSWER)


@pytest.mark.parametrize(
    ("before", "after"),
    {
        "nothing": ("", ""),
        "whole": (LINE + "\n", LINE + "\n"),
        "blank lines": (LINE + "\n\n", LINE + "\n\n"),
        "whole, without its end": (LINE, LINE + "\n"),
        "cut in a text": (LINE + "\n" + LINE[:40], LINE + "\n"),
        "cut in the first id": ('{"question_id": "1', ""),
        "cut before the prompt": ('{"question_id": 12, "pr', ""),
        "cut in a character": (
            (LINE + "\n" + LINE[:40] + "猫").encode()[:-1].decode(errors="surrogateescape"),
            LINE + "\n",
        ),
        "cut at once": (LINE + "\n{", LINE + "\n"),
        "cut, by another writer": (LINE + "\n" + '{"question_id": 1, "text": "a', LINE + "\n"),
    }.values(),
)
def test_answers_go_behind_what_is_whole(tmp_path, before, after):
    file = tmp_path / "a.jsonl"
    file.write_text(before, errors="surrogateescape")
    with AnswersFile(file, tmp_path / "q") as answers:
        assert answers.answered.total() == after.count("\n") - after.count("\n\n")
        assert not after or answers.answered[key_of(1, "a")] == 1
    assert file.read_text(errors="surrogateescape") == before  # nothing was answered
    with AnswersFile(file, tmp_path / "q") as answers:
        answers.append(ANSWER)
        answers.append(ANSWER)
    assert file.read_text() == after + 2 * (LINE + "\n")


@pytest.mark.parametrize(
    "text",
    [
        "one line, no newline",
        '{"question_id": 1, "text": "a"}\n{"question_id": 2, "text": "b"}',
        '{"question_id": 1, "text": "a"}',
        '{"question_id": 1, "text": "a',
        '{"question_id":1,"prompt":"a',
        LINE + "\n" + '{"question_id": 1, "text": "a"}',
        LINE + "\nmine",
        LINE[:40] + "\n" + LINE,
        "[" * 99_999,
        "[]\n",
        '{"question_id": 1, "prompt": "a", "text": null}\n{}',
        "\x00" * 50,
        "\udcff\udc80\udcfe",  # these bytes
        '\udc80{"question\udcff',
        '{"question_id": 1, "prompt": "\udcffa',
    ],
)
def test_what_is_no_answers_file_is_left_alone(tmp_path, text):
    file = tmp_path / "a.jsonl"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match="no answers file"), AnswersFile(file, tmp_path / "q"):
        pass
    assert file.read_text(errors="surrogateescape") == text


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_the_questions_are_not_the_answers_under_another_name(tmp_path, link):
    write(tmp_path / "q", LINE)
    link(tmp_path / "q", tmp_path / "a")
    with pytest.raises(InputError, match="the file of the questions"), AnswersFile(tmp_path / "a", tmp_path / "q"):
        pass
    assert (tmp_path / "q").read_text() == LINE


def test_answers_go_into_regular_files_that_can_be_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path / "huge")
    os.truncate(tmp_path / "huge", 2**40)
    for path, says in (
        (tmp_path / "pipe", "a pipe, not a file"),
        (tmp_path, "a directory, not a file"),
        (tmp_path / "huge", "has 1,099,511,627,776 bytes"),
        ("/dev/full", "a device, not a file"),
        (f"/proc/self/fd/{os.pipe()[1]}", "a pipe, not a file"),
        (tmp_path / "no" / "a", "cannot be written"),
        (tmp_path / ("x" * 300), "cannot be written"),
        ("a\0b", "cannot be written"),
    ):
        with pytest.raises(InputError, match=says), AnswersFile(path, tmp_path / "q"):
            pass
    assert sorted(os.listdir(tmp_path)) == ["huge", "pipe"]


def test_one_command_holds_an_answers_file(tmp_path):
    with AnswersFile(tmp_path / "a", tmp_path / "q") as answers:
        with pytest.raises(InputError, match="in use by another command"), AnswersFile(tmp_path / "a", tmp_path / "q"):
            pass
        answers.append(ANSWER)
    with AnswersFile(tmp_path / "a", tmp_path / "q") as answers:
        assert answers.answered.total() == 1
    with AnswersFile(tmp_path / "b", tmp_path / "q"):
        pass
    assert os.listdir(tmp_path) == ["a"]  # where nothing was answered nothing is left


def test_a_line_that_a_full_disk_has_no_room_for_is_not_begun(tmp_path):
    with AnswersFile(tmp_path / "a", tmp_path / "q") as answers:
        answers.append(ANSWER)
        with files_of_at_most(len(LINE) + 20), pytest.raises(InputError, match="/a: cannot be written .File too large"):
            answers.append(ANSWER)
        answers.append(ANSWER)
    assert (tmp_path / "a").read_text() == 2 * (LINE + "\n")


def test_a_lock_that_its_holder_removes_is_no_lock(tmp_path):
    first = LockedFile(tmp_path / "lock")
    first.path.unlink()
    second = LockedFile(tmp_path / "lock")
    with pytest.raises(InputError, match="in use"):
        LockedFile(tmp_path / "lock")
    first.close()
    second.close()
    LockedFile(tmp_path / "lock").close()


# ---------------------------------------------------------------- directories of runs


@pytest.fixture
def run_config(tmp_path):
    write(tmp_path / "d.json", "[]")
    return TrainConfig(data=(str(tmp_path / "d.json"),), checkpoint=str(MISTRAL), output=str(tmp_path / "out"))


@pytest.mark.parametrize(
    "name", ["model/a.txt", "hf/a.txt", "adapter/a.txt", "checkpoints/1/a", "events/a", "metrics.jsonl"]
)
def test_a_run_writes_over_nothing_that_is_not_its_own(run_config, tmp_path, name):
    write(tmp_path / "out" / name)
    write(tmp_path / "out" / "log.txt")  # which is nobody's business
    with pytest.raises(InputError, match=f"holds something else: {name.split('/')[0]}"):
        Output(run_config)
    (tmp_path / "out" / name.split("/")[0]).rename(tmp_path / "elsewhere")
    output = Output(run_config)
    output.write_config()
    output.close()
    if name.split("/")[0] in ("model", "hf", "adapter"):
        write(tmp_path / "out" / name)
        with pytest.raises(InputError, match=r"is not replaced: it holds a\.txt"):
            Output(run_config)


def test_a_lock_of_something_else_is_left_alone(run_config, tmp_path):
    write(tmp_path / "out" / ".lock")
    with pytest.raises(InputError, match="something else than a lock"):
        Output(run_config)
    assert (tmp_path / "out" / ".lock").read_text() == "precious"


def test_what_a_refused_run_leaves_is_what_was_there(run_config, tmp_path):
    write(tmp_path / "out" / "bad_samples.jsonl")
    before = contents(tmp_path)
    Output(run_config).withdraw()
    assert contents(tmp_path) == before


def test_a_run_refused_in_a_checkpoint_leaves_it_as_it_was(run_config, models):
    before = contents(models)
    with pytest.raises(InputError, match="holds something else"):
        Output(run_config.replace(output=str(models / "m")))
    assert contents(models) == before


def test_runs_inside_a_checkpoint_do_not_change_its_fingerprint(models):
    before = fingerprint(str(models / "m"))
    write(models / "m" / "run" / "model" / "config.json")
    assert fingerprint(str(models / "m")) == before
    write(models / "m" / "params" / "d" / "more")
    assert fingerprint(str(models / "m")) != before


APPENDED = {
    "metrics.jsonl": (lambda folder: MetricsFiles(folder, 1).close(), '{"step": 1, "loss": 2.0}'),
    "bad_samples.jsonl": (lambda folder: BadSamples(TrainConfig(), None, folder), '{"data": "a", "index": 1}'),
}


@pytest.mark.parametrize("name", APPENDED)
@pytest.mark.parametrize("last", ["precious", '{"id": 1, "text": "prec', '{"id": 1}', "\x00", "{]"])
def test_an_unfinished_line_of_another_file_is_never_removed(name, last, tmp_path):
    open_file, line = APPENDED[name]
    for text in (last, f"{line}\n{last}"):
        write(tmp_path / name, text)
        with pytest.raises(InputError, match=f"{name} line"):
            open_file(tmp_path)
        assert (tmp_path / name).read_text() == text


@pytest.mark.parametrize("name", APPENDED)
def test_only_an_incomplete_last_line_is_removed(name, tmp_path):
    open_file, line = APPENDED[name]
    for end in range(1, len(line) + 1):
        write(tmp_path / name, f"{line}\n{line[:end]}")
        open_file(tmp_path)
        assert (tmp_path / name).read_text() == f"{line}\n" * (2 if end == len(line) else 1)
