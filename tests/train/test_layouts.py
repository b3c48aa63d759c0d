"""Layouts that share sequences, matrices or weights among devices, against a plain loop in one process."""

import dataclasses
import itertools
import re

import pytest
import torch

from configs.checks import check
from configs.compose import compose
from configs.enums import Precision, Recompute
from configs.errors import UserError
from marathon.layout import choose
from model.weights import MASTER, Columns, FragmentReader
from tests.train.ranks import run_ranks
from tests.train.test_engine import build, config, engine_steps, plain_loop, save
from train.checkpoint import Snapshot, commit, write_part, writing_folder
from train.progress import Progress

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


@pytest.mark.parametrize(
    ("overrides", "repair"),
    [
        (["engine.tensor_parallel=4", "cluster.devices_per_node=4"], "engine.tensor_parallel one of [1, 2]"),
        (["engine.tensor_parallel=3", "cluster.devices_per_node=2"], "engine.tensor_parallel one of [1, 2]"),
        (["engine.sequence_parallel=3", "cluster.devices_per_node=3"], "engine.sequence_parallel one of [1]"),
        (["engine.sequence_parallel=2", "cluster.devices_per_node=1", "cluster.nodes=2"], "one of [1]"),
        (["engine.sequence_parallel=2", "engine.tensor_parallel=2", "cluster.devices_per_node=2"], "alone"),
        (["engine.shard_group=2", "cluster.devices_per_node=4"], "engine.shard_group=0, or engine=zero3"),
        (["engine.shard_group=3", "engine.zero_stage=3", "cluster.devices_per_node=4"], "one of [2]"),
        (["engine.tensor_parallel=2", "optim=muon"], "optim=adamw"),
    ],
)
def test_layouts_that_cannot_be_or_do_nothing_are_refused(overrides, repair):
    with pytest.raises(UserError, match=re.escape(repair)):
        compose(["experiment=smoke", *overrides])


def test_what_is_stored_by_columns_is_read_as_the_whole_and_as_other_columns(tmp_path):
    """Four writers of a fifth to two fifths of the columns each, in two ranges; any range of any columns is right."""
    matrix, bounds = torch.arange(7 * 10.0).view(7, 10), [0, 2, 4, 8, 10]
    folder = writing_folder(tmp_path, 1)
    for rank, (first, end) in enumerate(itertools.pairwise(bounds)):
        name, part = str(Columns("w", first, end, 10)), matrix[:, first:end].flatten()
        ranges = {0: part[:5], 5: part[5:]}
        tensors = {f"{MASTER}/{name}/{start}": values.clone() for start, values in ranges.items()}
        write_part(folder, rank, Snapshot(tensors, [(name, start, len(values)) for start, values in ranges.items()]))
    reader = FragmentReader(commit(tmp_path, Progress(step=1).to_json(), {}, 4))
    for first, end in [(0, 10), *itertools.combinations(range(0, 11, 2), 2)]:
        name = "w" if end - first == 10 else str(Columns("w", first, end, 10))
        expected = matrix[:, first:end].flatten()
        for start, stop in itertools.combinations(range(0, len(expected) + 1, 3), 2):
            assert torch.equal(reader.read(MASTER, name, start, stop - start), expected[start:stop])


def test_a_layout_is_the_cheapest_that_fits():
    def chosen(*overrides):
        cfg, told = choose(
            compose(["experiment=eu24_8b", "cluster=lumi", "engine=auto", "engine.recompute=auto", *overrides])
        )
        return cfg.engine.zero_stage, cfg.engine.recompute, cfg.engine.shard_group, told

    assert choose(given := compose(["experiment=smoke"])) == (given, [])
    small = chosen("model=160m", "cluster.nodes=1")
    assert small[:3] == (1, Recompute.none, 0) and len(small[3]) == 1
    stage, recompute, _, told = chosen("cluster.nodes=32")
    assert (stage, recompute) == (2, Recompute.selective) and "too much: ZeRO-2, recompute=none" in "\n".join(told)
    assert chosen("model=32b", "cluster.nodes=64")[0] == 3
    assert chosen("cluster.nodes=32", "engine.zero_stage=3")[0] == 3
    with pytest.raises(UserError, match="no layout fits"):
        chosen("model=70b", "cluster.nodes=1")
