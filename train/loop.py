"""The loop, top to bottom: forward and backward, step, what all ranks agree on, then visible ifs.

Log, go back after a spike, validate, save, stop: each an if that a reader can see.
"""

import contextlib
import enum
import math
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
from data.order import OrderHash, by_language, by_source, unskipped
from eval.validation import bits_per_byte, gather_scores, mean_bpb, score_documents
from ledger.record import Ledger
from train.batch import StepShape
from train.dist import Rank
from train.engine import Engine
from train.faults import JobClock, StopSignals, is_spike, refuse_bad_numbers
from train.metrics import Metrics, memory_gib
from train.progress import Progress
from train.rewind import rewind
from train.saving import Saver
from train.schedule import learning_rate
from train.watchdog import Watchdog


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
    """What checkpoints belong to: corpus, sequence length, seed, rows of the vocabulary."""
    flops_per_token: float
    peak_flops: float
    """Of one device, in operations a second."""
    metrics: Metrics
    saver: Saver
    signals: StopSignals
    clock: JobClock
    watchdog: Watchdog


class End(enum.Enum):
    """Why a stretch of steps has ended."""

    finished = "last step"
    stopped = "asked to stop, saved"
    spike = "the loss has jumped"


def train(job: Job) -> End:
    """Trains from `job.progress` to the last step, or to where it was asked to stop and has saved."""
    while (end := _stretch(job)) is End.spike:
        job.saver.wait()
        step = job.progress.step
        rewind(job.run_dir, job.progress, job.engine, job.rank, job.samples, job.cfg)
        job.metrics.terminal.advance(job.progress.step - step)
    job.saver.finish()
    return end


def _stretch(job: Job) -> End:
    cfg, progress, rank = job.cfg.train, job.progress, job.rank
    consumed, window = Consumed(job), Window(job)
    for micro_batches in batches(
        job.samples,
        start_step=progress.step,
        n_steps=cfg.steps - progress.step,
        seqs_per_step=job.shape.seqs_per_step,
        micro_batch_seqs=job.shape.micro_batch_seqs,
        rank=rank.rank,
        world_size=rank.world_size,
        workers=cfg.loader_workers,
        skipped=progress.skipped,
    ):
        began_s = time.monotonic()
        counts = torch.zeros(2, dtype=torch.float64, device=rank.device)
        for micro_batch in micro_batches:
            counts += job.engine.backward(micro_batch["tokens"], micro_batch["doc"])
            consumed.add(micro_batch)
        progress.lr = learning_rate(progress.step, cfg.steps, job.cfg.optim, job.cfg.schedule)
        grad_norm, applied = job.engine.step(progress.lr)
        progress.step += 1
        progress.updates += applied
        progress.tokens += cfg.tokens_per_step
        progress.flops += cfg.tokens_per_step * job.flops_per_token
        job.metrics.terminal.advance()

        # What the ranks have to agree on, in one message.
        leave = job.signals.received is not None or (rank.is_first and job.clock.is_over())
        nats, labels, n_leaving, *votes = rank.sum([*counts.tolist(), leave, *job.saver.votes])
        job.saver.advance(*map(int, votes))
        loss = nats / labels
        last, stop = progress.step == cfg.steps, n_leaving > 0
        if _begins_phase(progress, job.shape.seqs_per_step):
            progress.losses = []  # with other text the loss is another, which is no spike
        if not applied:
            _note_skipped_step(job, grad_norm)
        elif is_spike(loss, progress.losses, job.cfg.faults):
            progress.losses.append(loss)
            window.read_clock()
            return End.spike
        else:
            progress.losses = [*progress.losses, loss][-max(job.cfg.faults.spike_window_steps, 1) :]
            window.add(nats, labels)
        job.clock.took("step", time.monotonic() - began_s)
        job.clock.took("checkpoint", job.saver.slowest_s)
        job.watchdog.alive()

        if last or stop or progress.step % cfg.log_every_steps == 0:
            window.log(grad_norm)
        validate = last or progress.step % cfg.validate_every_steps == 0
        save = last or stop or progress.step % cfg.save_every_steps == 0
        if validate or save:
            consumed.sum_over_ranks()
            with window.paused():
                if save:
                    job.saver.begin(progress)
                if validate:
                    _validate(job)
        if stop and not last:
            return End.stopped
    return End.finished


