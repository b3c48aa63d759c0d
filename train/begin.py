"""Whether a run can begin from a checkpoint of another one."""

from pathlib import Path

from configs.compose import diff, load
from configs.errors import UserError
from configs.schema import RunConfig
from model.weights import list_checkpoints, read_manifest

KEPT = ("model.", "optim.name", "seed", "train.seq_len", "mixture.packing")


def require_fit(cfg: RunConfig, source: Path) -> None:
    """Raises `UserError` where a run cannot go on from `source`, as far as settings tell: before there is a corpus."""
    train = cfg.train
    try:
        progress, theirs = read_manifest(source)["progress"], load(source.parent.parent / "config.yaml")
    except UserError as error:
        near = [str(path) for run in (source, source.parent.parent) for path in list_checkpoints(run)]
        repair = f"train.begin_from= one of {', '.join(near)}" if near else "OTHER/checkpoints/step-000000100"
        raise UserError(f"train.begin_from={train.begin_from}: {error.found}", error.rule, repair) from None
    if other := {key: was_now for key, was_now in diff(theirs, cfg).items() if key.startswith(KEPT)}:
        found = f"{', '.join(f'{key}={now}' for key, (_, now) in other.items())}: not what {source} was trained with"
        repair = " ".join(f"{key}={was}" for key, (was, _) in other.items())
        raise UserError(found, "train.begin_from takes weights, moments and order as they are", repair)
    step, tokens = progress["step"], progress["tokens"]
    if (here := train.first_sample(step) * train.seq_len) != tokens:
        found = f"{step} steps of this run take {here} tokens, those of {source} took {tokens}"
        rule = "what is done keeps its size of a step, and the order of samples goes on behind it"
        repair = f"train.batch_ramp with the sizes of that run, the last of them with until_tokens: {tokens}"
        raise UserError(found, rule, repair)
    if step >= train.steps:
        rule = f"they count from that run's beginning, and {source} has taken {tokens}"
        raise UserError(f"train.tokens={train.tokens}", rule, f"train.tokens={tokens + train.tokens_per_step} or more")
