"""How many tokens of each language a run sees, planned before it starts and whenever the plan changes.

A language is never repeated more often than `mixture.max_epochs` unless the config says so in words.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from configs.enums import MixtureRule
from configs.errors import UserError
from configs.text import MixtureConfig
from data.order import Phase


@dataclass(frozen=True)
class Row:
    """One language of a mixture."""

    language: str
    available_tokens: int
    share: float
    """Of all tokens planned; shares sum to 1."""
    tokens: int
    """Tokens planned, repetitions counted."""
    epochs: float
    """How often the run sees the language's text, with what it saw before this plan."""
    cap: str
    """`capped` where UniMax held it at max_epochs, `over` where it is seen more often, else empty."""


@dataclass(frozen=True)
class Mixture:
    """The plan: one row a language, sorted by name."""

    rows: list[Row]
    unspent_tokens: int
    """Tokens of the budget for which no language has text left within max_epochs."""

    @property
    def shares(self) -> dict[str, float]:
        """Share by language, without languages that have none."""
        return {row.language: row.share for row in self.rows if row.share > 0}


def plan_mixture(
    tokens_by_language: Mapping[str, int],
    cfg: MixtureConfig,
    total_tokens: int,
    seen: Mapping[str, int] | None = None,
) -> Mixture:
    """Shares of the languages for `total_tokens` more, after the tokens of each language that were `seen` before.

    Raises `UserError` where weights name languages that are not there, or a language would be seen more than
    `max_epochs` times. With `allow_more_epochs` the plan goes on and the table says so.
    """
    mixture = _plan(tokens_by_language, cfg, total_tokens, seen or {})
    if not cfg.allow_more_epochs:
        _refuse_repetition(mixture, cfg, total_tokens, seen or {})
    return mixture


def plan_phases(
    phases: Sequence[Phase],
    drawn: Mapping[str, int],
    cfg: MixtureConfig,
    tokens_by_language: Mapping[str, int],
    *,
    position: int,
    end_position: int,
    seq_len: int,
) -> tuple[list[Phase], Mixture]:
    """The phases with which a run goes on at `position`, and the plan of the last one, up to `end_position`.

    `phases` are those so far, none at a start, and `drawn` the sequences of each language before `position`. Where
    `cfg` plans the shares of the phase that was running, that phase goes on; else one more begins at `position`.
    Raises `UserError` as `plan_mixture` does.
    """
    # A phase that begins here or later has drawn nothing yet, and is planned anew.
    kept = [phase for phase in phases if phase.from_position < position]
    if kept:
        span = _span(kept[-1], end_position, seq_len)
        if _plan(tokens_by_language, cfg, *span).shares == kept[-1].shares:
            return kept, plan_mixture(tokens_by_language, cfg, *span)
    fresh = Phase(position, {}, {lang: n for lang, n in drawn.items() if n})
    mixture = plan_mixture(tokens_by_language, cfg, *_span(fresh, end_position, seq_len))
    return [*kept, replace(fresh, shares=mixture.shares)], mixture


def table(mixture: Mixture) -> str:
    """The plan as text: share, tokens, epochs and cap of each language."""
    lines = [f"{'language':<10}{'available':>16}{'share':>9}{'tokens':>18}{'epochs':>9}  cap"]
    for row in mixture.rows:
        counts = f"{row.available_tokens:>16,}{row.share:>9.3%}{row.tokens:>18,}{row.epochs:>9.2f}"
        lines.append(f"{row.language:<10}{counts}  {row.cap}".rstrip())
    if over := [row.language for row in mixture.rows if row.cap == "over"]:
        lines.append(f"warning: seen more often than mixture.max_epochs: {', '.join(over)}")
    if mixture.unspent_tokens:
        lines.append(f"warning: {mixture.unspent_tokens:,} tokens of the budget exceed what max_epochs allows")
    return "\n".join(lines)


