import json
import random
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import CYCLE, Order, OrderHash, Phase, Stream, by_language, by_source, permute, unskipped

SLOTS = {"de/web": 183_501, "fr/web": 76_022, "mt/web": 2_621}
START = Phase(0, SLOTS)


def order(*later: Phase, seed: int = 1, **changes: object) -> Order:
    streams = [Stream("de/web", 1000, "hash-de"), Stream("fr/web", 37, "hash-fr"), Stream("mt/web", 1, "hash-mt")]
    return Order([Stream(**(vars(s) | changes)) for s in streams], seed, [START, *later])  # type: ignore[arg-type]


ORDER = order()


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_an_epoch_visits_every_sequence_once(n: int, key: int) -> None:
    index = np.arange(n, dtype=np.uint64)
    visited = permute(index, np.full(n, n, np.uint64), np.full(n, key, np.uint64))
    assert sorted(visited.tolist()) == list(range(n))


@given(
    st.integers(2**30, 2**48), st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**30 - 1), min_size=2, unique=True)
)
def test_large_epochs_stay_within_bounds_and_collide_nowhere(n: int, key: int, indices: list[int]) -> None:
    index = np.array(indices, np.uint64)
    visited = permute(index, np.full(len(index), n, np.uint64), np.full(len(index), key, np.uint64))
    assert visited.max() < n and len(set(visited.tolist())) == len(indices)


def test_the_permutation_looks_like_chance() -> None:
    n = 10_000
    index, sizes = np.arange(n, dtype=np.uint64), np.full(n, n, np.uint64)
    first, second = (permute(index, sizes, np.full(n, key, np.uint64)).astype(float) for key in (1, 2))
    for a, b in ((index, first), (first, second), (first[:-1], first[1:])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05  # five standard deviations
    assert abs(np.mean(first[:100]) - n / 2) < 0.15 * n


def test_a_part_keeps_its_share_in_every_stretch() -> None:
    parts = ORDER.locate(np.arange(CYCLE)).part
    counts = np.bincount(parts)
    assert counts.tolist() == list(SLOTS.values())
    for size in (100, 1000, 12_345):
        for start in range(0, CYCLE - size, 30_011):
            seen = np.bincount(parts[start : start + size], minlength=3)
            assert np.all(np.abs(seen - size * counts / CYCLE) <= 2), "never off by more than a slot at either end"


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, CYCLE), min_size=1, max_size=40))
def test_every_part_has_its_slots_and_together_they_fill_the_cycle(cuts: list[int]) -> None:
    slots = np.diff([0, *sorted(cuts), CYCLE]).tolist()
    phase = Phase(0, {f"l{i}/web": n for i, n in enumerate(slots)})
    built = Order([Stream(part, 5, "") for part in phase.slots], 3, [phase])
    assert np.bincount(built.locate(np.arange(CYCLE)).part, minlength=len(slots)).tolist() == slots


