"""How many tokens of each language a run sees, planned before it starts.

A language is never repeated more often than `mixture.max_epochs` unless the config says so in words.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from configs.enums import MixtureRule
from configs.errors import UserError
from configs.schema import MixtureConfig


@dataclass(frozen=True)
class Row:
    """One language of a mixture."""

    language: str
    available_tokens: int
    share: float
    """Of all tokens that the run sees; shares sum to 1."""
    tokens: int
    """Tokens that the run sees, repetitions counted."""
    epochs: float
    """How often the run sees the language's text."""
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


def plan_mixture(tokens_by_language: Mapping[str, int], cfg: MixtureConfig, total_tokens: int) -> Mixture:
    """Shares of the languages for a run of `total_tokens`.

    Raises `UserError` where weights name languages that are not there, or a language would be seen more than
    `max_epochs` times. With `allow_more_epochs` the plan goes on and the table says so.
    """
    available = dict(sorted(tokens_by_language.items()))
    if cfg.rule is MixtureRule.unimax:
        tokens = _unimax(available, cfg.max_epochs, total_tokens)
    else:
        tokens = {lang: share * total_tokens for lang, share in _shares(available, cfg).items()}
    # A capped budget is spread over the whole run: the run has total_tokens whatever the plan leaves unspent.
    planned = sum(tokens.values())
    unspent = round(total_tokens - planned)
    rows = [_row(lang, n, tokens[lang] / planned, cfg, total_tokens) for lang, n in available.items()]
    mixture = Mixture(rows, unspent)
    if not cfg.allow_more_epochs:
        _refuse_repetition(mixture, cfg, total_tokens)
    return mixture


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


def _shares(available: Mapping[str, int], cfg: MixtureConfig) -> dict[str, float]:
    if cfg.rule is MixtureRule.temperature:
        raw = {lang: float(n) ** cfg.alpha for lang, n in available.items()}
    else:
        if unknown := sorted(cfg.weights.keys() - available.keys()):
            raise UserError(
                f"mixture.weights names {', '.join(unknown)}",
                f"the corpus has training text in {', '.join(available)}",
                "take them out of mixture.weights, or add a source",
            )
        raw = {lang: cfg.weights.get(lang, 0.0) for lang in available}
    return {lang: weight / sum(raw.values()) for lang, weight in raw.items()}


def _unimax(available: Mapping[str, int], max_epochs: float, total_tokens: int) -> dict[str, float]:
    """Smallest first, each an even part of what is left, at most max_epochs of its text (arXiv 2304.09151)."""
    left, tokens = float(total_tokens), {}
    by_size = sorted(available, key=lambda lang: (available[lang], lang))
    for i, lang in enumerate(by_size):
        tokens[lang] = min(left / (len(by_size) - i), max_epochs * available[lang])
        left -= tokens[lang]
    return tokens


def _row(lang: str, available: int, share: float, cfg: MixtureConfig, total_tokens: int) -> Row:
    epochs = share * total_tokens / available
    is_capped = cfg.rule is MixtureRule.unimax and math.isclose(epochs, cfg.max_epochs, rel_tol=1e-9)
    cap = "capped" if is_capped else "over" if epochs > cfg.max_epochs * (1 + 1e-9) else ""
    return Row(lang, available, share, round(share * total_tokens), epochs, cap)


def _refuse_repetition(mixture: Mixture, cfg: MixtureConfig, total_tokens: int) -> None:
    over = [row for row in mixture.rows if row.cap == "over"]
    if not over:
        return
    worst = max(row.epochs for row in over)
    seen = ", ".join(f"{row.language} {row.epochs:.2f} times" for row in over)
    fitting = math.floor(total_tokens * cfg.max_epochs / worst)
    other = "" if cfg.rule is MixtureRule.unimax else "mixture.rule=unimax, "
    raise UserError(
        f"train.tokens = {total_tokens} under mixture.rule = {cfg.rule.value} would show {seen}",
        f"mixture.max_epochs = {cfg.max_epochs:g}",
        f"{other}train.tokens={fitting} or less, more text, mixture.max_epochs={math.ceil(worst)}, "
        "or mixture.allow_more_epochs=true",
    )
