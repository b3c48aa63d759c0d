"""A run and its stages: how a command opens the run, what each stage depends on, and whether it is done.

A stage is done when the ledger holds a record of it with the same inputs and its outputs are still there.
So a changed corpus, suite or checkpoint runs it again, and nothing else does. Looking takes no torch.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from configs.compose import compose, config_hash, diff, freeze, is_free_to_change, load, run_dir, settings_hash
from configs.enums import Packing
from configs.errors import UserError
from configs.schema import RunConfig
from data.files import sha256
from ledger import host
from ledger.record import Ledger, json_lines
from marathon.choices import run_names
from marathon.layout import choose
from train.faults import refuse_if_held
from train.schedule import learning_rate

CHECKPOINTS = "checkpoints"
MAX_STARTS_WITHOUT_PROGRESS = 2
_AFTER_DATA = (
    "training, evaluation and release go on from what `marathon data` prepares",
    "run `marathon data` with the same arguments, or `marathon run` for all stages",
)


def open_run(overrides: list[str], is_new: bool = True) -> tuple[RunConfig, Path]:
    """Composes the config and freezes it into the run's folder, which is made if the run may be new.

    Raises `UserError` where it may not, or has checkpoints and a setting that decides what they are has changed.
    """
    cfg, layout = choose(compose(overrides))
    folder = run_dir(cfg)
    frozen = folder / "config.yaml"
    if not is_new and not frozen.exists():
        there = ", ".join(run_names(folder.parent)) or "none"
        raise UserError(f"no run {cfg.name} in {folder.parent}; there: {there}", *_AFTER_DATA)
    before = load(frozen) if frozen.exists() else cfg
    changes = diff(before, cfg)
    told = {key: f"{key}: {old} -> {new}" for key, (old, new) in changes.items()}
    _require_same_run(cfg, folder, told, before)
    hops = [r for r in Ledger(folder).read() if r["event"] in ("moved", "arrived", "train_start")]
    if hops and hops[-1]["event"] == "moved":  # and has not gone on here since
        print(f"warning: run {cfg.name} was moved to {hops[-1]['to']}; what is done here stays here", file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        found, rule = f"{folder} cannot be written: {error.strerror}", "what a run writes stands under cluster.scratch"
        raise UserError(found, rule, "export MARATHON_SCRATCH=<a folder of yours>, or cluster.scratch=…") from None
    if frozen.exists() and not changes:
        return cfg, folder
    refuse_if_held(folder)
    freeze(cfg, frozen)
    print(*layout, sep="\n", end="\n" if layout else "", flush=True)
    facts: dict[str, Any] = {"arguments": overrides, "config_hash": config_hash(cfg), "layout": layout}
    if changes:
        print(*told.values(), sep="\n", flush=True)
        facts["settings"] = {key: [str(old), str(new)] for key, (old, new) in changes.items()}
    facts |= {"software": host.software(), "commit": host.commit()}
    Ledger(folder).append("changed" if changes else "frozen", **facts)
    return cfg, folder


def _require_same_run(cfg: RunConfig, folder: Path, changes: dict[str, str], before: RunConfig) -> None:
    steps = [int(path.name.removeprefix("step-")) for path in (folder / CHECKPOINTS).glob("step-" + 9 * "[0-9]")]
    fixed = [line for key, line in changes.items() if not is_free_to_change(key)]
    if steps and fixed:
        first = "; ".join(fixed[:6] + ([f"and {len(fixed) - 6} more"] if len(fixed) > 6 else []))
        found = f"run {cfg.name} has checkpoints, and these settings differ from theirs: {first}"
        rule = "what decides weights and order of samples stays as the run began"
        raise UserError(found, rule, f"name={cfg.name}-2 for a new run, or leave them as they were")
    if (done := max(steps, default=0)) > cfg.train.steps:
        found = f"train.tokens = {cfg.train.tokens} are {cfg.train.steps} steps, the run has done {done}"
        repair = f"train.tokens={cfg.train.first_sample(done) * cfg.train.seq_len} or more"
        raise UserError(found, "a run may be made longer, or end where it stands", repair)
    was, now = (learning_rate(max(done - 1, 0), c.train.steps, c.optim, c.schedule) for c in (before, cfg))
    if done and now > was:
        print(f"warning: the rate rises again, {was:.3g} to {now:.3g}: see docs/recover.md", file=sys.stderr)
    if not done and cfg.train.begin_from:
        from train.begin import require_fit  # takes torch

        require_fit(cfg, folder.parent / cfg.train.begin_from)


def inputs_of(stage: str, cfg: RunConfig, run_dir: Path) -> dict[str, Any]:
    """What decides the outcome of a stage; raises `UserError` where an earlier stage has yet to run."""
    if stage == "data":
        return _inputs_of_data(cfg, run_dir)
    corpus_hash = prepared_corpus(run_dir)["corpus_hash"]
    if stage == "train":
        return {"corpus_hash": corpus_hash, "settings": settings_hash(cfg)}
    checkpoints = {path.parent.name: sha256(path) for path in _manifests(run_dir)}
    if not checkpoints:
        found = f"{run_dir / CHECKPOINTS} holds no checkpoint"
        raise UserError(found, f"{stage} needs one", "run `marathon train` first")
    if stage == "eval":
        return {"corpus_hash": corpus_hash, "checkpoints": checkpoints, "suite": config_hash(cfg.suite)}
    evaluations = {path.name: sha256(path) for path in sorted((run_dir / "eval").glob("*.json"))}
    last = checkpoints[max(checkpoints)]
    return {"checkpoint": last, "evaluations": evaluations, "release": config_hash(cfg.release)}


def _inputs_of_data(cfg: RunConfig, run_dir: Path) -> dict[str, Any]:
    from data.manifest import Manifest
    from data.pipeline import changed_inputs, corpus_dir

    # A run with checkpoints keeps the settings of its corpus, and so what was prepared from them.
    record = Ledger(run_dir).last("stage", stage="data")
    kept = record["inputs"] if record and _manifests(run_dir) and is_done("data", record["inputs"], run_dir) else None
    try:
        packing = f"fit-{cfg.train.seq_len}" if cfg.mixture.packing is Packing.best_fit else "concat"
        inputs = {"corpus_key": corpus_dir(cfg).name, "packing": packing}
    except UserError:
        if kept is None:
            raise
        return kept  # the sources may have stayed on another machine
    if kept is None or kept["corpus_key"] == inputs["corpus_key"]:
        return inputs
    if changed := changed_inputs(cfg, Manifest.load(prepared_corpus(run_dir)["path"])):
        found = f"not as it was when {run_dir.name} began: {', '.join(changed[:5])}{' …' if len(changed) > 5 else ''}"
        removal = f"`marathon data remove run={run_dir.name} ids=… reason=…` takes documents out of this one"
        repair = f"put back what was there, or name=… begins a new run; {removal}"
        raise UserError(found, "a run with checkpoints keeps the corpus that they were trained on", repair)
    return kept  # this version of Marathon would prepare the same anew


def _manifests(run_dir: Path) -> list[Path]:
    return sorted((run_dir / CHECKPOINTS).glob("step-*/manifest.json"))


def is_done(stage: str, inputs: dict[str, Any], run_dir: Path) -> bool:
    """Whether the newest record of the stage has these inputs and its outputs are there."""
    record = Ledger(run_dir).last("stage", stage=stage)
    if record is None or record["inputs"] != inputs:
        return False
    return all(Path(os.path.normpath(run_dir / path)).exists() for path in record["outputs"])


def mark_done(stage: str, inputs: dict[str, Any], run_dir: Path, outputs: list[Path]) -> None:
    """Records a stage with what it was given and what it left."""
    # Relative, since a run may move to another machine.
    relative = [os.path.relpath(path, run_dir) for path in outputs]
    Ledger(run_dir).append("stage", stage=stage, inputs=inputs, outputs=relative)


def prepared_corpus(run_dir: Path) -> dict[str, Any]:
    """The newest `corpus` record, its `path` a `Path` of this machine; `UserError` where `data` has yet to run."""
    if record := Ledger(run_dir).last("corpus"):
        # It names the folder of the machine that prepared it; the corpus stands under the run's own scratch folder.
        path = Path(os.path.abspath(run_dir)).parents[1] / "corpora" / Path(record["path"]).name
        if (path / "manifest.json").exists():
            return {**record, "path": path}
    raise UserError(f"{run_dir} has no prepared corpus", *_AFTER_DATA)


def note_start(stage: str, run_dir: Path) -> None:
    """Records that a stage starts, and how far the run had come.

    Raises `UserError` in a job where the last starts came no further: it would burn node-hours. The refusal is
    recorded, so that whoever mended the cause simply submits again.
    """
    ledger, reached, fruitless = Ledger(run_dir), _reached(stage, run_dir), 0
    for record in ledger.read():
        if record["event"] in ("start", "refused", "stage") and record["stage"] == stage:
            is_fruitless = record["event"] == "start" and record["reached"] == reached
            fruitless = fruitless + 1 if is_fruitless else 0
    job = os.environ.get("SLURM_JOB_ID", "")
    # At a terminal, a person decides how often to try.
    if fruitless >= MAX_STARTS_WITHOUT_PROGRESS and job:
        ledger.append("refused", stage=stage, reached=reached, starts=fruitless)
        found = f"{fruitless} starts of `{stage}` in a row have come no further than {reached}"
        repair = f"read the end of the log and {run_dir / 'logs'}, mend the cause, submit again: this is said once"
        raise UserError(found, "a job that makes no progress is not started again", repair)
    ledger.append("start", stage=stage, reached=reached, job=job)


def _reached(stage: str, run_dir: Path) -> str:
    if stage == "train":
        # After a spike a run may save for a while below the furthest step.
        saved = max((path.name for path in (run_dir / CHECKPOINTS).glob("step-*")), default="nothing")
        # A start that repeats steps since the last checkpoint is no progress yet.
        furthest = max((record.get("step") or 0 for record in json_lines(run_dir / "metrics.jsonl")), default=0)
        return f"step {furthest}, {saved} saved"
    if stage == "eval":
        return f"{len(list(Ledger(run_dir).read('evaluation')))} evaluations"
    return "its beginning"
