"""Count the work of a compiled program from its text: the optimized, scheduled HLO that `compiled.as_text()` prints
and libtpu dumps while it compiles.

Trip counts of loops, FLOPs of matmuls and bytes of collectives are exact. HBM traffic is counted at the edges of fused
operations.

JAX's `compiled.cost_analysis()` counts the body of a loop once, whatever its trip count, and ignores collectives. JAX
returns a module's protobuf, but not the message types that parse it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from llava_jax.aot.hlo_text import Instruction, parse_shapes

FLOATS = ("bf16", "f16", "f32")
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one chip.

    flops        of matmuls and attention kernels
    hbm_bytes    read from and written to HBM
    collectives  bytes sent to other chips, by kind
    counts       the number of collectives, by kind
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)
    counts: dict[str, float] = dataclasses.field(default_factory=dict)

    def plus(self, other: "Work", times: float = 1) -> "Work":
        def added(a, b):
            return {k: a.get(k, 0) + times * b.get(k, 0) for k in a | b}

        return Work(
            self.flops + times * other.flops,
            self.hbm_bytes + times * other.hbm_bytes,
            added(self.collectives, other.collectives),
            added(self.counts, other.counts),
        )


class Program:
    """An optimized, scheduled HLO module, as `compiled.as_text()` prints it.

    >>> Program(compiled.as_text()).work
    """

    def __init__(self, text: str, unknown_trips: int | None = None):
        """`unknown_trips`: the trip count to assume for a loop that ends on a condition; None: `work` raises."""
        self.unknown_trips = unknown_trips
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        found = re.search(r"num_partitions=(\d+)", text[:100_000])
        self.chips = int(found[1]) if found else 1
        current: dict[str, Instruction] | None = None
        lines: list[str] = []
        for line in [*text.splitlines(), "}"]:
            head = None if line.startswith(" ") else re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            new = bool(Instruction.HEAD.match(line))
            if (head or new or line == "}") and lines and current is not None:
                instruction = Instruction("\n".join(lines))  # attributes may span several lines
                current[instruction.name] = instruction
            lines = [line] if new else [] if head or line == "}" else [*lines, line]
            if head:
                current = self.computations[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
            elif line == "}":
                current = None
        for computation in self.computations.values():
            self._add_tuple_elements(computation)

    @staticmethod
    def _add_tuple_elements(computation: dict[str, Instruction]) -> None:
        """Add a `get-tuple-element` for each `%x#3`, which newer releases of XLA write instead of one."""
        for name in {arg for one in computation.values() for arg in one.args if "#" in arg}:
            source, index = name.split("#")
            one = Instruction(f"  %element = () get-tuple-element(%{source}), index={index}")
            one.name, one.out = name, computation[source].out[int(index) :][:1]
            computation[name] = one

    @functools.cached_property
    def work(self) -> Work:
        """The work of one run of the program, loops included; a conditional counts as its most expensive branch."""
        return self._work(self.entry)

    @functools.cache  # noqa: B019
    def _work(self, name: str) -> Work:
        total, chains = Work(), set[str]()
        for one in self.computations[name].values():
            total = total.plus(self._work_of(name, one, chains))
        return total

    def _work_of(self, name: str, one: Instruction, chains: set[str]) -> Work:
        if one.op == "while":
            return Work().plus(self._work(one.attribute("body")), self.trips(name, one))
        if one.op == "call":
            return self._work(one.calls)
        if one.op == "conditional":
            listed = re.search(r"branch_computations=\{(.*?)\}", one.attributes)
            branches = re.findall(r"%([\w.\-]+)", listed[1]) if listed else []
            branches += [b for key in ("true_computation", "false_computation") if (b := one.attribute(key))]
            return max((self._work(b) for b in branches), key=lambda w: (w.flops, w.hbm_bytes))
        moved = self._collective(name, one, chains)
        work = Work(self._flops(name, one), self._hbm_bytes(name, one))
        return work.plus(Work(0.0, 0.0, {moved[0]: moved[1]}, {moved[0]: 1})) if moved else work

    # ------------------------------------------------------------ loops

    def trips(self, name: str, loop: Instruction) -> int:
        """The trip count of a loop, from its condition and the counter's start and step.

        Raises:
          ValueError: the program does not contain it.
        """
        found = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes)
        if found:
            return int(found[1])
        condition, body = loop.attribute("condition"), loop.attribute("body")
        compare, where, bound = self._root(condition), condition, None
        if compare.op == "fusion":
            bound = dict(enumerate(self._affine(condition, a, None) for a in compare.args))
            where = compare.calls
            compare = self._root(where)
        sides = [self._affine(where, a, bound) for a in compare.args]
        known = [side for side in sides if side is not None]
        start = self.computations[name][loop.args[0]]

        def initial(slot: int) -> int | None:
            value = self._affine(name, start.args[slot], {}) if start.op == "tuple" else None
            return value[1] if value and value[0] is None else None

        if len(sides) == len(known) == 2:
            (counter, offset), (slot, more) = known if known[0][0] is not None else known[::-1]
            first = 0 if slot is None else initial(slot)
            limit = None if first is None else first + more
            after = self._root(body)
            step = (
                self._affine(body, after.args[counter], None) if counter is not None and after.op == "tuple" else None
            )
            begin = initial(counter) if counter is not None else None
            if limit is not None and step and step[0] == counter and step[1]:
                count = (limit - offset - (begin or 0)) / step[1]
                inclusive = compare.attribute("direction") in ("LE", "GE")
                return max(0, math.floor(count) + 1 if inclusive else math.ceil(count))
        if self.unknown_trips is not None:
            return self.unknown_trips
        raise ValueError(f"the trip count of {body} is not in the program")

    def _affine(self, name: str, value: str, bound: dict | None) -> tuple[int | None, int] | None:
        """A scalar as (slot, n): an element of the loop's state plus n, or the constant n if slot is None.

        `bound` holds the values of a fusion's parameters; None: the only parameter is the loop's state.
        """
        one = self.computations[name].get(value)
        if one is None:
            return None
        if one.op == "constant":
            return (None, int(one.inside)) if re.fullmatch(r"-?\d+", one.inside.strip()) else None
        if one.op == "parameter":
            return (bound or {}).get(int(one.inside))
        if one.op == "get-tuple-element":
            source = self.computations[name].get(one.args[0])
            known = source is not None and source.op == "parameter" and bound is None
            return (int(one.attribute("index")), 0) if known else None
        if one.op in ("copy", "convert", "bitcast", "reshape"):
            return self._affine(name, one.args[0], bound)
        values = [self._affine(name, a, bound) for a in one.args]
        if one.op == "fusion":
            return self._affine(one.calls, self._root(one.calls).name, dict(enumerate(values)))
        terms = [value for value in values if value is not None]
        if one.op in ("add", "subtract") and len(terms) == len(values):
            (p, x), (q, y) = terms
            if one.op == "add" and None in (p, q):
                return (q if p is None else p, x + y)
            if one.op == "subtract" and q is None:
                return (p, x - y)
        return None

    def _root(self, name: str) -> Instruction:
        return next(one for one in self.computations[name].values() if one.is_root)

    # ------------------------------------------------------------ floating-point operations

    @functools.cache  # noqa: B019
    def _flops_within(self, name: str) -> float:
        return sum(self._flops(name, one) for one in self.computations.get(name, {}).values() if one.op != "while")

    def _flops(self, name: str, one: Instruction) -> float:
        if one.op in ("fusion", "async-start"):
            return self._flops_within(one.calls) if one.calls else 0
        if one.op == "custom-call" and "tpu_custom_call" in one.attributes:
            return self._kernel_flops(name, one)
        operands = [self.computations[name][a].out[0].dims for a in one.args[:2]] if one.op in _MATMULS else []
        if one.op == "dot":
            summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
            assert summed, one.attributes
            return 2 * math.prod(one.out[0].dims) * math.prod(operands[0][int(d)] for d in summed[1].split(",") if d)
        if one.op == "convolution":
            return 2 * _multiplications(one, *operands)
        return 0

    def _kernel_flops(self, name: str, one: Instruction) -> float:
        """FLOPs of a splash attention kernel of JAX's: the matmuls of the blocks that a causal mask keeps.

        Raises:
          ValueError: another kernel.
        """
        found = re.match(r"splash_m[hq]a_(fwd|dkv|dq)", one.name)
        if not found:
            raise ValueError(f"{one.name}: the FLOPs of this kernel are unknown")
        phase = found[1]
        products = {"fwd": 2, "dkv": 4, "dq": 3}[phase]
        operands = parse_shapes(one.attributes.split("operand_layout_constraints={")[1].split("}}")[0])
        (*many, Q, N), (*_, S, _) = [s.dims for s in operands if s.dtype in FLOATS and len(s.dims) > 2][:2]
        blocks = {}
        for side in ("q", "kv"):
            found = re.search(rf'block_{side}{"" if phase == "fwd" else "_" + phase}\\*": (\d+)', one.attributes)
            assert found, one.attributes
            blocks[side] = int(found[1])
        seen = [math.ceil((S - Q + end) / blocks["kv"]) for end in range(blocks["q"], Q + 1, blocks["q"])]
        return products * 2 * math.prod(many) * N * blocks["q"] * blocks["kv"] * sum(seen)

    # ------------------------------------------------------------ between chips

    def _collective(self, name: str, one: Instruction, chains: set[str]) -> tuple[str, float] | None:
        """The kind of a collective and the bytes that each chip sends for it; None for other instructions.

        A fusion may contain a collective, or one stage of an asynchronous one, whose stages share a `chain_id`.
        """
        found = self._direct_collective(name, one)
        if found or one.op not in ("fusion", "async-start") or one.calls not in self.computations:
            return found
        for inner in self.computations[one.calls].values():
            found = self._direct_collective(one.calls, inner)
            if not found:
                continue
            chain = re.search(r'chain_id="(\d+)"', inner.attributes)
            if chain and chain[1] in chains:
                return None
            chains |= {chain[1]} if chain else set()
            if found[0] == "all-reduce" and sum(s.bytes for s in one.out) < sum(s.bytes for s in inner.out):
                return "reduce-scatter", found[1] / 2  # each chip keeps its shard
            return found
        return None

    def _direct_collective(self, name: str, one: Instruction) -> tuple[str, float] | None:
        offloaded = one.op == "custom-call-update"  # to the SparseCore: operands are ([operand], result, scratch)
        kind = next((k for k in KINDS if one.op in (k, f"{k}-start") or (offloaded and one.name.startswith(k))), None)
        if kind is None:
            return None
        size = sum(s.bytes for a in one.args[offloaded:] for s in self.computations[name][a].out)
        n = self._group(one)
        if offloaded and kind == "all-gather":
            n = max(1, round(one.out[1].bytes / size))
        share = (n - 1) / n
        sent = {"all-gather": n - 1, "all-reduce": 2 * share, "collective-permute": 1}.get(kind, share)
        return kind, size * sent

    def _group(self, one: Instruction) -> int:
        """The number of chips in each group of a collective."""
        if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", one.attributes):
            sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", found[1]))
            return math.prod(int(sizes[a]) for a in re.findall(r"'([\w.]+)'", found[2]) if a in sizes)
        if found := re.search(r"replica_groups=\{\{([\d,]+)\}", one.attributes):
            return found[1].count(",") + 1
        if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", one.attributes):
            return int(found[2])
        return self.chips

    # ------------------------------------------------------------ HBM

    def _hbm_bytes(self, name: str, one: Instruction) -> float:
        """Bytes that an operation reads and writes at its edges: for a slice or an update, only the part concerned."""
        if one.op in _FREE or one.op.endswith(("-update", "-done")):
            return 0
        inputs = [self.computations[name][a].out for a in one.args]
        if one.op in ("copy-start", "slice-start"):
            moved = [s.bytes for s in one.out if s.bytes > 64]
            return min(inputs[0][0].bytes, min(moved, default=0))
        if one.op == "async-start" and (root := self._root(one.calls)).op in (*_PARTS, "dynamic-update-slice"):
            return dict(self._updates(one.calls, root)).get(root.out[0].dims, root.out[0].bytes)
        if one.op.endswith("-start") or (one.op == "custom-call" and "tpu_custom" not in one.attributes):
            return 0
        read = sum(
            self._bytes_read_by(one, i, shapes[0].bytes, is_outer=True)
            for i, shapes in enumerate(inputs)
            if shapes and shapes[0].in_hbm
        )
        updates = dict(self._updates(name, one))
        return read + sum(updates.get(s.dims, s.bytes) for s in one.out if s.in_hbm)

    def _updates(self, name: str, one: Instruction) -> Iterator[tuple[tuple[int, ...], int]]:
        """For each dynamic-update-slice in an operation, the dimensions of the result and the bytes of the update."""
        if one.op == "dynamic-update-slice":
            yield one.out[0].dims, self.computations[name][one.args[1]].out[0].bytes
        elif one.op == "fusion":
            for inner in self.computations[one.calls].values():
                yield from self._updates(one.calls, inner)

    def _bytes_read_by(self, one: Instruction, i: int, whole: int, is_outer: bool = False) -> int:
        """Bytes that an operation reads of its argument `i`, of `whole`; 0 for an inner one that passes it on."""
        if i == 0 and one.op in _PARTS:
            return one.out[0].bytes
        if i == 0 and one.op == "dynamic-update-slice":
            return 0
        if one.op == "fusion":
            parameter = self._parameter(one, i)
            is_copy = is_outer and self._is_root(one.calls, parameter)
            return whole if is_copy else self._bytes_read(one.calls, parameter, whole)
        return whole

    def _bytes_read(self, name: str, value: str, whole: int) -> int:
        """Bytes of a value that the operations of a fused computation read."""
        total = 0
        for one in self.computations[name].values():
            for i, arg in enumerate(one.args):
                if arg != value or total >= whole:
                    continue
                passes = one.op == "fusion" and self._is_root(one.calls, self._parameter(one, i))
                if one.op == "bitcast" or passes:
                    total += self._bytes_read(name, one.name, whole)
                if one.op != "bitcast":
                    total += self._bytes_read_by(one, i, whole)
        return min(total, whole)

    def _parameter(self, fusion: Instruction, i: int) -> str:
        """The name of an argument within a fusion."""
        within = self.computations[fusion.calls].values()
        return next(one.name for one in within if one.op == "parameter" and int(one.inside) == i)

    def _is_root(self, name: str, value: str) -> bool:
        """Whether a computation returns a value, perhaps under another shape."""
        root = self._root(name)
        while root.op == "bitcast":
            root = self.computations[name][root.args[0]]
        return root.name == value


_MATMULS = ("dot", "convolution")
_PARTS = ("dynamic-slice", "slice", "gather")  # operations that read a part of their first operand
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("iota", "while", "call", "conditional"),
}  # fmt: skip


def _multiplications(one: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> int:
    """Multiplications of a convolution (on a TPU every matmul is one), without padding and the zeros of dilation."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    assert labels, one.attributes
    window = re.search(r"window=\{(.*?)\}", one.attributes)
    given = dict(re.findall(r"(\w+)=([\dx_\-]+)", window[1])) if window else {}

    def setting(key: str, dimension: int, default: str) -> int:
        return int(given[key].split("x")[dimension].split("_")[0] if key in given else default)

    left, right, out = labels.groups()
    count = lhs[left.index("b")] // int(one.attribute("batch_group_count") or 1)
    count *= rhs[right.index("o")] * rhs[right.index("i")]
    for d in range(sum(c.isdigit() for c in left)):
        n, k, outputs = lhs[left.index(str(d))], rhs[right.index(str(d))], one.out[0].dims[out.index(str(d))]
        pad, stride = setting("pad", d, "0"), setting("stride", d, "1")
        spread, step = setting("lhs_dilate", d, "1"), setting("rhs_dilate", d, "1")
        places = (y * stride + x * step - pad for y in range(outputs) for x in range(k))
        count *= sum(0 <= place <= (n - 1) * spread and place % spread == 0 for place in places)
    return count