def _span(phase: Phase, end_position: int, seq_len: int) -> tuple[int, dict[str, int]]:
    """Tokens from the beginning of `phase` to the end of the run, and those of each language before."""
    n_positions = max(end_position - phase.from_position, 0)
    return n_positions * seq_len, {lang: n * seq_len for lang, n in phase.visits.items()}


def _plan(available: Mapping[str, int], cfg: MixtureConfig, total_tokens: int, seen: Mapping[str, int]) -> Mixture:
    available, unspent = dict(sorted(available.items())), 0
    if cfg.rule is MixtureRule.unimax:
        room = {lang: max(cfg.max_epochs * n - seen.get(lang, 0), 0.0) for lang, n in available.items()}
        raw = _unimax(room, total_tokens)
        # A capped budget is spread over all that is planned: the run has its tokens whatever the plan leaves unspent.
        unspent = round(total_tokens - sum(raw.values()))
        raw = raw if any(raw.values()) else {lang: float(n) for lang, n in available.items()}
    elif cfg.rule is MixtureRule.temperature:
        raw = {lang: float(n) ** cfg.alpha for lang, n in available.items()}
    else:
        raw = _weights(available, cfg)
    total = sum(raw.values())
    rows = [_row(lang, n, raw[lang] / total, cfg, total_tokens, seen.get(lang, 0)) for lang, n in available.items()]
    return Mixture(rows, unspent)


def _weights(available: Mapping[str, int], cfg: MixtureConfig) -> dict[str, float]:
    if unknown := sorted(cfg.weights.keys() - available.keys()):
        raise UserError(
            f"mixture.weights names {', '.join(unknown)}",
            f"the corpus has training text in {', '.join(available)}",
            "take them out of mixture.weights, or add a source",
        )
    return {lang: cfg.weights.get(lang, 0.0) for lang in available}


def _unimax(room: Mapping[str, float], total_tokens: int) -> dict[str, float]:
    """Least room first, each an even part of what is left, at most its room (arXiv 2304.09151)."""
    left, tokens = float(total_tokens), {}
    by_room = sorted(room, key=lambda lang: (room[lang], lang))
    for i, lang in enumerate(by_room):
        tokens[lang] = min(left / (len(by_room) - i), room[lang])
        left -= tokens[lang]
    return tokens


def _row(lang: str, available: int, share: float, cfg: MixtureConfig, total_tokens: int, seen: int) -> Row:
    epochs = (seen + share * total_tokens) / available
    is_capped = cfg.rule is MixtureRule.unimax and math.isclose(epochs, cfg.max_epochs, rel_tol=1e-9)
    cap = "capped" if is_capped else "over" if epochs > cfg.max_epochs * (1 + 1e-9) else ""
    return Row(lang, available, share, round(share * total_tokens), epochs, cap)


def _refuse_repetition(mixture: Mixture, cfg: MixtureConfig, total_tokens: int, seen: Mapping[str, int]) -> None:
    # What was seen too often before and is not planned any more cannot be mended.
    over = [row for row in mixture.rows if row.cap == "over" and row.share]
    if not over:
        return
    worst = max(row.epochs for row in over)
    times = ", ".join(f"{row.language} {row.epochs:.2f} times" for row in over)
    room = min((cfg.max_epochs * row.available_tokens - seen.get(row.language, 0)) / row.share for row in over)
    before = sum(seen.values())
    # The product of a quotient may fall short of a whole number by a rounding error.
    fitting = before + math.floor(max(room, 0) * (1 + 1e-12))
    other = "" if cfg.rule is MixtureRule.unimax else "mixture.rule=unimax, "
    raise UserError(
        f"train.tokens = {before + total_tokens} under mixture.rule = {cfg.rule.value} would show {times}",
        f"mixture.max_epochs = {cfg.max_epochs:g}",
        f"{other}train.tokens={fitting} or less, more text, mixture.max_epochs={math.ceil(worst)}, "
        "or mixture.allow_more_epochs=true",
    )
