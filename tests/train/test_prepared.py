"""Training from prepared datasets: the batches of the data file, and of its images only those of a process's shard."""

import collections
import itertools
import json
import shutil

import numpy as np
import pytest

from helpers import GOLDEN
from llava_jax.console import InputError
from train.datasets.prepare import __main__ as prepare
from train.loader import open_data
from train.mixture import checksum, read_parts
from train.prepared import DATASET, INDEX, PreparedDataset
from train.samples import Samples
from train.stores import Store
from training import assert_same_batches, good_row, take

CHECKPOINTS = {"v1.5-llama": "v1", "v1.6-mistral": "mistral_instruct"}


@pytest.fixture
def prepared(tmp_path, folder, run_cli, in_process):
    """Prepare data files: the directory."""

    def prepared(*data, name="prepared", image_folder=folder, **flags):
        more = itertools.chain(*((f"--{flag.replace('_', '-')}", str(value)) for flag, value in flags.items()))
        files = itertools.chain(*(("--data", str(file)) for file in data))
        output = tmp_path / name
        status, _, said = run_cli(
            prepare.main, *files, "--image-folder", image_folder, "--output", output, "--workers", 1, *more
        )
        assert status == 0, said
        return str(output)

    return prepared


@pytest.fixture
def reads(monkeypatch):
    """The images, and the bytes of rows, that are read from prepared datasets."""
    found = collections.Counter()
    image, row = PreparedDataset.image, PreparedDataset.row

    def read_image(self, number, place):
        found["images"] += 1
        return image(self, number, place)

    def read_row(self, number):
        found["rows"] += 1
        return row(self, number)

    monkeypatch.setattr(PreparedDataset, "image", read_image)
    monkeypatch.setattr(PreparedDataset, "row", read_row)
    return found


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("batching", ["packed", "bucketed"])
@pytest.mark.parametrize("measured", [False, True])
def test_batches_equal_those_of_the_data_file(write, config, models, prepared, name, batching, measured):
    """Over the end of an epoch, with images before or after the text, on one process and on two."""
    path = write([good_row(i) for i in range(40)])
    flags = (
        dict(checkpoint=GOLDEN / "checkpoints" / name, template=CHECKPOINTS[name], image_first="random")
        if measured
        else {}
    )
    directory = prepared(path, **flags)
    settings = config(path, batching=batching, image_first="random", template=CHECKPOINTS[name])
    whole = take(open_data(settings, *models[name]), 8)
    assert_same_batches(whole, take(open_data(settings.replace(data=directory), *models[name]), 8))
    for process in range(2):
        of_file = open_data(settings, *models[name], process=process, processes=2)
        of_dataset = open_data(settings.replace(data=directory), *models[name], process=process, processes=2)
        assert of_dataset.get_state() == of_file.get_state()
        assert_same_batches(take(of_file, 4), take(of_dataset, 4))


def test_a_run_resumes_bit_for_bit(write, config, models, prepared):
    model = models["v1.6-mistral"]
    settings = config(prepared(write([good_row(i) for i in range(40)])))
    whole = take(open_data(settings, *model), 9)
    data = open_data(settings, *model)
    for _ in range(4):
        next(data)
    state = json.loads(json.dumps(data.get_state()))
    data.close()
    again = open_data(settings, *model)
    again.set_state(state)
    assert_same_batches(take(again, 5), whole[4:])


def test_mixtures_of_prepared_and_other_data(write, config, models, prepared):
    model = models["v1.5-llama"]
    paths = [write([good_row(i + k) for i in range(20)], f"{k}.json") for k in (0, 100)]
    directory = prepared(paths[0])
    settings = config((f"{paths[0]}=1.5", paths[1]))
    mixed = (f"{directory}=1.5", paths[1])
    assert_same_batches(take(open_data(settings, *model), 4), take(open_data(settings.replace(data=mixed), *model), 4))
    whole = prepared(f"{paths[0]}=1.5", paths[1], name="both", seed=settings.seed)
    assert_same_batches(take(open_data(settings, *model), 4), take(open_data(settings.replace(data=whole), *model), 4))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_process_reads_the_images_of_its_shard_and_measured_data_no_other_text(
    write, config, models, prepared, reads, name
):
    rows = [good_row(i) for i in range(200)]
    template = CHECKPOINTS[name]
    directory = prepared(write(rows), checkpoint=GOLDEN / "checkpoints" / name, template=template)
    of, images, texts = 4, 0, 0
    for process in range(of):
        data = open_data(
            config(directory, template=template, workers=0), *models[name], process=process, processes=of, train=False
        )
        reads.clear()
        found = take(data)
        assert reads["images"] <= 1.25 / of * sum(info["images"] for _, info in found)
        images, texts = images + reads["images"], texts + reads["rows"]
    assert images == sum(info["images"] for _, info in found)  # each image of each row once
    assert texts == sum(info["conversations"] for _, info in found)


