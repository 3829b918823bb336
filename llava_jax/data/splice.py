"""Where an image's features go in the prompt: the one place at which lengths become static (host only, NumPy).

LLaVA's merge (llava/model/llava_arch.py `prepare_inputs_labels_for_multimodal`) splits, reshapes, crops,
concatenates, truncates and pads: it only ever moves rows. So here it is run on row *numbers*. `merge_rows`
takes `np.arange` through the same reshapes, `splice` does the rest, and what is left for the device is one
gather with static shapes (`llava.splice_embeddings`).

Every row of a batch has its own table of features [T * P, D], tile after tile, and behind them, where the model
has one, the newline embedding. `feature_rows` holds, for each position, a row of that table, or -1 for text.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError
from llava_jax.data.images import TileLayout

IMAGE = -200  # stands for an image among token ids (llava/constants.py IMAGE_TOKEN_INDEX)
IGNORE = -100  # a label that is not trained
TEXT = -1  # a position whose embedding is a token's
NEWLINE = -2  # in merge_rows: the newline row, whose number depends on the table


@dataclasses.dataclass(frozen=True)
class Row:
    """One conversation, ready to be spliced.

    `ids` [n] with `IMAGE` for each image in turn; `layouts` and `tiles` (uint8 [T, H, W, 3]) one for each of
    them; `labels` [n] or None. `tiles` may be left out where only positions matter.
    """

    ids: np.ndarray
    layouts: tuple[TileLayout, ...] = ()
    tiles: tuple[np.ndarray, ...] = ()
    labels: np.ndarray | None = None
    name: str = ""  # for errors: where the conversation came from

    @property
    def tile_count(self) -> int:
        return sum(place.tiles for place in self.layouts)


@dataclasses.dataclass(frozen=True)
class Batch:
    """What the device gets, for training and inference alike. All arrays are int32 but `tiles`.

    tiles         uint8 [B, T, H, W, 3]; unused ones are zero
    ids           [B, S] token ids, 0 where there is none
    feature_rows  [B, S] row of the feature table, `TEXT` where the token counts
    positions     [B, S] position for RoPE, 0 on padding
    segments      [B, S] 1, 2, ... for the conversations of a row, 0 on padding
    labels        [B, S] token to be predicted *at* this position (not yet shifted), `IGNORE` elsewhere
    """

    tiles: np.ndarray
    ids: np.ndarray
    feature_rows: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    labels: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """[B] positions in use."""
        return (self.segments > 0).sum(axis=1).astype(np.int32)


def merge_rows(place: TileLayout, config: LlavaConfig) -> np.ndarray:
    """Rows of an image's own features [T * P], in the order in which they enter the sequence.

    Returns:
      int32 [n]; `NEWLINE` for the newline embedding.

    Source: llava_arch.py, the branches of `mm_patch_merge_type`, and `unpad_image`.
    """
    patches = config.vision.features_per_tile
    rows = np.arange(place.tiles * patches, dtype=np.int32)
    if config.merge == "flat" or place.grid is None:
        return rows
    side = config.vision.patches_per_side
    columns, lines = place.grid
    base, rest = rows[:patches], rows[patches:]
    rest = rest.reshape(lines, columns, side, side).swapaxes(1, 2)
    if config.merge == "spatial_unpad":
        rest = _unpad(rest.reshape(lines * side, columns * side), place.size, config.image_rules)
        rest = np.pad(rest, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([base, rest.ravel()])


def _unpad(grid: np.ndarray, size: tuple[int, int], rules: str) -> np.ndarray:
    """Cut off what only padding fed. One row or column too many stays where the remainder is odd."""
    height, width = grid.shape
    whole = (lambda x: int(round(x, 7))) if rules == "transformers" else int
    if size[0] / size[1] > width / height:
        kept = whole(size[1] * (width / size[0]))
        cut = (height - kept) // 2
        return grid[cut : height - cut]
    kept = whole(size[0] * (height / size[1]))
    cut = (width - kept) // 2
    return grid[:, cut : width - cut]


def count_features(place: TileLayout, config: LlavaConfig) -> int:
    """Positions that an image takes in the sequence."""
    return len(merge_rows(place, config))


def widths(row: Row, config: LlavaConfig) -> np.ndarray:
    """Positions that each id takes once the images are in: int [n], 1 for a token, an image's features for its mark.

    Raises:
      InputError: there are more or fewer marks than images.
    """
    taken = np.ones(len(row.ids), np.int64)
    taken[_marks(row)] = [count_features(place, config) for place in row.layouts]
    return taken


def spliced_length(row: Row, config: LlavaConfig) -> int:
    """Positions of a conversation once its images are in."""
    return int(widths(row, config).sum())


def splice(
    rows: Sequence[Row],
    config: LlavaConfig,
    *,
    length: int | None = None,
    tiles: int | None = None,
    batch: int | None = None,
    max_length: int | None = None,
    padding_side: str = "right",
) -> Batch:
    """Splice conversations, one to a row, into a batch of static shape.

    Args:
      rows: the conversations.
      length: S; None for the longest row's.
      tiles: T; None for the most that a row has.
      batch: B; rows beyond `rows` are padding. None for as many as there are.
      max_length: positions after which a conversation is cut, on the right, as the reference does. None to cut
        nothing.
      padding_side: "right" or "left".

    Raises:
      InputError: a row has more or fewer image marks than images; a row does not fit `length` or `tiles`.
    """
    return pack(
        [[row] for row in rows], config,
        length=length, tiles=tiles, batch=batch, max_length=max_length, padding_side=padding_side,
    )  # fmt: skip


def pack(
    rows: Sequence[Sequence[Row]],
    config: LlavaConfig,
    *,
    length: int | None = None,
    tiles: int | None = None,
    batch: int | None = None,
    max_length: int | None = None,
    padding_side: str = "right",
) -> Batch:
    """Splice conversations, several to a row: they follow each other as segments 1, 2, ..., each with positions from 0.

    Each finds its own tiles in the row's feature table, behind those of the conversations before it; all share the
    newline at the table's end. Arguments and errors are `splice`'s.
    """
    parts = [[_splice_row(row, b, config, max_length) for row in members] for b, members in enumerate(rows)]
    longest = max((sum(len(ids) for ids, _, _ in members) for members in parts), default=0)
    most = max((sum(row.tile_count for row in members) for members in rows), default=0)
    S = longest if length is None else length
    T = most if tiles is None else tiles
    B = len(rows) if batch is None else batch
    if longest > S or most > T or len(rows) > B:
        raise InputError(
            f"{len(rows)} rows of up to {longest} positions and {most} tiles do not fit a batch of "
            f"{B} rows, {S} positions and {T} tiles"
        )
    side, patches = config.vision.image_size, config.vision.features_per_tile
    out = Batch(
        tiles=np.zeros((B, T, side, side, 3), np.uint8),
        ids=np.zeros((B, S), np.int32),
        feature_rows=np.full((B, S), TEXT, np.int32),
        positions=np.zeros((B, S), np.int32),
        segments=np.zeros((B, S), np.int32),
        labels=np.full((B, S), IGNORE, np.int32),
    )
    for b, members in enumerate(rows):
        used = sum(len(ids) for ids, _, _ in parts[b])
        start, tile = S - used if padding_side == "left" else 0, 0
        for segment, (row, (ids, features, labels)) in enumerate(zip(members, parts[b], strict=True), 1):
            n = len(ids)
            at = slice(start, start + n)
            out.ids[b, at] = ids
            out.feature_rows[b, at] = np.where(features >= 0, features + tile * patches, features)
            out.positions[b, at] = np.arange(n)
            out.segments[b, at] = segment
            out.labels[b, at] = labels
            if row.tiles:
                np.concatenate(row.tiles, out=out.tiles[b, tile : tile + row.tile_count])
            start, tile = start + n, tile + row.tile_count
    out.feature_rows[out.feature_rows == NEWLINE] = T * patches
    return out


def _marks(row: Row, number: int | None = None) -> np.ndarray:
    """Where in `row.ids` its images stand."""
    marks = np.flatnonzero(row.ids == IMAGE)
    if len(marks) != len(row.layouts):
        where = row.name or ("" if number is None else f"row {number}")
        raise InputError(
            f"{where}{': ' if where else ''}{len(marks)} <image> marks for {len(row.layouts)} images; "
            "there must be one mark for each"
        )
    return marks


def _splice_row(row: Row, number: int, config: LlavaConfig, max_length: int | None):
    """ids, rows of the row's own feature table (or `TEXT`, `NEWLINE`) and labels of one conversation, each [n]."""
    marks = _marks(row, number)
    labels = np.full(len(row.ids), IGNORE, np.int32) if row.labels is None else row.labels
    ids_parts, feature_parts, label_parts = [], [], []
    start = first_row = 0
    for mark, place in zip([*marks, len(row.ids)], [*row.layouts, None], strict=True):
        text = slice(start, mark)
        ids_parts.append(row.ids[text])
        feature_parts.append(np.full(mark - start, TEXT, np.int32))
        label_parts.append(labels[text])
        if place is not None:
            features = merge_rows(place, config)
            ids_parts.append(np.zeros(len(features), np.int32))
            feature_parts.append(np.where(features == NEWLINE, NEWLINE, features + first_row))
            label_parts.append(np.full(len(features), IGNORE, np.int32))
            first_row += place.tiles * config.vision.features_per_tile
        start = mark + 1
    return tuple(np.concatenate(parts)[:max_length] for parts in (ids_parts, feature_parts, label_parts))
