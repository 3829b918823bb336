"""Which conversations share a row: bin packing with two budgets, positions and tiles (host only).

grain's `FirstFitPackIterDataset` packs with two budgets too, but conversations with an image are a third of a row
or more, and first fit then wastes what is left: 13 % of positions on lengths drawn like mix665k's, against 5 % here
(`python benchmarks/train_data.py`). So rows are filled one after the other, each as full as can be (minimum bin slack,
Fleszar and Hindi 2002): the longest conversation that is left, and with it the set of others that leaves the fewest
positions free, found by dynamic programming over all sums that can be reached.
"""

import bisect
import heapq
from collections.abc import Sequence

WINDOW = 1024  # conversations that are distributed over rows together
CANDIDATES = 256  # conversations among which the ones to fill a row are looked for
LENGTHS = 17  # of a row, that are tried: 4,096 and what is a multiple of 128 up to 6,144
PIECE = 128  # positions; accelerators process sequences in pieces of that
NEAR = 0.2  # a batch may hold so much more or less than was asked for, so that its rows are full

Sizes = Sequence[tuple[int, int]]  # positions and tiles of each conversation


def fill_rows(sizes: Sizes, length: int, tiles: int) -> list[list[int]]:
    """Distribute conversations, none of them larger than a row, over rows of `length` positions and `tiles` tiles.

    Returns:
      For each row the indices of its conversations. It depends on nothing but the arguments.
    """
    left = sorted(range(len(sizes)), key=lambda i: (sizes[i], -i), reverse=True)
    rows = []
    while left:
        first, *left = left
        positions_used, tiles_used = sizes[first]
        # Evenly over all lengths: with so many to choose from, a sum that fits is found among them.
        candidates = left[:: -(-len(left) // CANDIDATES) or 1]
        chosen = _best_fill([sizes[i] for i in candidates], length - positions_used, tiles - tiles_used)
        row = [first, *(candidates[k] for k in chosen)]
        taken = set(row)
        left = [i for i in left if i not in taken]
        rows.append(row)
    return rows


def _best_fill(sizes: Sizes, length: int, tiles: int) -> list[int]:
    """The subset of `sizes` with most positions that fits `length` positions and `tiles` tiles.

    The sums that can be reached are bits of one integer: bit `t * stride + n` stands for n positions and t tiles.
    To add a conversation to every sum is one shift.
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
    most, at = max((((sums >> (t * stride)) & line).bit_length() - 1, t) for t in range(tiles + 1))
    bit = at * stride + most
    chosen = []
    for k in reversed(range(len(before))):
        if not before[k] >> bit & 1:  # this sum was not there before conversation k
            chosen.append(k)
            bit -= sizes[k][1] * stride + sizes[k][0]
    return chosen


def spread(rows: list[list[int]], least: int) -> list[list[int]]:
    """Split rows evenly, those of most conversations into most parts, until there are `least` or all have one each."""
    parts = [1] * len(rows)
    heap: list[tuple[float, int]] = [(-len(row), number) for number, row in enumerate(rows)]
    heapq.heapify(heap)
    for _ in range(least - len(rows)):
        largest, number = heap[0]
        if largest >= -1:
            break
        parts[number] += 1
        heapq.heapreplace(heap, (-len(rows[number]) / parts[number], number))
    return [row[k::n] for row, n in zip(rows, parts, strict=True) for k in range(n)]


# ---------------------------------------------------------------- what rows suit the data


def rows_of_batch(wanted: int, per_row: float, multiple: int) -> tuple[int, float | None]:
    """Rows of a global batch of about `wanted` conversations.

    Args:
      per_row: conversations of a full row, on average.
      multiple: rows come in multiples of this.

    Returns:
      The rows, and the conversations that a row may hold on average so that a batch does not hold more than was asked
      for; None where rows may be full, which changes the batch by at most `NEAR`.
    """
    rows = max(1, round(wanted / per_row / multiple)) * multiple
    if rows * per_row < (1 - NEAR) * wanted:
        rows += multiple
    return rows, (max(1.0, wanted / rows) if rows * per_row > (1 + NEAR) * wanted else None)


def good_length(sizes: Sizes, least: int, width: int) -> int:
    """Positions of a row: `least`, or up to half as many more if a twentieth of the work is saved.

    How well conversations with images share rows depends on the length: of images with 2,340 features each, rows of
    4,096 positions hold one, rows of 5,120 two. For each position a layer of a decoder multiplies about 12 width^2
    times, and length x width times for attention.
    """
    if least < 1024:
        return least
    lengths = range(-(-least // PIECE) * PIECE, least + least // 2 + 1, PIECE)
    lengths = lengths[:: -(-len(lengths) // LENGTHS)]  # each costs filling all rows: 0.1 s and more where they are long

    def work(positions: int, length: int) -> float:
        return positions * (1 + length / (12 * width))

    def work_of_rows(length: int) -> float:
        return work(len(fill_rows([(n, 0) for n, _ in sizes], length, 0)) * length, length)

    enough = 0.95 * work_of_rows(least)
    used = sum(n for n, _ in sizes)
    # A length that would not do without any padding need not be tried.
    found = {length: work_of_rows(length) for length in lengths if work(used, length) < enough}
    best = min(found, key=found.__getitem__, default=least)
    return best if found.get(best, enough) < enough else least


def enough_tiles(sizes: Sizes, length: int, least: int) -> int:
    """The fewest tiles of a row, from `least` on, that hold each conversation and cost a hundredth of rows at most."""
    rows = fill_rows([(n, 0) for n, _ in sizes], length, 0)
    most = max(sum(sizes[i][1] for i in row) for row in rows)
    least = max(least, *(tiles for _, tiles in sizes))
    fits = lambda tiles: len(fill_rows(sizes, length, tiles)) <= 1.01 * len(rows)  # noqa: E731
    return least + bisect.bisect_left(range(least, max(least, most)), True, key=fits)
