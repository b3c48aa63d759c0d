"""Layouts that share sequences, matrices or weights among devices, against a plain loop in one process."""

import dataclasses

import pytest

from configs.checks import check
from configs.enums import Precision, Recompute
from tests.train.ranks import run_ranks
from tests.train.test_engine import build, config, engine_steps, plain_loop, save

STEPS = 20
LAYOUTS = {
    "2 devices": [
        *({"zero_stage": stage, "sequence_parallel": 2} for stage in (1, 2, 3)),
        {"zero_stage": 1, "sequence_parallel": 2, "compile": True},
        {"zero_stage": 2, "recompute": Recompute.selective},
    ],
    "4 devices": [
        *({"zero_stage": stage} for stage in (1, 2, 3)),
        *({"zero_stage": stage, "sequence_parallel": 2} for stage in (1, 3)),
        {"zero_stage": 3, "shard_group": 2},
    ],
    # DeepSpeed keeps its groups of devices for as long as a process lives.
    "2 devices, AutoTP": [
        *({"zero_stage": stage, "tensor_parallel": 2} for stage in (1, 2, 3)),
        {"zero_stage": 1, "tensor_parallel": 2, "compile": True},
    ],
    "4 devices, AutoTP": [
        *({"zero_stage": stage, "tensor_parallel": 2} for stage in (1, 2, 3)),
        {"zero_stage": 2, "tensor_parallel": 2, "precision": Precision.bf16},
    ],
}


def named(layout):
    return "-".join(f"{key}={value}" for key, value in layout.items())


def with_layout(world_size, layout):
    cfg = config(world_size)
    return dataclasses.replace(cfg, engine=dataclasses.replace(cfg.engine, **layout))


def train_each(folder, world_size, layouts):
    """One rank: for each layout 20 steps, saved at 10; then from there once more, in another engine."""
    from train.dist import join, leave
    from train.schedule import step_shape

    rank = join(config(world_size))
    told = {}
    for layout in layouts:
        cfg = with_layout(world_size, layout)
        check(cfg)
        here, shape = dataclasses.replace(rank, group_size=cfg.engine.group_size), step_shape(cfg)
        engine, _ = build(cfg, here)
        whole = engine_steps(engine, cfg, here, shape, 0, STEPS // 2)
        middle = save(folder / named(layout), engine, here, STEPS // 2)
        whole += engine_steps(engine, cfg, here, shape, STEPS // 2, STEPS)
        engine, step = build(cfg, here, middle)
        told[named(layout)] = whole, engine_steps(engine, cfg, here, shape, step, STEPS)
    leave()
    return told


@pytest.fixture(scope="module", params=LAYOUTS)
def trained(request, tmp_path_factory):
    folder, world_size = tmp_path_factory.mktemp("layouts"), int(request.param.split()[0])
    return folder, run_ranks(train_each, world_size, folder, world_size, LAYOUTS[request.param])


def test_every_layout_steps_as_a_plain_loop(trained):
    _, told = trained
    expected, _ = plain_loop(STEPS)
    for layout, (whole, resumed) in told.items():
        tolerance = 2e-2 if "bf16" in layout else 1e-4
        assert [nats for nats, _ in whole] == pytest.approx([nats for nats, _ in expected], rel=tolerance), layout
        if "bf16" not in layout:
            assert [norm for _, norm in whole] == pytest.approx([norm for _, norm in expected], rel=1e-2), layout
        assert resumed == whole[STEPS // 2 :], layout
