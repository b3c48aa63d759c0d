"""Rules across sections: one function a rule, all failures reported at once.

They run on the composed config, before anything is written or started. A rule returns the error
instead of raising it, so that one round of mending is enough.
"""

from configs.enums import Device, Precision, ScheduleName, SourceFormat, WandbMode
from configs.errors import UserError, raise_together
from configs.schema import RunConfig


def check(cfg: RunConfig) -> None:
    """Raises one `UserError` that holds every broken rule."""
    raise_together(error for rule in RULES if (error := rule(cfg)) is not None)


def _name_is_a_folder_name(cfg: RunConfig) -> UserError | None:
    if cfg.name and all(c.isalnum() or c in "._-" for c in cfg.name) and not cfg.name.startswith("."):
        return None
    return UserError(
        f"name = {cfg.name!r}",
        "a run's name is a folder: letters, digits, dot, dash, underscore",
        "name=my-run",
    )


def _sequences_divide_over_devices(cfg: RunConfig) -> UserError | None:
    seqs, world = cfg.train.seqs_per_step, cfg.cluster.world_size
    if seqs % world == 0:
        return None
    upward = -(-seqs // world) * world * cfg.train.seq_len
    return UserError(
        f"train.tokens_per_step = {cfg.train.tokens_per_step} is {seqs} sequences over {world} devices",
        "every device takes the same number of sequences in a step",
        f"train.tokens_per_step={upward}, or a number of devices that divides {seqs}",
    )


def _warmup_ends_before_the_decay(cfg: RunConfig) -> UserError | None:
    steps = cfg.train.steps
    decay_steps = round(cfg.schedule.decay_share * steps) if cfg.schedule.name is ScheduleName.wsd else 0
    if cfg.schedule.warmup_steps <= steps - max(decay_steps, 1):
        return None
    return UserError(
        f"schedule.warmup_steps = {cfg.schedule.warmup_steps}, of {steps} steps the last {decay_steps} decay",
        "the warm-up has to end before the decay begins",
        f"schedule.warmup_steps={steps // 10}, or more train.tokens",
    )


def _phases_begin_within_the_run(cfg: RunConfig) -> UserError | None:
    late = [phase.from_tokens for phase in cfg.mixture.phases if phase.from_tokens >= cfg.train.tokens]
    if not late:
        return None
    return UserError(
        f"mixture.phases from {late[0]} tokens on, train.tokens = {cfg.train.tokens}",
        "a phase begins before the run ends",
        f"train.tokens above {late[-1]}, or 'mixture.phases=[]'",
    )


def _something_is_held_out(cfg: RunConfig) -> UserError | None:
    if cfg.corpus.holdout.by_field or cfg.corpus.holdout.share > 0:
        return None
    return UserError(
        "corpus.holdout is empty",
        "validation needs documents that training does not see",
        "corpus.holdout.share=0.001",
    )


def _a_source_exists(cfg: RunConfig) -> UserError | None:
    if cfg.corpus.sources:
        return None
    return UserError("corpus.sources is empty", "a corpus has at least one source", "name one in configs/corpus/")


def _hub_data_is_pinned_and_allowed(cfg: RunConfig) -> UserError | None:
    for name, source in cfg.corpus.sources.items():
        is_local = source.path.startswith(("/", "package:"))
        if source.format is SourceFormat.hub and not is_local and not source.hub_revision:
            return UserError(
                f"corpus.sources.{name}.path = {source.path} without hub_revision",
                "a hub dataset is named with its commit, since a branch can change under a run",
                f"corpus.sources.{name}.hub_revision=<commit>, or a local copy as path",
            )
    return None


def _precision_fits_communication(cfg: RunConfig) -> UserError | None:
    if cfg.engine.precision is Precision.bf16 or cfg.engine.comm_precision is Precision.fp32:
        return None
    return UserError(
        "engine.precision = fp32 with engine.comm_precision = bf16",
        "gradients must not be rounded below the precision of the weights",
        "engine.comm_precision=fp32",
    )


def _peak_is_known_on_devices(cfg: RunConfig) -> UserError | None:
    if cfg.cluster.device is Device.cpu or cfg.cluster.peak_tflops > 0:
        return None
    return UserError(
        f"cluster.peak_tflops = {cfg.cluster.peak_tflops} on {cfg.cluster.device.value}",
        "MFU on an accelerator is stated against the vendor's peak, not against a measurement",
        "cluster.peak_tflops=<dense bf16 peak> with cluster.peak_source=<where it stands>",
    )


def _wandb_online_needs_a_network(cfg: RunConfig) -> UserError | None:
    if cfg.log.wandb is not WandbMode.online or cfg.cluster.online:
        return None
    return UserError(
        "log.wandb = online with cluster.online = false",
        "compute nodes are taken to have no network",
        "log.wandb=offline, then `wandb sync` from a login node; or cluster.online=true",
    )


RULES = (
    _name_is_a_folder_name,
    _sequences_divide_over_devices,
    _warmup_ends_before_the_decay,
    _phases_begin_within_the_run,
    _something_is_held_out,
    _a_source_exists,
    _hub_data_is_pinned_and_allowed,
    _precision_fits_communication,
    _peak_is_known_on_devices,
    _wandb_online_needs_a_network,
)
