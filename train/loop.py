"""The loop, top to bottom: forward, backward, step, what all ranks agree on, then an if for each of what may follow."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from configs.errors import UserError
from data.loader import Portion, batches
from data.order import OrderHash, by_language, by_source, unskipped
from eval.validation import bits_per_byte, gather_scores, mean_bpb, score_documents
from train.checkpoint import newest_usable, restore
from train.faults import is_spike, refuse_bad_numbers
from train.job import Job
from train.metrics import memory_gib
from train.profile import profile_steps
from train.progress import Progress
from train.schedule import learning_rate, step_shape


@dataclass
class Window:
    """Sums since the last line of metrics; seconds are without validating and saving, joules with them."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data_s: float = 0.0  # of the seconds, those in which this rank waited for its batches
    starved_steps: int = 0  # in which that took more than a hundredth
    joules: Any = 0.0
    nats: float = 0.0
    labels: float = 0.0

    def add_step(self, tokens: int, seconds: float, data_s: float) -> None:
        """Counts a step and its time."""
        self.steps, self.tokens, self.seconds = self.steps + 1, self.tokens + tokens, self.seconds + seconds
        self.data_s, self.starved_steps = self.data_s + data_s, self.starved_steps + (data_s > 0.01 * seconds)


def begin(job: Job) -> None:
    """What stands before the first step: the validation that later ones are compared with, and a checkpoint."""
    _count_consumed(job, OrderHash(len(job.samples.parts)))
    _validate(job)
    job.saver.begin(job.progress)
    job.saver.finish()


def train(job: Job) -> bool:
    """Trains from `job.progress` to the last step, which is True, or to where it was asked to stop and has saved."""
    job.engine.timer.read()  # what self-test and first validation took
    _count_joules(job)
    end_step = profile_steps(job)
    while not _train_until_spike(job, end_step):
        job.saver.wait()
        _rewind(job)
    job.saver.finish()
    _count_joules(job)
    return job.progress.step == job.cfg.train.steps


def _train_until_spike(job: Job, end_step: Callable[[], object]) -> bool:
    """Whether it has come to its end; if not, the loss has jumped."""
    cfg, progress, rank, timer = job.cfg.train, job.progress, job.rank, job.engine.timer
    consumed, window, resumed_s = OrderHash(len(job.samples.parts)), Window(), time.perf_counter()
    for micro_batches in batches(
        job.samples,
        (Portion(cfg.first_sample(n), *step_shape(job.cfg, n)[:2]) for n in range(progress.step, cfg.steps)),
        rank=rank.data_rank,
        world_size=rank.data_world_size,
        device=rank.device,
        workers=cfg.loader_workers,
        skipped=progress.skipped,
    ):
        began_s = time.perf_counter()
        job.engine.begin_step(len(micro_batches))
        counts = torch.zeros(2, dtype=torch.float64, device=rank.device)
        for micro_batch in micro_batches:
            counts += job.engine.backward(micro_batch["tokens"], micro_batch["doc"])
            if rank.part == 0:
                consumed.add(micro_batch["position"], micro_batch["sample_id"], micro_batch["part"], cfg.seq_len)
        progress.lr = learning_rate(progress.step, cfg.steps, job.cfg.optim, job.cfg.schedule)
        grad_norm, applied = job.engine.step(progress.lr)
        progress.step += 1
        progress.updates += applied
        tokens = cfg.seq_len * (cfg.first_sample(progress.step) - cfg.first_sample(progress.step - 1))
        progress.tokens += tokens
        progress.flops += tokens * job.flops_per_token
        job.metrics.terminal.advance()

        # What the ranks have to agree on, in one message.
        leave = job.signals.received is not None or (rank.is_first and job.clock.is_over())
        with timer.part("communication"):
            nats, labels, n_leaving, *votes = rank.sum([*counts.tolist(), leave, *job.saver.votes])
        job.saver.advance(*votes)
        loss, last, stop = nats / labels, progress.step == cfg.steps, n_leaving > 0
        ended_s = time.perf_counter()
        progress.device_s += (ended_s - resumed_s) * rank.world_size

        if _begins_phase(job):
            progress.losses = []  # with other text the loss is another, which is no spike
        window.add_step(tokens, ended_s - resumed_s, began_s - resumed_s)
        if not applied:
            _note_skipped_step(job, grad_norm)
        elif is_spike(loss, progress.losses, job.cfg.faults):
            progress.losses.append(loss)
            return False
        else:
            progress.losses = [*progress.losses, loss][-max(job.cfg.faults.spike_window_steps, 1) :]
            window.nats += nats
            window.labels += labels
        job.clock.took("step", ended_s - began_s)
        job.clock.took("checkpoint", job.saver.slowest_s)
        job.watchdog.alive()

        if last or stop or progress.step % cfg.log_every_steps == 0:
            _log(job, window, grad_norm)
            window = Window()
        validate = last or progress.step % cfg.validate_every_steps == 0
        save = last or stop or progress.step % cfg.save_every_steps == 0
        if validate or save:
            _count_consumed(job, consumed)
            window.joules += _count_joules(job)
        if save:
            with timer.part("checkpoint"):
                job.saver.begin(progress)
        if validate:
            with timer.part("validation"):
                _validate(job)
        end_step()
        if stop:
            return True
        resumed_s = time.perf_counter()
    return True


