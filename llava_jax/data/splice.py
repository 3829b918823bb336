"""Splice image features into prompts: the one place where lengths become static (host only, NumPy).

LLaVA's merge (llava/model/llava_arch.py `prepare_inputs_labels_for_multimodal`) splits, reshapes, crops,
concatenates, truncates and pads: it only reorders feature rows. So this module runs it on row *indices*. `merge_rows`
applies the same reshapes to `np.arange`, `splice` does the rest, and the device only needs one gather with static
shapes (`llava.splice_embeddings`).

Each row of a batch has its own table of features [T * P, D], tile after tile, followed by the newline embedding if the
model has one. For each position, `feature_rows` holds a row of that table, or -1 for text.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError
from llava_jax.data.images import TileLayout

IMAGE = -200  # the id of an image token (llava/constants.py IMAGE_TOKEN_INDEX)
IGNORE = -100  # the label of a position that is not trained
TEXT = -1  # the feature row of a text token
NEWLINE = -2  # in merge_rows: the newline row, whose index depends on the table's size

Array: TypeAlias = Any  # NumPy's on the host, JAX's on the device


@dataclasses.dataclass(frozen=True)
class Row:
    """One conversation, ready to be spliced.

    `ids` [n] has `IMAGE` for each image in order; `layouts` and `tiles` (uint8 [T, H, W, 3]) have one entry per image;
    `labels` are [n] or None. `tiles` may be empty if only positions matter.
    """

    ids: np.ndarray
    layouts: tuple[TileLayout, ...] = ()
    tiles: tuple[np.ndarray, ...] = ()
    labels: np.ndarray | None = None
    name: str = ""  # of the conversation, in errors

    @property
    def tile_count(self) -> int:
        return sum(layout.tiles for layout in self.layouts)


@dataclasses.dataclass(frozen=True)
class Batch:
    """The device's input, for training and inference alike. All arrays except `tiles` are int32.

    tiles         uint8 [B, T, H, W, 3]; padding is zero
    ids           [B, S] token ids, 0 at image tokens and padding
    feature_rows  [B, S] row of the feature table, `TEXT` at text tokens and padding
    positions     [B, S] position for RoPE, 0 on padding
    segments      [B, S] 1, 2, ... for the conversations of a row, 0 on padding
    labels        [B, S] token to be predicted *at* this position (not yet shifted), `IGNORE` elsewhere
    """

    tiles: Array
    ids: Array
    feature_rows: Array
    positions: Array
    segments: Array
    labels: Array

    @property
    def lengths(self) -> np.ndarray:
        """[B] positions that are not padding."""
        return (self.segments > 0).sum(axis=1).astype(np.int32)


def merge_rows(layout: TileLayout, config: LlavaConfig) -> np.ndarray:
    """Order the feature rows of an image [T * P] as they enter the sequence.

    Returns:
      int32 [n] row indices; `NEWLINE` for the newline embedding.

    Source: llava_arch.py, the branches of `mm_patch_merge_type`, and `unpad_image`.
    """
    patches = config.vision.features_per_tile
    rows = np.arange(layout.tiles * patches, dtype=np.int32)
    if config.merge == "flat" or layout.grid is None:
        return rows
    side = config.vision.patches_per_side
    columns, lines = layout.grid
    base, rest = rows[:patches], rows[patches:]
    rest = rest.reshape(lines, columns, side, side).swapaxes(1, 2)
    if config.merge == "spatial_unpad":
        rest = _unpad(rest.reshape(lines * side, columns * side), layout.size, config.image_rules)
        rest = np.pad(rest, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([base, rest.ravel()])


def _unpad(grid: np.ndarray, size: tuple[int, int], rules: str) -> np.ndarray:
    """Crop the features of padding. If the remainder is odd, one extra row or column stays, as in the reference."""
    height, width = grid.shape
    to_int = (lambda x: int(round(x, 7))) if rules == "transformers" else int
    if size[0] / size[1] > width / height:
        kept = to_int(size[1] * (width / size[0]))
        margin = (height - kept) // 2
        return grid[margin : height - margin]
    kept = to_int(size[0] * (height / size[1]))
    margin = (width - kept) // 2
    return grid[:, margin : width - margin]


def count_features(layout: TileLayout, config: LlavaConfig) -> int:
    """The number of positions that an image takes in the sequence."""
    return len(merge_rows(layout, config))


def positions_per_id(row: Row, config: LlavaConfig) -> np.ndarray:
    """The positions of each id after splicing: int [n], 1 for text, the number of its features for an image.

    Raises:
      InputError: the numbers of image tokens and images differ.
    """
    positions = np.ones(len(row.ids), np.int64)
    positions[image_indices(row.ids, len(row.layouts), row.name)] = [
        count_features(layout, config) for layout in row.layouts
    ]
    return positions


def spliced_length(row: Row, config: LlavaConfig) -> int:
    """The positions of a conversation after splicing."""
    return int(positions_per_id(row, config).sum())


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
    """Splice conversations, one per row, into a batch of static shape.

    Args:
      rows: the conversations.
      length: S; None for that of the longest row.
      tiles: T; None for the largest number in a row.
      batch: B; rows beyond `rows` are padding. None for `len(rows)`.
      max_length: truncate conversations on the right to this many positions, as the reference does; None for no limit.
      padding_side: "right" or "left".

    Raises:
      InputError: the numbers of image tokens and images of a row differ, or a row exceeds `length` or `tiles`.
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
    """Splice conversations, several per row: they become segments 1, 2, ..., each with positions from 0.

    In the row's feature table, the tiles of each conversation follow those of the conversations before it; all share
    the newline at the end. Arguments and errors are those of `splice`.
    """
    parts = [[_splice_row(row, b, config, max_length) for row in members] for b, members in enumerate(rows)]
    longest = max((sum(len(ids) for ids, _, _ in members) for members in parts), default=0)
    most_tiles = max((sum(row.tile_count for row in members) for members in rows), default=0)
    S = longest if length is None else length
    T = most_tiles if tiles is None else tiles
    B = len(rows) if batch is None else batch
    if longest > S or most_tiles > T or len(rows) > B:
        raise InputError(
            f"{len(rows)} rows of up to {longest} positions and {most_tiles} tiles do not fit a batch of "
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


def image_indices(ids: np.ndarray, images: int, where: str = "") -> np.ndarray:
    """The indices of image tokens in `ids`.

    Args:
      where: the name of the conversation in the error.

    Raises:
      InputError: there are not as many as images.
    """
    indices = np.flatnonzero(ids == IMAGE)
    if len(indices) != images:
        raise InputError(
            f"{where}{': ' if where else ''}{len(indices)} <image> tokens for {images} images; "
            "there must be one for each image"
        )
    return indices


def _splice_row(row: Row, number: int, config: LlavaConfig, max_length: int | None):
    """ids, feature rows (indices into the conversation's own table, `TEXT` or `NEWLINE`) and labels, each [n]."""
    indices = image_indices(row.ids, len(row.layouts), row.name or f"row {number}")
    labels = np.full(len(row.ids), IGNORE, np.int32) if row.labels is None else row.labels
    ids_parts, feature_parts, label_parts = [], [], []
    start = first_row = 0
    for end, layout in zip([*indices, len(row.ids)], [*row.layouts, None], strict=True):
        text = slice(start, end)
        ids_parts.append(row.ids[text])
        feature_parts.append(np.full(end - start, TEXT, np.int32))
        label_parts.append(labels[text])
        if layout is not None:
            features = merge_rows(layout, config)
            ids_parts.append(np.zeros(len(features), np.int32))
            feature_parts.append(np.where(features == NEWLINE, NEWLINE, features + first_row))
            label_parts.append(np.full(len(features), IGNORE, np.int32))
            first_row += layout.tiles * config.vision.features_per_tile
        start = end + 1
    return tuple(np.concatenate(parts)[:max_length] for parts in (ids_parts, feature_parts, label_parts))
