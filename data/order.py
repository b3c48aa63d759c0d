"""Which sample stands at position i: arithmetic on i alone, without a scan, a list or a state.

The unit is a part: the text of one source in one language, named `de/wiki`. Parts are interleaved in a cycle of 2**18
positions that holds each part's slots, evenly spread. The o-th visit to a part of n sequences is in epoch o // n, and
within an epoch a keyed permutation, computed and not stored, visits every sequence once. So ranks, workers and
restarts cannot change the order, and starting at any position costs the same.

Shares change with the phases: each begins a cycle anew at its first position, every part goes on with the visit at
which it stood, and all earlier positions stay what they were.
"""

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.minhash import mix

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

CYCLE = 2**18  # slots of a cycle, one a position: the least share is one in so many

ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Stream:
    """One part as the order sees it."""

    part: str
    n_sequences: int
    content_hash: str
    """Hash of its tokens and of how they are put into sequences: part of every sample id, so that other text is
    another sample."""


@dataclass(frozen=True)
class Phase:
    """The mixture from a position on; goes through JSON unchanged."""

    from_position: int
    slots: dict[str, int]  # by part, `CYCLE` in all; a part without slots is not drawn


class Located(NamedTuple):
    """Samples at some positions: arrays of int64 alike in shape."""

    part: I64  # index into the streams
    sequence: I64  # sequence within the part
    epoch: I64
    sample_id: I64  # 64 bits that stand for part, content, sequence and epoch


class Order:
    """The order of a run; raises `ValueError` for phases that do not follow from 0 on, or whose cycle is not filled."""

    def __init__(self, streams: Sequence[Stream], seed: int, phases: Sequence[Phase]) -> None:
        starts = [phase.from_position for phase in phases]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise ValueError(f"phases begin at 0, and each after the one before; these begin at {starts}")
        self.parts = [s.part for s in streams]
        self._n = np.array([s.n_sequences for s in streams], np.uint64)
        self._keys = np.array([_hash64(f"order/{seed}/{s.part}") for s in streams], np.uint64)
        self._identities = np.array([_hash64(f"sample/{s.part}/{s.content_hash}") for s in streams], np.uint64)
        # One row a phase, and one column a part or a position of the cycle.
        self._starts = np.array(starts, np.uint64)
        self._slots = np.array([[phase.slots.get(part, 0) for part in self.parts] for phase in phases], np.uint64)
        if any(self._slots.sum(axis=1) != CYCLE):
            raise ValueError(f"the parts {self.parts} have {self._slots.sum(axis=1)} slots in cycles of {CYCLE}")
        cycles = [_interleave(slots, self._keys) for slots in self._slots]
        self._pattern, self._rank = map(np.stack, zip(*cycles, strict=True))
        self._visits = np.zeros_like(self._slots)
        for k, start in enumerate(starts):
            self._visits[k] = list(self.visits(start).values())

    def locate(self, positions: ArrayLike) -> Located:
        """The samples at `positions`, an array of whole numbers from 0."""
        i = np.asarray(positions, np.uint64)
        phase = np.searchsorted(self._starts, i, "right") - 1
        since = i - self._starts[phase]
        cycle, r = since // np.uint64(CYCLE), since % np.uint64(CYCLE)
        part = self._pattern[phase, r].astype(np.int64)
        n = self._n[part]
        ordinal = self._visits[phase, part] + cycle * self._slots[phase, part] + self._rank[phase, r]
        epoch = ordinal // n
        sequence = permute(ordinal % n, n, mix(self._keys[part] + epoch * np.uint64(_GOLDEN)))
        sample_id = mix(mix(self._identities[part] + sequence) + epoch * np.uint64(_GOLDEN))
        return Located(part, sequence.view(np.int64), epoch.view(np.int64), sample_id.view(np.int64))

    def visits(self, position: int) -> dict[str, int]:
        """Sequences of each part that stand before `position`; costs the same for any position."""
        phase = max(bisect_left(self._starts.tolist(), position) - 1, 0)  # the one before, at the start of another
        cycles, r = divmod(position - int(self._starts[phase]), CYCLE)
        begun = np.bincount(self._pattern[phase, :r], minlength=len(self.parts)).astype(np.uint64)
        visited = self._visits[phase] + np.uint64(cycles) * self._slots[phase] + begun
        return dict(zip(self.parts, visited.tolist(), strict=True))


