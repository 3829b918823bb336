"""JSON files made wrong: other values, keys taken away, numbers too large, nesting, and bytes that are no JSON.

>>> for what, data in mutations(b'{"a": [1, 2]}', seed=0, n=30):
...     path.write_bytes(data)
"""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

# Written in place of a value, as they stand.
VALUES = [
    "null", "true", "false", "0", "1", "-1", "3", "1.5", "-0.0", "1e308", "2147483648", "18446744073709551616",
    "9" * 60, "9" * 5000, "-" + "9" * 5000, "1e400", "NaN", "-Infinity", '""', '"x"', '"7"', '"\\ud800"', '"\\u0000"',
    '"a\\nb\\u001b[31m"', '"../../etc/passwd"', json.dumps("x" * 10_000), json.dumps("猫" * 300), "[]", "{}", "[1]",
    "[null]", '["x", 1]', '[["x"]]', '{"x": 1}', '{"": null}', '{"content": "x"}', json.dumps([1] * 1000),
    "[" * 200 + "]" * 200, '{"a":' * 600 + "1" + "}" * 600,
]  # fmt: skip
WHOLE = [b"", b" ", b"null", b"true", b"7", b'"x"', b"[]", b"{}", b"[{}]", b"NaN", b"\xff\xfe", b"\xef\xbb\xbf", b"{"]
DEEP = b"[" * 10_000_000


def mutations(original: bytes, seed: int, n: int, *, lines: bool = False) -> Iterator[tuple[str, bytes]]:
    """What was done, and the file then: what replaces a whole file first, then `n` changes drawn from the seed.

    Args:
      lines: it has one JSON object a line, of which one is changed.
    """
    for whole in WHOLE:
        yield f"the file is {whole!r}", whole + b"\n" * lines
    yield "10 MB of [", DEEP
    draw = random.Random(seed)
    for _ in range(n):
        if not lines:
            yield _mutated(original, draw)
            continue
        rows = original.splitlines()
        at = draw.randrange(len(rows))
        what, rows[at] = _mutated(rows[at], draw)
        yield f"line {at + 1}: {what}", b"\n".join(rows) + b"\n"


def _mutated(original: bytes, draw: random.Random) -> tuple[str, bytes]:
    kind = draw.choice(["value"] * 12 + ["delete"] * 3 + ["truncate", "byte", "twice", "key"])
    if kind == "truncate":
        at = draw.randrange(len(original))
        return f"cut off after byte {at}", original[:at]
    if kind == "byte":
        at = draw.randrange(len(original))
        return f"no UTF-8 at byte {at}", original[:at] + draw.choice([b"\xff", b"\xed\xa0\x80", b"\x00"]) + original[
            at:
        ]
    value = json.loads(original)
    places = list(_places(value))
    if not places:
        return "as it was", original
    path = draw.choice(places)
    where = "".join(f"[{key!r}]" for key in path)
    changed = copy.deepcopy(value)
    inside = changed
    for key in path[:-1]:
        inside = inside[key]
    last = path[-1]
    if kind == "delete":
        del inside[last]
        return f"{where} deleted", json.dumps(changed).encode()
    if kind == "key" and isinstance(inside, dict):
        name = draw.choice(["", "x" * 1000, "\ud800", "-1", "99999999999", "a\nb"])
        inside[name] = inside.pop(last)
        return f"{where} called {name[:20]!r}", json.dumps(changed).encode()
    if kind == "twice" and isinstance(inside, list):
        inside.extend(inside * 3)
        return f"the list of {where} four times", json.dumps(changed).encode()
    written = draw.choice(VALUES)
    inside[last] = "%VALUE%"
    return f"{where} = {written[:60]}", json.dumps(changed).replace('"%VALUE%"', written).encode()


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from _places(value[key], (*path, key))
