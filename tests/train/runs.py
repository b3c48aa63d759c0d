"""Small runs of `train.run.run` on real ranks, and what may befall them: faults that a rank is given before it starts.

A fault is a function at the top of a module, made ready with `functools.partial`, that is called once in every rank.
"""

import contextlib
import io
import itertools
import json
from typing import NamedTuple

import numpy as np
import torch

from configs.compose import compose
from configs.enums import Packing
from configs.errors import UserError
from data.loader import Samples
from data.order import OrderHash
from model.weights import read_manifest
from tests.train.ranks import run_ranks

SEQ_LEN, SEQS, SEED = 64, 12, 1


class Told(NamedTuple):
    """What came of a run: its exit status, or None, and what it printed, or said when it refused."""

    status: int | None
    text: str


def small(*overrides):
    """97,000 parameters, 20 steps of 12 sequences."""
    return compose(
        [
            "experiment=smoke",
            "corpus.languages=[de,el,mt]",
            "tokenizer.vocab_size=1000",
            "mixture.max_epochs=1000",
            "model={n_layer: 2, d_model: 48, n_head: 6, n_kv_head: 2, head_dim: 16, d_ff: 80}",
            "optim.lr=0.002",
            "schedule.warmup_steps=1",
            f"train.seq_len={SEQ_LEN}",
            f"train.tokens_per_step={SEQS * SEQ_LEN}",
            f"train.tokens={20 * SEQS * SEQ_LEN}",
            "train.max_micro_batch_seqs=3",
            "train.log_every_steps=1",
            "train.validate_every_steps=1000",
            "train.save_every_steps=5",
            "train.self_test=false",
            "cluster.peak_tflops=0.1",
            "cluster.devices_per_node=1",
            *overrides,
        ]
    )


def steps(n):
    """The override for a run of so many steps."""
    return f"train.tokens={n * SEQS * SEQ_LEN}"


def train(run_dir, corpus, *overrides, world_size=1, faults=()):
    """Runs the ranks of one start, and returns what the first of them has `Told`."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    cfg = small(f"cluster.devices_per_node={world_size}", *overrides)
    return run_ranks(one_rank, world_size, cfg, run_dir, corpus, faults)


def one_rank(cfg, run_dir, corpus, faults):
    """One rank of a start."""
    from train.run import run

    for fault in faults:
        fault()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return Told(run(cfg, run_dir, corpus), printed.getvalue())
    except UserError as refusal:
        return Told(None, str(refusal))
    except SystemExit:  # another rank has told why
        return Told(None, "")


def losses(run_dir):
    """Loss by step; of a step that was done again, the last."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def progress(run_dir, step):
    """Progress as a checkpoint has it."""
    return read_manifest(run_dir / "checkpoints" / f"step-{step:09d}")["progress"]


def files(run_dir, step):
    """Hashes of all that a checkpoint holds."""
    return read_manifest(run_dir / "checkpoints" / f"step-{step:09d}")["files"]


def order_hash(corpus, phases, positions, packing=Packing.concat):
    """The proof of having consumed just these positions, computed without loader and loop."""
    samples, proof = Samples(corpus, phases, SEQ_LEN, SEED, packing), OrderHash(3)
    found = samples.order.locate(positions)
    proof.add(positions, found.sample_id, found.part, SEQ_LEN)
    return proof.hex


# Faults.


def stop_after(n_steps):
    """The job's time is over after so many steps of this start."""
    from train.faults import JobClock

    calls = itertools.count(1)
    JobClock.is_over = lambda self: next(calls) >= n_steps


def spike(*at):
    """The losses of these steps, counted from the start of the process, are taken for spikes."""
    from train import loop

    calls = itertools.count(1)
    loop.is_spike = lambda *_: next(calls) in at


def spoil(first, end):
    """The tokens at these positions are noise, in which no language is to be found."""
    read = Samples.__getitems__

    def read_spoilt(self, positions):
        batch = read(self, positions)
        for row, position in enumerate(np.asarray(positions)):
            if first <= position < end:
                noise = torch.Generator().manual_seed(int(position))
                batch["tokens"][row] = torch.randint(4, 1000, (SEQ_LEN + 1,), generator=noise)
        return batch

    Samples.__getitems__ = read_spoilt
