"""Parse file sizes."""

import argparse
import re

from llava_jax.console import integer, shorten

SHARD_BYTES = integer(1, 10**15)  # a tensor larger than this gets its own file
UNITS = "kmgt"


def parse_size(text: str) -> int:
    """Parse `5GB`, `500MB`, `1GiB` or plain bytes to a number of bytes; the type of a flag.

    Raises:
      argparse.ArgumentTypeError: the text is not a size, or out of range.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([KMGT]i?)?B?", text.strip(), re.IGNORECASE | re.ASCII)
    unit = (match[2] or "").lower() if match else ""
    step = 1024 if unit.endswith("i") else 1000
    size = int(float(match[1]) * step ** (UNITS.index(unit[0]) + 1 if unit else 0)) if match else 0
    if not SHARD_BYTES.minimum <= size <= SHARD_BYTES.maximum:
        raise argparse.ArgumentTypeError(f"{shorten(text)!r}: must be a size such as 5GB or 500MB, at most 1000TB")
    return size
