import json
import random
from collections import Counter
from pathlib import Path

import pytest

from configs.enums import LanguageBalance
from configs.errors import UserError
from configs.text import TokenizerConfig
from data import tokenizer
from data.balance import train
from data.fertility import read_parallel
from data.files import find_files, read_lines

UDHR = [
    json.loads(line)
    for file in find_files("package:data/samples/udhr-europe.jsonl.zst", ())
    for line in read_lines(file.path)
]
LANGUAGES = {"en": 60, "de": 30, "fr": 30, "pl": 3, "fi": 2, "el": 1, "mt": 1}
"""How often the text of a language is there: as in the web, some have fifty times as much as others."""


@pytest.fixture(scope="module")
def words() -> dict[str, Counter[str]]:
    """Words of the odd articles; nothing is measured on them."""
    counted: dict[str, Counter[str]] = {lang: Counter() for lang in LANGUAGES}
    for record in UDHR:
        if record["lang"] in LANGUAGES and record["article"] % 2:
            for _ in range(LANGUAGES[record["lang"]]):
                tokenizer.count_words(record["text"], counted[record["lang"]])
    return counted


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Even articles in two files: one to choose weights with, one to see what they are worth."""
    even, paths = [r for r in UDHR if r["article"] % 2 == 0], [tmp_path_factory.mktemp("parallel") / n for n in "ab"]
    for remainder, path in enumerate(paths):
        path.write_text("\n".join(json.dumps(r) for r in even if r["article"] % 4 == 2 * remainder))
    return [f"{path}" for path in paths]


def settings(balance: str, **others: object) -> TokenizerConfig:
    return TokenizerConfig(vocab_size=1500, balance=LanguageBalance(balance), **others)  # type: ignore[arg-type]


def tokens(model: bytes, path: str) -> dict[str, int]:
    return {lang: tokenizer.count_tokens(model, texts) for lang, texts in read_parallel(path, LANGUAGES).items()}


def test_natural_and_uniform_are_the_ends_of_temperature(words: dict[str, Counter[str]]) -> None:
    natural, weights = train(words, settings("natural"))
    assert natural == train(words, settings("temperature", language_alpha=1.0))[0]
    assert natural == tokenizer.train(sum(words.values(), Counter()), settings("natural"))
    assert set(weights.values()) == {1.0}
    uniform, weights = train(words, settings("uniform"))
    assert uniform == train(words, settings("temperature", language_alpha=0.0))[0]
    n_bytes = [sum(len(w.encode()) * n * weights[lang] for w, n in c.items()) for lang, c in words.items()]
    assert max(n_bytes) / min(n_bytes) == pytest.approx(1, rel=1e-4)


def test_a_lower_alpha_gives_small_languages_more(words: dict[str, Counter[str]], halves: list[str]) -> None:
    greek = [
        tokens(train(words, settings("temperature", language_alpha=alpha))[0], halves[0])["el"]
        for alpha in (1.0, 0.5, 0.0)
    ]
    assert greek[0] > greek[1] > greek[2]


def test_parity_lifts_the_worst_language_on_text_it_has_not_seen(
    words: dict[str, Counter[str]], halves: list[str]
) -> None:
    """Fewer tokens for the worst-off language, and a smaller ratio to the mean, than any balance by bytes gives."""
    fresh = {
        balance: tokens(train(words, settings(balance, parity_text=halves[0]))[0], halves[1])
        for balance in ("natural", "temperature", "uniform", "parity")
    }
    worst = {balance: max(found.values()) for balance, found in fresh.items()}
    ratio = {balance: worst[balance] * len(found) / sum(found.values()) for balance, found in fresh.items()}
    assert worst["natural"] > 1.3 * worst["parity"]
    assert worst["parity"] < 0.95 * min(worst["temperature"], worst["uniform"])
    assert ratio["parity"] < 0.95 * min(ratio["temperature"], ratio["uniform"])


def test_the_search_gives_the_same_bytes_whatever_the_order(
    halves: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = TokenizerConfig(vocab_size=400, balance=LanguageBalance.parity, parity_text=halves[0], parity_rounds=3)
    words: dict[str, Counter[str]] = {"de": Counter(), "fi": Counter(), "en": Counter()}
    for record in UDHR:
        if record["lang"] in words:
            tokenizer.count_words(record["text"], words[record["lang"]])
    assert all(len(counts) > 400 for counts in words.values())  # rounds see the most frequent words: ties are cut
    backwards = {lang: Counter(dict(reversed(words[lang].items()))) for lang in reversed(words)}
    assert train(words, cfg) == train(backwards, cfg)
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == told[3:] and told[2].startswith("tokenizer: round 3: ")


def test_a_search_of_one_round_is_uniform(words: dict[str, Counter[str]], halves: list[str]) -> None:
    found = train(words, settings("parity", parity_text=halves[0], parity_rounds=1))
    assert found == train(words, settings("uniform"))


def test_more_rounds_never_make_it_worse(words: dict[str, Counter[str]], halves: list[str]) -> None:
    """The best round is kept, not the last."""
    worst = [
        max(tokens(train(words, settings("parity", parity_text=halves[0], parity_rounds=n))[0], halves[0]).values())
        for n in range(1, 10)
    ]
    assert worst == sorted(worst, reverse=True) and worst[0] > worst[1]


def test_rounds_on_frequent_words_are_checked_on_all_words(tmp_path: Path) -> None:
    """Here the rare words of one language are made of two stems, which rounds do not see: they take it for the worst,
    and raise it at the cost of the other, which is the worst once stems are learned."""
    letters, cfg = random.Random(0), TokenizerConfig(vocab_size=340, balance=LanguageBalance.parity, parity_rounds=4)
    some = {
        kind: sorted({" " + start + "".join(letters.choices(alphabet, k=n)) for start in starts for _ in range(300)})
        for kind, starts, alphabet, n in [
            ("frequent", ["", ""], "abcdefghij", 4),
            ("rare", ["kilometer", "wanderung"], "abcdefghij", 3),
            ("other", ["", ""], "nopqrstuvw", 5),
        ]
    }
    words = {
        "aa": Counter(dict.fromkeys(some["frequent"], 5) | dict.fromkeys(some["rare"], 4)),
        "bb": Counter(dict.fromkeys(some["other"], 12)),
    }
    rows = [("aa", "".join(some["rare"][i::60] + some["frequent"][i::60])) for i in range(20)]
    rows += [("bb", "".join(some["other"][i::45])) for i in range(20)]
    cfg.parity_text = str(tmp_path / "parallel.jsonl")
    lines = [json.dumps({"lang": lang, "article": i % 20, "text": text}) for i, (lang, text) in enumerate(rows)]
    Path(cfg.parity_text).write_text("\n".join(lines))
    _, weights = train(words, cfg)
    cfg.balance = LanguageBalance.uniform
    assert weights == train(words, cfg)[1]
    assert len(words["aa"]) > 340


def test_a_language_without_parallel_text_keeps_its_weight(words: dict[str, Counter[str]], halves: list[str]) -> None:
    code = {"x-code": Counter({" def": 50, " return": 40, "self.x": 30})}
    _, uniform = train(words | code, settings("uniform"))
    _, weights = train(words | code, settings("parity", parity_text=halves[0], parity_rounds=2))
    assert weights["x-code"] == uniform["x-code"] and weights["el"] > uniform["el"]


def test_a_search_without_parallel_text_is_refused(words: dict[str, Counter[str]]) -> None:
    with pytest.raises(UserError, match="31 articles in 1 of the languages de x-code"):
        train({"de": words["de"], "x-code": words["en"]}, settings("parity"))
