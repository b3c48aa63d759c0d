import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.enums import MixtureRule
from configs.errors import UserError
from configs.schema import MixtureConfig
from data.mixture import plan_mixture, table

AVAILABLE = {"de": 8_000, "fr": 4_000, "mt": 100}


def unimax(max_epochs: float, allow: bool = False) -> MixtureConfig:
    return MixtureConfig(rule=MixtureRule.unimax, max_epochs=max_epochs, allow_more_epochs=allow)


def test_temperature() -> None:
    natural = plan_mixture(AVAILABLE, MixtureConfig(alpha=1.0), 12_100)
    assert [row.tokens for row in natural.rows] == [8_000, 4_000, 100]
    assert [row.epochs for row in natural.rows] == [1.0, 1.0, 1.0]
    root = plan_mixture({"de": 900, "mt": 100}, MixtureConfig(alpha=0.5), 400)  # 30 to 10
    assert root.shares == {"de": 0.75, "mt": 0.25}
    assert [row.epochs for row in root.rows] == [300 / 900, 1.0]


def test_weights_are_normalised_and_languages_without_one_are_left_out() -> None:
    cfg = MixtureConfig(rule=MixtureRule.weights, weights={"de": 3, "mt": 1})
    mixture = plan_mixture(AVAILABLE, cfg, 400)
    assert [(row.language, row.share, row.tokens) for row in mixture.rows] == [
        ("de", 0.75, 300), ("fr", 0.0, 0), ("mt", 0.25, 100),
    ]  # fmt: skip
    assert mixture.shares == {"de": 0.75, "mt": 0.25}


def test_weights_of_languages_that_are_not_there_are_refused() -> None:
    cfg = MixtureConfig(rule=MixtureRule.weights, weights={"de": 1, "xx": 1})
    with pytest.raises(UserError, match=r"names xx\n.* de, fr, mt"):
        plan_mixture(AVAILABLE, cfg, 100)


def test_unimax_by_hand() -> None:
    # 9,000 over three: 3,000 each, but mt has 100 x 4. The rest, 8,600, over two: 4,300 each, both below their caps.
    mixture = plan_mixture(AVAILABLE, unimax(4), 9_000)
    assert [(row.language, row.tokens, row.cap) for row in mixture.rows] == [
        ("de", 4_300, ""), ("fr", 4_300, ""), ("mt", 400, "capped"),
    ]  # fmt: skip
    assert mixture.unspent_tokens == 0
    # With one epoch: mt 100, fr 4,000 of 4,450, de the rest.
    mixture = plan_mixture(AVAILABLE, unimax(1), 9_000)
    assert [(row.tokens, row.cap) for row in mixture.rows] == [(4_900, ""), (4_000, "capped"), (100, "capped")]


def test_a_budget_beyond_all_text_is_refused_with_what_fits() -> None:
    with pytest.raises(UserError, match=r"train\.tokens=24200 or less") as error:
        plan_mixture(AVAILABLE, unimax(2), 30_000)
    assert "mixture.max_epochs=3" in str(error.value) and "unimax," not in error.value.repair
    plan_mixture(AVAILABLE, unimax(2), 24_200)
    plan_mixture(AVAILABLE, unimax(3), 30_000)
    mixture = plan_mixture(AVAILABLE, unimax(2, allow=True), 30_000)
    assert mixture.unspent_tokens == 30_000 - 24_200
    assert [row.cap for row in mixture.rows] == ["over"] * 3
    assert sum(row.tokens for row in mixture.rows) == 30_000


def test_a_small_language_is_not_wrapped_in_silence() -> None:
    cfg = MixtureConfig(rule=MixtureRule.weights, weights={"de": 0.98, "mt": 0.02})
    with pytest.raises(UserError, match=r"show de 6\.12 times, mt 10\.00 times") as error:
        plan_mixture(AVAILABLE, cfg, 50_000)
    repair = "mixture.rule=unimax, train.tokens=20000 or less, more text, mixture.max_epochs=10"
    assert repair in error.value.repair
    cfg.allow_more_epochs = True
    text = table(plan_mixture(AVAILABLE, cfg, 50_000))
    assert "warning: seen more often than mixture.max_epochs: de, mt" in text


def test_the_table_shows_share_tokens_epochs_and_cap() -> None:
    lines = table(plan_mixture(AVAILABLE, unimax(4), 9_000)).splitlines()
    assert [line.split() for line in lines] == [
        ["language", "available", "share", "tokens", "epochs", "cap"],
        ["de", "8,000", "47.778%", "4,300", "0.54"],
        ["fr", "4,000", "47.778%", "4,300", "1.07"],
        ["mt", "100", "4.444%", "400", "4.00", "capped"],
    ]


LANGUAGES = st.dictionaries(st.text("abc", min_size=2, max_size=3), st.integers(1, 10**12), min_size=1, max_size=30)


@given(LANGUAGES, st.floats(0.1, 40), st.floats(0.01, 1))
def test_unimax_properties(available: dict[str, int], max_epochs: float, part: float) -> None:
    total = max(1, int(sum(available.values()) * max_epochs * part))
    rows = plan_mixture(available, unimax(max_epochs, allow=True), total).rows
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert all(row.epochs <= max_epochs * (1 + 1e-6) or total > max_epochs * sum(available.values()) for row in rows)
    free = [row.share for row in rows if row.cap == ""]
    assert free == pytest.approx([max(row.share for row in rows)] * len(free)), "those below the cap are alike"
    by_size = sorted(rows, key=lambda row: row.available_tokens)
    shares = [row.share for row in by_size]
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(shares)), "more text, never a smaller share"
