"""Learning rate, portions of a step, and what stops a run."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.compose import compose
from configs.enums import ScheduleName
from configs.schema import OptimConfig, ScheduleConfig
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


@given(
    steps=st.integers(1, 300),
    warmup=st.integers(0, 299),
    decay=st.floats(0, 1),
    floor=st.floats(0, 1),
    name=st.sampled_from(list(ScheduleName)),
)
def test_the_rate_never_leaves_its_bounds_and_rises_before_it_falls(steps, warmup, decay, floor, name):
    warmup = min(warmup, steps - 1)
    decay = min(decay, (steps - warmup) / steps)
    found = rates(steps, name=name, warmup_steps=warmup, decay_share=decay, final_lr_share=floor)
    assert all(0 < rate <= 1 + 1e-12 for rate in found) or floor == 0
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found[: warmup + 1]))
    after = found[warmup:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))


SMOKE = compose(["experiment=smoke", "train.tokens_per_step=8192"])


@given(world=st.sampled_from([1, 2, 4, 8, 16, 32]), largest=st.integers(1, 64))
def test_a_step_is_shared_out_whole(world, largest):
    cluster = replace(SMOKE.cluster, devices_per_node=world)
    cfg = replace(SMOKE, cluster=cluster, train=replace(SMOKE.train, max_micro_batch_seqs=largest))
    shape = step_shape(cfg)
    assert shape.micro_batch_seqs <= largest
    assert shape.micro_batch_seqs * shape.accumulation_steps * world == cfg.train.seqs_per_step == shape.seqs_per_step
