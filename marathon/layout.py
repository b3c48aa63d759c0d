"""Which layout a run has where its config leaves that open: the cheapest that fits in memory."""

from collections.abc import Iterator
from dataclasses import replace

from configs.enums import Recompute
from configs.errors import UserError
from configs.schema import EngineConfig, RunConfig
from marathon.plan import USABLE_SHARE, device_memory

COSTS = [
    (1, Recompute.none, "gradients are reduced once a step, nothing is computed twice"),
    (2, Recompute.none, "gradients are reduced with every micro batch"),
    (1, Recompute.selective, "norms, rotations and SwiGLU are computed twice"),
    (
        2,
        Recompute.selective,
        "gradients are reduced with every micro batch, norms, rotations and SwiGLU computed twice",
    ),
    (3, Recompute.none, "weights are gathered for each block, forward and backward"),
    (3, Recompute.selective, "weights are gathered for each block; norms, rotations and SwiGLU are computed twice"),
    (2, Recompute.full, "blocks are computed twice: a third more work"),
    (3, Recompute.full, "weights are gathered for each block, and blocks computed twice: a third more work"),
]
"""ZeRO stage and recomputation, the cheaper first, and what each costs."""


def choose(cfg: RunConfig) -> tuple[RunConfig, list[str]]:
    """The config with a layout, and lines that tell why it is this one; none where nothing was open.

    Raises `UserError` where no layout that the config allows fits.
    """
    if cfg.engine.zero_stage and cfg.engine.recompute is not Recompute.auto:
        return cfg, []
    usable_gib, told, seqs = USABLE_SHARE * cfg.cluster.device_memory_gib, [], cfg.train.max_micro_batch_seqs
    while seqs:
        for layout, cost in _candidates(cfg):
            chosen = replace(cfg, engine=layout, train=replace(cfg.train, max_micro_batch_seqs=seqs))
            needed_gib = sum(device_memory(chosen).values()) / 2**30
            groups = f", weights whole in groups of {layout.shard_group}" if layout.shard_group else ""
            told.append(
                f"ZeRO-{layout.zero_stage}{groups}, recompute={layout.recompute}, {seqs} sequences at a time: "
                f"{needed_gib:.1f} of {usable_gib:.1f} GiB; {cost}"
            )
            if needed_gib <= usable_gib:
                return chosen, [f"layout        {told.pop()}", *(f"  too much: {line}" for line in told)]
        seqs //= 2
    raise UserError(
        "no layout fits; the least of them:\n    " + told[-1],
        f"{cfg.cluster.name} has {cfg.cluster.device_memory_gib:g} GiB a device; {USABLE_SHARE:.0%} may be planned",
        "more nodes; or engine.tensor_parallel=2, 4 or 8, within a node",
    )


def _candidates(cfg: RunConfig) -> Iterator[tuple[EngineConfig, str]]:
    """What the config leaves open, in the order of `COSTS`; ZeRO-3 over several nodes first with weights on each."""
    engine, cluster = cfg.engine, cfg.cluster
    for stage, recompute, cost in COSTS:
        if engine.zero_stage not in (0, stage) or engine.recompute not in (Recompute.auto, recompute):
            continue
        layout = replace(engine, zero_stage=stage, recompute=recompute)
        if stage == 3 and cluster.nodes > 1 and cluster.devices_per_node > 1 and not engine.shard_group:
            yield replace(layout, shard_group=cluster.devices_per_node), f"{cost}, within a node"
        yield layout, cost
