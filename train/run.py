"""A rank, in reading order: join, corpus, checkpoint, order, engine, resume or begin, loop."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from configs.errors import EXIT_UNFINISHED, UserError
from configs.schema import RunConfig
from data import manifest as corpus
from data.heldout import ValidDocuments
from data.loader import Samples
from data.manifest import TRAIN, Manifest
from data.mixture import Mixture, language_rows, plan_phases, table
from data.order import Phase, unskipped
from ledger import host
from ledger.record import Ledger, gap
from model.decoder import Decoder, count_parameters, flops_per_token, init_weights, padded_rows
from model.weights import list_checkpoints, read_manifest
from train import checkpoint
from train.batch import step_shape
from train.dist import Rank, join, leave
from train.engine import Engine
from train.faults import JobClock, RunLock, StopSignals
from train.loop import End, Job, begin, train
from train.metrics import MFU_FORMULA, Metrics, peak_flops
from train.progress import Progress
from train.retention import require_space
from train.saving import Saver
from train.selftest import self_test
from train.watchdog import Watchdog


def run(cfg: RunConfig, run_dir: Path, corpus_dir: Path) -> int:
    """Trains as one of the ranks; returns the exit status: 0 at the last step, `EXIT_UNFINISHED` before."""
    signals = StopSignals()
    rank = join(cfg)
    locks: list[RunLock] = []  # held until the end; nothing of another start's is touched before
    rank.first_does(lambda: locks.append(RunLock(run_dir)))
    watchdog = Watchdog(run_dir / "logs", rank.rank, cfg.engine.timeout_s)
    try:
        job = _prepare(cfg, run_dir, corpus_dir, rank, signals, watchdog)
        try:
            end = train(job)
        finally:
            job.metrics.close()
        if rank.is_first:
            _record_end(job, end)
        rank.barrier()
    finally:
        watchdog.close()
        leave()
    return 0 if end is End.finished else EXIT_UNFINISHED


def _prepare(
    cfg: RunConfig, run_dir: Path, corpus_dir: Path, rank: Rank, signals: StopSignals, watchdog: Watchdog
) -> Job:
    manifest = Manifest.load(corpus_dir)
    _verify_corpus(rank, run_dir, corpus_dir, watchdog)
    vocab_rows = padded_rows(manifest.tokenizer.vocab_size)
    identity = {
        "corpus_hash": manifest.corpus_hash,
        "seq_len": cfg.train.seq_len,
        "seed": cfg.seed,
        "packing": cfg.mixture.packing.value,
        "vocab_rows": vocab_rows,
    }
    earlier_corpora = [removal["corpus_hash_before"] for removal in manifest.removed]
    resume_from = _choose_checkpoint(rank, run_dir, identity, earlier_corpora)
    progress = Progress.from_json(read_manifest(resume_from)["progress"]) if resume_from else Progress()
    rank.first_does(lambda: _refuse_fewer_steps(cfg, progress.step))
    rank.first_does(lambda: require_space(run_dir, cfg, vocab_rows, progress.step))
    seqs = cfg.train.seqs_per_step
    phases, mixtures = plan_phases(
        progress.phases,
        cfg.mixture,
        manifest.tokens_by_part(TRAIN),
        position=int(unskipped(progress.step * seqs, progress.skipped)),
        end_position=cfg.train.steps * seqs,
        seq_len=cfg.train.seq_len,
    )

    engine = _engine(cfg, vocab_rows, rank, has_weights=resume_from is not None)
    metrics = Metrics(run_dir, cfg, rank, progress.step)
    keep = cfg.train.keep_checkpoints, cfg.train.keep_every_steps
    job = Job(
        cfg=cfg,
        run_dir=run_dir,
        rank=rank,
        shape=step_shape(cfg),
        engine=engine,
        samples=Samples(corpus_dir, phases, cfg.train.seq_len, cfg.seed, cfg.mixture.packing),
        held_out=ValidDocuments(corpus_dir).read_all(),
        progress=progress,
        identity=identity,
        flops_per_token=flops_per_token(cfg.model, vocab_rows, cfg.train.seq_len),
        peak_flops=peak_flops(cfg, rank),
        metrics=metrics,
        saver=Saver(run_dir, engine, rank, identity, keep, metrics.terminal.say),
        signals=signals,
        clock=JobClock(),
        watchdog=watchdog,
    )
    if resume_from is not None:
        checkpoint.restore(resume_from, engine, rank, cfg.seed)
        _tell_changes(job, phases)
    if phases != progress.phases:
        progress.phases, progress.losses = phases, []  # with other text the loss is another, which is no spike
    if rank.is_first:
        _announce(job, mixtures)
    if resume_from is None:
        checkpoint.seed_random(cfg.seed, rank)
        begin(job)
    if cfg.train.self_test:
        self_test(cfg, run_dir, engine, rank, vocab_rows, resume_from or list_checkpoints(run_dir)[0])
    watchdog.alive()
    return job


def _verify_corpus(rank: Rank, run_dir: Path, corpus_dir: Path, watchdog: Watchdog) -> None:
    """Every shard is there, and those that changed since they were last hashed are what the manifest says."""
    ledger, marks = Ledger(run_dir), {}

    def look() -> None:
        marks.update(corpus.marks(corpus_dir))

    rank.first_does(look)
    last = ledger.last("corpus_verified", path=str(corpus_dir)) if rank.is_first else None
    known = last["marks"] if last else {}
    changed = rank.tell(sorted(name for name, mark in marks.items() if known.get(name) != mark))
    error = None
    try:
        corpus.verify_files(corpus_dir, _watched(changed[rank.rank :: rank.world_size], watchdog))
    except UserError as mismatch:
        error = mismatch
    rank.raise_together(error)
    if rank.is_first and changed:
        ledger.append("corpus_verified", path=str(corpus_dir), files=len(changed), marks=marks)


def _watched(names: list[str], watchdog: Watchdog) -> Iterator[str]:
    """The names, one by one: what is done with each may take a while, and all of them longer than a hang."""
    for name in names:
        watchdog.alive()
        yield name


def _choose_checkpoint(rank: Rank, run_dir: Path, identity: dict[str, Any], earlier_corpora: list[str]) -> Path | None:
    """The checkpoint to go on from; what is wrong with newer ones is told and recorded."""
    if rank.is_first:
        checkpoint.remove_unfinished(run_dir)
    found, complaints = checkpoint.newest_usable(run_dir, rank)
    if rank.is_first:
        for complaint in complaints:
            print(f"not used: {complaint}", flush=True)
            Ledger(run_dir).append("checkpoint_damaged", complaint=complaint)
    if found is None:
        if complaints:
            rank.first_does(lambda: _refuse_to_begin_again(run_dir, complaints))
        return None
    rank.first_does(lambda: checkpoint.require_identity(found, identity, earlier_corpora))
    return found


def _refuse_fewer_steps(cfg: RunConfig, step: int) -> None:
    if step > cfg.train.steps:
        raise UserError(
            f"train.tokens = {cfg.train.tokens} are {cfg.train.steps} steps, the run has done {step}",
            "a run may be made longer, or end where it stands",
            f"train.tokens={step * cfg.train.tokens_per_step} or more",
        )


def _refuse_to_begin_again(run_dir: Path, complaints: list[str]) -> None:
    raise UserError(
        f"none of {len(complaints)} checkpoints in {run_dir / 'checkpoints'} is whole",
        "a run does not begin again over what may be saved yet",
        "bring one back, from a copy or an earlier `marathon move`; or move the folder away to begin again",
    )


def _engine(cfg: RunConfig, vocab_rows: int, rank: Rank, has_weights: bool) -> Engine:
    """The engine; where a checkpoint has the weights, none are drawn."""
    decoder = Decoder(cfg.model, vocab_rows)
    if not has_weights:
        init_weights(decoder, cfg.seed)
    return Engine(decoder, cfg.engine, cfg.optim, step_shape(cfg), rank)


def _tell_changes(job: Job, phases: list[Phase]) -> None:
    """A new phase of the mixture, and a ledger that has lost lines since the checkpoint."""
    if not job.rank.is_first:
        return
    ledger, progress = Ledger(job.run_dir), job.progress
    if phases != progress.phases:
        changed = [phase for phase in (*phases, *progress.phases) if (phase in phases) != (phase in progress.phases)]
        at = min(phase.from_position for phase in changed)
        job.metrics.terminal.say(f"the mixture changes at position {at:,}:")
        later = [asdict(phase) for phase in phases if phase.from_position >= at]
        ledger.append("mixture_phase", step=progress.step, from_position=at, phases=later)
    if ledger.n_bytes < progress.ledger_bytes:
        lost = progress.ledger_bytes - ledger.n_bytes
        ledger.append("ledger_short", lost=gap(f"{lost} bytes that stood here when step {progress.step} was saved"))
        job.metrics.terminal.say(
            f"warning: the ledger is {lost} bytes shorter than when step {progress.step} was saved"
        )


def _announce(job: Job, mixtures: list[Mixture]) -> None:
    cfg, progress = job.cfg, job.progress
    parameters = count_parameters(cfg.model, job.identity["vocab_rows"])
    job.metrics.terminal.say(table(mixtures))
    job.metrics.terminal.say(
        f"{parameters:,} parameters, {cfg.train.steps} steps of {cfg.train.tokens_per_step:,} tokens: {job.shape}\n"
        f"{MFU_FORMULA}; {job.flops_per_token:,.0f} FLOPs per token; peak {job.peak_flops / 1e12:.3g} TFLOP/s a device "
        f"({cfg.cluster.peak_source})"
    )
    if progress.step:
        job.metrics.terminal.say(f"resuming at step {progress.step}, {progress.tokens:,} tokens")
    ledger = Ledger(job.run_dir)
    rules = ", then ".join(mixture.rule for mixture in mixtures)
    ledger.append("mixture", rule=rules, rows=language_rows(mixtures), phases=[asdict(mixture) for mixture in mixtures])
    ledger.append(
        "train_start",
        step=progress.step,
        tokens=progress.tokens,
        cluster=cfg.cluster.name,
        world_size=job.rank.world_size,
        zero_stage=cfg.engine.zero_stage,
        parameters=parameters,
        flops_per_token=job.flops_per_token,
        peak_tflops=job.peak_flops / 1e12,
        peak_source=cfg.cluster.peak_source,
        mfu_formula=MFU_FORMULA,
        hardware=host.hardware(),
        software=host.software(),
        commit=host.commit(),
        container=host.container(),
        device=_device_name(job.rank),
    )


def _device_name(rank: Rank) -> Any:
    return torch.cuda.get_device_name(rank.device) if rank.device.type == "cuda" else host.hardware()["processor"]


def _record_end(job: Job, end: End) -> None:
    progress, finished = job.progress, end is End.finished
    reason = job.signals.received or (
        "the end of the job's time" if job.clock.is_over() else "a signal to another rank"
    )
    Ledger(job.run_dir).append(
        "train_end" if finished else "train_stop",
        reason="last step" if finished else reason,
        steps=progress.step,
        tokens=progress.tokens,
        flops=progress.flops,
        device_hours=progress.device_s / 3600,
        energy_kwh=gap("no energy meter is read by this version"),
        skipped_steps=progress.skipped_steps,
        rewinds=progress.rewinds,
        order_hash=progress.order_hash,
        consumed=progress.consumed,
        consumed_by_source=progress.consumed_by_source,
        consumed_by_part=progress.consumed_by_part,
    )
    if not finished:
        print(f"stopped by {reason} after step {progress.step}; saved", flush=True)
