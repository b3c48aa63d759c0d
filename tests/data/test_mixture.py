import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.enums import MixtureRule
from configs.errors import UserError
from configs.text import LaterPhaseConfig, MixtureConfig
from data.mixture import Mixture, language_rows, plan_phases, table
from data.order import CYCLE, Order, Phase, Stream

Parts = Mapping[tuple[str, str], int]
AVAILABLE = {("de", "web"): 8_000, ("fr", "web"): 4_000, ("mt", "web"): 100}
MIXED = {("de", "books"): 1_000, ("de", "web"): 8_000, ("mt", "web"): 100}


def plan(cfg: MixtureConfig, n_tokens: int, available: Parts = AVAILABLE) -> list[Mixture]:
    """All phases of a run of sequences of one token."""
    return plan_phases([], cfg, available, position=0, end_position=n_tokens, seq_len=1)[1]


def rows(mixture: Mixture) -> list[tuple[str, int, str]]:
    return [(row.part, row.tokens, row.cap) for row in mixture.rows]


def epochs(mixture: Mixture) -> list[float]:
    return [row.epochs for row in mixture.rows]


def shares(mixture: Mixture) -> dict[str, float]:
    return {row.part: row.share for row in mixture.rows if row.share}


def unimax(max_epochs: float, allow: bool = False, **settings: object) -> MixtureConfig:
    return MixtureConfig(rule=MixtureRule.unimax, max_epochs=max_epochs, allow_more_epochs=allow, **settings)  # type: ignore[arg-type]


def weights(given: dict[str, float], **settings: object) -> MixtureConfig:
    return MixtureConfig(rule=MixtureRule.weights, weights=given, **settings)  # type: ignore[arg-type]


# One phase.


def test_temperature() -> None:
    [natural] = plan(MixtureConfig(alpha=1.0), 12_100)
    assert rows(natural) == [("de/web", 8_000, ""), ("fr/web", 4_000, ""), ("mt/web", 100, "")]
    assert epochs(natural) == pytest.approx([1.0, 1.0, 1.0], abs=1e-3)
    [root] = plan(MixtureConfig(alpha=0.5), 400, {("de", "web"): 900, ("mt", "web"): 100})  # 30 to 10
    assert shares(root) == {"de/web": 0.75, "mt/web": 0.25}
    assert epochs(root) == [300 / 900, 1.0]


