"""Splicing on its own; `test_model.py` holds its results against the reference."""

import numpy as np
import pytest

from llava_jax import config as c
from llava_jax.console import InputError
from llava_jax.data.images import TileLayout, tile_layout
from llava_jax.data.splice import (
    IGNORE,
    IMAGE,
    NEWLINE,
    TEXT,
    Row,
    count_features,
    merge_rows,
    pack,
    positions_per_id,
    splice,
    spliced_length,
)

SPATIAL = c.tiny(merge="spatial")
UNPAD = c.tiny()
FLAT = c.tiny(merge="flat", aspect_ratio="pad")


def row(*ids, layouts=(), **kw):
    return Row(np.array(ids, np.int32), tuple(layouts), **kw)


def test_flat_takes_all_rows_in_order():
    assert merge_rows(TileLayout((50, 50)), FLAT).tolist() == list(range(16))


def test_spatial_puts_tiles_side_by_side():
    rows = merge_rows(TileLayout((56, 28), (2, 1)), SPATIAL)
    assert rows[:16].tolist() == list(range(16))  # the whole image first
    assert rows[16:24].tolist() == [16, 17, 18, 19, 32, 33, 34, 35]  # then lines across both tiles


def test_unpad_drops_what_padding_fed_and_ends_lines():
    rows = merge_rows(TileLayout((56, 14), (2, 1)), UNPAD)  # half as high as its grid
    lines = rows[16:].reshape(2, 9)
    assert (lines[:, -1] == NEWLINE).all()
    assert lines[0, :8].tolist() == [20, 21, 22, 23, 36, 37, 38, 39]  # the second line of each tile


def test_odd_remainder_keeps_one_more():
    config = UNPAD.replace(grid_pinpoints=((28, 28),))
    lines = lambda h: (merge_rows(TileLayout((100, h), (1, 1)), config) == NEWLINE).sum()  # noqa: E731
    assert [lines(h) for h in (100, 75, 74, 50, 26, 24)] == [4, 4, 2, 2, 2, 0]


def test_rounding_of_either_rule():
    """376 x 799 at 336: transformers rounds 51.9999... up first (50 rows of features against 52)."""
    config = c.preset("v1.6-vicuna-7b")
    counts = [
        count_features(tile_layout((376, 799), config.replace(image_rules=rules)), config.replace(image_rules=rules))
        for rules in ("original", "transformers")
    ]
    assert counts[0] != counts[1]


def test_small_images_tie_and_each_rule_reads_the_list_its_own_way():
    config = c.preset("v1.6-vicuna-7b")
    assert tile_layout((300, 300), config).grid == (1, 2)
    assert tile_layout((300, 300), config.replace(image_rules="transformers")).grid == (2, 1)
    assert (
        tile_layout((1024, 899), config).grid
        == tile_layout((1024, 899), config.replace(image_rules="transformers")).grid
    )


def test_positions_and_rows_of_a_mixed_batch():
    one = TileLayout((20, 20))
    rows = [row(5, IMAGE, 6, layouts=[one]), row(7, 8), row(IMAGE, IMAGE, 9, layouts=[one, one])]
    batch = splice(rows, FLAT)
    assert batch.ids.shape == (3, 33)
    assert batch.tiles.shape == (3, 2, 28, 28, 3)
    assert batch.lengths.tolist() == [18, 2, 33]
    assert batch.feature_rows[0, :18].tolist() == [TEXT, *range(16), TEXT]
    assert (batch.feature_rows[1] == TEXT).all()
    assert batch.feature_rows[2].tolist() == [*range(32), TEXT]  # the second image's rows follow the first's
    assert batch.ids[0, [0, 17]].tolist() == [5, 6]
    assert batch.positions[1].tolist() == [0, 1, *[0] * 31]


def test_newline_row_is_behind_all_tiles_of_the_batch():
    place = tile_layout((56, 28), UNPAD)
    batch = splice([row(IMAGE, layouts=[place])], UNPAD, tiles=5)
    newlines = merge_rows(place, UNPAD) == NEWLINE
    assert (batch.feature_rows[0][newlines] == 5 * 16).all()
    assert batch.feature_rows[0][~newlines].max() < place.tiles * 16


def test_left_padding():
    batch = splice([row(5, 6), row(7)], FLAT, padding_side="left", length=4)
    assert batch.ids.tolist() == [[0, 0, 5, 6], [0, 0, 0, 7]]
    assert batch.positions.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert batch.segments.tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]


def test_truncation_is_on_the_right_even_through_an_image():
    place = TileLayout((20, 20))
    labels = np.array([IGNORE, IGNORE, 6], np.int32)
    long = row(5, IMAGE, 6, layouts=[place], labels=labels)
    assert splice([long], FLAT).labels[0, -1] == 6
    cut = splice([long], FLAT, max_length=10)
    assert cut.feature_rows[0].tolist() == [TEXT, *range(9)]
    assert (cut.labels == IGNORE).all()


