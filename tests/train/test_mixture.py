"""Several data files as one, each with its weight."""

import collections
import hashlib
import json
from pathlib import Path

import pytest

from helpers import GOLDEN
from llava_jax.console import InputError
from llava_jax.data.data_files import read_rows
from train.__main__ import read_config
from train.loader import open_data
from train.mixture import Part, checksum, read_parts
from train.run_directory import Output
from training import assert_same_batches, good_row, take


def test_weights_take_a_share_of_a_file_or_repeat_it():
    assert Part("a").choose(5, (0, 0)).tolist() == [0, 1, 2, 3, 4]
    halves = [
        Part("a", weight=0.5).choose(15, (seed, part)).tolist() for seed, part in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert [len({*half} & {*range(15)}) for half in halves] == [8] * 4
    assert halves[0] == halves[1] == sorted(halves[0])
    assert halves[0] != halves[2] != halves[3] != halves[0]
    more = Part("a", weight=2.5).choose(4, (0, 0)).tolist()
    assert more[:8] == [*range(4)] * 2 and len({*more[8:]}) == 2
    assert len(Part("a", weight=0.1).choose(30, (0, 0))) == 3  # not 4, as 0.1 * 30 rounded up would be
    for share in (1e-6, 1e-9, 1e-300):
        assert len(Part("a", weight=share).choose(30, (0, 0))) == len(Part("a", weight=share).choose(1, (0, 0))) == 1


def test_yaml_lists_as_llava_next_has_them(tmp_path):
    for strategy, rows in {
        "all": [*range(10)], None: [*range(10)], "first:3": [0, 1, 2], "end:3": [7, 8, 9], "first:25%": [0, 1, 2],
        "end:10%": [9], "first:100": [*range(10)], "end:100": [*range(10)], "random:100": [*range(10)],
    }.items():  # fmt: skip
        line = f'\n    sampling_strategy: "{strategy}"' if strategy else ""
        (tmp_path / "mix.yaml").write_text(f"datasets:\n  - json_path: a.json{line}\n  - json_path: b.jsonl\n")
        first, second = read_parts(["c.json=2", str(tmp_path / "mix.yaml")])[1:]
        assert (first.path, first.choose(10, (0, 0)).tolist()) == ("a.json", rows)
        assert second == Part("b.jsonl")
    (tmp_path / "mix.yaml").write_text('datasets: [{json_path: a.json, sampling_strategy: "random:25%"}]')
    assert len({*read_parts(str(tmp_path / "mix.yaml"))[0].choose(10, (0, 0)).tolist()}) == 3


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        ("a: [", "not YAML"), ("", "must have one key, datasets"), ("datasets: []", "must have one key, datasets"),
        ("datasets: 3", "must have one key, datasets"), ("datasets: [3]", r"datasets\[0\] has no json_path"),
        ("datasets: [{json_path: a}]\nmore: 1", "must have one key, datasets"),
        ("datasets: [{json_path: a, data_root: b}]", r"datasets\[0\]: data_root is unknown"),
        ("[" * 100_000, "cannot be read|not YAML"), ("datasets: [&a {json_path: a}, *a]", "has aliases"),
        ("a0: &a0 {x: 1}\n" + "".join(
            f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 9)}]}}\n" for i in range(12)), "has aliases"),
        *[
            (f'datasets: [{{json_path: a, sampling_strategy: "{x}"}}]', f"sampling_strategy '{x}': write all, or first")
            for x in ("some", "first", "first:", "first:0", "first:0%", "end:00%", "end:x", "random:-1", "random:200%",
                      "first:1.5%", "last:3")
        ],
    ],
)  # fmt: skip
def test_yaml_that_cannot_be_used(contents, says, tmp_path):
    (tmp_path / "mix.yaml").write_text(contents)
    with pytest.raises(InputError, match=says):
        read_parts(str(tmp_path / "mix.yaml"))


