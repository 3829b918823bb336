"""Parse the text of HLO instructions, as XLA prints them: names, operations, shapes, attributes."""

import dataclasses
import math
import re

BYTES = dict(
    pred=1, s8=1, u8=1, s4=0.5, u4=0.5, s16=2, u16=2, bf16=2, f16=2, s32=4, u32=4, f32=4, s64=8, u64=8, f64=8, c64=8
)


@dataclasses.dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool  # otherwise in on-chip memory

    @property
    def bytes(self) -> int:
        return int(math.prod(self.dims) * BYTES.get(self.dtype, 1))


def parse_shapes(text: str) -> list[Shape]:
    found = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", re.sub(r"/\*.*?\*/", "", text))
    return [
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n), not re.search(r"S\([1-9]", layout))
        for dtype, dims, layout in found
        if dtype in BYTES or dtype.startswith("f8")
    ]


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i + 1
    return len(text)


class Instruction:
    """`%name = shape op(arguments), attributes`"""

    HEAD = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")

    def __init__(self, text: str):
        match = self.HEAD.match(text)
        assert match, text
        self.is_root, self.name = bool(match[1]), match[2]
        start = match.end()
        behind = _closing(text, start) if text[start] == "(" else text.index(" ", start)
        self.out = parse_shapes(text[start:behind])
        bracket = text.index("(", behind)
        end = _closing(text, bracket)
        self.op = text[behind:bracket].strip()
        self.inside, self.attributes = text[bracket + 1 : end - 1], text[end:]
        self.args = re.findall(r"%([\w.\-#]+)", self.inside)

    def attribute(self, key: str) -> str:
        """The first word of an attribute; "" if it is missing."""
        match = re.search(rf"\b{key}=\{{?%?([\w.\-]+)", self.attributes)
        return match[1] if match else ""

    @property
    def calls(self) -> str:
        return self.attribute("calls") or self.attribute("to_apply") or self.attribute("called_computations")
