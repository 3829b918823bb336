"""Which slot of the KV cache a prompt gets, and how much of its prefix is there already (host only).

A slot keeps what it holds after its answer has ended, until another prompt takes it. A prompt that begins as one of
them does, the next turn of a conversation for example, is only computed from where they differ.
"""

import collections
import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np

MIN_COPY = 64  # positions in common that are worth a copy from another slot


@dataclasses.dataclass
class Slot:
    """A slot; `keys` (as `Prompt.keys`) are those of the positions that it holds."""

    index: int
    owner: Any = None  # the generation that uses it
    keys: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    used: int = 0  # when it was last taken


@dataclasses.dataclass(frozen=True)
class Place:
    """A slot for a prompt, whose first `reused` positions are there, or are to be copied from `source`."""

    slot: Slot
    reused: int
    source: Slot | None = None


class SlotTable:
    """The slots, in `shards` groups of equal size. A copy stays within a group."""

    def __init__(self, slots: int, shards: int = 1):
        self.slots = [Slot(i) for i in range(slots)]
        self.per_shard = slots // shards
        self._time = 0

    def shard(self, slot: Slot) -> int:
        return slot.index // self.per_shard

    def find(self, keys: np.ndarray) -> Place | None:
        """The best slot for a prompt; None if all are in use.

        The slot that holds most of the prompt is continued, if the prompt has at least half of what it holds; otherwise
        the prompt gets the slot unused for longest, and what another slot of its group holds is copied. Where nothing
        is worth a copy, it is a slot of the group with the fewest answers, since groups prefill at the same time.
        """
        free = [slot for slot in self.slots if slot.owner is None]
        if not free:
            return None
        room = len(keys) - 1  # the last position is computed in any case: its output is the first token
        common = {slot.index: min(common_prefix(slot.keys, keys), room) for slot in self.slots}
        best = max(free, key=lambda slot: common[slot.index])
        if common[best.index] > 0 and 2 * common[best.index] >= len(best.keys):
            longest = max(common.values())
            if common[best.index] >= longest or longest < MIN_COPY:
                return Place(best, common[best.index])
        groups = {self.shard(slot) for slot in free}
        source = max((slot for slot in self.slots if self.shard(slot) in groups), key=lambda slot: common[slot.index])
        copies = common[source.index] >= MIN_COPY
        if copies:
            free = [slot for slot in free if self.shard(slot) == self.shard(source)]
        answers = collections.Counter(self.shard(slot) for slot in self.slots if slot.owner is not None)
        oldest = min(free, key=lambda slot: (len(slot.keys) > 0, answers[self.shard(slot)], slot.used))
        if copies and source is not oldest:
            return Place(oldest, common[source.index], source)
        return Place(oldest, common[oldest.index])

    def some(self, used: Collection[int], count: int) -> np.ndarray | None:
        """The numbers of `count` slots, those that are `used` first; None for all slots."""
        if count == len(self.slots):
            return None
        others = [slot.index for slot in self.slots if slot.index not in used]
        return np.array([*used, *others[: count - len(used)]], np.int32)

    def take(self, place: Place, owner: Any, keys: np.ndarray) -> None:
        """Give a slot to a generation with a prompt of `keys`."""
        self._time += 1
        place.slot.owner, place.slot.used = owner, self._time
        place.slot.keys = keys[: place.reused]

    def release(self, slot: Slot) -> None:
        """The slot's answer has ended; what it holds stays until it is taken again."""
        self._time += 1
        slot.owner, slot.used = None, self._time


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """The number of equal elements at the beginning of two arrays."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