def test_each_part_goes_through_its_epochs() -> None:
    located = ORDER.locate(np.arange(2 * CYCLE))
    for k, n in enumerate((1000, 37, 1)):
        mine = located.part == k
        sequences, epochs = located.sequence[mine], located.epoch[mine]
        for epoch in range(sequences.size // n):
            assert sorted(sequences[epoch * n : (epoch + 1) * n]) == list(range(n))
            assert set(epochs[epoch * n : (epoch + 1) * n]) == {epoch}
    fr = located.sequence[located.part == 1]
    assert not np.array_equal(fr[:37], fr[37:74]), "each epoch has its own order"


def test_a_position_is_located_alone_as_among_others() -> None:
    positions = np.array([0, 1, CYCLE - 1, CYCLE, 10**12, 7])
    together = ORDER.locate(positions)
    for i, position in enumerate(positions):
        assert [field[i] for field in together] == [field[0] for field in ORDER.locate([position])]


def test_the_order_is_fixed() -> None:
    """A change here breaks the resumption of every run that has begun."""
    located = ORDER.locate([0, 1, 2, 3, 262144, 10**9])
    assert located.part.tolist() == [0, 0, 1, 0, 0, 0]
    assert located.sequence.tolist() == [963, 299, 14, 763, 313, 290]
    assert located.epoch.tolist() == [0, 0, 0, 0, 183, 700000]
    assert located.sample_id[[0, -1]].tolist() == [2067114381525491682, 2318656671297311348]
    far = ORDER.locate([100, CYCLE - 1, CYCLE + 1, 3 * CYCLE + 77, 2**40 + 12345, 2**55 + 1])
    assert far.sequence.tolist() == [614, 389, 992, 540, 824, 805]
    assert far.epoch.tolist() == [0, 183, 183, 550, 769658986, 25220185401065]
    positions, consumed = np.arange(2 * CYCLE + 5000), OrderHash(3)
    located = ORDER.locate(positions)
    consumed.add(positions, located.sample_id, located.part, 64)
    assert consumed.hex == "bd3ad42753ecabc02e2df4168539e9ea"
    assert consumed.state[2:].tolist() == [23712128, 9823616, 338688]


CHANGES = [
    Phase(1000, {"de/web": 26_214, "fr/web": CYCLE - 26_214}),
    Phase(1001, {"fr/web": CYCLE}),
    Phase(CYCLE + 5, {"mt/web": CYCLE // 2, "fr/web": CYCLE // 4, "de/web": CYCLE // 4}),
    Phase(3 * CYCLE, {"de/web": CYCLE, "fr/web": 0}),
]
PHASED = order(*CHANGES)


def test_a_part_goes_on_where_it_was_when_the_shares_change() -> None:
    end = 4 * CYCLE
    found, alone = PHASED.locate(np.arange(end)), ORDER.locate(np.arange(8 * CYCLE))
    for k in range(2):
        mine, expected = found.part == k, alone.part == k
        n = mine.sum()
        assert np.array_equal(found.sample_id[mine], alone.sample_id[expected][:n]), "no visit left out, none repeated"
        assert np.array_equal(found.sequence[mine], alone.sequence[expected][:n])
    mt = found.part == 2
    assert found.epoch[mt].tolist() == list(range(mt.sum()))
    assert len(set(found.sample_id.tolist())) == end


def test_a_change_of_shares_leaves_what_is_past_and_holds_from_its_first_position() -> None:
    found, before = PHASED.locate(np.arange(4 * CYCLE)), ORDER.locate(np.arange(1000))
    assert all(np.array_equal(new[:1000], old) for new, old in zip(found, before, strict=True))
    assert set(found.part[1001 : CYCLE + 5]) == {1}, "parts without a slot are not drawn"
    assert set(found.part[3 * CYCLE :]) == {0}
    counts = np.bincount(found.part[CYCLE + 5 : 2 * CYCLE + 5])
    assert counts.tolist() == [CYCLE // 4, CYCLE // 4, CYCLE // 2]


@pytest.mark.parametrize("position", [0, 1, 999, 1000, 1001, 1002, 5000, CYCLE, CYCLE + 5, 2 * CYCLE + 9, 4 * CYCLE])
def test_visits_count_what_stands_before(position: int) -> None:
    expected = np.bincount(PHASED.locate(np.arange(position)).part, minlength=3).tolist()
    assert PHASED.visits(position) == dict(zip(SLOTS, expected, strict=True))


def test_visits_of_a_position_far_out() -> None:
    assert ORDER.visits(10**9 * CYCLE) == {part: n * 10**9 for part, n in SLOTS.items()}


def test_phases_go_through_json() -> None:
    phase = Phase(7, {"de/web": 4, "fr/web": CYCLE - 4})
    assert Phase(**json.loads(json.dumps(asdict(phase)))) == phase


@pytest.mark.parametrize("starts", [[], [5], [0, 0], [0, 9, 8]])
def test_phases_that_do_not_follow_one_another_are_refused(starts: list[int]) -> None:
    with pytest.raises(ValueError, match="phases begin at 0"):
        Order([Stream("de/web", 5, "")], 1, [Phase(start, {"de/web": CYCLE}) for start in starts])


@pytest.mark.parametrize("slots", [{"de/web": CYCLE - 1}, {"de/web": CYCLE, "fr/web": 1}, {"mt/web": CYCLE}])
def test_a_cycle_that_the_parts_do_not_fill_is_refused(slots: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="slots in cycles of 262144"):
        Order([Stream("de/web", 5, ""), Stream("fr/web", 5, "")], 1, [Phase(0, slots)])


def test_what_is_known_by_part_is_summed_by_language_and_source() -> None:
    known = {"fr/web": 4, "de/web": 2, "de/books": 1}
    assert list(by_language(known).items()) == [("de", 3), ("fr", 4)]
    assert list(by_source(known).items()) == [("books", 1), ("web", 6)]


LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6)


@given(LENGTHS)
def test_unskipped_lists_just_the_positions_that_are_not_skipped(lengths: list[tuple[int, int]]) -> None:
    skipped, end = [], 0
    for gap, length in lengths:
        skipped.append([end + gap, end + gap + length])
        end += gap + length
    expected = [i for i in range(end + 20) if not any(first <= i < last for first, last in skipped)]
    assert unskipped(np.arange(len(expected)), skipped).tolist() == expected
    assert [int(unskipped(k, skipped)) for k in range(len(expected))] == expected


@pytest.mark.parametrize("change", [{"seed": 2}, {"content_hash": "other"}])
def test_seed_and_content_are_part_of_it(change: dict[str, object]) -> None:
    here, there = ORDER.locate(np.arange(2000)), order(**change).locate(np.arange(2000))  # type: ignore[arg-type]
    assert not set(here.sample_id) & set(there.sample_id) or "seed" in change
    assert np.array_equal(here.sequence, there.sequence) == ("seed" not in change)


def test_sample_ids_are_unique() -> None:
    located = ORDER.locate(np.arange(2 * CYCLE))
    assert len(set(located.sample_id.tolist())) == 2 * CYCLE


def hash_of(positions: list[int], ids: list[int]) -> OrderHash:
    total = OrderHash(3)
    total.add(positions, ids, [0] * len(ids), 10)
    return total


def test_the_hash_tells_swaps_skips_and_repeats() -> None:
    ids = ORDER.locate(np.arange(64)).sample_id.tolist()
    whole = hash_of(list(range(64)), ids).hex
    rng = random.Random(0)
    seen = {whole}
    for _ in range(200):
        a, b = rng.sample(range(64), 2)
        swapped = list(ids)
        swapped[a], swapped[b] = ids[b], ids[a]
        skipped = [i for i in range(64) if i != a]
        repeated = [ids[a] if i == b else ids[i] for i in range(64)]
        assert hash_of(list(range(64)), swapped).hex not in seen
        assert hash_of(skipped, [ids[i] for i in skipped]).hex not in seen
        assert hash_of(list(range(64)), repeated).hex not in seen
        assert hash_of([*range(64), a], [*ids, ids[a]]).hex not in seen


@given(st.permutations(range(40)), st.integers(1, 7))
def test_parts_of_the_hash_add_up_in_any_order(positions: list[int], n_ranks: int) -> None:
    located = ORDER.locate(positions)
    whole, total = OrderHash(3), OrderHash(3)
    all_at_once = ORDER.locate(np.arange(40))
    whole.add(np.arange(40), all_at_once.sample_id, all_at_once.part, 16)
    for rank in range(n_ranks):
        part, mine = OrderHash(3), slice(rank, None, n_ranks)
        part.add(np.array(positions)[mine], located.sample_id[mine], located.part[mine], 16)
        total.state += part.state
    assert total.hex == whole.hex and len(total.hex) == 32
    assert total.state.tolist() == whole.state.tolist()
    assert total.state[2:].tolist() == (np.bincount(located.part, minlength=3) * 16).tolist()