class OrderHash:
    """Proof of what was consumed: a sum over samples, so that portions of it add up in any order.

    `state` is int64[2 + parts]: two lanes of a 128-bit sum over hashes of (position, sample), then the tokens consumed
    of each part. The sum of all ranks' states is the state of the run, for any number of ranks.
    """

    def __init__(self, n_parts: int) -> None:
        self.state: I64 = np.zeros(2 + n_parts, np.int64)

    def add(self, positions: ArrayLike, sample_ids: ArrayLike, parts: ArrayLike, tokens_per_sample: int) -> None:
        """Counts samples in: arrays of int64 alike in shape, or tensors on the CPU."""
        place, sample = (np.asarray(x, np.int64).ravel().view(np.uint64) for x in (positions, sample_ids))
        for lane in range(2):
            mixed = mix(mix(place + np.uint64(_GOLDEN * (lane + 1) % 2**64)) ^ sample)
            # A slice, since numpy warns of the overflow of a scalar; the sum is meant to wrap.
            self.state[lane : lane + 1] += mix(mixed).sum(dtype=np.uint64, keepdims=True).view(np.int64)
        counts = np.bincount(np.asarray(parts, np.int64).ravel(), minlength=len(self.state) - 2)
        self.state[2:] += counts * tokens_per_sample

    @property
    def hex(self) -> str:
        """The 128 bits as hexadecimal digits."""
        return "".join(f"{int(lane) % 2**64:016x}" for lane in self.state[:2])


def by_language(of_parts: Mapping[str, int]) -> dict[str, int]:
    """Sums over sources of what is known by part, sorted."""
    return _sums(of_parts, 0)


def by_source(of_parts: Mapping[str, int]) -> dict[str, int]:
    """Sums over languages of what is known by part, sorted."""
    return _sums(of_parts, 1)


def unskipped(k: ArrayLike, skipped: Sequence[Sequence[int]]) -> I64:
    """The k-th position, from 0, that lies in none of `skipped`: sorted, disjoint [start, end); shaped like `k`."""
    k, (starts, ends) = np.asarray(k, np.int64), np.array(skipped, np.int64).reshape(-1, 2).T
    gone = np.concatenate([[0], np.cumsum(ends - starts)])
    # starts - gone: how many positions are left before each interval.
    return np.asarray(k + gone[np.searchsorted(starts - gone[:-1], k, "right")], np.int64)


def permute(index: U64, n: U64, key: U64) -> U64:
    """For each key a permutation of 0 … n - 1, taken at `index`; arrays of uint64 alike in shape, index < n.

    A Feistel network on pairs (a, b) with a, b < ceil(sqrt(n)), repeated where it leads outside (cycle walking;
    Black and Rogaway, "Ciphers with Arbitrary Finite Domains"). It nearly never repeats: the square is at most
    2 sqrt(n) + 1 larger than n.
    """
    side = np.ceil(np.sqrt(n.astype(np.float64))).astype(np.uint64)
    side += side * side < n  # the root of a large number may be rounded down
    found = _feistel(index, side, key)
    while (outside := found >= n).any():
        found[outside] = _feistel(found[outside], side[outside], key[outside])
    return found


def _sums(of_parts: Mapping[str, int], side: int) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for part, n in of_parts.items():
        sums[part.split("/")[side]] += n
    return dict(sorted(sums.items()))


def _feistel(index: U64, side: U64, key: U64) -> U64:
    left, right = index // side, index % side
    for key_of_round in mix(np.add.outer(np.arange(ROUNDS, dtype=np.uint64), key)):
        turn = mix(right ^ key_of_round) % side
        left, right = right, (left + turn) % side
    return left * side + right


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _interleave(slots: U64, keys: U64) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
    """Part of each position of a cycle, and how many of its slots came before."""
    shifts = (mix(keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    # Slot j of q stands at (j + shift) / q: evenly spread, and parts of equal share are not in lockstep.
    times = np.concatenate([(np.arange(q) + shift) / q for q, shift in zip(slots, shifts, strict=True)])
    part = np.repeat(np.arange(len(slots), dtype=np.uint16), slots.astype(np.int64))
    rank = np.concatenate([np.arange(q, dtype=np.uint32) for q in slots])
    order = np.argsort(times, kind="stable")
    return part[order], rank[order]
