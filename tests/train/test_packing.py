"""How conversations are put into rows."""

import numpy as np
import pytest

from train import row_packing
from train.row_packing import choose_length, fill_rows


def test_rows_are_filled_as_full_as_can_be():
    sizes = [(6, 1), (5, 1), (4, 1), (3, 0), (2, 0), (2, 0), (8, 1)]
    assert fill_rows(sizes, 10, 2) == [[6, 4], [0, 2], [1, 5, 3]]
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


def test_padding_of_lengths_like_mix665k_is_below_five_percent():
    random = np.random.default_rng(0)
    kind = random.choice(3, 1024, p=[0.40, 0.54, 0.06])
    short = 621 + random.integers(8, 60, 1024)
    long = 621 + np.maximum(random.lognormal(5.5, 0.6, 1024), 30)
    text = 45 + np.maximum(random.lognormal(6.8, 0.8, 1024), 20)
    n = np.minimum(np.choose(kind, [short, long, text]), 2048).astype(int)
    rows = fill_rows(list(zip(n.tolist(), (kind < 2).tolist(), strict=True)), 2048, 3)
    assert 1 - n.sum() / (2048 * len(rows)) < 0.05


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
    assert choose_length([(positions, 1)] * 12, least, 4096) == chosen
    assert len(tried) <= 18
    tried.clear()
    assert choose_length([(least // 2, 1)] * 12, least, 4096) == least  # rows are full already
    assert tried in ([], [least])


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
