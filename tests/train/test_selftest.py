"""The self-test: silent on every sound layout, which it leaves as it was, and loud where a gradient is not right."""

import dataclasses
import itertools
import re

import pytest
import torch

from configs.enums import Precision
from configs.errors import UserError
from configs.schema import EngineConfig
from ledger.record import Ledger
from tests.train.ranks import run_ranks
from tests.train.test_engine import ROWS, build, config, engine_steps, save
from train.engine import refuse_known_bad
from train.selftest import TOLERANCE

LAYOUTS = list(itertools.product((1, 2, 3), ("fp32", "bf16")))


def pass_on_all_layouts(folder, world_size):
    """One rank: for each layout whether engine and later steps are as without a self-test, and what it recorded."""
    from train.dist import join, leave
    from train.schedule import step_shape
    from train.selftest import self_test

    base = config(world_size)
    rank = join(base)
    told = {}
    for stage, precision in LAYOUTS:
        cfg, here = laid_out(base, stage, precision), folder / f"{stage}-{precision}"
        engine, _ = build(cfg, rank)
        engine_steps(engine, cfg, rank, step_shape(cfg), 0, 2)
        whole = save(here, engine, rank, 2)
        before = state(engine)
        for _ in range(2):
            self_test(cfg, here, engine, rank, ROWS, whole)
        untouched = all(torch.equal(now, then) for now, then in zip(state(engine), before, strict=True))
        after = engine_steps(engine, cfg, rank, step_shape(cfg), 2, 4)
        other, _ = build(cfg, rank, whole)
        as_without = after == engine_steps(other, cfg, rank, step_shape(cfg), 2, 4)
        told[stage, precision] = rank.gather((untouched, as_without)), list(Ledger(here).read("self_test"))
    leave()
    return told


def laid_out(cfg, stage, precision):
    return dataclasses.replace(
        cfg, engine=dataclasses.replace(cfg.engine, zero_stage=stage, precision=Precision(precision))
    )


def state(engine):
    """Weights, moments, and the steps that the moments have seen."""
    tensors = [tensor.clone() for fragment in engine.fragments() for tensor in fragment.tensors.values()]
    return [*tensors, *(flat["step"].clone() for flat in engine.engine.optimizer.optimizer.state.values())]


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_layout_passes_and_goes_on_as_if_nothing_had_been(tmp_path, world_size):
    told = run_ranks(pass_on_all_layouts, world_size, tmp_path, world_size)
    for (stage, precision), (ranks, records) in told.items():
        assert ranks == [(True, True)] * world_size, (stage, precision)
        [record] = records  # the second time, the ledger knows
        assert (record["layout"]["zero_stage"], record["layout"]["precision"]) == (stage, precision)
        assert 0 < record["error"] < TOLERANCE[Precision(precision)] / 5


# What engines have done wrong, each done to a sound one.


def lose_last_micro_batch(engine):
    weigh_loss(engine, lambda: 0.0 if engine.engine.is_gradient_accumulation_boundary() else 1.0)


def lose_first_micro_batch(engine):
    weigh_loss(
        engine, lambda: 0.0 if engine.engine.micro_steps % engine.engine.gradient_accumulation_steps() == 0 else 1.0
    )


def double(engine):
    weigh_loss(engine, lambda: 2.0)


def lose_a_rank(engine):
    weigh_loss(engine, lambda: 0.0 if engine.rank.rank == 1 else 1.0)


def weigh_loss(engine, weight):
    backward = engine.engine.backward
    engine.engine.backward = lambda loss: backward(loss * weight())


def zero_a_parameter(engine):
    engine.decoder.blocks[1].attention.k_norm.weight.register_hook(torch.zeros_like)


def reduce_nothing(engine):
    """Every rank keeps its own gradient for that of all."""
    from deepspeed import comm

    def keep(tensor, *_, **__):
        return tensor.mul_(engine.rank.world_size) if tensor.numel() > 16 else reduced(tensor, *_, **__)

    reduced, comm.all_reduce = comm.all_reduce, keep


