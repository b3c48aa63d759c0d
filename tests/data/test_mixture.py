import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.enums import MixtureRule
from configs.errors import UserError
from configs.text import MixtureConfig
from data.mixture import Mixture, plan_mixture, plan_phases, table
from data.order import Phase

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


def test_what_was_seen_before_counts_towards_the_cap() -> None:
    # mt has 400 - 250 left, fr 16,000 - 14,000 and de 32,000: 150, 2,000 and the rest of 9,000.
    seen = {"mt": 250, "fr": 14_000}
    mixture = plan_mixture(AVAILABLE, unimax(4), 9_000, seen)
    assert [(row.tokens, row.epochs, row.cap) for row in mixture.rows] == [
        (6_850, 6_850 / 8_000, ""), (2_000, 4.0, "capped"), (150, 4.0, "capped"),
    ]  # fmt: skip
    natural = MixtureConfig(max_epochs=2)
    plan_mixture(AVAILABLE, natural, 12_100, {"mt": 100})
    with pytest.raises(UserError, match=r"train\.tokens = 12220 under .* show mt 2\.20 times") as error:
        plan_mixture(AVAILABLE, natural, 12_100, {"mt": 120})
    assert "train.tokens=9800 or less" in error.value.repair, "80 of mt are left: 80 / 100 of 12,100, after 120"
    plan_mixture(AVAILABLE, natural, 9_680, {"mt": 120})
    assert plan_mixture(AVAILABLE, unimax(4), 9_000, dict.fromkeys(AVAILABLE, 0)) == plan_mixture(
        AVAILABLE, unimax(4), 9_000
    )


def test_a_language_seen_too_often_before_is_refused_only_where_it_is_planned_again() -> None:
    cfg = MixtureConfig(rule=MixtureRule.weights, weights={"de": 1}, max_epochs=2)
    assert [row.cap for row in plan_mixture(AVAILABLE, cfg, 100, {"mt": 500}).rows] == ["", "", "over"]
    assert plan_mixture(AVAILABLE, unimax(2), 100, {"mt": 500}).shares == {"de": 0.5, "fr": 0.5}
    with pytest.raises(UserError, match="show mt"):
        plan_mixture(AVAILABLE, MixtureConfig(max_epochs=2), 100, {"mt": 500})


def test_unimax_with_no_text_left_is_refused_or_goes_on_by_size() -> None:
    seen = {lang: 2 * n for lang, n in AVAILABLE.items()}
    with pytest.raises(UserError, match=r"train\.tokens=24200 or less"):
        plan_mixture(AVAILABLE, unimax(2), 1_210, seen)
    mixture = plan_mixture(AVAILABLE, unimax(2, allow=True), 1_210, seen)
    assert [row.tokens for row in mixture.rows] == [800, 400, 10] and mixture.unspent_tokens == 1_210


EVEN = MixtureConfig(rule=MixtureRule.weights, weights={"de": 1, "fr": 1})
MALTESE = MixtureConfig(rule=MixtureRule.weights, weights={"de": 3, "mt": 1})
DRAWN = {"de": 50, "fr": 50, "mt": 0}


def plan(
    phases: list[Phase], drawn: Mapping[str, int], cfg: MixtureConfig, position: int, end: int = 200
) -> tuple[list[Phase], Mixture]:
    """Phases go through JSON first, as they do in a checkpoint."""
    stored = [Phase(**d) for d in json.loads(json.dumps([asdict(phase) for phase in phases]))]
    return plan_phases(stored, drawn, cfg, AVAILABLE, position=position, end_position=end, seq_len=10)


@pytest.mark.parametrize("cfg", [EVEN, MixtureConfig(alpha=0.3, max_epochs=9), unimax(1)])
def test_a_run_goes_on_with_its_phase_while_the_plan_is_the_same(cfg: MixtureConfig) -> None:
    phases, mixture = plan([], {}, cfg, 0)
    assert phases == [Phase(0, mixture.shares, {})] and mixture == plan_mixture(AVAILABLE, cfg, 2_000)
    assert plan(phases, DRAWN, cfg, 100) == (phases, mixture), "planned from the beginning of the phase"
    assert plan(phases, DRAWN, cfg, 200) == (phases, mixture), "also at the end"


def test_another_plan_begins_another_phase_where_the_run_stands() -> None:
    phases, _ = plan([], {}, EVEN, 0)
    changed, mixture = plan(phases, DRAWN, MALTESE, 100)
    assert changed == [*phases, Phase(100, {"de": 0.75, "mt": 0.25}, {"de": 50, "fr": 50})]
    assert [row.tokens for row in mixture.rows] == [750, 0, 250]
    assert [row.epochs for row in mixture.rows] == [1250 / 8000, 500 / 4000, 2.5]
    assert plan(changed, {"de": 100, "fr": 50, "mt": 17}, MALTESE, 167) == (changed, mixture)
    third, _ = plan(changed, {"de": 100, "fr": 50, "mt": 17}, EVEN, 167)
    assert third == [*changed, Phase(167, {"de": 0.5, "fr": 0.5}, {"de": 100, "fr": 50, "mt": 17})]


def test_a_phase_that_has_drawn_nothing_is_planned_anew() -> None:
    phases, _ = plan([], {}, EVEN, 0)
    changed, _ = plan(phases, DRAWN, MALTESE, 100)
    assert plan(changed, DRAWN, EVEN, 100)[0] == phases, "back to what it was: no change at all"
    assert plan(changed, DRAWN, unimax(1), 100)[0][1].shares.keys() == AVAILABLE.keys()
    assert plan(changed, DRAWN, MALTESE, 100)[0] == changed
    assert plan(phases, dict.fromkeys(AVAILABLE, 0), MALTESE, 0, 100)[0] == [Phase(0, {"de": 0.75, "mt": 0.25}, {})]


def test_a_change_is_judged_by_what_the_run_will_have_seen_and_not_by_a_plan_from_the_beginning() -> None:
    phases, _ = plan([], {}, EVEN, 0, end=400)
    with pytest.raises(UserError, match=r"show mt 10\.00 times"):
        plan([], {}, MALTESE, 0, end=400)
    plan(phases, {"de": 180, "fr": 180, "mt": 0}, MALTESE, 360, end=400)
    with pytest.raises(UserError, match=r"train\.tokens = 4000 .* mt 7\.50 times"):
        plan(phases, DRAWN, MALTESE, 100, end=400)


def test_more_tokens_under_a_cap_begin_a_phase() -> None:
    phases, _ = plan([], {}, unimax(1), 0)
    longer, mixture = plan(phases, {"de": 48, "fr": 47, "mt": 5}, unimax(1), 100, end=300)
    assert [phase.from_position for phase in longer] == [0, 100]
    assert {row.language: row.epochs for row in mixture.rows}["mt"] == 1.0
