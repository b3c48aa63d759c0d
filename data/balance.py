"""How much each language counts when a tokenizer is trained."""

import heapq
from collections import Counter
from collections.abc import Mapping
from typing import Any

from configs.enums import LanguageBalance
from configs.text import TokenizerConfig
from data import tokenizer
from data.fertility import read_parallel

RAISED_BY = 4
"""Exponent of the search: a language needs many times the weight for a few tokens less. In 27 languages, after six
rounds, the worst took 1.13 times the mean with 2, 1.06 with 4 and 1.03 with 8; the mean rose by 0, 1 and 3 %."""


def train(words: Mapping[str, Counter[str]], cfg: TokenizerConfig) -> tuple[bytes, dict[str, float]]:
    """Content of a `tokenizer.model` trained on words by language, and how often each word of a language counted.

    Raises `UserError` where the vocabulary does not fit the text, or there is no parallel text to search with.
    """
    if cfg.balance is LanguageBalance.parity:
        return _search(words, cfg)
    alpha = {LanguageBalance.natural: 1.0, LanguageBalance.uniform: 0.0}.get(cfg.balance, cfg.language_alpha)
    weights = _by_bytes(words, alpha)
    return tokenizer.train(_weighted(words, weights), cfg), weights


def _search(words: Mapping[str, Counter[str]], cfg: TokenizerConfig) -> tuple[bytes, dict[str, float]]:
    """Raises, round by round, the weights of languages that take more tokens than the mean for the same content.

    The best round is that with the fewest tokens in its worst-off language; their ratio to English would also fall if
    English got worse. Rounds train on the most frequent words, in a fraction of the time. The best one is trained
    once more on all words, and so is the first, which stays if it is the better one there.
    """
    parallel = read_parallel(cfg.parity_text, words)

    def attempt(words: Mapping[str, Counter[str]], weights: Mapping[str, float]) -> tuple[bytes, dict[str, int], Any]:
        model = tokenizer.train(_weighted(words, weights), cfg)
        tokens = {lang: tokenizer.count_tokens(model, texts) for lang, texts in parallel.items()}
        return model, tokens, (max(tokens.values()), sum(tokens.values()))

    # As many words as the vocabulary has entries are more than any language can get.
    frequent = {lang: Counter(dict(_most_frequent(counts, cfg.vocab_size))) for lang, counts in words.items()}
    weights, tried = _by_bytes(words, alpha=0.0), []
    for number in range(1, cfg.parity_rounds + 1):
        _, tokens, cost = attempt(frequent, weights)
        tried.append((cost, number, weights))
        mean, worst = sum(tokens.values()) / len(tokens), max(tokens, key=lambda lang: (tokens[lang], lang))
        print(f"tokenizer: round {number}: {worst} takes {tokens[worst] / mean:.3f} times the mean", flush=True)
        raised = {lang: max(1.0, n / mean) ** RAISED_BY for lang, n in tokens.items()}
        weights = {lang: _rounded(weight * raised.get(lang, 1.0)) for lang, weight in weights.items()}
    ends = [tried[0]] if min(tried) is tried[0] else [tried[0], min(tried)]
    made = [(*attempt(words, weights), weights) for *_, weights in ends]
    model, _, _, weights = min(made, key=lambda found: found[2])
    return model, weights


def _most_frequent(counts: Counter[str], n: int) -> list[tuple[str, int]]:
    return heapq.nsmallest(n, counts.items(), key=lambda item: (-item[1], item[0]))


def _by_bytes(words: Mapping[str, Counter[str]], alpha: float) -> dict[str, float]:
    """(bytes / bytes of the largest language) ** (alpha - 1)."""
    n_bytes = {lang: sum(len(word.encode()) * n for word, n in counts.items()) for lang, counts in words.items()}
    largest = max(n_bytes.values(), default=0)
    return {lang: _rounded((n / largest) ** (alpha - 1)) if n else 1.0 for lang, n in n_bytes.items()}


def _rounded(weight: float) -> float:
    return float(f"{weight:.6g}")  # the last digits of a power are not the same on every machine


def _weighted(words: Mapping[str, Counter[str]], weights: Mapping[str, float]) -> Counter[str]:
    """Counts summed over languages. The lowest weight counts as 1, so that no word is rounded to nothing."""
    total: Counter[str] = Counter()
    lowest = min(weights.values(), default=1.0)
    for lang, counts in words.items():
        factor = weights[lang] / lowest
        for word, n in counts.items():
            total[word] += round(n * factor)
    return total
