"""A rank, in reading order: join, data, model, engine, resume, loop."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from configs.schema import RunConfig
from data.heldout import ValidDocuments
from data.loader import Samples
from data.manifest import TRAIN, Manifest
from data.mixture import Mixture, plan_mixture, table
from ledger import host
from ledger.record import Ledger, gap
from model.decoder import Decoder, padded_rows
from model.flops import count_parameters, flops_per_token
from model.init import init_weights
from model.weights import FragmentReader
from train import checkpoint
from train.batch import step_shape
from train.checkpoint import Progress
from train.dist import Rank, join, leave
from train.engine import Engine
from train.faults import EXIT_SAVED, StopSignals, refuse_restart_loop
from train.loop import Job, train
from train.metrics import MFU_FORMULA, Metrics, peak_flops


def run(cfg: RunConfig, run_dir: Path, corpus_dir: Path) -> int:
    """Trains as one of the ranks; returns the exit status: 0 at the last step, `EXIT_SAVED` before."""
    signals = StopSignals()
    rank = join(cfg)
    try:
        job = _prepare(cfg, run_dir, corpus_dir, rank, signals)
        try:
            finished = train(job)
        finally:
            job.metrics.close()
        if rank.is_first:
            _record_end(job, finished)
        rank.barrier()
    finally:
        leave()
    return 0 if finished else EXIT_SAVED


def _prepare(cfg: RunConfig, run_dir: Path, corpus_dir: Path, rank: Rank, signals: StopSignals) -> Job:
    manifest = Manifest.load(corpus_dir)
    mixture = plan_mixture(manifest.tokens_by_language(TRAIN), cfg.mixture, cfg.train.steps * cfg.train.tokens_per_step)
    samples = Samples(corpus_dir, mixture, seq_len=cfg.train.seq_len, seed=cfg.seed)
    vocab_rows = padded_rows(manifest.tokenizer.vocab_size)
    identity = {
        "corpus_hash": manifest.corpus_hash,
        "seq_len": cfg.train.seq_len,
        "seed": cfg.seed,
        "vocab_rows": vocab_rows,
        # More train.tokens can move the shares of a capped UniMax, and with them the order of what is past.
        "order": samples.order.fingerprint,
    }
    resume_from, progress = _choose_checkpoint(rank, run_dir, identity), Progress()

    torch.manual_seed(cfg.seed)
    decoder = Decoder(cfg.model, vocab_rows)
    if resume_from is None:
        init_weights(decoder, cfg.seed)
    else:
        # Before the engine is built: it takes its weights from the module, rounded as the module rounds them.
        FragmentReader(resume_from).read_into(decoder)
    shape = step_shape(cfg)
    engine = Engine(decoder, cfg.engine, cfg.optim, shape, rank)
    if resume_from is not None:
        progress = checkpoint.restore(resume_from, engine)
    _refuse_together(rank, run_dir, progress.step)
    job = Job(
        cfg=cfg,
        run_dir=run_dir,
        rank=rank,
        shape=shape,
        engine=engine,
        samples=samples,
        held_out=ValidDocuments(corpus_dir).read_all(),
        progress=progress,
        identity=identity,
        flops_per_token=flops_per_token(cfg.model, vocab_rows, cfg.train.seq_len),
        peak_flops=peak_flops(cfg, rank),
        metrics=Metrics(run_dir, cfg, rank, progress.step),
        signals=signals,
    )
    if rank.is_first:
        _announce(job, mixture)
    return job


def _choose_checkpoint(rank: Rank, run_dir: Path, identity: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from; the first rank verifies its hashes and tells the others."""
    name = ""
    if rank.is_first:
        found, complaints = checkpoint.newest_usable(run_dir)
        for complaint in complaints:
            print(f"not used: {complaint}", flush=True)
        name = found.name if found else ""
    name = rank.tell(name)
    if not name:
        return None
    chosen = run_dir / "checkpoints" / name
    checkpoint.require_identity(chosen, identity)
    return chosen


def _refuse_together(rank: Rank, run_dir: Path, step: int) -> None:
    """The first rank reads the ledger; all go or none."""
    error: UserError | None = None
    if rank.is_first:
        try:
            refuse_restart_loop(run_dir, step)
        except UserError as refusal:
            error = refusal
    if rank.any(error is not None):
        raise error or SystemExit(1)


def _announce(job: Job, mixture: Mixture) -> None:
    cfg, progress = job.cfg, job.progress
    parameters = count_parameters(cfg.model, job.identity["vocab_rows"])
    job.metrics.terminal.say(table(mixture))
    job.metrics.terminal.say(
        f"{parameters:,} parameters, {cfg.train.steps} steps of {cfg.train.tokens_per_step:,} tokens: {job.shape}\n"
        f"{MFU_FORMULA}; {job.flops_per_token:,.0f} FLOPs per token; peak {job.peak_flops / 1e12:.3g} TFLOP/s a device "
        f"({cfg.cluster.peak_source})"
    )
    if progress.step:
        job.metrics.terminal.say(f"resuming at step {progress.step}, {progress.tokens:,} tokens")
    ledger = Ledger(job.run_dir)
    ledger.append("mixture", rule=cfg.mixture.rule.value, rows=[asdict(row) for row in mixture.rows])
    ledger.append(
        "train_start",
        step=progress.step,
        tokens=progress.tokens,
        world_size=job.rank.world_size,
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


def _record_end(job: Job, finished: bool) -> None:
    progress = job.progress
    Ledger(job.run_dir).append(
        "train_end" if finished else "train_stop",
        reason="last step" if finished else job.signals.received or "a signal to another rank",
        steps=progress.step,
        tokens=progress.tokens,
        flops=progress.flops,
        device_hours=progress.device_s / 3600,
        energy_kwh=gap("no energy meter is read by this version"),
        order_hash=progress.order_hash,
        consumed=progress.consumed,
    )
    if not finished:
        print(f"stopped by {job.signals.received or 'a signal'} after step {progress.step}; saved", flush=True)
