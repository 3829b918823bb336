"""Bad samples of a run: listed once, counted over processes and restarts, and too many of them refused."""

import json
from pathlib import Path

import pytest

from helpers import turns
from llava_jax.console import InputError
from train.loader import open_data
from train.samples import Samples
from training import BROKEN, assert_same_batches, good_row, take


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_a_thousand_rows_thirty_of_them_broken(batching, write, config, models, capsys):
    lines = [json.dumps(good_row(i)) for i in range(1000)]
    broken = {i * 33 + 5: line for i, line in enumerate((list(BROKEN) * 2)[:30])}
    for i, line in broken.items():
        lines[i] = line
    path = write(lines, "data.jsonl")
    runs = {}
    for workers in (2, 0, 5):
        settings = config(path, batching=batching, workers=workers, max_bad_share=0.04, global_batch_size=32)
        data = open_data(settings.replace(output=f"{settings.output}{workers}"), *models["v1.6-mistral"])
        runs[workers] = [next(data) for _ in range(data.steps_per_epoch + 1 if workers == 2 else 4)]
        data.close()
    assert {i for _, info in runs[2] for i in info["ids"]} == {f"row{i}" for i in range(1000) if i not in broken}
    assert_same_batches(runs[2][:4], runs[0])
    assert_same_batches(runs[2][:4], runs[5])
    listed = list(map(json.loads, Path(f"{settings.output}2", "bad_samples.jsonl").read_text().splitlines()))
    assert sorted(row["index"] for row in listed) == sorted(broken)
    assert all(BROKEN[broken[row["index"]]] in row["reason"] for row in listed)
    assert all(row["data"] == path for row in listed)
    said = capsys.readouterr().err
    assert said.count("bad sample: ") == 3 * 10
    assert said.count("further bad samples are listed in") == 3


def test_bad_samples_are_listed_once_over_restarts(write, config, models, capsys):
    rows = [good_row(i) for i in range(40)] + [{"image": "missing.png", "conversations": turns("<image>", "x")}]
    settings = config(write(rows), max_bad_share=0.1)
    model = models["v1.6-mistral"]
    take(open_data(settings, *model), 8)
    file = Path(settings.output, "bad_samples.jsonl")
    once = file.read_text()
    assert json.loads(once)["index"] == json.loads(once)["id"] == 40
    with file.open("a") as cut_off:
        cut_off.write('{"data": "da')
    take(open_data(settings, *model), 8)
    assert file.read_text() == once
    assert capsys.readouterr().err.count("bad sample") == 1
    take(open_data(settings, *model, process=1, processes=2), 8)
    assert file.read_text() == once  # process 0 knows it too
    assert not file.with_name("bad_samples.1.jsonl").exists()


def test_each_process_lists_the_broken_images_of_its_own_rows(write, config, models):
    rows = [good_row(i) | ({"image": "truncated.jpg"} if i % 5 == 1 else {}) for i in range(40)]
    settings = config(write(rows), max_bad_share=0.3)
    for process in (0, 1):
        take(open_data(settings, *models["v1.6-mistral"], process=process, processes=2, train=False))
    files = [Path(settings.output, name) for name in ("bad_samples.jsonl", "bad_samples.1.jsonl")]
    listed = [{json.loads(line)["index"] for line in file.read_text().splitlines()} for file in files]
    assert listed[0] | listed[1] == set(range(1, 40, 5))
    assert listed[0]
    assert listed[1]
    assert len(listed[0] & listed[1]) <= 1  # but one that both looked at beforehand


def test_too_many_bad_samples_stop_a_run(write, config, models):
    rows = [good_row(i) for i in range(100)]
    for i in (5, 50):
        rows[i] = {"image": "missing.png", "conversations": turns("<image>", "x")}
    refused = "bad samples: 2 among the first 100, more than --max-bad-share 0.01 allows; row 5: .*; row 50: .*image$"
    with pytest.raises(InputError, match=refused):
        open_data(config(write(rows)), *models["v1.6-mistral"])
    assert not Path(config("").output, "bad_samples.jsonl").exists()
    with pytest.raises(InputError, match="row 5: .*missing.png: no such image"):
        open_data(config(write(rows), on_bad_sample="fail"), *models["v1.6-mistral"])
    rows[5], rows[50] = good_row(5), good_row(50) | {"image": "truncated.jpg"}
    open_data(config(write(rows)), *models["v1.6-mistral"]).close()
    data = open_data(config(write(rows), on_bad_sample="fail"), *models["v1.6-mistral"])
    with pytest.raises(InputError, match=r"row 50 \(id row50\): .*truncated.jpg: broken image"):
        take(data, 30)
    rows[9] = good_row(9) | {"image": "truncated.jpg"}
    data = open_data(config(write(rows)), *models["v1.6-mistral"])
    with pytest.raises(
        InputError, match=r"bad samples: 2 among the first 100, .*; row \d+ .*/bad_samples.jsonl lists them"
    ):
        take(data, 30)
    assert len(Path(config("").output, "bad_samples.jsonl").read_text().splitlines()) == 2


