"""How conversations are put into rows, and how long these are."""

from types import SimpleNamespace

import numpy as np
import pytest

from llava_jax.config import preset
from train import row_packing
from train.config import TrainConfig
from train.packed_batches import Filling, RowLimits
from train.row_packing import choose_tiles, fill_lengths, fill_rows, row_cost
from train.synthetic_data import draw_lengths, drawn_data


def test_rows_are_filled_as_full_as_can_be():
    sizes = [(6, 1), (5, 1), (4, 1), (3, 0), (2, 0), (2, 0), (8, 1)]
    assert fill_rows(sizes, 10, 2) == [[6, 4], [0, 2], [1, 3, 5]]
    assert fill_rows(sizes, 10, 1) == [[6, 4], [0, 3], [1, 5], [2]]
    assert fill_rows([], 10, 1) == []
    assert fill_rows([(10, 0)] * 2, 10, 0) == [[0], [1]]
    assert [len(row) for row in fill_rows([(2, 0)] * 10, 7, 1)] == [3, 3, 3, 1]


def test_every_conversation_has_one_row_with_room_for_it():
    random = np.random.default_rng(1)
    for length, tiles in [(300, 3), (1000, 12), (64, 64)]:
        n = random.integers(1, length + 1, 700)
        sizes = list(zip(n.tolist(), random.integers(0, tiles + 1, 700).tolist(), strict=True))
        rows = fill_rows(sizes, length, tiles)
        assert sorted(i for row in rows for i in row) == list(range(700))
        for row in rows:
            assert sum(sizes[i][0] for i in row) <= length
            assert sum(sizes[i][1] for i in row) <= tiles


def test_rows_with_some_slack_where_full_ones_leave_over_what_fits_badly():
    """Exactly filled, [18, 9, 5], [15, 13] and [13, 12] leave a 10 alone."""
    sizes = [(n, 0) for n in (9, 13, 12, 5, 13, 10, 18, 15)]
    assert fill_rows(sizes, 32, 0) == [[6, 1], [7, 2, 3], [4, 5, 0]]


def test_many_positions_and_few_tiles():
    """Positions are rounded up where tiles limit what fits: a row holds no more than it may, and loses little."""
    random = np.random.default_rng(2)
    sizes = list(zip(random.integers(500, 4000, 400).tolist(), random.choice([0, 3, 5], 400).tolist(), strict=True))
    rows = fill_rows(sizes, 10_000, 15)
    totals = [(sum(sizes[i][0] for i in row), sum(sizes[i][1] for i in row)) for row in rows]
    assert sorted(i for row in rows for i in row) == list(range(400))
    assert max(n for n, _ in totals) <= 10_000 and max(t for _, t in totals) <= 15
    assert any(t == 15 for _, t in totals)
    assert len(rows) <= 98  # of at least 92


@pytest.mark.parametrize(
    ("features", "image_tiles", "max_length", "chosen", "padding"),
    [(576, 1, 2048, 2048, 0.05), (2340, 5, 4096, 7680, 0.03), (1476, 3, 4096, 4992, 0.03)],
)
def test_padding_of_lengths_like_mix665k_is_below_five_percent(features, image_tiles, max_length, chosen, padding):
    lengths, has_image = draw_lengths(1024, 0, features, max_length)
    sizes = list(zip(lengths.tolist(), (has_image * image_tiles).tolist(), strict=True))
    found = fill_lengths(sizes, max_length, 2 * max_length, 4096, 10_000)
    length = min(found, key=lambda length: row_cost(length, 4096) / found[length])
    rows = fill_rows(sizes, length, choose_tiles(sizes, length, image_tiles))
    assert length == chosen
    assert 0 < 1 - lengths.sum() / (length * len(rows)) < padding


