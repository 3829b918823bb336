"""Which slot a prompt gets, and how much of its prefix is there."""

import numpy as np

from infer.slots import MIN_COPY, SlotTable, common_prefix


def keys(*parts: tuple[int, int]) -> np.ndarray:
    """Keys made of runs: (first, length)."""
    return np.concatenate([np.arange(first, first + n) for first, n in parts]).astype(np.int64)


def give(table: SlotTable, prompt: np.ndarray, *, release: bool = True):
    """A prompt that is wholly computed in the slot that it gets."""
    place = table.find(prompt)
    table.take(place, "owner", prompt)
    place.slot.keys = prompt
    if release:
        table.release(place.slot)
    return place


def test_common_prefix():
    assert common_prefix(keys((0, 5)), keys((0, 3), (9, 4))) == 3
    assert common_prefix(keys((0, 5)), keys((0, 9))) == 5
    assert common_prefix(keys((0, 0)), keys((0, 9))) == 0


def test_the_next_turn_continues_in_its_slot():
    table = SlotTable(4)
    first = give(table, keys((0, 300)))
    give(table, keys((5000, 300)))
    again = give(table, keys((0, 300), (9000, 40)))
    assert again.slot is first.slot
    assert (again.reused, again.source) == (300, None)


def test_the_last_position_is_computed_in_any_case():
    table = SlotTable(2)
    first = give(table, keys((0, 300)))
    same = table.find(keys((0, 300)))
    assert (same.slot, same.reused) == (first.slot, 299)
    assert table.find(keys((0, 1))).reused == 0


def test_a_new_conversation_takes_the_slot_unused_for_longest():
    table = SlotTable(3)
    places = [give(table, keys((1000 * i, 200))) for i in range(1, 4)]
    assert [place.slot.index for place in places] == [0, 1, 2]
    give(table, keys((1000, 200), (9000, 10)))  # the first conversation goes on
    assert give(table, keys((50_000, 200))).slot is places[1].slot


def test_a_short_common_prefix_is_copied_and_leaves_the_conversation_alone():
    """Two conversations with one long system message."""
    table = SlotTable(2)
    first = give(table, keys((0, 100), (1000, 900)))
    second = table.find(keys((0, 100), (7000, 50)))
    assert second.slot is not first.slot
    assert (second.source, second.reused) == (first.slot, 100)


def test_a_prefix_of_a_running_answer_is_copied():
    table = SlotTable(2)
    first = give(table, keys((0, 500)), release=False)
    second = table.find(keys((0, 500), (9000, 5)))
    assert second.slot is not first.slot
    assert (second.source, second.reused) == (first.slot, 500)
    tiny = MIN_COPY - 1
    assert table.find(keys((0, tiny), (9000, 50))).source is None


def test_all_slots_in_use():
    table = SlotTable(1)
    give(table, keys((0, 10)), release=False)
    assert table.find(keys((0, 10))) is None


def test_nothing_is_copied_between_shards():
    table = SlotTable(4, shards=2)
    long = keys((0, 500))
    assert [give(table, keys((i, 100)), release=False).slot.index for i in (3000, 4000)] == [0, 2]
    table.slots[0].keys = long
    place = table.find(keys((0, 500), (1, 1)))
    assert (place.slot.index, place.source, place.reused) == (1, table.slots[0], 500)
    table.slots[1].owner = "owner"  # the first shard is full
    place = table.find(keys((0, 500), (1, 1)))
    assert (place.slot.index, place.source, place.reused) == (3, None, 0)


def test_prompts_are_spread_over_shards():
    """Shards prefill at the same time; a long prefix is worth a slot where it is."""
    table = SlotTable(8, shards=4)
    places = [give(table, keys((1000 * i, 200)), release=False) for i in range(1, 5)]
    assert [table.shard(place.slot) for place in places] == [0, 1, 2, 3]
    shared = table.find(keys((3000, 200), (1, 1)))
    assert (table.shard(shared.slot), shared.source, shared.reused) == (2, places[2].slot, 200)


def test_random_prompts_never_reuse_what_is_not_there():
    random, table = np.random.default_rng(0), SlotTable(5)
    running = []
    for _ in range(2000):
        if running and random.random() < 0.5:
            table.release(running.pop(int(random.integers(len(running)))))
        prompt = keys(*((int(random.integers(3)) * 1000, int(random.integers(1, 200))) for _ in range(3)))
        if (place := table.find(prompt)) is None:
            assert len(running) == 5
            continue
        holder = place.source or place.slot
        assert (holder.keys[: place.reused] == prompt[: place.reused]).all()
        assert place.reused < len(prompt)
        assert place.slot.owner is None
        table.take(place, "owner", prompt)
        place.slot.keys = prompt[: int(random.integers(place.reused, len(prompt) + 1))]
        running.append(place.slot)
