"""The place in the data: resumed bit for bit, on other meshes and numbers of processes."""

import json

import numpy as np
import pytest

from llava_jax.aot.tpu_plan import model_of
from llava_jax.console import InputError
from llava_jax.data.splice import IGNORE
from train.bad_samples import BadSamples
from train.config import TrainConfig
from train.loader import Data, open_data
from train.synthetic_data import DrawnSamples
from training import SAME, assert_same_batches, good_row, take


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
@pytest.mark.parametrize("made", [1, 4, 9])
def test_resume_bit_for_bit(batching, made, write, config, models):
    model = models["v1.6-mistral"]
    settings = config(write([good_row(i) for i in range(40)]), batching=batching, image_first="random")
    whole = take(open_data(settings, *model), made + 7)  # over the end of an epoch
    data = open_data(settings, *model)
    assert_same_batches(take(data, made), whole[:made])
    state = json.loads(json.dumps(data.get_state()))
    again = open_data(settings.replace(workers=0, prefetch=1), *model)
    again.set_state(state)
    assert again.get_state() == state
    assert_same_batches(take(again, 7), whole[made:])


def test_a_place_in_the_data_that_is_none_is_refused(write, config, models):
    data = open_data(config(write([good_row(i) for i in range(8)])), *models["v1.5-llama"])
    state = data.get_state()
    for place in (
        {}, {"parent": {"next_index": 0}}, {"parent": {"next_index": 0}, "next_index_in_buffer": {}},
        {"parent": {"next_index": -1}, "next_index_in_buffer": 0}, {"parent": [0], "next_index_in_buffer": 0},
        {"parent": {"next_index": True}, "next_index_in_buffer": 0}, state["place"] | {"more": 1},
    ):  # fmt: skip
        with pytest.raises(InputError, match="place in the data .* remove the directory"):
            data.set_state(state | {"place": place})
    data.set_state(state)
    data.close()


def test_a_run_of_another_packing_is_resumed_with_a_warning(write, config, models, capsys):
    data = open_data(config(write([good_row(i) for i in range(8)])), *models["v1.5-llama"])
    state = data.get_state()
    data.set_state(state)
    assert "packs conversations" not in capsys.readouterr().err
    del state["packing"]  # as 0.1.0 saved it
    data.set_state(state)
    assert "warning: the run was begun by a version that packs conversations" in capsys.readouterr().err
    data.close()


def test_resume_with_another_number_of_processes_and_another_mesh(write, config, models):
    model = models["v1.5-llama"]
    settings = config(write([good_row(i) for i in range(70)]), template="v1")
    data = open_data(settings, *model, rows_multiple=4)
    whole = [next(data) for _ in range(6)]
    state = data.get_state()
    rest = take(data, 3)
    halves = []
    for process in (0, 1):
        half = open_data(settings, *model, rows_multiple=2, process=process, processes=2)
        half.set_state(state)
        assert (half.rows, half.steps_per_epoch) == (data.rows, data.steps_per_epoch)
        halves.append(take(half, 3))
    for (batch, info), (first, one), (second, two) in zip(rest, *halves, strict=True):
        assert info["ids"] == one["ids"] == two["ids"]
        for name in SAME:
            joined = np.concatenate([getattr(first, name), getattr(second, name)])
            np.testing.assert_array_equal(getattr(batch, name), joined)
    seen = {i for _, info in whole for i in info["ids"]}
    odd = open_data(settings, *model, rows_multiple=3)  # does not divide the rows, so each batch gets empty ones
    odd.set_state(state)
    assert (odd.rows, odd.steps_per_epoch) == (-(-data.rows // 3) * 3, data.steps_per_epoch)
    assert odd.rows != data.rows
    assert odd.get_state() == state
    for (batch, info), (padded, same) in zip(rest, take(odd, 3), strict=True):
        assert info["ids"] == same["ids"]
        for name in SAME:
            np.testing.assert_array_equal(getattr(batch, name), getattr(padded, name)[: data.rows])
        assert (padded.segments[data.rows :] == 0).all() and (padded.labels[data.rows :] == IGNORE).all()
    assert len(seen) > 30


@pytest.mark.parametrize(
    ("asked", "multiple", "other", "conversations", "rows"),
    [
        (96, 32, 24, 96, (64, 72)), (192, 96, 64, 229, (96, 128)), (48, 16, 24, 48, (32, 48)),
        (240, 80, 48, 240, (160, 192)), (96, 96, 32, 96, (96, 96)), (96, 8, 512, 95, (40, 512)),
    ],
)  # fmt: skip
def test_a_resumed_batch_holds_as_many_conversations_on_every_mesh(asked, multiple, other, conversations, rows):
    model = model_of("llava-v1.5-7b")

    def open_drawn(multiple):
        settings = TrainConfig(global_batch_size=asked, workers=0, positions_per_row=2048)
        samples = DrawnSamples(settings, model, 500)
        return Data(settings, samples, BadSamples(settings, samples, None), multiple, 0, 1, True)

    first, second = open_drawn(multiple), open_drawn(other)
    held, steps = first.estimate()["conversations"], first.steps_per_epoch
    second.set_state(first.get_state())
    assert (first.rows, second.rows) == rows
    assert round(held) == conversations
    assert (second.estimate()["conversations"], second.steps_per_epoch) == (held, steps)
    assert f"about {conversations} conversations (" in second.describe()
    first.close(), second.close()


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_processes_share_the_rows_of_each_batch(batching, write, config, models):
    model = models["v1.6-mistral"]
    settings = config(write([good_row(i) for i in range(50)]), batching=batching)
    for train in (True, False):
        n = 9 if train else None
        whole = take(open_data(settings, *model, rows_multiple=2, train=train), n)
        parts = [take(open_data(settings, *model, process=p, processes=2, train=train), n) for p in (0, 1)]
        assert len(whole) == len(parts[0]) == len(parts[1])
        for (batch, info), (first, one), (second, two) in zip(whole, *parts, strict=True):
            assert info["ids"] == one["ids"] == two["ids"]
            for name in SAME:
                assert getattr(first, name).shape == getattr(second, name).shape
                joined = np.concatenate([getattr(first, name), getattr(second, name)])
                np.testing.assert_array_equal(getattr(batch, name), joined)


def test_changed_data_is_refused(write, config, models):
    data = open_data(config(write([good_row(i) for i in range(40)])), *models["v1.6-mistral"])
    next(data)
    state = data.get_state()
    data.close()
    other = open_data(config(write([good_row(i) for i in range(41)])), *models["v1.6-mistral"])
    with pytest.raises(InputError, match="has 41 conversations; the run to resume had 40"):
        other.set_state(state)
    other.close()