def test_lengths_for_another_template_are_not_used(write, models, prepared, folder, reads):
    directory = prepared(write([good_row(0)]), checkpoint=GOLDEN / "checkpoints" / "v1.5-llama", template="v1")
    for template, read in (("v1", 0), ("llava_llama_2", 1)):
        reads.clear()
        Samples(directory, str(folder), *models["v1.5-llama"], template=template).measure(0)
        assert reads["rows"] == read


def damage(directory, name, change):
    file = directory / name
    file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (DATASET, None, r"its preparation is not complete; repeat the command|not a prepared dataset"),
        (DATASET, lambda data: data[:-9], "dataset.json: not JSON"),
        (DATASET, lambda data: data.replace(b'"format": 1', b'"format": 2'), "dataset.json: .*format"),
        (INDEX, None, "index.safetensors: no such file"),
        (INDEX, lambda data: data[:-1], "index.safetensors: damaged"),
        ("images-00000.tar", None, "images-00000.tar: is missing"),
        ("conversations-00000.jsonl", lambda data: data + b"\n", r"conversations-00000.jsonl: has [\d,]+ bytes;"),
    ],
)
def test_a_damaged_dataset_is_refused(tmp_path, write, config, models, prepared, name, change, says):
    directory = prepared(write([good_row(i) for i in range(4)]))
    if change is None:
        (tmp_path / "prepared" / name).unlink()
    else:
        damage(tmp_path / "prepared", name, change)
    with pytest.raises(InputError, match=says):
        open_data(config(directory), *models["v1.5-llama"])


def test_a_damaged_image_is_a_bad_sample_and_a_lost_file_ends_the_run(tmp_path, write, config, models, prepared):
    directory = prepared(write([good_row(i) for i in range(12)]))
    samples = Samples(directory, "", *models["v1.5-llama"])
    one = samples.measure(0)
    shard = tmp_path / "prepared" / "images-00000.tar"
    shard.write_bytes(bytes(255 - byte for byte in shard.read_bytes()))
    assert "images-00000.tar image 0: damaged (another checksum" in samples.load(one).reason
    shard.write_bytes(b"")
    with pytest.raises(OSError, match=r"images-00000.tar: ends before byte"):
        samples.load(one)
    shard.unlink()
    with pytest.raises(OSError, match="No such file"):
        samples.load(one)


def test_the_checksum_is_that_of_the_contents_wherever_they_are(tmp_path, write, prepared):
    rows = [good_row(i) for i in range(8)]
    first = prepared(write(rows))
    shutil.copytree(first, tmp_path / "moved")
    other = prepared(write([*rows, good_row(9)], "b.json"), name="other")
    assert checksum(read_parts(first)) == checksum(read_parts(str(tmp_path / "moved")))
    assert checksum(read_parts(first)) != checksum(read_parts(other))
    assert checksum(read_parts(f"{first}=2")) != checksum(read_parts(first))


def test_a_run_trains_from_prepared_data(train, data, prepared, tmp_path, on_one_device):
    """The same losses as from the data file."""
    directory = tmp_path / "dataset"
    prepared(data / "plain.json", name="dataset", image_folder=data / "images")
    losses = []
    for number, source in enumerate((data / "plain.json", directory)):
        status, _, said = train(tmp_path / f"run{number}", "--data", source)
        assert status == 0, said
        lines = (tmp_path / f"run{number}" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)])
    assert losses[0] == losses[1] and np.isfinite(losses[0]).all()


def test_a_store_reads_ranges_and_publishes_whole_files(tmp_path):
    store = Store(str(tmp_path / "new" / "store"))
    assert store.sizes() == {} and store.read("a", 10) is None
    store.create()
    store.write("a", b"0123456789")
    (tmp_path / "b").write_bytes(b"abc")
    store.publish(tmp_path / "b", "b")
    assert store.sizes() == {"a": 10, "b": 3} and not (tmp_path / "b").exists()
    assert store.read_range("a", 3, 4) == b"3456" and store.read_range("a", 10, 0) == b""
    with pytest.raises(OSError, match="a: ends before byte 12"):
        store.read_range("a", 8, 4)
    with pytest.raises(InputError, match="a: has 10 bytes"):
        store.read("a", 9)
    store.remove("a")
    store.remove("a")
    assert store.sizes() == {"b": 3}
    for path in ("file:///tmp", "nowhere://x", "http://x/y"):
        with pytest.raises(InputError, match="supported object store|cannot be opened"):
            Store(path)