FAULTS = (lose_last_micro_batch, lose_first_micro_batch, double, lose_a_rank, zero_a_parameter)


def fail(folder, cases):
    """One rank of two: what a self-test says of each fault in its layout, and whether the engine is as before."""
    from train.dist import join, leave
    from train.selftest import self_test

    base = config(2)
    base.train.max_micro_batch_seqs = 1  # six a step, of which one must not be a drop in the ocean
    rank = join(base)
    told = []
    for number, (stage, precision, fault) in enumerate(cases):
        cfg, here = laid_out(base, stage, precision), folder / str(number)
        engine, _ = build(cfg, rank)
        whole = save(here, engine, rank, 0)
        before = state(engine)
        fault(engine)
        # A layout that was refused has not passed: the next start is refused too, where the fault is still there.
        for _ in range(2 if fault is zero_a_parameter else 1):
            found = ""
            try:
                self_test(cfg, here, engine, rank, ROWS, whole)
            except UserError as refusal:
                found = refusal.found
            except SystemExit:  # the first rank tells it
                assert rank.rank
        told.append((found, all(torch.equal(now, then) for now, then in zip(state(engine), before, strict=True))))
    leave()
    return told


def test_gradients_that_are_not_right_are_refused(tmp_path):
    cases = list(itertools.product((1, 2, 3), ("bf16",), FAULTS))
    # Under ZeRO-3 the ranks would not even agree on the norm.
    cases += [(1, "bf16", reduce_nothing), (2, "fp32", reduce_nothing)]
    told = run_ranks(fail, 2, tmp_path, cases)
    for (stage, precision, fault), (found, untouched) in zip(cases, told, strict=True):
        case = stage, precision, fault.__name__, found
        assert untouched, case
        off, n_parameters, worst = re.search(r"off in (\d+) of (\d+) parameters: \S+ by ([\d.]+)", found).groups()
        assert off == ("1" if fault is zero_a_parameter else n_parameters), case
        assert float(worst) > 0.3, case
        if fault is zero_a_parameter:
            assert "blocks.1.attention.k_norm.weight by 1" in found, case


def engine_of(stage, precision):
    return EngineConfig(zero_stage=stage, precision=Precision(precision))


@pytest.mark.parametrize(
    ("deepspeed", "pytorch", "stage", "precision", "reason"),
    [
        ("0.18.5", "2.9.1", 1, "bf16", "0.19.5 and later"),
        ("0.18.6", "2.9.1", 1, "bf16", "last micro batch"),
        ("0.18.10", "2.12.0+rocm7.1", 1, "bf16", "last micro batch"),
        ("0.18.10", "2.9.1", 1, "fp32", "0.19.5 and later"),
        ("0.18.10", "2.9.1", 2, "bf16", "0.19.5 and later"),
        ("0.18.8", "2.10.0", 3, "bf16", "ZeRO-3"),
        ("0.18.8", "2.9.1", 3, "bf16", "0.19.5 and later"),
        ("0.18.9", "2.10.0", 3, "bf16", "0.19.5 and later"),
        ("0.19.4", "2.9.1", 2, "fp32", "0.19.5 and later"),
        ("0.19.5", "2.9.1+cu128", 1, "bf16", None),
        ("0.19.5+3d2f1a", "2.13.0", 3, "bf16", None),
        ("0.20.0", "2.14.0a0+git12", 2, "fp32", None),
    ],
)
def test_versions_that_compute_something_else_are_refused(deepspeed, pytorch, stage, precision, reason):
    if reason is None:
        refuse_known_bad(deepspeed, pytorch, engine_of(stage, precision))
        return
    with pytest.raises(UserError) as refusal:
        refuse_known_bad(deepspeed, pytorch, engine_of(stage, precision))
    assert reason in refusal.value.rule
    assert f"DeepSpeed {deepspeed} with torch {pytorch}, ZeRO-{stage} in {precision}" in refusal.value.found
