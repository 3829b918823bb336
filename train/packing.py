"""Which conversations share a row: bin packing with two budgets, positions and tiles (host only).

grain's `FirstFitPackIterDataset` packs with two budgets too, but conversations with a picture are a third of a row
or more, and first fit then wastes what is left: 13 % of positions on lengths drawn like mix665k's, against 4 % here
(`python benchmarks/train_data.py`). So rows are filled one after the other, each as full as can be
(minimum bin slack, Gupta and Ho 1999): the longest conversation that is left, and with it the set of others that
leaves the fewest positions free, found by dynamic programming over all sums that can be reached.
"""

from collections.abc import Sequence

CANDIDATES = 256  # conversations among which the ones to fill a row are looked for


def fill_rows(sizes: Sequence[tuple[int, int]], length: int, tiles: int) -> list[list[int]]:
    """Distribute conversations over rows.

    Args:
      sizes: positions and tiles of each conversation; none is larger than a row.
      length, tiles: of a row.

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


def _best_fill(sizes: list[tuple[int, int]], length: int, tiles: int) -> list[int]:
    """The subset of `sizes` with most positions that fits `length` positions and `tiles` tiles.

    The sums that can be reached are bits of one integer: bit `t * stride + n` stands for n positions and t tiles.
    To add a conversation to every sum is one shift.
    """
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
