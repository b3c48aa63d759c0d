"""Rules across sections: they run on the composed config, before anything is written or started."""

import math
from collections.abc import Iterator

from configs.enums import Device, OptimizerName, Precision, ScheduleName, SourceFormat, WandbMode
from configs.errors import UserError, raise_together
from configs.schema import RunConfig


def check(cfg: RunConfig) -> None:
    """Raises one `UserError` that holds every broken rule, so that one round of mending is enough."""
    raise_together(_broken_rules(cfg))


def _broken_rules(cfg: RunConfig) -> Iterator[UserError]:
    if not cfg.name or not all(c.isalnum() or c in "._-" for c in cfg.name) or cfg.name.startswith("."):
        rule = "a run's name is a folder: letters, digits, dot, dash, underscore"
        yield UserError(f"name = {cfg.name!r}", rule, "name=my-run")

    yield from _broken_layout(cfg)

    steps = cfg.train.steps
    decay_steps = round(cfg.schedule.decay_share * steps) if cfg.schedule.name is ScheduleName.wsd else 0
    if cfg.schedule.warmup_steps > steps - max(decay_steps, 1):
        found = f"schedule.warmup_steps = {cfg.schedule.warmup_steps}, of {steps} steps the last {decay_steps} decay"
        repair = f"schedule.warmup_steps={steps // 10}, or more train.tokens"
        yield UserError(found, "the warm-up has to end before the decay begins", repair)

    tokens = cfg.train.first_sample(steps) * cfg.train.seq_len
    late = [phase.from_tokens for phase in cfg.mixture.phases if phase.from_tokens > tokens - cfg.train.seq_len]
    if late:
        found = f"mixture.phases from {late[0]} tokens on, of {tokens} that {steps} steps take"
        last = cfg.train.steps_within(late[-1] + cfg.train.seq_len - 1)
        enough = cfg.train.first_sample(last + 1) * cfg.train.seq_len
        repair = f"train.tokens={enough} or more, or 'mixture.phases=[]'"
        yield UserError(found, "a phase begins before the run ends", repair)

    if not cfg.corpus.holdout.by_field and cfg.corpus.holdout.share <= 0:
        rule = "validation needs documents that training does not see"
        yield UserError("corpus.holdout is empty", rule, "corpus.holdout.share=0.001")
    if not cfg.corpus.sources:
        yield UserError("corpus.sources is empty", "a corpus has at least one source", "name one in configs/corpus/")
    for name, source in cfg.corpus.sources.items():
        is_local = source.path.startswith(("/", "package:"))
        if source.format is SourceFormat.hub and not is_local and not source.hub_revision:
            found = f"corpus.sources.{name}.path = {source.path} without hub_revision"
            rule = "a hub dataset is named with its commit, since a branch can change under a run"
            yield UserError(found, rule, f"corpus.sources.{name}.hub_revision=<commit>, or a local copy as path")

    sources = cfg.corpus.sources.values()
    licences = {source.licence for source in sources}
    unknown = [licence for licence in cfg.corpus.dedup.licence_order if licence not in licences]
    if unknown and not any(source.licence_field for source in sources):
        found = f"corpus.dedup.licence_order has {', '.join(unknown)}, the sources have {', '.join(sorted(licences))}"
        rule = "an order of licences names those of the sources, or of their documents where they have a licence_field"
        yield UserError(found, rule, "licence_order with the licences of the sources as they are spelled there")

    if cfg.engine.precision is Precision.fp32 and cfg.engine.comm_precision is Precision.bf16:
        found = "engine.precision = fp32 with engine.comm_precision = bf16"
        rule = "gradients must not be rounded below the precision of the weights"
        yield UserError(found, rule, "engine.comm_precision=fp32")
    if cfg.cluster.device is not Device.cpu and not cfg.cluster.peak_tflops > 0:
        found = f"cluster.peak_tflops = {cfg.cluster.peak_tflops} on {cfg.cluster.device.value}"
        rule = "MFU on an accelerator is stated against the vendor's peak, not against a measurement"
        yield UserError(found, rule, "cluster.peak_tflops=<dense bf16 peak> with cluster.peak_source=<where it stands>")
    if cfg.log.wandb is WandbMode.online and not cfg.cluster.online:
        found, rule = "log.wandb = online with cluster.online = false", "compute nodes are taken to have no network"
        yield UserError(found, rule, "log.wandb=offline, then `wandb sync` from a login node; or cluster.online=true")


def _broken_layout(cfg: RunConfig) -> Iterator[UserError]:
    """How devices share the work."""
    engine, world, group = cfg.engine, cfg.cluster.world_size, cfg.engine.group_size
    shared = {f"model.{name}": getattr(cfg.model, name) for name in ("n_head", "n_kv_head", "d_ff")}
    shared |= {"train.seq_len": cfg.train.seq_len, "cluster.devices_per_node": cfg.cluster.devices_per_node}
    largest = math.gcd(*shared.values())
    for name, size in (("tensor", engine.tensor_parallel), ("sequence", engine.sequence_parallel)):
        if largest % size:
            uneven = [f"{setting} = {value}" for setting, value in shared.items() if value % size]
            rule = "the devices of a group have equal parts, and are of one node, where links are fast"
            fitting = [n for n in range(1, largest + 1) if largest % n == 0]
            found = f"engine.{name}_parallel = {size}, {', '.join(uneven)}"
            yield UserError(found, rule, f"engine.{name}_parallel one of {fitting}")
            return
    if engine.tensor_parallel > 1 and engine.sequence_parallel > 1:
        found = "engine.tensor_parallel and engine.sequence_parallel are both set"
        rule = "the devices of a group share either matrices or sequences"
        yield UserError(found, rule, "sequence_parallel alone for long sequences, else tensor_parallel alone")
        return
    if engine.tensor_parallel > 1 and cfg.optim.name is OptimizerName.muon:
        found = f"optim.name = muon with engine.tensor_parallel = {engine.tensor_parallel}"
        rule = "muon makes whole matrices orthogonal, of which tensor parallelism leaves each device a part"
        yield UserError(found, rule, "engine.tensor_parallel=1, or optim=adamw")
    for name, size in cfg.train.step_sizes:
        seqs, shares = size // cfg.train.seq_len, world // group
        if seqs % shares:
            upward = -(-seqs // shares) * shares * cfg.train.seq_len
            devices = "devices" if group == 1 else f"groups of {group} devices"
            found = f"{name} = {size} is {seqs} sequences over {shares} {devices}"
            rule = "every device takes the same number of sequences in a step"
            yield UserError(found, rule, f"{name}={upward}, or a number of devices that divides {seqs * group}")
    fitting = [n for n in range(2, world) if world % n == 0]
    if engine.shard_group and engine.shard_group not in fitting:
        rule = "groups of equal size within all devices: of one device, or of all, they change nothing"
        found = f"engine.shard_group = {engine.shard_group} of {world} devices"
        others = f", or one of {fitting}, a node's devices best" if fitting else ""
        yield UserError(found, rule, f"engine.shard_group=0{others}")
    elif engine.shard_group and engine.zero_stage not in (0, 3):
        found = f"engine.shard_group = {engine.shard_group} with engine.zero_stage = {engine.zero_stage}"
        rule = "only ZeRO-3 shards weights; under the other stages each device has them whole"
        yield UserError(found, rule, "engine.shard_group=0, or engine=zero3")