def test_weights_are_normalised_and_languages_without_one_are_left_out() -> None:
    [mixture] = plan(weights({"de": 3, "mt": 1}), 400)
    assert rows(mixture) == [("de/web", 300, ""), ("fr/web", 0, ""), ("mt/web", 100, "")]
    assert shares(mixture) == {"de/web": 0.75, "mt/web": 0.25}
    assert mixture.phase == Phase(0, {"de/web": CYCLE * 3 // 4, "mt/web": CYCLE // 4})


def test_unimax_by_hand() -> None:
    # 9,000 over three: 3,000 each, but mt has 100 x 4. The rest, 8,600, over two: 4,300 each, both below their caps.
    [mixture] = plan(unimax(4), 9_000)
    assert rows(mixture) == [("de/web", 4_300, ""), ("fr/web", 4_300, ""), ("mt/web", 400, "capped")]
    assert mixture.unspent_tokens == 0
    # With one epoch: mt 100, fr 4,000 of 4,450, de the rest.
    [mixture] = plan(unimax(1), 9_000)
    assert rows(mixture) == [("de/web", 4_900, ""), ("fr/web", 4_000, "capped"), ("mt/web", 100, "capped")]


def test_a_budget_beyond_all_text_is_refused_with_what_fits() -> None:
    with pytest.raises(UserError, match=r"train\.tokens=24200 or less") as error:
        plan(unimax(2), 30_000)
    assert "mixture.max_epochs=3" in str(error.value) and "unimax," not in error.value.repair
    plan(unimax(2), 24_200)
    plan(unimax(3), 30_000)
    [mixture] = plan(unimax(2, allow=True), 30_000)
    assert mixture.unspent_tokens == 30_000 - 24_200
    assert [row.cap for row in mixture.rows] == ["over"] * 3
    assert sum(row.tokens for row in mixture.rows) == 30_000


def test_a_small_language_is_not_wrapped_in_silence() -> None:
    cfg = weights({"de": 0.98, "mt": 0.02})
    with pytest.raises(UserError, match=r"show de/web 6\.12 times, mt/web 10\.00 times") as error:
        plan(cfg, 50_000)
    repair = "mixture.rule=unimax, train.tokens=20000 or less, more text, mixture.max_epochs=10"
    assert repair in error.value.repair
    cfg.allow_more_epochs = True
    assert "warning: seen more often than max_epochs: de/web, mt/web" in table(plan(cfg, 50_000))


# Sources.


def test_sources_share_what_a_language_has_by_tokens_and_factor() -> None:
    [mixture] = plan(weights({"de": 1, "mt": 1}, max_epochs=9), 1_600, MIXED)
    assert shares(mixture) == pytest.approx({"de/books": 1 / 18, "de/web": 8 / 18, "mt/web": 0.5}, abs=1e-5)
    [mixture] = plan(weights({"de": 1, "mt": 1}, max_epochs=9, sources={"books": 8}), 1_600, MIXED)
    assert shares(mixture) == {"de/books": 0.25, "de/web": 0.25, "mt/web": 0.5}, "nothing moves between languages"
    [mixture] = plan(MixtureConfig(sources={"web": 0}), 1_600, MIXED)
    assert shares(mixture) == {"de/books": 1.0}, "what is left out counts nowhere"


def test_unimax_fills_a_language_from_its_other_sources_where_one_is_capped() -> None:
    # de and mt 400 each, mt capped at 300; of the 500 of de, books would have 4/5 but are shown 3 times: 300.
    available = {("de", "books"): 100, ("de", "web"): 1_000, ("mt", "web"): 100}
    [mixture] = plan(unimax(3, sources={"books": 40}), 800, available)
    assert rows(mixture) == [("de/books", 300, "capped"), ("de/web", 200, ""), ("mt/web", 300, "capped")]
    [mixture] = plan(unimax(3, sources={"books": 40}, max_epochs_of={"books": 1}), 800, available)
    assert rows(mixture) == [("de/books", 100, "capped"), ("de/web", 400, ""), ("mt/web", 300, "capped")]
    assert mixture.unspent_tokens == 0


def test_a_source_seen_too_often_is_refused_by_its_own_cap() -> None:
    cfg = MixtureConfig(max_epochs=9, max_epochs_of={"books": 1.5})
    with pytest.raises(UserError, match=r"show de/books 2\.00 times\n.*mixture.max_epochs_of.books = 1\.5\n") as error:
        plan(cfg, 18_200, MIXED)
    assert "train.tokens=13650 or less" in error.value.repair
    assert "mixture.max_epochs_of.books=2," in error.value.repair
    plan(cfg, 13_650, MIXED)


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        (weights({"de": 1, "xx": 1}), r"mixture\.weights names xx\n.* de, fr, mt"),
        (weights({"de": 1}, sources={"web": 0}), r"mixture\.sources = .*\n.* has to be drawn"),
        (MixtureConfig(sources={"wiki": 2}), r"mixture\.sources names wiki\n.* web"),
        (MixtureConfig(max_epochs_of={"wiki": 2}), r"mixture\.max_epochs_of names wiki\n.* web"),
        (
            MixtureConfig(phases=[LaterPhaseConfig(from_tokens=5, rule=MixtureRule.weights, weights={"yy": 1})]),
            r"mixture\.phases\.0\.weights names yy",
        ),
    ],
)
def test_what_the_corpus_does_not_have_is_refused(cfg: MixtureConfig, said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan(cfg, 100)


def test_a_language_all_of_whose_sources_are_left_out_has_no_weight() -> None:
    with pytest.raises(UserError, match=r"weights names mt\n.* de"):
        plan(weights({"de": 1, "mt": 1}, sources={"web": 0}), 100, MIXED)


# Slots.


def test_a_part_below_a_slot_is_left_out_where_the_slot_would_exceed_its_cap_and_the_table_says_so() -> None:
    # A slot of 2.6e9 tokens are 10,000: the 400 that mt may have are less, the 4e4 of fr are four.
    available = {("de", "web"): 10**10, ("fr", "web"): 10_000, ("mt", "web"): 100}
    n_tokens = 10_000 * CYCLE
    [mixture] = plan(unimax(4), n_tokens, available)
    assert [(row.part, row.slots, row.cap) for row in mixture.rows] == [
        ("de/web", CYCLE - 4, ""), ("fr/web", 4, "capped"), ("mt/web", 0, "small"),
    ]  # fmt: skip
    assert "warning: left out, since one of 2**18 slots would exceed max_epochs: mt/web" in table([mixture])
    [mixture] = plan(unimax(4, allow=True), n_tokens, available)
    assert [(row.slots, row.epochs, row.cap) for row in mixture.rows[1:]] == [(4, 4.0, "capped"), (1, 100.0, "over")]


LANGUAGES = st.text("abc", min_size=2, max_size=3)
TEXT = st.dictionaries(
    st.tuples(LANGUAGES, st.sampled_from("xyz")), st.integers(1_000, 10**12), min_size=1, max_size=30
)


@given(TEXT, st.floats(0.1, 40), st.floats(0.01, 1), st.floats(0.1, 9))
def test_unimax_keeps_caps_and_is_even_above_them(available: Parts, cap: float, part: float, factor: float) -> None:
    total = max(1, int(sum(available.values()) * cap * part))
    [mixture] = plan(
        unimax(cap, allow=True, sources=dict.fromkeys({source for _, source in available}, factor)), total, available
    )
    slot = total / CYCLE
    assert sum(row.slots for row in mixture.rows) == CYCLE
    assert mixture.unspent_tokens <= total * 1e-9 + 1
    for row in mixture.rows:
        assert row.epochs * row.available_tokens <= cap * row.available_tokens * (1 + 1e-6) + slot
    tokens: dict[str, float] = {}
    free: set[str] = set()
    for row in mixture.rows:
        tokens[row.part[:-2]] = tokens.get(row.part[:-2], 0.0) + row.share * total
        free |= {row.part[:-2]} if row.cap == "" else set()
    most = max(tokens.values())
    assert all(tokens[lang] >= most * (1 - 1e-9) - 8 * slot for lang in free), "those below the cap are alike"


@given(TEXT, st.floats(0, 1), st.integers(1, 10**13))
def test_rounding_to_slots_is_fair(available: Parts, alpha: float, total: int) -> None:
    [mixture] = plan(MixtureConfig(alpha=alpha, allow_more_epochs=True), total, available)
    languages: dict[str, float] = {}
    for (lang, _), n in available.items():
        languages[lang] = languages.get(lang, 0.0) + n
    whole = sum(n**alpha for n in languages.values())
    for row, ((lang, _), n) in zip(mixture.rows, sorted(available.items()), strict=True):
        wanted = languages[lang] ** alpha / whole * n / languages[lang] * CYCLE
        assert row.slots >= 1 and abs(row.slots - wanted) <= 1 + (len(available) if wanted > CYCLE / 31 else 0)


# Phases.

EVEN = weights({"de": 1, "fr": 1})
MALTESE = weights({"de": 3, "mt": 1})


def later(from_tokens: int, **settings: object) -> LaterPhaseConfig:
    return LaterPhaseConfig(from_tokens=from_tokens, **settings)  # type: ignore[arg-type]


def go_on(
    phases: list[Phase], cfg: MixtureConfig, position: int, end: int = 200, available: Parts = AVAILABLE
) -> tuple[list[Phase], list[Mixture]]:
    """Phases go through JSON first, as they do in a checkpoint."""
    stored = [Phase(**d) for d in json.loads(json.dumps([asdict(phase) for phase in phases]))]
    return plan_phases(stored, cfg, available, position=position, end_position=end, seq_len=10)


def test_every_phase_is_planned_from_the_start_and_counts_what_those_before_it_show() -> None:
    cfg = unimax(4, phases=[later(6_000, alpha=1.0), later(9_000, rule=MixtureRule.unimax, max_epochs=6)])
    # mt: 4 x 100 of 6,000; then 3,000 x 100 / 12,100 = 25 more, so 6 x 100 - 425 are left for the last 3,000.
    cfg.phases[0].max_epochs = 5
    mixtures = plan(cfg, 12_000)
    assert [(m.from_tokens, m.rule) for m in mixtures] == [(0, "unimax"), (6_000, "temperature"), (9_000, "unimax")]
    mt = [mixture.rows[2] for mixture in mixtures]
    assert [row.tokens for row in mt] == [400, 25, 175]
    assert [row.epochs for row in mt] == pytest.approx([4.0, 4.248, 6.0], abs=1e-3)
    assert [row.cap for row in mt] == ["capped", "", "capped"]
    by_language = language_rows(mixtures)
    assert [row["tokens"] for row in by_language] == [sum(m.rows[k].tokens for m in mixtures) for k in range(3)]
    assert sum(row["share"] for row in by_language) == pytest.approx(1) and by_language[2]["cap"] == "capped"
    assert by_language[2]["epochs"] == mt[2].epochs and by_language[2]["available_tokens"] == 100


def test_the_table_shows_every_phase() -> None:
    text = table(plan(unimax(4, phases=[later(9_000, allow_more_epochs=True)]), 18_000))
    assert [line.split() for line in text.splitlines()] == [
        ["mixture", "from", "0", "tokens", "on,", "by", "unimax"],
        ["part", "available", "share", "tokens", "epochs", "cap"],
        ["de/web", "8,000", "47.7779%", "4,300", "0.54"],
        ["fr/web", "4,000", "47.7779%", "4,300", "1.08"],
        ["mt/web", "100", "4.4441%", "400", "4.00", "capped"],
        ["mixture", "from", "9,000", "tokens", "on,", "by", "temperature"],
        ["part", "available", "share", "tokens", "epochs", "cap"],
        ["de/web", "8,000", "66.1156%", "5,950", "1.28"],
        ["fr/web", "4,000", "33.0578%", "2,975", "1.82"],
        ["mt/web", "100", "0.8266%", "74", "4.74", "over"],
        ["warning:", "seen", "more", "often", "than", "max_epochs:", "mt/web"],
    ]


def test_a_later_phase_that_overspends_is_refused_before_the_start() -> None:
    cfg = unimax(
        4, phases=[later(5_000, rule=MixtureRule.weights, weights={"mt": 1}), later(5_400, allow_more_epochs=True)]
    )
    with pytest.raises(UserError, match=r"mixture\.phases\.1\.from_tokens = 5400 under .*0\.rule = weights") as error:
        plan(cfg, 6_000)
    assert "mixture.phases.0.max_epochs=8" in error.value.repair, "mt 4 times before, and 400 tokens more"
    assert "from_tokens=" not in error.value.repair, "no time is early enough: mt was shown 4 times before phase 0"


@given(st.integers(1, 300), st.integers(1, 60_000), st.integers(1, 90_000))
def test_the_tokens_that_a_refusal_names_are_accepted_as_they_stand(seq_len: int, first: int, length: int) -> None:
    """Where a phase is refused, another that begins sooner ends it: in whole sequences, and after its own beginning."""
    cfg = weights({"de": 1}, phases=[later(first, alpha=0.0), later(first + length, allow_more_epochs=True)])
    end_position = (first + length) // seq_len + 10

    def refusal() -> str:
        try:
            plan_phases([], cfg, AVAILABLE, position=0, end_position=end_position, seq_len=seq_len)
        except UserError as error:
            return str(error)
        return ""

    while found := re.search(r"mixture\.phases\.(\d)\.from_tokens=(\d+) or less", refusal()):
        k, tokens = map(int, found.groups())
        assert tokens < cfg.phases[k].from_tokens
        cfg.phases[k].from_tokens = tokens
        MixtureConfig(**vars(cfg))  # they still follow one another
        assert f"phases.{k}.from_tokens =" not in refusal()


def test_all_phases_that_overspend_are_told_at_once() -> None:
    cfg = weights({"mt": 1}, phases=[later(600, rule=MixtureRule.weights, weights={"mt": 1})])
    with pytest.raises(UserError) as error:
        plan(cfg, 900)
    assert "phases.0.from_tokens = 600" in str(error.value) and "train.tokens = 900" in str(error.value)


@pytest.mark.parametrize("cfg", [EVEN, MixtureConfig(alpha=0.3, max_epochs=9), unimax(1)])
def test_a_run_goes_on_with_its_phase_while_the_plan_is_the_same(cfg: MixtureConfig) -> None:
    phases, mixtures = go_on([], cfg, 0)
    assert phases == [mixtures[0].phase] and len(mixtures) == 1
    assert go_on(phases, cfg, 100) == (phases, mixtures), "planned from the beginning of the phase"
    assert go_on(phases, cfg, 200) == (phases, mixtures), "also at the end"


def test_another_plan_begins_another_phase_where_the_run_stands() -> None:
    phases, _ = go_on([], EVEN, 0)
    changed, [mixture] = go_on(phases, MALTESE, 100)
    assert changed == [*phases, Phase(100, {"de/web": CYCLE * 3 // 4, "mt/web": CYCLE // 4})]
    assert rows(mixture) == [("de/web", 750, ""), ("fr/web", 0, ""), ("mt/web", 250, "")]
    assert epochs(mixture) == [1250 / 8000, 500 / 4000, 2.5]
    assert go_on(changed, MALTESE, 167) == (changed, [mixture])
    third, _ = go_on(changed, EVEN, 167)
    assert third == [*changed, Phase(167, {"de/web": CYCLE // 2, "fr/web": CYCLE // 2})]


def test_a_phase_that_has_drawn_nothing_is_planned_anew() -> None:
    phases, _ = go_on([], EVEN, 0)
    changed, _ = go_on(phases, MALTESE, 100)
    assert go_on(changed, EVEN, 100)[0] == phases, "back to what it was: no change at all"
    assert go_on(changed, unimax(1), 100)[0][1].slots.keys() == {"de/web", "fr/web", "mt/web"}
    assert go_on(changed, MALTESE, 100)[0] == changed
    assert go_on(phases, MALTESE, 0, 100)[0] == [Phase(0, {"de/web": CYCLE * 3 // 4, "mt/web": CYCLE // 4})]


def test_a_change_is_judged_by_what_the_run_will_have_seen_and_not_by_a_plan_from_the_beginning() -> None:
    phases, _ = go_on([], EVEN, 0, end=400)
    with pytest.raises(UserError, match=r"show mt/web 10\.00 times"):
        go_on([], MALTESE, 0, end=400)
    go_on(phases, MALTESE, 360, end=400)
    with pytest.raises(UserError, match=r"train\.tokens = 4000 .* mt/web 7\.50 times"):
        go_on(phases, MALTESE, 100, end=400)


def test_what_was_seen_too_often_before_is_refused_only_where_it_is_planned_again() -> None:
    often = weights({"mt": 1}, allow_more_epochs=True)
    phases, _ = go_on([], often, 0)
    _, [mixture] = go_on(phases, unimax(2), 100)
    assert shares(mixture) == {"de/web": 0.5, "fr/web": 0.5} and mixture.rows[2].cap == "over"
    with pytest.raises(UserError, match="show mt/web"):
        go_on(phases, MixtureConfig(max_epochs=2), 100)


def test_unimax_with_no_text_left_is_refused_or_goes_on_by_size() -> None:
    # mt 200 tokens, de 16,000, fr 8,000 and 10 more.
    slots = {0: "mt/web", 20: "de/web", 1_620: "fr/web", 2_420: "fr/web"}
    phases = [Phase(start, {part: CYCLE}) for start, part in slots.items()]
    with pytest.raises(UserError, match=r"train\.tokens = 25420 under") as error:
        go_on(phases, unimax(2), 2_421, end=2_542)
    assert "train.tokens=" not in error.value.repair
    _, [mixture] = go_on(phases, unimax(2, allow=True), 2_421, end=2_542)
    assert [row.tokens for row in mixture.rows] == [800, 400, 10] and mixture.unspent_tokens == 1_210


def test_more_tokens_under_a_cap_begin_a_phase() -> None:
    phases, _ = go_on([], unimax(1), 0)
    longer, [mixture] = go_on(phases, unimax(1), 100, end=300)
    assert [phase.from_position for phase in longer] == [0, 100]
    assert epochs(mixture)[2] == pytest.approx(1.0, abs=1e-3)


THREE = weights({"de": 1, "fr": 1}, phases=[later(1_000), later(1_500, rule=MixtureRule.weights, weights={"mt": 1})])
THREE.phases[1].max_epochs = 9


def test_a_run_with_phases_goes_on_through_them_without_a_change() -> None:
    phases, mixtures = go_on([], THREE, 0)
    assert [phase.from_position for phase in phases] == [0, 100, 150] and len(mixtures) == 3
    for position in (1, 99, 100, 101, 150, 151, 200):
        assert go_on(phases, THREE, position)[0] == phases


def test_a_phase_moved_to_before_where_the_run_stands_begins_there() -> None:
    phases, _ = go_on([], THREE, 0)
    moved = weights({"de": 1, "fr": 1}, phases=[later(400)])
    assert [phase.from_position for phase in go_on(phases, moved, 60)[0]] == [0, 60]
    away = weights({"de": 1, "fr": 1})
    assert [phase.from_position for phase in go_on(phases, away, 120)[0]] == [0, 100, 120]


RULES = st.one_of(
    st.builds(lambda a, b: {"rule": MixtureRule.weights, "weights": {"de": a, "mt": b}}, st.floats(0.1, 9), st.floats(0.1, 9)),
    st.builds(lambda alpha: {"alpha": alpha}, st.floats(0, 1)),
    st.builds(lambda n: {"rule": MixtureRule.unimax, "max_epochs": n}, st.floats(0.5, 9)),
)  # fmt: skip


@settings(max_examples=25)
@given(RULES, st.integers(1, 199), RULES, RULES, st.integers(1, 200))
def test_changing_a_phase_to_come_leaves_all_earlier_samples_as_they_were(
    first: dict[str, object], begin: int, second: dict[str, object], other: dict[str, object], position: int
) -> None:
    """Planned from the start, and in mid-run up to where it stands."""
    streams = [Stream(f"{lang}/{source}", -(-n // 10), "") for (lang, source), n in AVAILABLE.items()]

    def order(phases: list[Phase]) -> Order:
        return Order(streams, 1, phases)

    def cfg(rule: dict[str, object]) -> MixtureConfig:
        return MixtureConfig(
            **first, allow_more_epochs=True, phases=[later(begin * 10, allow_more_epochs=True, **rule)]  # type: ignore[arg-type]
        )  # fmt: skip

    planned, _ = go_on([], cfg(second), 0)
    anew, _ = go_on([], cfg(other), 0)
    in_mid_run, _ = go_on(planned, cfg(other), position)
    for phases, past in ((anew, begin), (in_mid_run, position)):
        before, after = (order(p).locate(range(past)) for p in (planned, phases))
        assert all((a == b).all() for a, b in zip(before, after, strict=True))
    if position <= begin:
        assert in_mid_run == anew, "a run that has not come to the phase goes on as one that was planned so"


def test_tokens_planned_are_those_drawn() -> None:
    """To within the last cycle's parts of a slot and the end of a phase."""
    cfg = unimax(4, phases=[later(4 * CYCLE, alpha=0.5, max_epochs=9), later(6 * CYCLE + 70)])
    available = {("de", "web"): 20 * CYCLE, ("fr", "a"): CYCLE, ("fr", "b"): CYCLE // 3}
    phases, mixtures = plan_phases([], cfg, available, position=0, end_position=8 * CYCLE, seq_len=1)
    order = Order([Stream(row.part, row.available_tokens, "") for row in mixtures[0].rows], 1, phases)
    for mixture, end in zip(mixtures, [*(m.from_position for m in mixtures[1:]), 8 * CYCLE], strict=True):
        drawn = order.visits(end)
        for row in mixture.rows:
            assert drawn[row.part] / row.available_tokens == pytest.approx(row.epochs, abs=1e-4)
    for first, second in itertools.pairwise(mixtures):
        assert first.from_position < second.from_position
