"""What a run writes over in its directory, and what it never touches."""

import shutil

import pytest

from helpers import GOLDEN, contents, put_file
from llava_jax.console import InputError
from train.bad_samples import BadSamples
from train.config import TrainConfig
from train.metrics import MetricsFiles
from train.run_directory import Output, fingerprint

MISTRAL = GOLDEN / "checkpoints" / "v1.6-mistral"


@pytest.fixture
def checkpoints(tmp_path):
    """A folder that holds a checkpoint, `m`."""
    shutil.copytree(MISTRAL, tmp_path / "models" / "m")
    return tmp_path / "models"


@pytest.fixture
def run_config(tmp_path):
    put_file(tmp_path / "d.json", "[]")
    return TrainConfig(data=(str(tmp_path / "d.json"),), checkpoint=str(MISTRAL), output=str(tmp_path / "out"))


@pytest.mark.parametrize(
    "name", ["model/a.txt", "hf/a.txt", "adapter/a.txt", "checkpoints/1/a", "events/a", "metrics.jsonl"]
)
def test_a_run_writes_over_nothing_that_is_not_its_own(run_config, tmp_path, name):
    put_file(tmp_path / "out" / name)
    put_file(tmp_path / "out" / "log.txt")  # which is nobody's business
    with pytest.raises(InputError, match=f"holds something else: {name.split('/')[0]}"):
        Output(run_config)
    (tmp_path / "out" / name.split("/")[0]).rename(tmp_path / "elsewhere")
    output = Output(run_config)
    output.write_config()
    output.close()
    if name.split("/")[0] in ("model", "hf", "adapter"):
        put_file(tmp_path / "out" / name)
        with pytest.raises(InputError, match=r"is not replaced: it holds a\.txt"):
            Output(run_config)


def test_a_lock_of_something_else_is_left_alone(run_config, tmp_path):
    put_file(tmp_path / "out" / ".lock")
    with pytest.raises(InputError, match="is not a lock file"):
        Output(run_config)
    assert (tmp_path / "out" / ".lock").read_text() == "precious"


def test_what_a_refused_run_leaves_is_what_was_there(run_config, tmp_path):
    put_file(tmp_path / "out" / "bad_samples.jsonl")
    before = contents(tmp_path)
    Output(run_config).undo()
    assert contents(tmp_path) == before


def test_a_run_refused_in_a_checkpoint_leaves_it_as_it_was(run_config, checkpoints):
    before = contents(checkpoints)
    with pytest.raises(InputError, match="holds something else"):
        Output(run_config.replace(output=str(checkpoints / "m")))
    assert contents(checkpoints) == before


def test_runs_inside_a_checkpoint_do_not_change_its_fingerprint(checkpoints):
    before = fingerprint(str(checkpoints / "m"))
    put_file(checkpoints / "m" / "run" / "model" / "config.json")
    assert fingerprint(str(checkpoints / "m")) == before
    put_file(checkpoints / "m" / "params" / "d" / "more")
    assert fingerprint(str(checkpoints / "m")) != before


APPENDED = {
    "metrics.jsonl": (lambda folder: MetricsFiles(folder, 1).close(), '{"step": 1, "loss": 2.0}'),
    "bad_samples.jsonl": (lambda folder: BadSamples(TrainConfig(), None, folder), '{"data": "a", "index": 1}'),
}


@pytest.mark.parametrize("name", APPENDED)
@pytest.mark.parametrize("last", ["precious", '{"id": 1, "text": "prec', '{"id": 1}', "\x00", "{]"])
def test_an_unfinished_line_of_another_file_is_never_removed(name, last, tmp_path):
    open_file, line = APPENDED[name]
    for text in (last, f"{line}\n{last}"):
        put_file(tmp_path / name, text)
        with pytest.raises(InputError, match=f"{name} line"):
            open_file(tmp_path)
        assert (tmp_path / name).read_text() == text


@pytest.mark.parametrize("name", APPENDED)
def test_only_an_incomplete_last_line_is_removed(name, tmp_path):
    open_file, line = APPENDED[name]
    for end in range(1, len(line) + 1):
        put_file(tmp_path / name, f"{line}\n{line[:end]}")
        open_file(tmp_path)
        assert (tmp_path / name).read_text() == f"{line}\n" * (2 if end == len(line) else 1)
