"""`python -m train.plot`: what it draws of which metrics, and what it refuses."""

import json
import math
import sys

import pytest
from PIL import Image

from train import plot


def write_run(directory, lines):
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


@pytest.fixture
def runs(tmp_path):
    """Two runs; the first was evaluated twice, and one of its losses was not finite."""
    lines = [
        {"step": i, "loss": 8.0 / i, "learning_rate": 0.1 * i, "tokens_per_second": 100.0 + i, "epoch": 0}
        for i in range(1, 9)
    ]
    lines[3] |= {"loss": None, "eval_loss": 2.5}
    lines[7] |= {"eval_loss": 1.5}
    return [write_run(tmp_path / "first", lines), write_run(tmp_path / "_second $x_{", lines[:1])]


def lines_of(ax) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()]


def test_a_panel_for_each_metric_and_a_curve_for_each_run(runs):
    read = {str(run): plot.read_run(str(run)) for run in runs}
    figure = plot.draw(read, plot.METRICS, share=0.5)
    loss, rate, speed = figure.axes
    assert [ax.get_title() for ax in figure.axes] == ["loss", "learning rate", "tokens per second"]
    assert lines_of(rate) == [([*range(1, 9)], [0.1 * i for i in range(1, 9)]), ([1], [0.1])]
    assert lines_of(speed)[0][1] == [100.0 + i for i in range(1, 9)]
    raw, evaluated, mean, *_ = lines_of(loss)
    assert [value for value in raw[1] if not math.isnan(value)] == [8.0 / i for i in range(1, 9) if i != 4]
    assert math.isnan(raw[1][3]) and evaluated == ([4, 8], [2.5, 1.5])
    assert mean[1][:2] == [8.0, pytest.approx((0.5 * 8 + 4) / 1.5)] and mean[1][3] == mean[1][2]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [plot._label(str(run)) for run in runs]


@pytest.mark.parametrize("suffix", plot.FORMATS)
def test_the_command_writes_an_image(runs, run_cli, monkeypatch, tmp_path, suffix):
    monkeypatch.chdir(tmp_path)
    output = tmp_path / f"curves{suffix}"
    more = ("--metrics", "loss,eval_loss,learning_rate,epoch", "--smooth", "0", "--output", output)
    command = [str(part) for part in ("first/metrics.jsonl", runs[1].name, *more)]
    status, out, err = run_cli(plot.main, *command)
    assert (status, out) == (0, "") and err == f"the plot is in {output}\n"
    assert output.read_bytes().startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])
    if suffix == ".png":
        image = Image.open(output).convert("RGB")
        assert image.size == (1380, 600) and len(image.getcolors(10**6)) > 100
    status, _, err = run_cli(plot.main, *command)
    assert (status, err) == (1, f"error: --output {output}: exists; --overwrite replaces it\n")
    assert run_cli(plot.main, *command, "--overwrite")[0] == 0
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["nowhere"], "nowhere: no metrics.jsonl, or an empty one; is it the --output of a run?"),
        (["first", "--metrics", "loss,los"], "--metrics los: no run has it; they have epoch, eval_loss, learning_rate"),
        (["first", "--metrics", ""], "--metrics : no run has it"),
        (["first", "--output", "metrics.jsonl"], "--output metrics.jsonl: must end in .png, .svg or .pdf"),
        (["first", "--smooth", "1"], "--smooth 1: must be a number from 0 to 0.999"),
        (["words"], "words: loss of step 1 is not a number"),
        (["broken"], "broken/metrics.jsonl"),
    ],
)
def test_what_cannot_be_plotted_is_one_line(runs, run_cli, monkeypatch, tmp_path, flags, says):
    write_run(tmp_path / "words", [{"step": 1, "loss": "high", "learning_rate": 1, "tokens_per_second": 1}])
    write_run(tmp_path / "broken", []).joinpath("metrics.jsonl").write_text('{"step": 1}\n{"step": "x"}\n')
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    status, out, err = run_cli(plot.main, "--output", "curves.png", *flags)
    assert (status, out, err.count("\n")) == (1, "", 1) and err.startswith(f"error: {says}")
    assert set(tmp_path.rglob("*")) == before


def test_without_matplotlib(runs, run_cli, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = run_cli(plot.main, str(runs[0]), "--output", str(tmp_path / "x.png"))
    assert (status, err) == (1, "error: plots need matplotlib: pip install 'llava-jax[plots]'\n")
