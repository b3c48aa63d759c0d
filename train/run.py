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
from model.decoder import Decoder, padded_rows
from model.flops import count_parameters, flops_per_token
from model.init import init_weights, left_empty
from model.weights import list_checkpoints, read_manifest
from train import checkpoint
from train.checkpoint import Saver
from train.dist import Rank, join, leave
from train.engine import Engine
from train.faults import JobClock, RunLock, StopSignals, Watchdog
from train.loop import Job, begin, train
from train.metrics import MFU_FORMULA, Metrics, peak_flops
from train.progress import Progress
from train.retention import require_space
from train.schedule import step_shape
from train.selftest import self_test


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
            finished = train(job)
        finally:
            job.metrics.close()
        if rank.is_first:
            _record_end(job, finished)
        rank.barrier()
    finally:
        watchdog.close()
        leave()
    return 0 if finished else EXIT_UNFINISHED


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

    with left_empty():
        decoder = Decoder(cfg.model, vocab_rows)
    if resume_from is None:
        init_weights(decoder, cfg.seed)
    engine = Engine(decoder, cfg.engine, cfg.optim, step_shape(cfg), rank)
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
    if rank.is_first:
        _announce(job, phases, mixtures, count_parameters(cfg.model, vocab_rows))
    if phases != progress.phases:
        progress.phases, progress.losses = phases, []  # with other text the loss is another, which is no spike
    if resume_from is None:
        checkpoint.seed_random(cfg.seed, rank)
        begin(job)
    if cfg.train.self_test:
        self_test(cfg, run_dir, engine, rank, vocab_rows, resume_from or list_checkpoints(run_dir)[0])
    watchdog.alive()
    return job


def _verify_corpus(rank: Rank, run_dir: Path, corpus_dir: Path, watchdog: Watchdog) -> None:
    """Every shard is there, and those that changed since they were last hashed are what the manifest says."""
    ledger, marks = Ledger(run_dir), dict[str, list[int]]()
    rank.first_does(lambda: marks.update(corpus.marks(corpus_dir)))
    last = ledger.last("corpus_verified", path=str(corpus_dir)) if rank.is_first else None
    known = last["marks"] if last else {}
    changed = rank.tell(sorted(name for name, mark in marks.items() if known.get(name) != mark))

    def share() -> Iterator[str]:
        for name in changed[rank.rank :: rank.world_size]:
            watchdog.alive()  # each may take a while, and all of them longer than a hang
            yield name

    rank.together(lambda: corpus.verify_files(corpus_dir, share()))
    if rank.is_first and changed:
        ledger.append("corpus_verified", path=str(corpus_dir), files=len(changed), marks=marks)


def _choose_checkpoint(rank: Rank, run_dir: Path, identity: dict[str, Any], earlier_corpora: list[str]) -> Path | None:
    """The checkpoint to go on from; what is wrong with newer ones is told and recorded."""
    if rank.is_first:
        checkpoint.remove_unfinished(run_dir)
    found, complaints = checkpoint.newest_usable(run_dir, rank)

    def judge() -> None:
        for complaint in complaints:
            print(f"not used: {complaint}", flush=True)
            Ledger(run_dir).append("checkpoint_damaged", complaint=complaint)
        if found is not None:
            checkpoint.require_identity(found, identity, earlier_corpora)
        elif complaints:
            raise UserError(
                f"none of {len(complaints)} checkpoints in {run_dir / 'checkpoints'} is whole",
                "a run does not begin again over what may be saved yet",
                "bring one back, from a copy or an earlier `marathon move`; or move the folder away to begin again",
            )

    rank.first_does(judge)
    return found


def _announce(job: Job, phases: list[Phase], mixtures: list[Mixture], parameters: int) -> None:
    """What is about to be trained, and what is not as it was when the checkpoint was saved."""
    cfg, progress, say, ledger = job.cfg, job.progress, job.metrics.terminal.say, Ledger(job.run_dir)
    before, device = progress.phases, job.rank.device
    if before and phases != before:
        at = min(phase.from_position for phase in (*phases, *before) if (phase in phases) != (phase in before))
        say(f"the mixture changes at position {at:,}:")
        later = [asdict(phase) for phase in phases if phase.from_position >= at]
        ledger.append("mixture_phase", step=progress.step, from_position=at, phases=later)
    if (lost := progress.ledger_bytes - ledger.n_bytes) > 0:
        ledger.append("ledger_short", lost=gap(f"{lost} bytes that stood here when step {progress.step} was saved"))
        say(f"warning: the ledger is {lost} bytes shorter than when step {progress.step} was saved")
    say(table(mixtures))
    say(
        f"{parameters:,} parameters, {cfg.train.steps} steps of {cfg.train.tokens_per_step:,} tokens: {job.shape}\n"
        f"{MFU_FORMULA}; {job.flops_per_token:,.0f} FLOPs per token; peak {job.peak_flops / 1e12:.3g} TFLOP/s a device "
        f"({cfg.cluster.peak_source})"
    )
    if progress.step:
        say(f"resuming at step {progress.step}, {progress.tokens:,} tokens")
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
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else host.hardware()["processor"],
    )


def _record_end(job: Job, finished: bool) -> None:
    progress = job.progress
    out_of_time = "the end of the job's time" if job.clock.is_over() else "a signal to another rank"
    reason = job.signals.received or out_of_time
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
        **progress.consumption,
    )
    if not finished:
        print(f"stopped by {reason} after step {progress.step}; saved", flush=True)
