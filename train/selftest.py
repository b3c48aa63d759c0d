"""Before the first step: does this engine, on this machine, compute the gradient that it should?

Versions of DeepSpeed have dropped micro batches, scaled gradients twice, or raced with a reduction, in silence and
only in some layouts. So every new layout takes one step on two small batches, and what has reached its optimizer
is compared with the gradient of one process in fp32. Then the checkpoint is read back, and nothing has happened.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.enums import Precision
from configs.errors import UserError
from configs.schema import RunConfig
from ledger.record import Ledger, gap
from model.decoder import Decoder, count_parameters
from model.loss import IGNORED, next_token_labels
from model.weights import Columns, FragmentReader
from train import checkpoint
from train.dist import Rank
from train.engine import Engine
from train.schedule import step_shape

TOLERANCE = {Precision.fp32: 1e-4, Precision.bf16: 0.2}
"""Largest relative error of one parameter's gradient. Measured: fp32 1e-6 on the layouts of
tests/train/test_selftest.py; bf16 0.02 there, 0.03 with 160M parameters, 0.04 with 64 layers. A gradient that lacks the
first or last micro batches of the ranks, or is not reduced, is off by 0.3 or more."""
TEST_TOKENS = 256
"""Length of the two sequences at the most: a reference on the host has to be cheap for billions of parameters."""


def self_test(cfg: RunConfig, run_dir: Path, engine: Engine, rank: Rank, vocab_rows: int, whole: Path) -> None:
    """Compares gradients unless this layout has passed before; leaves engine and run as in `whole`.

    Raises `UserError`, with the worst parameters, where a gradient is off by more than `TOLERANCE`.
    """
    ledger, layout = Ledger(run_dir), _layout(cfg, engine)
    if rank.tell(rank.is_first and ledger.last("self_test", layout=layout, passed=True) is not None):
        return
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    there = 1024 * int(next(line.split()[1] for line in meminfo if line.startswith("MemAvailable")))
    needed = 8 * count_parameters(cfg.model, vocab_rows)
    if rank.tell(needed > 0.8 * there):
        if rank.is_first:
            found = f"the reference takes {needed / 2**30:.0f} GiB of host memory, {there / 2**30:.0f} are free"
            ledger.append("self_test", layout=layout, passed=False, error=gap(found))
            print(f"no self-test: {found}", flush=True)
        return
    reader = FragmentReader(whole)
    engine.fill(reader, updates=0)
    batches = _batches(cfg, vocab_rows)
    turns = [_turns(number, step_shape(cfg).accumulation_steps) for number in range(rank.data_world_size)]
    for turn in turns[rank.data_rank]:
        engine.backward(*batches[turn])
    norm, applied = engine.step(cfg.optim.lr)
    shares = [sum(mine.count(turn) for mine in turns) / sum(map(len, turns)) for turn in (0, 1)]
    reference = _reference(cfg, vocab_rows, reader, batches[:2], shares) if rank.is_first else None
    scale = min(1.0, cfg.optim.grad_clip / norm) if applied else math.nan
    errors = _relative_errors(engine, rank, reference, scale)
    checkpoint.restore(whole, engine, rank, cfg.seed)

    def tell() -> None:
        worst, tolerance = max(errors.values()), TOLERANCE[cfg.engine.precision]
        # NaN is not within anything, and max would pass over it.
        wrong = sorted((name for name in errors if not errors[name] <= tolerance), key=lambda name: -errors[name])
        ledger.append("self_test", layout=layout, passed=not wrong, error=worst, tolerance=tolerance)
        if wrong:
            told = ", ".join(f"{name} by {errors[name]:.2g}" for name in wrong[:4])
            found = f"the engine's gradients are off in {len(wrong)} of {len(errors)} parameters: {told}"
            others = "another version of DeepSpeed or torch, another engine.zero_stage, or engine.compile=false"
            rule = f"at most {tolerance:g} from those of one process in fp32"
            raise UserError(found, rule, f"{others}; train.self_test=false trains all the same")
        print(f"self-test: gradients agree with one process in fp32 to {worst:.1e}", flush=True)

    rank.first_does(tell)


def _layout(cfg: RunConfig, engine: Engine) -> dict[str, Any]:
    return {
        "world_size": cfg.cluster.world_size,
        "accumulation_steps": step_shape(cfg).accumulation_steps,
        "zero_stage": cfg.engine.zero_stage,
        "tensor_parallel": cfg.engine.tensor_parallel,
        "sequence_parallel": cfg.engine.sequence_parallel,
        "shard_group": cfg.engine.shard_group,
        "recompute": cfg.engine.recompute.value,
        "precision": cfg.engine.precision.value,
        "comm_precision": cfg.engine.comm_precision.value,
        "compile": cfg.engine.compile,
        "cluster": cfg.cluster.name,
        "deepspeed": engine.version,
        "torch": torch.__version__,
    }


def _batches(cfg: RunConfig, vocab_rows: int) -> list[tuple[Tensor, Tensor]]:
    """Two sequences of two documents, and one of documents so short that nothing is predicted; [1, T + 1] each."""
    n = min(cfg.train.seq_len, TEST_TOKENS) + 1
    tokens = torch.randint(vocab_rows, (3, 1, n), generator=torch.Generator().manual_seed(1))
    docs = [torch.arange(n) >= n // 2, torch.arange(n) >= n // 3, torch.arange(n)]
    return [(tokens_BT1, doc_T1.int()[None]) for tokens_BT1, doc_T1 in zip(tokens, docs, strict=True)]


def _turns(rank: int, accumulation_steps: int) -> list[int]:
    """Which batch each micro batch of a rank is.

    Most have nothing to predict, so that a lost one weighs much however many there are. Neighbouring ranks differ,
    since where all have the same gradient nobody sees that it has not been reduced.
    """
    turns = [2] * accumulation_steps
    turns[-1] = 1
    if rank % 2 == 0:
        turns[0] = 0
    return turns


def _reference(
    cfg: RunConfig, vocab_rows: int, reader: FragmentReader, batches: list[tuple[Tensor, Tensor]], shares: list[float]
) -> list[Tensor]:
    """Gradients by the plainest way there is: one process, fp32, on the host, this file and autograd."""
    decoder = Decoder(cfg.model, vocab_rows)
    reader.read_into(decoder)
    for (tokens_BT1, doc_BT1), share in zip(batches, shares, strict=True):
        labels_BT = next_token_labels(tokens_BT1, doc_BT1)
        logits_PV = decoder(tokens_BT1[:, :-1], doc_BT1[:, :-1]).flatten(0, 1)
        nats = F.cross_entropy(logits_PV, labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
        squares = logits_PV[labels_BT.flatten() != IGNORED].logsumexp(1).square().sum()
        torch.autograd.backward(share * (nats + cfg.train.z_loss * squares) / labels_BT.numel())
    return [parameter.grad for parameter in decoder.parameters() if parameter.grad is not None]


def _relative_errors(engine: Engine, rank: Rank, reference: list[Tensor] | None, scale: float) -> dict[str, float]:
    """By parameter: the norm of the difference over that of the reference, or over a thousandth of all the others'."""
    fragments, off_squares, squares = list(engine.fragments()), [], []
    for index, (name, shape) in enumerate(engine.shapes.items()):
        expected = rank.broadcast(torch.empty(math.prod(shape)) if reference is None else reference[index].flatten())
        squares.append(float(expected.double().square().sum()))
        off = []
        for fragment in fragments:
            columns, moment = Columns.parse(fragment.name), fragment.tensors["exp_avg"]
            if name == (columns.name if columns else fragment.name):
                whole = columns.of(expected) if columns else expected
                gradient = moment / (scale * (1 - fragment.beta1))
                off.append(gradient - whole[fragment.start : fragment.start + moment.numel()])
        off_squares.append(sum(float(part.double().square().sum()) for part in off))
    least = 1e-6 * sum(squares)
    pairs = zip(rank.sum(off_squares), squares, strict=True)
    return dict(zip(engine.shapes, (math.sqrt(off / max(square, least)) for off, square in pairs), strict=True))
