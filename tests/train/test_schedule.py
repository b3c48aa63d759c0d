"""Learning rate, portions of a step, and what stops a run."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.compose import compose
from configs.enums import DecayShape, ScheduleName
from configs.schema import OptimConfig, RampConfig, ScheduleConfig
from train.schedule import learning_rate, step_shape

OPTIM = OptimConfig(lr=1.0)


def rates(steps, **settings):
    schedule = ScheduleConfig(**settings)
    return [learning_rate(step, steps, OPTIM, schedule) for step in range(steps)]


def test_wsd_warms_up_stays_and_decays():
    found = rates(100, name=ScheduleName.wsd, warmup_steps=4, decay_share=0.2)
    assert found[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert found[4:81] == [1.0] * 77
    assert found[81:84] == pytest.approx([0.95, 0.9, 0.85])
    assert found[-1] == pytest.approx(0.05)


def test_cosine_falls_to_its_floor():
    found = rates(104, name=ScheduleName.cosine, warmup_steps=4, final_lr_share=0.1)
    assert found[4] == 1.0
    assert found[54] == pytest.approx(0.55)
    assert 0.1 < found[-1] < 0.101


@pytest.mark.parametrize(("shape", "expected"), [("linear", 0.75), ("sqrt", 0.5), ("cosine", 0.8535534)])
def test_a_decay_has_the_shape_that_was_asked_for(shape, expected):
    found = rates(100, name=ScheduleName.wsd, warmup_steps=4, decay_share=0.2, decay_shape=DecayShape[shape])
    assert found[4:81] == [1.0] * 77
    assert found[85] == pytest.approx(expected), "a quarter of the way"


@given(
    steps=st.integers(1, 300),
    warmup=st.integers(0, 299),
    decay=st.floats(0, 1),
    floor=st.floats(0, 1),
    name=st.sampled_from(list(ScheduleName)),
    shape=st.sampled_from(list(DecayShape)),
)
def test_the_rate_never_leaves_its_bounds_and_rises_before_it_falls(steps, warmup, decay, floor, name, shape):
    warmup = min(warmup, steps - 1)
    decay = min(decay, (steps - warmup) / steps)
    settings = {"name": name, "warmup_steps": warmup, "decay_share": decay, "final_lr_share": floor}
    found = rates(steps, **settings, decay_shape=shape)
    assert all(0 < rate <= 1 + 1e-12 for rate in found) or floor == 0
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found[: warmup + 1]))
    after = found[warmup:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    assert all(rate >= floor - 1e-12 for rate in after)
    at_the_end = learning_rate(steps, steps, OPTIM, ScheduleConfig(**settings, decay_shape=shape))
    has_decay = name is ScheduleName.cosine or round(decay * steps)
    assert at_the_end == pytest.approx(floor if has_decay else 1.0, abs=1e-12)


SMOKE = compose(["experiment=smoke", "train.tokens_per_step=8192"])


@given(world=st.sampled_from([1, 2, 4, 8, 16, 32]), largest=st.integers(1, 64))
def test_a_step_is_shared_out_whole(world, largest):
    cluster = replace(SMOKE.cluster, devices_per_node=world)
    cfg = replace(SMOKE, cluster=cluster, train=replace(SMOKE.train, max_micro_batch_seqs=largest))
    shape = step_shape(cfg)
    assert shape.micro_batch_seqs <= largest
    assert shape.micro_batch_seqs * shape.accumulation_steps * world == cfg.train.seqs_per_step == shape.seqs_per_step


@st.composite
def ramps(draw):
    """A run of sequences of 4 tokens, whose steps have up to four sizes."""
    ends = sorted(draw(st.sets(st.integers(1, 2_000), max_size=3)))
    *sizes, last = draw(st.lists(st.integers(1, 40), min_size=len(ends) + 1, max_size=len(ends) + 1))
    ramp = [RampConfig(end, 4 * size) for end, size in zip(ends, sizes, strict=True)]
    return replace(
        SMOKE.train, seq_len=4, batch_ramp=ramp, tokens_per_step=4 * last, tokens=draw(st.integers(160, 4_000))
    )


@given(train=ramps())
def test_steps_of_any_ramp_follow_one_another_without_gap(train):
    """Against the plain reading of the setting: step by step, each of the size that its first token asks for."""
    tokens, firsts = 0, []
    while tokens <= train.tokens:
        firsts.append(tokens // train.seq_len)
        tokens += next((s.tokens_per_step for s in train.batch_ramp if tokens < s.until_tokens), train.tokens_per_step)
    steps = len(firsts) - 1
    assert train.steps == steps
    assert [train.first_sample(step) for step in range(steps + 1)] == firsts
    assert [train.steps_within(4 * first) for first in firsts] == list(range(steps + 1))
    assert all(train.steps_within(4 * first - 1) == step - 1 for step, first in enumerate(firsts) if step)


def test_each_size_of_a_ramp_is_shared_out_by_itself():
    cfg = replace(SMOKE, train=replace(SMOKE.train, batch_ramp=[RampConfig(3_000, 512), RampConfig(9_000, 2_560)]))
    shapes = [step_shape(cfg, step) for step in (0, 5, 6, 8, 9)]
    assert shapes == [(2, 1, 1), (2, 1, 1), (10, 5, 1), (10, 5, 1), (32, 16, 1)]
    assert step_shape(cfg) == shapes[-1]