def test_buckets_and_padding_rows():
    batch = splice([row(5)], FLAT, length=8, tiles=3, batch=4)
    assert batch.ids.shape == (4, 8)
    assert batch.tiles.shape[:2] == (4, 3)
    assert batch.lengths.tolist() == [1, 0, 0, 0]
    with pytest.raises(InputError, match="do not fit"):
        splice([row(5, 6, 7)], FLAT, length=2)


def test_packed_conversations_are_segments_with_their_own_positions_and_tiles():
    one = TileLayout((20, 20))
    tile = lambda value: np.full((1, 28, 28, 3), value, np.uint8)  # noqa: E731
    first = row(5, IMAGE, layouts=[one], tiles=(tile(1),), labels=np.array([IGNORE, IGNORE]))
    second = row(7, 8, labels=np.array([IGNORE, 8]))
    third = row(IMAGE, 9, IMAGE, layouts=[one, one], tiles=(tile(2), tile(3)), labels=np.array([IGNORE, 9, IGNORE]))
    batch = pack([[first, second, third], [second]], FLAT, length=60, tiles=4, batch=3)
    assert batch.segments[0].tolist() == [1] * 17 + [2] * 2 + [3] * 33 + [0] * 8
    assert batch.positions[0].tolist() == [*range(17), *range(2), *range(33), *[0] * 8]
    assert batch.feature_rows[0, :17].tolist() == [TEXT, *range(16)]
    assert batch.feature_rows[0, 19:52].tolist() == [*range(16, 32), TEXT, *range(32, 48)]
    assert batch.ids[0, [0, 17, 18, 35]].tolist() == [5, 7, 8, 9]
    assert np.flatnonzero(batch.labels[0] != IGNORE).tolist() == [18, 35]
    assert batch.tiles[0, :, 0, 0, 0].tolist() == [1, 2, 3, 0]
    assert batch.lengths.tolist() == [52, 2, 0]


def test_packed_conversations_share_the_newline_at_the_end_of_the_table():
    place = tile_layout((56, 28), UNPAD)
    one = row(IMAGE, layouts=[place])
    batch = pack([[one, one]], UNPAD, tiles=7)
    alone = merge_rows(place, UNPAD)
    rows = batch.feature_rows[0].reshape(2, -1)
    assert (rows[:, alone == NEWLINE] == 7 * 16).all()
    assert (rows[0, alone != NEWLINE] == alone[alone != NEWLINE]).all()
    assert (rows[1, alone != NEWLINE] == alone[alone != NEWLINE] + place.tiles * 16).all()


def test_widths():
    place = TileLayout((20, 20))
    assert positions_per_id(row(5, IMAGE, 6, layouts=[place]), FLAT).tolist() == [1, 16, 1]
    with pytest.raises(InputError, match="^1 <image> tokens for 0 images"):
        positions_per_id(row(5, IMAGE), FLAT)


@pytest.mark.parametrize("marks", [0, 2])
def test_marks_and_images_must_agree(marks):
    bad = row(5, *[IMAGE] * marks, layouts=[TileLayout((20, 20))])
    with pytest.raises(InputError, match=f"row 1: {marks} <image> tokens for 1 images"):
        splice([row(5), bad], FLAT)
    named = row(5, *[IMAGE] * marks, layouts=[TileLayout((20, 20))], name="data.json entry 7")
    with pytest.raises(InputError, match=r"data\.json entry 7"):
        splice([named], FLAT)


def test_length_is_known_beforehand():
    random = np.random.default_rng(0)
    for config in (FLAT, SPATIAL, UNPAD):
        for _ in range(50):
            places = [tile_layout(tuple(random.integers(2, 200, 2)), config) for _ in range(random.integers(0, 4))]
            ids = [IMAGE] * len(places) + [5] * random.integers(1, 9)
            one = row(*random.permutation(ids), layouts=places)
            assert splice([one], config).ids.shape[1] == spliced_length(one, config)


def test_every_feature_row_exists():
    """No position asks for a row beyond its table, at any size: the device's gather need not check."""
    random = np.random.default_rng(1)
    for config in (SPATIAL, UNPAD, c.preset("v1.6-vicuna-7b")):
        for _ in range(200):
            place = tile_layout(tuple(int(x) for x in random.integers(10, 2000, 2)), config)
            rows = merge_rows(place, config)
            assert rows.min() >= NEWLINE
            assert rows.max() < place.tiles * config.vision.features_per_tile
            assert len(set(rows[rows >= 0])) == (rows >= 0).sum()
