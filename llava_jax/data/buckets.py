"""The ladders of static shapes, which bound the number of compiled programs."""

import bisect
import dataclasses

from llava_jax.console import InputError

# Positions of a training row, and of a prompt, which has two rungs more.
LENGTHS = (
    *(128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768),
    *(49152, 65536, 98304, 131072),
)  # fmt: skip
PROMPT_LENGTHS = tuple(sorted((*LENGTHS, 2560, 5120)))
# Tiles of a training row, and of a prompt: an anyres image has up to five.
TILES = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)
PROMPT_TILES = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100)
CHUNKS = (64, 128, 256, 512)  # positions of a prompt that are prefilled at once
MAX_SLOTS = 256
MIN_CONTEXT = 16  # positions of a slot, which are at least as many as a dispatch of decode steps writes
NOUNS = {"lengths": "positions of a prompt", "tiles": "tiles"}  # in errors


def round_up(ladder: tuple[int, ...], n: int) -> int:
    """The smallest size of a ladder that is at least `n`; its largest size if `n` exceeds it."""
    return ladder[min(bisect.bisect_left(ladder, n), len(ladder) - 1)]


def spans(context: int, smallest: int, factor: int) -> tuple[int, ...]:
    """`smallest`, then always `factor` times as many, up to `context`."""
    sizes = []
    while smallest < context:
        sizes.append(smallest)
        smallest *= factor
    return (*sizes, context)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that the engine rounds its shapes up to."""

    lengths: tuple[int, ...] = PROMPT_LENGTHS
    tiles: tuple[int, ...] = PROMPT_TILES
    chunks: tuple[int, ...] = CHUNKS

    def up(self, ladder: str, n: int) -> int:
        """Round `n` up to the next size.

        Raises:
          InputError: `n` exceeds the largest size.
        """
        sizes = getattr(self, ladder)
        if n > sizes[-1]:
            raise InputError(f"{n:,} {NOUNS[ladder]} exceed the largest bucket, {sizes[-1]:,}")
        return round_up(sizes, n)

    def chunk_sizes(self, context: int) -> tuple[int, ...]:
        """The sizes of the chunks of a prompt, of which a slot of `context` positions has room for each."""
        return tuple(dict.fromkeys(min(n, context) for n in self.chunks))

    def prefill_spans(self, context: int) -> tuple[int, ...]:
        """The numbers of a slot's positions that a prefill may read: 0 at the beginning of a prompt."""
        return (0, *spans(context, 512, 4))

    def decode_spans(self, context: int) -> tuple[int, ...]:
        """The numbers of a slot's positions that decode steps may read."""
        return spans(context, 256, 2)

    def decode_rows(self, slots: int) -> tuple[int, ...]:
        """The numbers of slots that are decoded at a time where rows cost time."""
        return spans(slots, 1, 4)
