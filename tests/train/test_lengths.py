"""What is kept of a tokenized conversation says the same of its size as splicing it."""

import numpy as np
import pytest

from helpers import turns
from llava_jax.console import InputError
from llava_jax.data.splice import IGNORE, IMAGE
from train.lengths import Length, Lengths
from train.samples import BadSample, Samples
from training import good_row, write_rows


def test_sizes_follow_from_tokens_and_images_alone():
    """As counted position by position, for any truncation."""
    random = np.random.default_rng(0)
    for _ in range(300):
        ids = np.where(random.random(random.integers(1, 30)) < 0.2, IMAGE, 7)
        labels = np.where((random.random(len(ids)) < 0.3) & (ids != IMAGE), ids, IGNORE)
        features = random.integers(1, 9, (ids == IMAGE).sum()).tolist()
        taken = np.ones(len(ids), int)
        taken[ids == IMAGE] = features
        begins = np.cumsum(taken) - taken
        length = Length.of(ids, labels)
        assert length.spliced(features) == taken.sum()
        trained = np.flatnonzero(labels[1:] != IGNORE) + 1
        for room in range(1, taken.sum() + 2):
            kept = length.ids_within(room, features)
            assert kept == (begins < room).sum()
            assert (0 < length.label < kept) == (begins[trained] < room).any()


def test_known_lengths_are_saved_and_read_back():
    lengths = Lengths(np.array([1, 0, 2], np.uint16), 2)
    for order in range(2):
        lengths.set(order, 0, Length(9, 5, np.array([order])))
        lengths.set_bad(order, 1, "no turns")
        lengths.set(order, 2, Length(8, 3, np.array([1, 4])))
    again = Lengths(np.array([1, 0, 2], np.uint16), 2)
    again.load(lengths.save("of"), "a", "of")
    assert again.get(1, 0).images.tolist() == [1] and again.get(0, 2).tokens == 8
    with pytest.raises(InputError, match="no turns"):
        again.get(0, 1)
    data = lengths.save("of")
    with pytest.raises(InputError, match="a: damaged, or of another dataset"):
        Lengths(np.array([1, 0, 1], np.uint16), 2).load(data, "a", "of")
    with pytest.raises(InputError, match="a: damaged, or of another dataset, tokenizer or template; remove it"):
        again.load(data, "a", "of another")
    for damaged in (data[:-4], b"", data.replace(b"no turns", b"no\\xturn"), data.replace(b"turns", b"terms")):
        with pytest.raises(InputError, match="a: "):
            again.load(damaged, "a", "of")


def test_any_damaged_byte_is_noticed():
    lengths = Lengths(np.array([1], np.uint16), 1)
    lengths.set(0, 0, Length(9, 5, np.array([1])))
    data = lengths.save("of")
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(InputError, match="a: "):
            Lengths(np.array([1], np.uint16), 1).load(bytes(damaged), "a", "of")


@pytest.mark.parametrize("first", ["as_is", "random"])
@pytest.mark.parametrize("name", ["v1.5-llama", "v1.6-mistral"])
def test_a_conversation_is_tokenized_once_for_its_size(tmp_path, folder, models, monkeypatch, name, first):
    rows = [good_row(i) for i in range(4)] + [{"id": "bad", "conversations": []}]
    samples = Samples(
        write_rows(tmp_path / "data.json", rows), str(folder), *models[name], max_length=100, image_first=first
    )
    found = [[samples.measure(i, epoch) for epoch in range(8)] for i in range(5)]
    calls = []
    monkeypatch.setattr(samples._encoder, "encode", lambda *given: calls.append(given))
    again = [[samples.measure(i, epoch) for epoch in range(8)] for i in range(5)]
    assert not calls
    for before, after in zip(found, again, strict=True):
        for one, other in zip(before, after, strict=True):
            if isinstance(one, BadSample):
                assert one == other
            else:
                assert other.encoded is None
                assert {**vars(one), "encoded": None} == vars(other)


def test_a_broken_image_is_named_whenever_it_is_measured(tmp_path, folder, models):
    """Also once the conversation has been tokenized."""
    data = write_rows(tmp_path / "data.json", [good_row(0) | {"image": "empty.png"}, good_row(1)])
    samples = Samples(data, str(folder), *models["v1.6-mistral"])
    first, again = samples.measure(0), samples.measure(0, epoch=1)
    assert again == first and first.file == "empty.png"


def test_a_row_is_parsed_once_for_all_its_images(tmp_path, folder, models, monkeypatch):
    """A row that has them as `data:` URLs is long."""
    row = {"image": ["0.png"] * 5, "conversations": turns("<image>" * 5 + "What?", "x")}
    samples = Samples(write_rows(tmp_path / "data.json", [row]), str(folder), *models["v1.6-mistral"], template="v1")
    read, parsed = samples.sources[0].conversation, []
    monkeypatch.setattr(samples.sources[0], "conversation", lambda row: parsed.append(row) or read(row))
    assert samples.load(samples.measure(0)).tile_count > 5
    assert parsed == [0]
    assert samples.load(samples.measure(0)).tile_count > 5
    assert parsed == [0, 0]
