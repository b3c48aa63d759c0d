"""The loop, top to bottom: forward and backward, step, then four visible ifs: log, validate, save, stop."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.schema import RunConfig
from data.heldout import ValidDocument
from data.loader import Batch, Samples, batches
from data.order import OrderHash
from eval.validation import bits_per_byte, gather_scores, mean_bpb, score_documents
from ledger.record import Ledger
from model.weights import checkpoint_sha256
from train import checkpoint
from train.batch import StepShape
from train.checkpoint import Progress
from train.dist import Rank
from train.engine import Engine
from train.faults import StopSignals, check_finite
from train.metrics import Metrics, memory_gib
from train.schedule import learning_rate


@dataclass
class Job:
    """What the loop works with; built by train/run.py."""

    cfg: RunConfig
    run_dir: Path
    rank: Rank
    shape: StepShape
    engine: Engine
    samples: Samples
    held_out: list[ValidDocument]
    progress: Progress
    identity: dict[str, Any]
    """What checkpoints belong to: see `checkpoint.save`."""
    flops_per_token: float
    peak_flops: float
    """Of one device, in operations a second."""
    metrics: Metrics
    signals: StopSignals


def train(job: Job) -> bool:
    """Trains from `job.progress` to the last step; false where a signal ended it early, after saving."""
    cfg, progress, rank = job.cfg.train, job.progress, job.rank
    consumed, window = Consumed(job), Window(job)
    if progress.step == 0:
        _validate(job)
        _save(job)
    window.restart()
    for micro_batches in batches(
        job.samples,
        start_step=progress.step,
        n_steps=cfg.steps - progress.step,
        seqs_per_step=job.shape.seqs_per_step,
        micro_batch_seqs=job.shape.micro_batch_seqs,
        rank=rank.rank,
        world_size=rank.world_size,
        workers=cfg.loader_workers,
    ):
        lr = learning_rate(progress.step, cfg.steps, job.cfg.optim, job.cfg.schedule)
        for micro_batch in micro_batches:
            window.add(job.engine.backward(micro_batch["tokens"], micro_batch["doc"]))
            consumed.add(micro_batch)
        grad_norm = job.engine.step(lr)
        progress.step += 1
        progress.tokens += cfg.tokens_per_step
        progress.flops += cfg.tokens_per_step * job.flops_per_token
        job.metrics.terminal.advance()
        check_finite(progress.step, grad_norm)

        last = progress.step == cfg.steps
        stop = rank.any(job.signals.received is not None)
        if last or stop or progress.step % cfg.log_every_steps == 0:
            window.log(lr, grad_norm)
        validate = last or progress.step % cfg.validate_every_steps == 0
        save = last or stop or progress.step % cfg.save_every_steps == 0
        if validate or save:
            consumed.sum_over_ranks()
            with window.paused():
                if validate:
                    _validate(job)
                if save:
                    _save(job)
        if stop and not last:
            return False
    return True


class Consumed:
    """What this rank has consumed since the start, and the way to what all ranks have since step 0."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.here = OrderHash(len(job.samples.languages))
        self.before = job.progress.order_state or [0] * len(self.here.state)

    def add(self, batch: Batch) -> None:
        """Counts a micro batch in."""
        self.here.add(batch["position"], batch["sample_id"], batch["language"], self.job.cfg.train.seq_len)

    def sum_over_ranks(self) -> None:
        """Brings `job.progress` up to date; collective, so only when it is told or saved."""
        progress, total = self.job.progress, OrderHash(len(self.job.samples.languages))
        total.state += np.array(self.before) + np.array(self.job.rank.sum_integers(self.here.state.tolist()))
        progress.order_state, progress.order_hash = total.state.tolist(), total.hex
        progress.consumed = dict(zip(self.job.samples.languages, progress.order_state[2:], strict=True))


class Window:
    """Sums since the last line of metrics, with a clock that stands while the loop validates and saves."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.counts = torch.zeros(2, dtype=torch.float64, device=job.rank.device)
        self.restart()

    def restart(self) -> None:
        """Begins a new window here and now."""
        self.counts.zero_()
        self.first_step, self.stepping_s = self.job.progress.step, 0.0
        self.since_s = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps what has been counted, and leaves out the time of what is done inside."""
        self._read_clock()
        yield
        self.since_s = time.perf_counter()

    def add(self, nats_and_labels: torch.Tensor) -> None:
        """Takes the counts of a micro batch without waiting for the device."""
        self.counts += nats_and_labels

    def log(self, lr: float, grad_norm: float) -> None:
        """Writes the line of this window and begins the next."""
        job, progress = self.job, self.job.progress
        self._read_clock()
        nats, labels = job.rank.sum(self.counts.tolist())
        steps = progress.step - self.first_step
        tokens_per_s = steps * job.cfg.train.tokens_per_step / self.stepping_s
        job.metrics.write(
            "train",
            progress.step,
            progress.tokens,
            loss=nats / labels,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_s=tokens_per_s,
            mfu=job.flops_per_token * tokens_per_s / (job.rank.world_size * job.peak_flops),
            memory_gib=job.rank.max(memory_gib(job.rank.device)),
            step_s=self.stepping_s / steps,
        )
        self.restart()

    def _read_clock(self) -> None:
        now_s = time.perf_counter()
        self.stepping_s += now_s - self.since_s
        self.job.progress.device_s += (now_s - self.since_s) * self.job.rank.world_size
        self.since_s = now_s


def _validate(job: Job) -> None:
    decoder = job.engine.decoder.eval()
    scores = score_documents(
        decoder,
        job.held_out,
        seq_len=job.cfg.train.seq_len,
        batch_seqs=job.shape.micro_batch_seqs,
        device=job.rank.device,
        rank=job.rank.rank,
        world_size=job.rank.world_size,
    )
    decoder.train()
    by_lang = bits_per_byte(gather_scores(scores), bootstrap_samples=1)
    job.metrics.write(
        "valid",
        job.progress.step,
        job.progress.tokens,
        bpb={lang: entry.bpb for lang, entry in by_lang.items()},
        bpb_mean=mean_bpb(by_lang),
        consumed=job.progress.consumed,
    )


def _save(job: Job) -> None:
    path = checkpoint.save(job.run_dir, job.engine, job.progress, job.identity, job.rank)
    if job.rank.is_first:
        Ledger(job.run_dir).append(
            "checkpoint",
            name=path.name,
            step=job.progress.step,
            tokens=job.progress.tokens,
            sha256=checkpoint_sha256(path),
            order_hash=job.progress.order_hash,
            consumed=job.progress.consumed,
        )
        checkpoint.remove_old(job.run_dir, job.cfg.train.keep_checkpoints)
        job.metrics.terminal.say(f"saved {path.name}")