@pytest.mark.parametrize(
    ("positions", "least", "chosen"),
    [
        (600, 1000, 1000), (600, 1024, 1280), (900, 2048, 2816), (1000, 2048, 2048), (2050, 4096, 4224),
        (2500, 4096, 5120), (2700, 5000, 5632), (4500, 8192, 9216), (20000, 32768, 40960),
    ],
)  # fmt: skip
def test_length_of_a_row_is_chosen_from_few(positions, least, chosen, monkeypatch):
    """To try one fills all rows with it."""
    tried = []
    monkeypatch.setattr(row_packing, "fill_rows", lambda *args: tried.append(args[1]) or fill_rows(*args))
    found = fill_lengths([(positions, 1)] * 12, least, 2 * least, 4096, 12)
    assert min(found, key=lambda length: row_cost(length, 4096) / found[length]) == chosen
    assert len(tried) <= 34
    tried.clear()
    assert fill_lengths([(least // 2, 1)] * 12, least, 2 * least, 4096, 12) == {least: 2}  # rows are full already
    assert tried == [least]
    assert fill_lengths([(positions, 1)] * 12, least, least, 4096, 12).keys() == {least}


def survey_of(sizes, wanted, *, max_tiles=5):
    config = TrainConfig(max_length=4096, global_batch_size=wanted)
    measured = [SimpleNamespace(length=n, tiles=t) for n, t in sizes]
    samples = SimpleNamespace(model=preset("v1.6-vicuna-7b"))
    return SimpleNamespace(
        config=config, samples=samples, measured=measured, wanted=wanted, usable=len(sizes), min_tiles=5,
        max_tiles=max_tiles,
    )  # fmt: skip


def test_rows_that_are_not_full_are_no_longer_than_they_need():
    """Rows of 4,096 hold one of these conversations, rows of 5,120 two."""
    limits = RowLimits(survey_of([(2500, 5)] * 12, wanted=12))
    found = {rows: (limits.filling(rows), limits.length(limits.filling(rows))) for rows in (6, 8, 12, 24)}
    assert found == {
        6: (Filling(6), 5120), 8: (Filling(8, per_row=1.5), 5120), 12: (Filling(12), 4096),
        24: (Filling(24, per_row=1.0), 4096),
    }  # fmt: skip
    assert [limits.length(Filling(rows, whole=True)) for rows in (6, 8, 12, 13)] == [5120, 5120, 5120, 4096]
    assert [limits.tiles(length) for length in (4096, 5120)] == [5, 10]


def test_rows_have_one_length_if_their_tiles_may_decide_which_conversations_are_bad():
    limits = RowLimits(survey_of([(2500, 5)] * 12, wanted=12, max_tiles=20))
    assert [limits.length(limits.filling(rows)) for rows in (6, 8, 12, 24)] == [5120] * 4


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (128, {1: (41, 7680), 8: (40, 7680), 64: (64, 5376), 128: (128, 4096), 256: (256, 4096)}),
        (24, {1: (8, 7680), 8: (8, 7680), 16: (16, 5120), 32: (32, 4096)}),
    ],
)
def test_rows_are_as_long_as_suits_their_number(wanted, expected):
    """Three images fill a row of 7,680, two one of 5,376; where a batch has a row for each, rows have `max_length`.

    `expected`: rows of a batch of `wanted` conversations and their length, by what they must be a multiple of.
    """
    config = TrainConfig(aspect_ratio="anyres", max_length=4096, global_batch_size=wanted, workers=0)
    data = drawn_data(config, preset("v1.6-vicuna-7b"), 1)
    states = {}
    for multiple, rows in expected.items():
        data.resize(multiple)
        assert (data.rows, data.length) == rows, multiple
        held = data.estimate()["conversations"]
        assert 0.8 * wanted <= held <= max(1.2 * wanted, multiple)
        states[multiple] = data.get_state(), held
    data.resize(96)
    for multiple, (state, held) in states.items():
        data.set_state(state)  # on another mesh the same rows, and empty ones
        assert (data.rows % 96, data.rows_in_use, data.length) == (0, *expected[multiple])
        assert data.estimate()["conversations"] == pytest.approx(held)
    data.close()


@pytest.mark.parametrize(
    ("rows", "least", "sizes"),
    [([12], 3, [4, 4, 4]), ([5, 1, 2], 4, [3, 2, 1, 2]), ([5, 1, 2], 6, [2, 2, 1, 1, 1, 1]), ([2, 2], 9, [1, 1, 1, 1]),
     ([3, 2], 1, [3, 2])],
)  # fmt: skip
def test_rows_are_spread_evenly(rows, least, sizes):
    numbers = iter(range(sum(rows)))
    found = row_packing.split_rows([[next(numbers) for _ in range(n)] for n in rows], least)
    assert list(map(len, found)) == sizes
    assert sorted(i for row in found for i in row) == list(range(sum(rows)))
