"""Sizes of files as people write them."""

import argparse
import re

from llava_jax.console import integer, shorten

SHARD_BYTES = integer(1, 10**15)  # of a file; a larger tensor has one of its own
UNITS = "kmgt"


def parse_size(text: str) -> int:
    """`5GB`, `500MB`, `1GiB` or plain bytes, as a number of bytes. A flag's type.

    Raises:
      argparse.ArgumentTypeError: it is none of these, or out of range.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([KMGT]i?)?B?", text.strip(), re.IGNORECASE | re.ASCII)
    unit = (match[2] or "").lower() if match else ""
    step = 1024 if unit.endswith("i") else 1000
    size = int(float(match[1]) * step ** (UNITS.index(unit[0]) + 1 if unit else 0)) if match else 0
    if not SHARD_BYTES.minimum <= size <= SHARD_BYTES.maximum:
        raise argparse.ArgumentTypeError(f"{shorten(text)!r}: must be a size such as 5GB or 500MB, at most 1000TB")
    return size
