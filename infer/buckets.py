"""The ladders of static shapes, which bound the number of compiled programs."""

import bisect
import dataclasses

from llava_jax.console import InputError


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that each dimension is rounded up to."""

    lengths: tuple[int, ...] = (
        *(128, 256, 512, 768, 1024, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8192),
        *(12288, 16384, 24576, 32768, 49152, 65536, 98304, 131072),
    )  # fmt: skip
    tiles: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100)
    new_tokens: tuple[int, ...] = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)

    def up(self, ladder: str, n: int) -> int:
        """Round `n` up to the next size.

        Raises:
          InputError: `n` exceeds the largest size.
        """
        sizes = getattr(self, ladder)
        i = bisect.bisect_left(sizes, n)
        if i == len(sizes):
            raise InputError(f"{n} {ladder.replace('_', ' ')} exceed the engine's largest bucket ({sizes[-1]})")
        return sizes[i]
