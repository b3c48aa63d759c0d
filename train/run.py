"""A rank, in reading order: join, corpus, checkpoint, order and engine (train/job.py), resume or begin, loop."""

from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch

from configs.errors import EXIT_UNFINISHED
from configs.schema import RunConfig
from data.mixture import language_rows, table
from ledger import energy, host
from ledger.record import gap
from model.decoder import count_parameters
from model.weights import list_checkpoints
from train.checkpoint import restore, seed_random
from train.dist import join, leave
from train.faults import RunLock, StopSignals, Watchdog
from train.job import Job
from train.loop import begin, train
from train.metrics import MFU_FORMULA
from train.selftest import self_test


def run(cfg: RunConfig, run_dir: Path, corpus_dir: Path) -> int:
    """Trains as one of the ranks; returns the exit status: 0 at the last step, `EXIT_UNFINISHED` before."""
    signals = StopSignals()
    rank = join(cfg)
    locks: list[RunLock] = []  # held until the end; nothing of another start's is touched before
    rank.first_does(lambda: locks.append(RunLock(run_dir)))
    watchdog = Watchdog(run_dir / "logs", rank.rank, cfg.engine.timeout_s)
    try:
        job = Job(cfg, run_dir, corpus_dir, rank, signals, watchdog)
        if job.resume_from is not None:
            restore(job.resume_from, job.engine, rank, cfg.seed)
        if rank.is_first:
            _announce(job)
        if job.phases != job.progress.phases:
            job.progress.phases, job.progress.losses = job.phases, []  # of other text, the loss is another
        if job.resume_from is None:
            seed_random(cfg.seed, rank)
            begin(job)
        if cfg.train.self_test:
            whole = job.resume_from or list_checkpoints(run_dir)[0]
            self_test(cfg, run_dir, job.engine, rank, job.vocab_rows, whole)
        watchdog.alive()
        with closing(job.metrics):
            finished = train(job)
        if rank.is_first:
            _record_end(job, finished)
        rank.barrier()
    finally:
        watchdog.close()
        leave()
    return 0 if finished else EXIT_UNFINISHED


def _announce(job: Job) -> None:
    """What is about to be trained, and what is not as it was when the checkpoint was saved."""
    cfg, progress, ledger, say = job.cfg, job.progress, job.ledger, job.metrics.terminal.say
    phases, before, device = job.phases, job.progress.phases, job.rank.device
    if before and phases != before:
        at = min(phase.from_position for phase in (*phases, *before) if (phase in phases) != (phase in before))
        say(f"the mixture changes at position {at:,}:")
        later = [asdict(phase) for phase in phases if phase.from_position >= at]
        ledger.append("mixture_phase", step=progress.step, from_position=at, phases=later)
    is_own = ledger.last("begun_from", step=progress.step) is None
    if is_own and (lost := progress.ledger_bytes - ledger.n_bytes) > 0:
        ledger.append("ledger_short", lost=gap(f"{lost} bytes that stood here when step {progress.step} was saved"))
        say(f"warning: the ledger is {lost} bytes shorter than when step {progress.step} was saved")
    parameters, sizes = count_parameters(cfg.model, job.vocab_rows), [f"{n:,}" for _, n in cfg.train.step_sizes]
    say(table(job.mixtures))
    say(
        f"{parameters:,} parameters, {cfg.train.steps} steps of {', then '.join(sizes)} tokens: {job.shape}\n"
        f"{MFU_FORMULA}; {job.flops_per_token:,.0f} FLOPs per token; peak {job.peak_flops / 1e12:.3g} TFLOP/s a device "
        f"({cfg.cluster.peak_source})"
    )
    if progress.step:
        say(f"resuming at step {progress.step}, {progress.tokens:,} tokens")
    rules = ", then ".join(mixture.rule for mixture in job.mixtures)
    mixtures = [asdict(mixture) for mixture in job.mixtures]
    ledger.append("mixture", rule=rules, rows=language_rows(job.mixtures), phases=mixtures)
    ledger.append(
        "train_start",
        step=progress.step,
        tokens=progress.tokens,
        cluster=cfg.cluster.name,
        world_size=job.rank.world_size,
        layout=cfg.engine.layout,
        parameters=parameters,
        flops_per_token=job.flops_per_token,
        peak_tflops=job.peak_flops / 1e12,
        peak_source=cfg.cluster.peak_source,
        mfu_formula=MFU_FORMULA,
        energy_meters=job.meter.sources,
        hardware=host.hardware(),
        software=host.software(),
        commit=host.commit(),
        container=host.container(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else host.hardware()["processor"],
    )


def _record_end(job: Job, finished: bool) -> None:
    progress, pue = job.progress, job.cfg.cluster.pue if job.cfg.cluster.pue_source else 0.0
    out_of_time = "the end of the job's time" if job.clock.is_over() else "a signal to another rank"
    reason = job.signals.received or out_of_time
    job.ledger.append(
        "train_end" if finished else "train_stop",
        reason="last step" if finished else reason,
        steps=progress.step,
        tokens=progress.tokens,
        flops=progress.flops,
        device_hours=progress.device_s / 3600,
        energy=energy.record(progress.joules, progress.metered_s, progress.tokens, job.meter.sources, pue),
        skipped_steps=progress.skipped_steps,
        rewinds=progress.rewinds,
        order_hash=progress.order_hash,
        **progress.consumption,
    )
    if not finished:
        print(f"stopped by {reason} after step {progress.step}; saved", flush=True)
