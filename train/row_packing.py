"""Pack conversations into rows: bin packing with two budgets, positions and tiles (host only).

grain's `FirstFitPackIterDataset` also packs with two budgets, but a conversation with an image takes a third of a row
or more, and first fit then wastes 13 % of positions on lengths like mix665k's, compared with 5 % here
(`python benchmarks/train_data.py`). `fill_rows` fills one row after another (minimum bin slack, Fleszar and Hindi
2002): it takes the longest remaining conversation and a set of others that leaves few positions free, found by dynamic
programming over all reachable sums.

The length of a row decides the rest: linear programming over all patterns of a row bounds the padding of v1.5's rows
of 2,048 positions from below by 2.4 % (4.5 % here), of v1.6's rows of 5,376 by 5.1 % (5.6 % here), and of 7,680 by
0.2 % (0.7 % here). More candidates or conversations at a time change it by less than 0.3 %.
"""

import bisect
import heapq
from collections.abc import Sequence

VERSION = 2  # of the packing, which is saved with a run: another one makes other rows of the same conversations
WINDOW = 1024  # conversations that are packed together
MAX_CANDIDATES = 96  # conversations that a row is filled from, at most
FULL = 0.99  # share of positions in use that needs no second attempt
SLACK = 16  # the second attempt accepts rows of which a sixteenth is free
COARSE_STEPS = 512  # of the free positions, if tiles limit what fits, as pairs of sums are many
MAX_LENGTHS_TRIED = 33  # of a row; for example 4,096 to 8,192 in multiples of 128
LENGTH_MULTIPLE = 128  # positions; accelerators process sequences in blocks of this size
LENGTHENED = 1024  # positions; shorter rows keep their length
MIN_SAVING = 0.05  # share of the computation that rows longer than `max_length` must save
BATCH_TOLERANCE = 0.2  # relative deviation of a batch from the target size that is allowed so that rows are full

Sizes = Sequence[tuple[int, int]]  # positions and tiles of each conversation


