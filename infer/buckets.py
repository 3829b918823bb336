"""The ladders of static shapes, which bound the number of compiled programs."""

import dataclasses

from llava_jax.console import InputError
from llava_jax.data import buckets


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that each dimension is rounded up to."""

    lengths: tuple[int, ...] = buckets.PROMPT_LENGTHS
    tiles: tuple[int, ...] = buckets.PROMPT_TILES
    new_tokens: tuple[int, ...] = buckets.NEW_TOKENS
    rows: tuple[int, ...] = buckets.ROWS

    def up(self, ladder: str, n: int) -> int:
        """Round `n` up to the next size.

        Raises:
          InputError: `n` exceeds the largest size.
        """
        sizes = getattr(self, ladder)
        if n > sizes[-1]:
            raise InputError(f"{n} {ladder.replace('_', ' ')} exceed the engine's largest bucket ({sizes[-1]})")
        return buckets.round_up(sizes, n)
