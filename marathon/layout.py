"""Which layout a run has where its config leaves that open: the cheapest that fits in memory."""

from collections.abc import Iterator
from dataclasses import replace

from configs.enums import Precision, Recompute
from configs.errors import UserError
from configs.schema import EngineConfig, RunConfig
from marathon.plan import USABLE_SHARE, device_memory

NONE, SELECTIVE, FULL = Recompute.none, Recompute.selective, Recompute.full
CHEAPER_FIRST = [(1, NONE), (2, NONE), (1, SELECTIVE), (2, SELECTIVE), (3, NONE), (3, SELECTIVE), (2, FULL), (3, FULL)]
STAGE_COSTS = {
    1: "gradients are reduced once a step, after the backward pass",
    2: "gradients are reduced with every micro batch, beside the backward pass",
    3: "weights are gathered for each block, forward and backward",
}
RECOMPUTE_COSTS = {
    NONE: "nothing is computed twice",
    SELECTIVE: "norms, rotations and SwiGLU are computed twice",
    FULL: "blocks are computed twice, a third more work",
}


def choose(cfg: RunConfig) -> tuple[RunConfig, list[str]]:
    """The config with a layout, and lines that tell why it is this one; none where nothing was open.

    Raises `UserError` where no layout that the config allows fits.
    """
    if cfg.engine.zero_stage and cfg.engine.recompute is not Recompute.auto:
        return cfg, []
    usable_gib, told, seqs = USABLE_SHARE * cfg.cluster.device_memory_gib, [], cfg.train.max_micro_batch_seqs
    while seqs:
        for layout in _candidates(cfg):
            chosen = replace(cfg, engine=layout, train=replace(cfg.train, max_micro_batch_seqs=seqs))
            needed_gib = sum(device_memory(chosen).values()) / 2**30
            told.append(
                f"{layout.layout}, train.max_micro_batch_seqs={seqs}: {needed_gib:.1f} of {usable_gib:.1f} GiB; "
                f"{STAGE_COSTS[layout.zero_stage]}; {RECOMPUTE_COSTS[layout.recompute]}"
            )
            if needed_gib <= usable_gib:
                return chosen, [f"layout        {told.pop()}", *(f"  too much: {line}" for line in told)]
        seqs //= 2
    found = "no layout fits; the least of them:\n    " + told[-1]
    rule = f"{cfg.cluster.name} has {cfg.cluster.device_memory_gib:g} GiB a device; {USABLE_SHARE:.0%} may be planned"
    raise UserError(found, rule, "more nodes, shorter sequences or a smaller model; or leave more open: engine=auto")


def _candidates(cfg: RunConfig) -> Iterator[EngineConfig]:
    """What the config leaves open, the cheaper first; ZeRO-3 over several nodes first with weights on each.

    Between nodes a reduction that everything waits for, as that of ZeRO-1 in bf16, costs more than several beside the
    backward pass: on 16 nodes of LUMI some 0.7 s beside 1.7 s of computing, for 1B parameters at 12.5 GB/s a GCD.
    """
    engine, cluster = cfg.engine, cfg.cluster
    for stage, recompute in CHEAPER_FIRST:
        if engine.zero_stage not in (0, stage) or engine.recompute not in (Recompute.auto, recompute):
            continue
        if not engine.zero_stage and stage == 1 and cluster.nodes > 1 and engine.precision is Precision.bf16:
            continue
        layout = replace(engine, zero_stage=stage, recompute=recompute)
        if stage == 3 and cluster.nodes > 1 and cluster.devices_per_node > 1 and not engine.shard_group:
            yield replace(layout, shard_group=cluster.devices_per_node)
        yield layout
