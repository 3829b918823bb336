"""Pack conversations into rows: bin packing with two budgets, positions and tiles (host only).

grain's `FirstFitPackIterDataset` also packs with two budgets, but a conversation with an image takes a third of a row
or more, and first fit then wastes 13 % of positions on lengths like mix665k's, compared with 5 % here
(`python benchmarks/train_data.py`). `fill_rows` fills one row after another as full as possible (minimum bin slack,
Fleszar and Hindi 2002): it takes the longest remaining conversation and the set of others that leaves the fewest
positions free, found by dynamic programming over all reachable sums.
"""

import bisect
import heapq
from collections.abc import Sequence

WINDOW = 1024  # conversations that are packed together
MAX_CANDIDATES = 256  # conversations that a row is filled from, at most
MAX_LENGTHS_TRIED = 17  # of a row; for example 4,096 to 6,144 in multiples of 128
LENGTH_MULTIPLE = 128  # positions; accelerators process sequences in blocks of this size
BATCH_TOLERANCE = 0.2  # relative deviation of a batch from the target size that is allowed so that rows are full

Sizes = Sequence[tuple[int, int]]  # positions and tiles of each conversation


def fill_rows(sizes: Sizes, length: int, tiles: int) -> list[list[int]]:
    """Pack conversations, none of them larger than a row, into rows of `length` positions and `tiles` tiles.

    Returns:
      For each row the indices of its conversations; deterministic.
    """
    left = sorted(range(len(sizes)), key=lambda i: (sizes[i], -i), reverse=True)
    rows = []
    while left:
        first, *left = left
        positions_used, tiles_used = sizes[first]
        # Spread evenly over all lengths, so many candidates suffice for a sum that fits.
        candidates = left[:: -(-len(left) // MAX_CANDIDATES) or 1]
        chosen = _best_fill([sizes[i] for i in candidates], length - positions_used, tiles - tiles_used)
        row = [first, *(candidates[k] for k in chosen)]
        taken = set(row)
        left = [i for i in left if i not in taken]
        rows.append(row)
    return rows


def _best_fill(sizes: Sizes, length: int, tiles: int) -> list[int]:
    """The subset of `sizes` with the most positions that fits `length` positions and `tiles` tiles.

    The reachable sums are bits of one integer: bit `t * stride + n` stands for n positions and t tiles. One shift adds
    a conversation to every sum.
    """
    length, tiles = min(length, sum(n for n, _ in sizes)), min(tiles, sum(t for _, t in sizes))  # no sum is larger
    stride = 2 * length + 1  # no sum of two numbers up to `length` runs into the next number of tiles
    line = (1 << (length + 1)) - 1
    inside = sum(line << (t * stride) for t in range(tiles + 1))
    full = sum(1 << (t * stride + length) for t in range(tiles + 1))
    sums, before = 1, []
    for n, t in sizes:
        before.append(sums)
        if n <= length and t <= tiles:
            sums |= (sums << (t * stride + n)) & inside
        if sums & full:
            break
    best, best_tiles = max((((sums >> (t * stride)) & line).bit_length() - 1, t) for t in range(tiles + 1))
    bit = best_tiles * stride + best
    chosen = []
    for k in reversed(range(len(before))):
        if not before[k] >> bit & 1:  # this sum was not reachable without conversation k
            chosen.append(k)
            bit -= sizes[k][1] * stride + sizes[k][0]
    return chosen


def split_rows(rows: list[list[int]], minimum: int) -> list[list[int]]:
    """Split the rows with the most conversations until there are `minimum` rows, or each has one conversation."""
    parts = [1] * len(rows)
    heap: list[tuple[float, int]] = [(-len(row), number) for number, row in enumerate(rows)]
    heapq.heapify(heap)
    for _ in range(minimum - len(rows)):
        largest, number = heap[0]
        if largest >= -1:
            break
        parts[number] += 1
        heapq.heapreplace(heap, (-len(rows[number]) / parts[number], number))
    return [row[k::n] for row, n in zip(rows, parts, strict=True) for k in range(n)]


# ---------------------------------------------------------------- the size of rows and batches


def rows_of_batch(wanted: int, per_row: float, multiple: int) -> tuple[int, float | None]:
    """Rows of a global batch of about `wanted` conversations.

    Args:
      per_row: average conversations of a full row.
      multiple: the number of rows is a multiple of this.

    Returns:
      The rows, and the average conversations per row for which a batch is no larger than wanted; None if rows can be
      full, which changes the batch by at most `BATCH_TOLERANCE`.
    """
    rows = max(1, round(wanted / per_row / multiple)) * multiple
    if rows * per_row < (1 - BATCH_TOLERANCE) * wanted:
        rows += multiple
    return rows, (max(1.0, wanted / rows) if rows * per_row > (1 + BATCH_TOLERANCE) * wanted else None)


def choose_length(sizes: Sizes, minimum: int, width: int) -> int:
    """Positions of a row: `minimum`, or up to half more if that saves 5 % of the computation.

    How well conversations with images pack depends on the length: with 2,340 features per image, a row of 4,096
    positions holds one, a row of 5,120 two. Per position a decoder layer takes about 12 width^2 multiplications, and
    attention length x width.
    """
    if minimum < 1024:
        return minimum
    lengths = range(-(-minimum // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, minimum + minimum // 2 + 1, LENGTH_MULTIPLE)
    lengths = lengths[:: -(-len(lengths) // MAX_LENGTHS_TRIED)]  # filling all rows takes 0.1 s or more for each

    def work(positions: int, length: int) -> float:
        return positions * (1 + length / (12 * width))

    def work_of_rows(length: int) -> float:
        return work(len(fill_rows([(n, 0) for n, _ in sizes], length, 0)) * length, length)

    enough = 0.95 * work_of_rows(minimum)
    used = sum(n for n, _ in sizes)
    # Skip a length that would not suffice even without padding.
    found = {length: work_of_rows(length) for length in lengths if work(used, length) < enough}
    best = min(found, key=found.__getitem__, default=minimum)
    return best if found.get(best, enough) < enough else minimum


def choose_tiles(sizes: Sizes, length: int, minimum: int) -> int:
    """The fewest tiles per row, at least `minimum`, that fit each conversation and need at most 1 % more rows."""
    rows = fill_rows([(n, 0) for n, _ in sizes], length, 0)
    max_tiles = max(sum(sizes[i][1] for i in row) for row in rows)
    minimum = max(minimum, *(tiles for _, tiles in sizes))
    fits = lambda tiles: len(fill_rows(sizes, length, tiles)) <= 1.01 * len(rows)  # noqa: E731
    return minimum + bisect.bisect_left(range(minimum, max(minimum, max_tiles)), True, key=fits)
