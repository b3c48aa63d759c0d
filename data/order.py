"""Which sample stands at position i: arithmetic on i alone, without a scan, a list or a state.

Languages are interleaved in a cycle of 2**18 positions that holds each language's share of slots, evenly
spread. The o-th visit to a language of n sequences is in epoch o // n, and within an epoch a keyed
permutation, computed and not stored, visits every sequence once. So ranks, workers and restarts cannot
change the order, and starting at any position costs the same.

Shares may change in mid-run: a further `Phase` begins a cycle anew at its first position, every language goes on with
the visit at which it stood, and all earlier positions stay what they were.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

CYCLE = 2**18
"""Positions after which the interleaving of languages repeats; the least share is one in so many."""

ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Stream:
    """One language as the order sees it."""

    language: str
    n_sequences: int
    content_hash: str
    """Hash of its tokens: part of every sample id, so that other text is another sample."""


@dataclass(frozen=True)
class Phase:
    """Shares of the languages from a position on; goes through JSON unchanged."""

    from_position: int
    shares: dict[str, float]
    """By language; one without a share is not drawn."""
    visits: dict[str, int]
    """Sequences of each language drawn before `from_position`; none in the first phase."""


class Located(NamedTuple):
    """Samples at some positions: arrays of int64 alike in shape."""

    language: I64
    """Index into the streams."""
    sequence: I64
    """Sequence within the language."""
    epoch: I64
    sample_id: I64
    """64 bits that stand for language, content, sequence and epoch."""


class Order:
    """The order of all samples of a run; raises `ValueError` where `phases` do not follow one another from 0 on."""

    def __init__(self, streams: Sequence[Stream], seed: int, phases: Sequence[Phase]) -> None:
        starts = [phase.from_position for phase in phases]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise ValueError(f"phases begin at 0, and each after the one before; these begin at {starts}")
        self.languages = [s.language for s in streams]
        self._n = np.array([s.n_sequences for s in streams], np.uint64)
        self._keys = np.array([_hash64(f"order/{seed}/{s.language}") for s in streams], np.uint64)
        self._identities = np.array([_hash64(f"sample/{s.language}/{s.content_hash}") for s in streams], np.uint64)
        # One row a phase, and one column a language or a position of the cycle.
        self._starts = np.array(starts, np.uint64)
        self._visits = np.array([[phase.visits.get(lang, 0) for lang in self.languages] for phase in phases], np.uint64)
        self._slots = np.stack([_slots([phase.shares.get(lang, 0.0) for lang in self.languages]) for phase in phases])
        cycles = [_interleave(slots, self._keys) for slots in self._slots]
        self._pattern = np.stack([pattern for pattern, _ in cycles])
        self._rank = np.stack([rank for _, rank in cycles])

    def locate(self, positions: ArrayLike) -> Located:
        """The samples at `positions`, an array of whole numbers from 0."""
        i = np.asarray(positions, np.uint64)
        phase, cycle, r = self._place(i)
        language = self._pattern[phase, r].astype(np.int64)
        n = self._n[language]
        ordinal = self._visits[phase, language] + cycle * self._slots[phase, language] + self._rank[phase, r]
        epoch = ordinal // n
        sequence = permute(ordinal % n, n, _mix(self._keys[language] + epoch * np.uint64(_GOLDEN)))
        sample_id = _mix(_mix(self._identities[language] + sequence) + epoch * np.uint64(_GOLDEN))
        return Located(language, sequence.view(np.int64), epoch.view(np.int64), sample_id.view(np.int64))

    def visits(self, position: int) -> dict[str, int]:
        """Sequences of each language that stand before `position`; costs the same for any position."""
        phase, cycle, r = (int(part) for part in self._place(np.uint64(position)))
        begun = np.bincount(self._pattern[phase, :r], minlength=len(self.languages)).astype(np.uint64)
        counts = self._visits[phase] + np.uint64(cycle) * self._slots[phase] + begun
        return dict(zip(self.languages, counts.tolist(), strict=True))

    def _place(self, i: Any) -> tuple[Any, Any, Any]:
        """Phase, cycle within it, and place in that cycle."""
        phase = np.searchsorted(self._starts, i, "right") - 1
        since = i - self._starts[phase]
        return phase, since // np.uint64(CYCLE), since % np.uint64(CYCLE)


class OrderHash:
    """Proof of what was consumed: a sum over samples, so that parts add up in any order.

    `state` is int64[2 + languages]: two lanes of a 128-bit sum over hashes of (position, sample), then the tokens
    consumed of each language. The sum of all ranks' states is the state of the run, for any number of ranks.
    """

    def __init__(self, n_languages: int) -> None:
        self.state: I64 = np.zeros(2 + n_languages, np.int64)

    def add(self, positions: ArrayLike, sample_ids: ArrayLike, languages: ArrayLike, tokens_per_sample: int) -> None:
        """Counts samples in: arrays of int64 alike in shape, or tensors on the CPU."""
        place, sample = (np.asarray(x, np.int64).ravel().view(np.uint64) for x in (positions, sample_ids))
        for lane in range(2):
            mixed = _mix(_mix(place + np.uint64(_GOLDEN * (lane + 1) % 2**64)) ^ sample)
            # A slice, since numpy warns of the overflow of a scalar; the sum is meant to wrap.
            self.state[lane : lane + 1] += _mix(mixed).sum(dtype=np.uint64, keepdims=True).view(np.int64)
        n_languages = len(self.state) - 2
        counts = np.bincount(np.asarray(languages, np.int64).ravel(), minlength=n_languages)
        self.state[2:] += counts * tokens_per_sample

    @property
    def hex(self) -> str:
        """The 128 bits as hexadecimal digits."""
        return "".join(f"{int(lane) % 2**64:016x}" for lane in self.state[:2])


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


def _feistel(index: U64, side: U64, key: U64) -> U64:
    left, right = index // side, index % side
    for number in range(ROUNDS):
        turn = _mix(right ^ _mix(key + np.uint64(number))) % side
        left, right = right, (left + turn) % side
    return left * side + right


def _mix(x: U64) -> U64:
    """A bijection of 64 bits in which every input bit moves every output bit (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _slots(shares: Sequence[float]) -> U64:
    """Slots of each language in a cycle: largest remainder, at least one for each with a share, CYCLE in all."""
    wanted = np.array(shares, np.float64) / sum(shares) * CYCLE
    slots = np.maximum(np.floor(wanted), wanted > 0).astype(np.int64)
    # Less than a slot is missing for each language with a remainder, so none without a share comes into one.
    by_remainder = np.argsort(-(wanted - slots), kind="stable")
    while (missing := CYCLE - int(slots.sum())) != 0:
        if missing > 0:
            slots[by_remainder[:missing]] += 1
        else:
            slots[np.argmax(slots)] -= 1
    return slots.astype(np.uint64)


def _interleave(slots: U64, keys: U64) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
    """Language of each position of a cycle, and how many of its slots came before."""
    shifts = (_mix(keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    # Slot j of q stands at (j + shift) / q: evenly spread, and languages of equal share are not in lockstep.
    times = np.concatenate([(np.arange(q) + shift) / q for q, shift in zip(slots, shifts, strict=True)])
    language = np.repeat(np.arange(len(slots), dtype=np.uint16), slots.astype(np.int64))
    rank = np.concatenate([np.arange(q, dtype=np.uint32) for q in slots])
    order = np.argsort(times, kind="stable")
    return language[order], rank[order]