def _begins_phase(job: Job) -> bool:
    """Whether the step that was just done has drawn the first samples of a later phase."""
    first, last = _positions(job, job.progress.step - 1, job.progress)
    return any(first <= phase.from_position <= last for phase in job.progress.phases[1:])


def _positions(job: Job, from_step: int, progress: Progress) -> list[int]:
    """First and last position of the steps from `from_step` on, up to where `progress` stands."""
    first, end = (job.cfg.train.first_sample(step) for step in (from_step, progress.step))
    return [int(position) for position in unskipped([first, end - 1], progress.skipped)]


def _note_skipped_step(job: Job, grad_norm: float) -> None:
    progress = job.progress
    progress.skipped_steps.append(progress.step)
    if job.rank.is_first:
        job.metrics.terminal.say(f"step {progress.step} left out: its gradient has norm {grad_norm}")
        job.ledger.append("step_left_out", step=progress.step, grad_norm=str(grad_norm))
    refuse_bad_numbers(progress.skipped_steps, progress.step, job.cfg.faults.max_skipped_in_a_row)


def _log(job: Job, window: Window, grad_norm: float) -> None:
    progress, rank = job.progress, job.rank
    tokens_per_s = window.tokens / window.seconds
    flops_per_s = job.flops_per_token * tokens_per_s / rank.world_size
    split_s = job.engine.timer.read() | {"data": window.data_s}
    of_ranks = rank.gather((split_s, memory_gib(rank.device), rank.host, window.starved_steps))
    splits, used_gib, hosts, starved_steps = zip(*of_ranks, strict=True)
    forward_s = [split["forward"] for split in splits]
    joules = (window.joules + _count_joules(job)) / window.tokens
    job.metrics.write(
        "train",
        progress,
        loss=window.nats / window.labels if window.labels else math.nan,
        lr=progress.lr,
        grad_norm=grad_norm,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_device=tokens_per_s / rank.world_size,
        mfu=flops_per_s / job.peak_flops,
        **({"mfu_derived": flops_per_s / 1e12 / derived} if (derived := job.cfg.cluster.peak_tflops_derived) else {}),
        memory_gib=max(used_gib),
        step_s=window.seconds / window.steps,
        window_s=window.seconds,
        split_s={part: float(np.mean([split[part] for split in splits])) for part in split_s},
        starved_steps=max(starved_steps),
        joules_per_token_devices=joules[0],
        joules_per_token_nodes=joules[1],
        skew=max(forward_s) / max(float(np.median(forward_s)), 1e-9),
        slowest=hosts[forward_s.index(max(forward_s))],
    )


def _count_joules(job: Job) -> Any:
    """Joules of all nodes since the last reading, by boundary, which `job.progress` takes in; collective."""
    seconds, gained_j = job.meter.read()
    joules, progress = np.array(job.rank.sum(gained_j)), job.progress
    progress.joules = (progress.joules + np.nan_to_num(joules)).tolist()
    progress.metered_s = (progress.metered_s + seconds * np.isfinite([*joules, 0.0])).tolist()
    return joules