def test_weights_that_are_none(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b=2").write_text("[]")
    assert read_parts(str(tmp_path / "b=2")) == [Part(str(tmp_path / "b=2"))]
    for weight in ("0", "-1", "nan", "inf", "1e9", "half", ""):
        with pytest.raises(InputError, match="the weight after = must be a number above 0"):
            read_parts(f"{tmp_path}/a.json={weight}")
    with pytest.raises(InputError, match="c=3.json: cannot be read"):
        read_rows(read_parts(f"{tmp_path}/c=3.json")[0].path)
    with pytest.raises(InputError, match="mix.yaml=2: a YAML file has its own"):
        read_parts("mix.yaml=2")


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_several_files_are_one_list(batching, write, config, models, capsys):
    """Each row as often as its file's weight says, in the order of no file, resumed bit for bit; the bad ones named by
    their own file."""
    model = models["v1.6-mistral"]
    first = write([good_row(i) for i in range(20)], "a.json")
    second = write([good_row(i) | {"id": f"b{i}"} for i in range(12)] + ["{"], "b.jsonl")
    third = write([good_row(i) | {"id": f"c{i}"} for i in range(10)], "c.json")
    settings = config((first, f"{second}=2", f"{third}=0.5"), batching=batching, max_bad_share=0.1)
    data = open_data(settings, *model)
    assert len(data.samples) == 20 + 2 * 13 + 5
    whole = [next(data) for _ in range(data.steps_per_epoch + 4)]
    data.close()
    once = take(open_data(settings, *model, train=False))
    seen = collections.Counter(i for _, info in once for i in info["ids"])
    assert [seen[f"row{i}"] for i in range(20)] == [1] * 20 and [seen[f"b{i}"] for i in range(12)] == [2] * 12
    assert sorted(seen[f"c{i}"] for i in range(10)) == [0] * 5 + [1] * 5
    assert seen.keys() == {i for _, info in whole for i in info["ids"]}
    assert f"bad sample: {second} row 12: not JSON" in capsys.readouterr().err
    [listed] = map(json.loads, Path(settings.output, "bad_samples.jsonl").read_text().splitlines())
    assert (listed["data"], listed["index"]) == (second, 12)
    data = open_data(settings, *model)
    assert_same_batches(take(data, 3), whole[:3])
    state = json.loads(json.dumps(data.get_state()))
    again = open_data(settings.replace(workers=0), *model)
    again.set_state(state)
    assert_same_batches(take(again, 3), whole[3:6])


def test_checksum_is_of_the_files_and_of_their_shares(write):
    """That of one file alone is its own, as sha256sum prints it."""
    a, b = write([1], "a.json"), write([2], "b.json")
    moved = write([1], "moved.json")
    sums = [checksum(read_parts(data)) for data in (a, b, (a, b), (b, a), (a, f"{b}=0.5"), f"{a}=2")]
    assert len({*sums}) == len(sums)
    assert sums[0] == hashlib.sha256(Path(a).read_bytes()).hexdigest() == checksum(read_parts(moved))
    assert checksum(read_parts((moved, b))) == sums[2]
    with pytest.raises(InputError, match="--data nowhere.json: cannot be read"):
        checksum(read_parts((a, "nowhere.json")))


def test_a_run_of_several_files_resumes_with_the_same_shares_only(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = GOLDEN / "checkpoints" / "v1.5-llama"
    write([good_row(0)], "a.json"), write([good_row(1)], "b.json"), write([good_row(1)], "moved.json")

    def output(*data):
        flags = [part for one in data for part in ("--data", one)]
        _, config = read_config(["--checkpoint", str(checkpoint), "--output", "run", "--eval-data", "b.json", *flags])
        assert config.eval_data == str(tmp_path / "b.json")
        assert config.data == (tuple(str(tmp_path / one) for one in data) if len(data) > 1 else str(tmp_path / data[0]))
        return Output(config)

    output("a.json", "b.json=0.5").write_config()
    assert output("a.json", "moved.json=0.5").resumed
    for other in (("a.json",), ("a.json", "b.json"), ("b.json=0.5", "a.json")):
        with pytest.raises(InputError, match="data_sha256 is .* there and .* here"):
            output(*other)