class Consumed:
    """What this rank has consumed since the start, and the way to what all ranks have since step 0."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.here = OrderHash(len(job.samples.parts))
        self.before = job.progress.order_state or [0] * len(self.here.state)

    def add(self, batch: Batch) -> None:
        """Counts a micro batch in."""
        self.here.add(batch["position"], batch["sample_id"], batch["part"], self.job.cfg.train.seq_len)

    def sum_over_ranks(self) -> None:
        """Brings `job.progress` up to date; collective, so only when it is told or saved."""
        progress, total = self.job.progress, OrderHash(len(self.job.samples.parts))
        total.state += np.array(self.before) + np.array(self.job.rank.sum_integers(self.here.state.tolist()))
        progress.order_state, progress.order_hash = total.state.tolist(), total.hex
        progress.consumed_by_part = dict(zip(self.job.samples.parts, progress.order_state[2:], strict=True))
        progress.consumed = by_language(progress.consumed_by_part)
        progress.consumed_by_source = by_source(progress.consumed_by_part)


class Window:
    """Sums since the last line of metrics, with a clock that stands while the loop validates and saves."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.restart()

    def restart(self) -> None:
        """Begins a new window here and now."""
        self.nats = self.labels = 0.0
        self.first_step, self.stepping_s = self.job.progress.step, 0.0
        self.since_s = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps what has been counted, and leaves out the time of what is done inside."""
        self.read_clock()
        yield
        self.since_s = time.perf_counter()

    def add(self, nats: float, labels: float) -> None:
        """Takes the sums of a step over all ranks."""
        self.nats += nats
        self.labels += labels

    def log(self, grad_norm: float) -> None:
        """Writes the line of this window and begins the next."""
        job, progress = self.job, self.job.progress
        self.read_clock()
        steps = progress.step - self.first_step
        tokens_per_s = steps * job.cfg.train.tokens_per_step / self.stepping_s
        forward_s = job.rank.gather_floats(job.engine.forward_time.read())
        slowest = max(range(len(forward_s)), key=forward_s.__getitem__)
        job.metrics.write(
            "train",
            progress.step,
            progress.tokens,
            loss=self.nats / self.labels if self.labels else math.nan,
            lr=progress.lr,
            grad_norm=grad_norm,
            tokens_per_s=tokens_per_s,
            mfu=job.flops_per_token * tokens_per_s / (job.rank.world_size * job.peak_flops),
            memory_gib=job.rank.max(memory_gib(job.rank.device)),
            step_s=self.stepping_s / steps,
            skew=max(forward_s) / max(float(np.median(forward_s)), 1e-9),
            slowest=job.rank.hosts[slowest],
        )
        self.restart()

    def read_clock(self) -> None:
        """Counts the time since the last reading."""
        now_s = time.perf_counter()
        self.stepping_s += now_s - self.since_s
        self.job.progress.device_s += (now_s - self.since_s) * self.job.rank.world_size
        self.since_s = now_s


def begin(job: Job) -> None:
    """What stands before the first step: the validation that later ones are compared with, and a checkpoint."""
    Consumed(job).sum_over_ranks()
    _validate(job)
    job.saver.begin(job.progress)
    job.saver.finish()


def _validate(job: Job) -> None:
    began_s = time.monotonic()
    job.watchdog.alive()
    scores = score_documents(
        job.engine.logits,
        job.held_out,
        seq_len=job.cfg.train.seq_len,
        batch_seqs=job.shape.micro_batch_seqs,
        device=job.rank.device,
        rank=job.rank.rank,
        world_size=job.rank.world_size,
    )
    by_lang = bits_per_byte(gather_scores(scores), bootstrap_samples=1)
    job.metrics.write(
        "valid",
        job.progress.step,
        job.progress.tokens,
        bpb={lang: entry.bpb for lang, entry in by_lang.items()},
        bpb_mean=mean_bpb(by_lang),
        consumed=job.progress.consumed,
        consumed_by_source=job.progress.consumed_by_source,
        consumed_by_part=job.progress.consumed_by_part,
    )
    job.clock.took("validation", time.monotonic() - began_s)
    job.watchdog.alive()


def _begins_phase(progress: Progress, seqs_per_step: int) -> bool:
    """Whether the step that was just done has drawn the first samples of a later phase."""
    first, last = unskipped([(progress.step - 1) * seqs_per_step, progress.step * seqs_per_step - 1], progress.skipped)
    return any(first <= phase.from_position <= last for phase in progress.phases[1:])


def _note_skipped_step(job: Job, grad_norm: float) -> None:
    progress = job.progress
    progress.skipped_steps.append(progress.step)
    if job.rank.is_first:
        job.metrics.terminal.say(f"step {progress.step} left out: its gradient has norm {grad_norm}")
        Ledger(job.run_dir).append("step_left_out", step=progress.step, grad_norm=str(grad_norm))
    refuse_bad_numbers(progress.skipped_steps, progress.step, job.cfg.faults.max_skipped_in_a_row)