def test_one_bad_sample_of_a_few_stops_nothing(write, config, models, capsys):
    """In each pass it is met again. Two are too many, and the error names them; nothing is listed of a run refused."""
    rows = [good_row(i) for i in range(15)]
    rows[4] = {"image": "missing.png", "conversations": turns("<image>", "x")}
    settings = config(write(rows))
    data = open_data(settings, *models["v1.6-mistral"])
    infos = [next(data)[1] for _ in range(4 * data.steps_per_epoch)]
    data.close()
    assert infos[-1]["epoch"] >= 3 and infos[-1]["bad"] >= 4
    link = Path(settings.data).with_name("link.json")
    link.symlink_to(settings.data)
    for several in (f"{settings.data}=3", (settings.data,) * 2, (settings.data, f"{settings.data}=2", str(link))):
        open_data(settings.replace(data=several), *models["v1.6-mistral"]).close()
    says = f"row 4: {settings.image_folder}/missing.png: no such image\n"
    assert capsys.readouterr().err == f"bad sample: {settings.data} {says}bad sample: {link} {says}"
    with pytest.raises(
        InputError, match=r"bad samples: 1 among the first 15, more than --max-bad-share 0 allows; .*row 4: "
    ):
        open_data(settings.replace(max_bad_share=0.0), *models["v1.6-mistral"])
    for i in (6, 8, 11, 12):
        rows[i] = {"id": f"bad{i}", "conversations": turns("a")}
    settings = config(write(rows), output=f"{settings.output}2")
    with pytest.raises(InputError) as error:
        open_data(settings, *models["v1.6-mistral"])
    assert str(error.value) == (
        f"{settings.data}: bad samples: 5 among the first 15, more than --max-bad-share 0.01 allows; "
        f"row 4: {settings.image_folder}/missing.png: no such image; row 6 (id bad6): no answer; "
        "row 8 (id bad8): no answer; and 2 more"
    )
    assert not Path(settings.output).exists()
    assert capsys.readouterr().err == ""


def test_processes_stop_together_at_what_each_of_them_found(write, config, models):
    """Ten of a hundred images are broken. Either process knows of some, and continues until both know of all."""
    rows = [good_row(i) | ({"image": "truncated.jpg"} if i % 10 == 1 else {}) for i in range(100)]

    def stop(**changes) -> set[str]:
        settings, said = config(write(rows), **changes), set()
        both = [open_data(settings, *models["v1.6-mistral"], process=i, processes=2, train=False) for i in (0, 1)]
        for data in both:
            take(data)
        assert all(0 < data.bad.own < 10 for data in both)
        reports = []
        for data in both:
            data.bad.agree(lambda text: [reports.append(text), text, text][1:])
        for data in both:
            with pytest.raises(InputError) as error:
                data.bad.agree(lambda text: reports)
            said.add(str(error.value).split("; ")[0])
            assert data.bad.total == 10
        return said

    share = dict(max_bad_share=0.08)  # neither alone has met so many
    (one,) = stop(**share)
    assert "bad samples: 10 among the first 100, more than --max-bad-share 0.08 allows" in one
    data = open_data(config(write(rows), max_bad_share=0.19), *models["v1.6-mistral"])
    data.bad.set_state([20, 50])  # of the run that is resumed
    with pytest.raises(InputError, match="bad samples: (29|30) among the first 150"):
        take(data, 30)


def test_nothing_but_broken_images(write, config, models):
    path = write([good_row(0) | {"image": "truncated.jpg"}] * 3)
    with pytest.raises(InputError, match=r"none of its images can be read; .*row 0 \(id row0\): .*broken image"):
        open_data(config(path), *models["v1.6-mistral"])


@pytest.mark.parametrize("name", ["v1.5-llama", "v1.6-mistral"])
def test_text_does_not_hide_a_wrong_image_folder(name, write, config, models, tmp_path, monkeypatch):
    """Of v1.5 no image is touched before it is loaded; of v1.6 the head of each has been read."""
    tried, load = [], Samples.load
    monkeypatch.setattr(Samples, "load", lambda self, one: tried.append(one.index) or load(self, one))
    path = write([good_row(3)] * 2 + [good_row(i) for i in range(98)])
    (tmp_path / "elsewhere").mkdir()
    settings = config(path, max_bad_share=1.0)
    with pytest.raises(InputError, match=r"none of its images can be read; .*row 2 \(id row0\): .*no such image"):
        open_data(settings.replace(image_folder=str(tmp_path / "elsewhere")), *models[name])
    assert (len(tried), max(tried, default=0) > 80) == ((8, True) if name == "v1.5-llama" else (0, False))
    tried.clear()
    open_data(settings, *models[name]).close()
    assert tried[0] == 2
    rows = [good_row(i) for i in range(20)]
    rows[0] |= {"image": "missing.png"}
    open_data(config(write(rows), max_bad_share=1.0), *models[name]).close()
    open_data(config(write([good_row(3)] * 20), image_folder=str(tmp_path / "elsewhere")), *models[name]).close()