def fill_rows(sizes: Sizes, length: int, tiles: int) -> list[list[int]]:
    """Pack conversations, none of them larger than a row, into rows of `length` positions and `tiles` tiles.

    Rows as full as possible use up the short conversations, and what is left over fits badly. So a second attempt
    accepts some slack, and the one with fewer rows counts.

    Returns:
      For each row the indices of its conversations; deterministic.
    """
    rows = _fill(sizes, length, tiles, 0)
    if sum(n for n, _ in sizes) < FULL * len(rows) * length:
        rows = min(rows, _fill(sizes, length, tiles, length // SLACK), key=len)
    return rows


def _fill(sizes: Sizes, length: int, tiles: int, slack: int) -> list[list[int]]:
    """Fill one row after another, until at most `slack` of its positions are free, or as few as possible."""
    left = sorted(range(len(sizes)), key=lambda i: (sizes[i], -i))
    lengths = [sizes[i][0] for i in left]
    rows = []
    while left:
        row = [left.pop()]
        rows.append(row)
        free, free_tiles = length - lengths.pop(), tiles - sizes[row[0]][1]
        fitting = bisect.bisect_right(lengths, free)
        # Spread evenly over all lengths, so many candidates suffice for a sum that fits.
        places = range(fitting - 1, -1, -fitting // MAX_CANDIDATES or -1)
        chosen = _best_fill([(lengths[i], 0) for i in places], free, 0, slack)
        if sum(sizes[left[places[k]]][1] for k in chosen) > free_tiles:
            unit = -(-free // COARSE_STEPS)
            both = [(-(-lengths[i] // unit), sizes[left[i]][1]) for i in places]
            chosen = _best_fill(both, free // unit, free_tiles, slack // unit)
        for k in chosen:  # places descend, so removing one does not move the next
            row.append(left.pop(places[k]))
            del lengths[places[k]]
    return rows


def _best_fill(sizes: Sizes, length: int, tiles: int, slack: int) -> list[int]:
    """Choose from `sizes` what fits into `length` positions and `tiles` tiles: ascending indices.

    It leaves at most `slack` positions free with the first sizes that can, or else as few as possible.

    The reachable sums are bits of one integer: bit `t * stride + n` stands for n positions and t tiles. One shift adds
    a conversation to every sum.
    """
    enough = max(length - slack, 1)
    length, tiles = min(length, sum(n for n, _ in sizes)), min(tiles, sum(t for _, t in sizes))  # no sum is larger
    stride = 2 * length + 1  # no sum of two numbers up to `length` runs into the next number of tiles
    line = (1 << (length + 1)) - 1
    starts = range(0, (tiles + 1) * stride, stride)
    inside = sum(line << start for start in starts)
    full = sum((line >> enough << enough) << start for start in starts)
    sums, before = 1, []
    for n, t in sizes:
        before.append(sums)
        if n <= length and t <= tiles:
            sums |= (sums << (t * stride + n)) & inside
            if sums & full:
                break
    bit = sum(max(((sums >> start & line).bit_length() - 1, start) for start in starts))
    chosen = []
    for k in reversed(range(len(before))):
        if not before[k] >> bit & 1:  # this sum was not reachable without conversation k
            chosen.append(k)
            bit -= sizes[k][1] * stride + sizes[k][0]
    return chosen[::-1]


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


def rows_of_batch(wanted: int, per_row: float, multiple: int) -> int:
    """Rows of a global batch of about `wanted` conversations.

    Args:
      per_row: average conversations of a full row.
      multiple: the number of rows is a multiple of this.
    """
    rows = max(1, round(wanted / per_row / multiple)) * multiple
    return rows + multiple * (rows * per_row < (1 - BATCH_TOLERANCE) * wanted)


def row_cost(length: int, width: int) -> float:
    """The computation of a row, to compare lengths: in units of 12 width^2 multiplications.

    Per position a decoder layer takes about 12 width^2 multiplications, and attention length x width: its kernels skip
    the half that is not causal, but not the other segments. (The compiled gradient of a layer of the 7B decoder agrees
    to 0.5 % from 2,048 to 7,680 positions.)
    """
    return length * (1 + length / (12 * width))


def fill_lengths(sizes: Sizes, minimum: int, maximum: int, width: int, tiles: int) -> dict[int, float]:
    """The average number of conversations in a full row, by its length.

    How well conversations with images pack depends on the length: with 2,340 features per image, a row of 4,096
    positions holds one, a row of 5,376 two, a row of 7,680 three. If no length saves 5 % of the computation, rows have
    the minimum. Left out are lengths that could not save that or cost more than a shorter one, even without padding.

    Args:
      minimum, maximum: the lengths to choose from; a minimum of less than 1,024 is the only one.
      width: of the decoder.
    """
    first = -(-minimum // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    lengths = range(first, maximum + 1 if minimum >= LENGTHENED else first, LENGTH_MULTIPLE)
    lengths = lengths[:: -(-len(lengths) // MAX_LENGTHS_TRIED) or 1]  # filling all rows takes some 0.03 s for each
    average = sum(n for n, _ in sizes) / len(sizes)

    def conversations(length: int) -> float:
        return len(sizes) / len(fill_rows(sizes, length, tiles))

    found = {minimum: conversations(minimum)}
    enough = least = (1 - MIN_SAVING) * row_cost(minimum, width) / found[minimum]  # per conversation
    for length in lengths:
        cost = row_cost(length, width)
        if length > minimum and cost * average / length < least:
            found[length] = conversations(length)
            least = min(least, cost / found[length])
    return found if least < enough else {minimum: found[minimum]}


def choose_tiles(sizes: Sizes, length: int, minimum: int) -> int:
    """The fewest tiles per row, at least `minimum`, that fit each conversation and need at most 1 % more rows."""
    rows = fill_rows([(n, 0) for n, _ in sizes], length, 0)
    max_tiles = max(sum(sizes[i][1] for i in row) for row in rows)
    minimum = max(minimum, *(tiles for _, tiles in sizes))
    fits = lambda tiles: len(fill_rows(sizes, length, tiles)) <= 1.01 * len(rows)  # noqa: E731
    return minimum + bisect.bisect_left(range(minimum, max(minimum, max_tiles)), True, key=fits)