def _count_consumed(job: Job, here: OrderHash) -> None:
    """Moves what each rank has in `here` into `job.progress`; collective, so only when it is told or saved."""
    progress, parts = job.progress, job.samples.parts
    total = OrderHash(len(parts))
    total.state += np.array(job.rank.sum(here.state.tolist(), torch.int64))
    total.state += np.array(progress.order_state or 0)
    here.state[:] = 0
    progress.order_state, progress.order_hash = total.state.tolist(), total.hex
    progress.consumed_by_part = dict(zip(parts, progress.order_state[2:], strict=True))
    progress.consumed = by_language(progress.consumed_by_part)
    progress.consumed_by_source = by_source(progress.consumed_by_part)


def _validate(job: Job) -> None:
    began_s, rank = time.monotonic(), job.rank
    together = job.cfg.engine.tensor_parallel  # so many ranks compute the same logits
    job.watchdog.alive()
    scores = score_documents(
        job.engine.logits,
        job.held_out,
        seq_len=job.cfg.train.seq_len,
        batch_seqs=job.shape.micro_batch_seqs,
        device=rank.device,
        rank=rank.rank // together,
        world_size=rank.world_size // together,
    )
    by_lang = bits_per_byte(gather_scores(scores if rank.rank % together == 0 else []), bootstrap_samples=1)
    job.metrics.write(
        "valid",
        job.progress,
        bpb={lang: entry.bpb for lang, entry in by_lang.items()},
        bpb_mean=mean_bpb(by_lang),
        **job.progress.consumption,
    )
    job.clock.took("validation", time.monotonic() - began_s)
    job.watchdog.alive()


def _rewind(job: Job) -> None:
    """Back to the last checkpoint, and on without the samples of the spike's steps, whose documents the ledger names.

    Raises `UserError` where the run has gone back too often, or there is no checkpoint.
    """
    old, faults = job.progress, job.cfg.faults
    *before, loss = old.losses
    if old.rewinds >= faults.max_rewinds:
        found = f"loss {loss:.3f} at step {old.step} after {old.rewinds} rewinds"
        rule = f"faults.max_rewinds = {faults.max_rewinds}"
        repair = "the ledger names the documents of each; lower optim.lr under a new name=…, or raise the limit"
        raise UserError(found, rule, repair)
    target, complaints = newest_usable(job.run_dir, job.rank)
    if target is None:
        found = f"loss {loss:.3f} at step {old.step} and no checkpoint to go back to: {complaints}"
        raise UserError(found, "a spike is answered by going back", "faults.spike_window_steps=0 switches this off")
    restored = restore(target, job.engine, job.rank, job.cfg.seed)
    first_step = max(old.step - faults.spike_skip_steps, restored.step)
    first, last = _positions(job, first_step, old)
    # Ranges stay sorted and disjoint: the new one takes in those that it touches.
    touched = [(start, end) for start, end in old.skipped if start <= last + 1 and first <= end]
    starts, ends = zip(*touched, (first, last + 1), strict=True)
    untouched = [skipped for skipped in old.skipped if skipped not in touched]
    job.progress = replace(
        restored,
        skipped=sorted([*untouched, (min(starts), max(ends))]),
        rewinds=old.rewinds + 1,
        phases=old.phases,  # what stands at a position; the checkpoint may be older than the newest of them
        flops=old.flops,  # spent all the same, as the time of devices
        device_s=old.device_s,
        joules=old.joules,
        metered_s=old.metered_s,
    )
    if job.rank.is_first:
        job.ledger.append(
            "rewind",
            step=old.step,
            loss=loss,
            losses_before=before[-8:],
            checkpoint=target.name,
            to_step=restored.step,
            left_out_steps=[first_step + 1, old.step],
            left_out_positions=[first, last + 1],
            documents=job.samples.documents(range(first, last + 1)),
        )
        print(
            f"loss {loss:.3f} at step {old.step}: back to {target.name}, without the samples of steps "
            f"{first_step + 1} to {old.step}; the ledger names their documents",
            flush=True,
        )
    job.metrics.terminal.advance(restored.step - old.step)
