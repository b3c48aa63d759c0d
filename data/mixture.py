"""How many tokens of each part a run sees, phase by phase, planned before it starts and whenever the plan changes.

A part is the text of one source in one language, named `de/wiki`. A rule gives the shares of languages; within a
language, sources share by tokens times their factor. No text is shown more often than `max_epochs`, earlier phases
included, unless the config says so in words.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.enums import MixtureRule
from configs.errors import UserError, raise_together
from configs.text import MixtureConfig, PhaseConfig
from data.order import CYCLE, Phase, by_language
from ledger.pages import render

Array = NDArray[Any]

_EXACT = 1e-9  # relative error within which a cap is kept


@dataclass(frozen=True)
class Row:
    """One part in one phase, as the order draws it."""

    part: str
    available_tokens: int
    slots: int  # of `CYCLE`
    share: float
    tokens: int  # tokens planned, repetitions counted
    epochs: float  # how often the run will have seen the part by the end of the phase
    cap: str
    """`capped` where UniMax held it at max_epochs, `over` where it is seen more often, `small` where it is left out
    since one slot would already show it more often; else empty."""


@dataclass(frozen=True)
class Mixture:
    """The plan of one phase: a row for each part, sorted by name."""

    from_position: int
    from_tokens: int
    rule: str
    rows: list[Row]
    unspent_tokens: int  # tokens of the phase for which no part has text left within max_epochs

    @property
    def phase(self) -> Phase:
        """What the order needs of it."""
        return Phase(self.from_position, {row.part: row.slots for row in self.rows if row.slots})


def plan_phases(
    phases: Sequence[Phase],
    cfg: MixtureConfig,
    tokens_by_part: Mapping[tuple[str, str], int],
    *,
    position: int,
    end_position: int,
    seq_len: int,
) -> tuple[list[Phase], list[Mixture]]:
    """The phases with which a run goes on at `position`, and the plans of the current one and those to come.

    `phases` are those so far, none at a start; `tokens_by_part` is the text there is, by language and source. Where
    `cfg` still plans the phase that was running, that one goes on; else another begins at `position`. What has not
    begun is planned anew. Raises `UserError` where `cfg` names what is not there or a part would be seen more often
    than `max_epochs`; with `allow_more_epochs` the plan goes on and the table says so.
    """
    available = {"/".join(part): n for part, n in sorted(tokens_by_part.items())}
    # A phase that begins here or later has drawn nothing yet.
    begun = [phase for phase in phases if phase.from_position < position]
    before, start = begun, position
    if begun:
        running = begun[-1].from_position
        mixtures, _ = _plan(begun[:-1], running, cfg, available, end_position, seq_len)
        if mixtures[0].phase == begun[-1] and not any(running < m.from_position < position for m in mixtures):
            before, start = begun[:-1], running
    mixtures, refusals = _plan(before, start, cfg, available, end_position, seq_len)
    raise_together(refusals)
    return [*before, *(mixture.phase for mixture in mixtures)], mixtures


def language_rows(mixtures: Sequence[Mixture]) -> list[dict[str, Any]]:
    """All phases together by language, in the words of `Row`; of caps the one that all its parts share at the end."""
    tokens: Counter[str] = Counter()
    for mixture in mixtures:
        tokens.update(by_language({row.part: row.tokens for row in mixture.rows}))
    found = []
    for lang, planned in sorted(tokens.items()):
        own = [row for row in mixtures[-1].rows if row.part.startswith(f"{lang}/")]
        n, caps = sum(row.available_tokens for row in own), {row.cap for row in own}
        epochs = sum(row.epochs * row.available_tokens for row in own) / n
        row = {"language": lang, "available_tokens": n, "share": planned / tokens.total(), "tokens": planned}
        found.append(row | {"epochs": epochs, "cap": caps.pop() if len(caps) == 1 else ""})
    return found


def table(mixtures: Sequence[Mixture]) -> str:
    """The plan as text: share, tokens, epochs and cap of each part, phase by phase."""
    width = max(len(row.part) for row in mixtures[0].rows)
    return render(Path(__file__).with_name("mixture.txt.j2"), mixtures=mixtures, width=width).rstrip()


class _Stock:
    """The text that a phase finds: arrays over `parts`. Raises `UserError` where `cfg` names what is not there."""

    def __init__(self, cfg: PhaseConfig, name: str, available: Mapping[str, int], seen: Mapping[str, float]) -> None:
        languages, sources = zip(*(part.split("/") for part in available), strict=True)
        factors = [cfg.sources.get(source, 1.0) for source in sources]
        if not any(factors):
            found = f"{name}.sources = {cfg.sources}"
            raise UserError(found, "some text has to be drawn", "give a source a factor above 0")
        drawn = [lang for lang, factor in zip(languages, factors, strict=True) if factor]
        for setting, known in {"weights": drawn, "sources": sources, "max_epochs_of": sources}.items():
            if unknown := sorted(getattr(cfg, setting).keys() - set(known)):
                rule = f"the corpus has training text in {', '.join(sorted(set(known)))}"
                repair = f"take them out of {name}.{setting}, or add a source"
                raise UserError(f"{name}.{setting} names {', '.join(unknown)}", rule, repair)
        self.parts = list(available)
        self.tokens: Array = np.array(list(available.values()), np.float64)
        self.weight = self.tokens * factors  # for the share within the language
        self.max_epochs: Array = np.array([cfg.max_epochs_of.get(source, cfg.max_epochs) for source in sources])
        self.seen: Array = np.array([seen.get(part, 0.0) for part in available])  # tokens shown before
        self.room: Array = np.maximum(self.max_epochs * self.tokens - self.seen, 0.0)  # tokens that may yet be shown

    def epochs(self, tokens: Array) -> Array:
        """How often each part has been shown after so many tokens more."""
        return (self.seen + tokens) / self.tokens


def _plan(
    before: Sequence[Phase], start: int, cfg: MixtureConfig, available: Mapping[str, int], end: int, seq_len: int
) -> tuple[list[Mixture], list[UserError]]:
    """The mixtures from position `start` on, one after another, and what speaks against them."""
    begins = [0, *(-(-phase.from_tokens // seq_len) for phase in cfg.phases), max(end, start + 1)]
    names = ["mixture", *(f"mixture.phases.{k}" for k in range(len(cfg.phases)))]
    end_names = [*(f"{name}.from_tokens" for name in names[1:]), "train.tokens"]
    phases, mixtures = list(before), list[Mixture]()
    refusals: list[UserError] = []
    for rule, name, end_name, (begin, stop) in zip([cfg, *cfg.phases], names, end_names, pairwise(begins), strict=True):
        begin, stop = max(begin, start), min(stop, begins[-1])
        if begin >= stop:
            continue
        stock, n_tokens = _Stock(rule, name, available, _seen(phases, begin, seq_len)), (stop - begin) * seq_len
        wanted, unspent = _wanted(rule, stock, n_tokens)
        rows = _rows(rule, stock, wanted, n_tokens / CYCLE)
        mixtures.append(Mixture(begin, begin * seq_len, rule.rule.value, rows, unspent))
        phases.append(mixtures[-1].phase)
        refusals += _refusals(rule, name, end_name, stock, wanted, begin, seq_len)
    return mixtures, refusals


def _seen(phases: Sequence[Phase], end: int, seq_len: int) -> dict[str, float]:
    """Tokens of each part that phases show before position `end`."""
    slots: Counter[str] = Counter()
    for phase, (begin, stop) in zip(phases, pairwise([*(p.from_position for p in phases), end]), strict=True):
        slots.update({part: n * (stop - begin) for part, n in phase.slots.items()})
    return {part: n * seq_len / CYCLE for part, n in slots.items()}


def _wanted(cfg: PhaseConfig, stock: _Stock, n_tokens: int) -> tuple[Array, int]:
    """Tokens of each part, `n_tokens` in all, and how many of them UniMax has no text for."""
    is_unimax, drawn = cfg.rule is MixtureRule.unimax, np.flatnonzero(stock.weight)
    languages, index = np.unique([stock.parts[i].split("/")[0] for i in drawn], return_inverse=True)
    room = stock.room[drawn] if is_unimax else np.full(len(drawn), math.inf)
    of_language: Array = np.array([cfg.weights.get(str(lang), 0.0) for lang in languages])
    if is_unimax:
        of_language = _fill(n_tokens, np.ones(len(languages)), np.bincount(index, room))
    elif cfg.rule is MixtureRule.temperature:
        # Python's power, not NumPy's, whose last bit depends on the processor.
        of_language = np.array([n**cfg.alpha for n in np.bincount(index, stock.tokens[drawn]).tolist()])
    wanted: Array = np.zeros(len(stock.parts))
    for k, total in enumerate(of_language):
        wanted[drawn[index == k]] = _fill(total, stock.weight[drawn[index == k]], room[index == k])
    unspent = round(n_tokens - wanted.sum()) if is_unimax else 0
    # A capped budget is spread over all that is planned: the run has its tokens whatever the plan leaves unspent.
    wanted = wanted if wanted.any() else stock.weight
    return wanted / wanted.sum() * n_tokens, unspent


def _fill(total: float, weight: Array, room: Array) -> Array:
    """Least room for its weight first, each its share of what is left, at most its room; equal weights: UniMax
    (arXiv 2304.09151)."""
    filled, by_room = np.zeros(len(weight)), np.argsort(room / weight, kind="stable")
    for at, of_all in zip(by_room, np.cumsum(weight[by_room][::-1])[::-1], strict=True):
        filled[at] = min(total * weight[at] / of_all, room[at])
        total -= filled[at]
    return filled


def _rows(cfg: PhaseConfig, stock: _Stock, wanted: Array, tokens_per_slot: float) -> list[Row]:
    room = np.full(len(wanted), math.inf) if cfg.allow_more_epochs else stock.room / tokens_per_slot
    slots = _slots(wanted / tokens_per_slot, room)
    tokens, wished, caps = slots * tokens_per_slot, stock.epochs(wanted), stock.max_epochs
    is_over = (wished > caps * (1 + _EXACT)) | (slots == 1) & (stock.room < tokens_per_slot)
    is_capped = (wished > caps * (1 - _EXACT)) & (cfg.rule is MixtureRule.unimax)
    words = np.where((wanted > 0) & (slots == 0), "small", np.where(is_over, "over", np.where(is_capped, "capped", "")))
    columns = stock.tokens.astype(int), slots, slots / CYCLE, np.rint(tokens).astype(int), stock.epochs(tokens), words
    return [Row(*row) for row in zip(stock.parts, *(column.tolist() for column in columns), strict=True)]


def _slots(wanted: Array, room: Array) -> Array:
    """Slots by largest remainder, one at least for what wants any; none above its room, unless none has any left."""
    slots = np.maximum(np.floor(wanted), (wanted > 0) & (room >= 1)).astype(np.int64)
    while (missing := CYCLE - int(slots.sum())) > 0:
        growing = (wanted > 0) & (slots + 1 <= room)
        growing = growing if growing.any() else slots > 0
        by_remainder = np.argsort(np.where(growing, slots - wanted, math.inf), kind="stable")
        slots[by_remainder[: min(missing, growing.sum())]] += 1
    for _ in range(-missing):
        slots[np.argmax(slots)] -= 1
    return slots


def _refusals(
    cfg: PhaseConfig, name: str, end_name: str, stock: _Stock, wanted: Array, begin: int, seq_len: int
) -> Iterator[UserError]:
    # What was seen too often before and is not planned any more cannot be mended.
    times, n_tokens = stock.epochs(wanted), round(wanted.sum())
    over = np.flatnonzero((wanted > 0) & (times > stock.max_epochs * (1 + _EXACT)))
    if cfg.allow_more_epochs or not len(over):
        return
    # In whole sequences, with which another phase begins; the product of a quotient may fall short by a rounding error.
    fitting = math.floor((stock.room[over] / wanted[over]).min() * n_tokens * (1 + _EXACT) / seq_len)
    shorter = f"{end_name}={(begin + fitting) * seq_len} or less, " if fitting else ""
    worst = over[np.argmax(times[over])]
    source = stock.parts[worst].split("/")[1]
    setting = f"{name}.max_epochs_of.{source}" if source in cfg.max_epochs_of else f"{name}.max_epochs"
    shown = ", ".join(f"{stock.parts[i]} {times[i]:.2f} times" for i in over)
    other = "" if cfg.rule is MixtureRule.unimax else f"{name}.rule=unimax, "
    found = f"{end_name} = {begin * seq_len + n_tokens} under {name}.rule = {cfg.rule.value} would show {shown}"
    higher = f"{setting}={math.ceil(times[worst] * (1 - _EXACT))}, or {name}.allow_more_epochs=true"
    yield UserError(found, f"{setting} = {stock.max_epochs[worst]:g}", f"{other}{shorter}more text, {higher}")
