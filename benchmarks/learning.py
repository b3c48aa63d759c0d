"""Does our decoder learn as transformers' does? The same weights, text, loss and AdamW for both, a hundred steps.

    python benchmarks/learning.py [--steps 100] [--draw docs/learning.svg]      three minutes on a core

Ours is model/decoder.py with model/loss.py, theirs Qwen3ForCausalLM with PyTorch's loss on all logits at once; ours
keeps documents apart by their ends, theirs by a mask. The smoke model, a step of 2,048 tokens, one thread. Beside them,
to compare with: ours from first weights that are off by a rounding of fp32, and ours from others.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.compose import compose
from configs.schema import RunConfig
from data.loader import Samples
from data.manifest import TRAIN, Manifest
from data.mixture import plan_phases
from data.pipeline import prepare
from model.decoder import Decoder, init_weights, padded_rows
from model.hf import to_transformers
from model.loss import IGNORED
from train.engine import NextTokenLoss
from train.schedule import learning_rate

Batch = tuple[Tensor, Tensor]


def batches(cfg: RunConfig, corpus_dir: Path) -> Iterator[Batch]:
    """Tokens and numbers of documents, [B, T + 1] each, in the order in which a run would read them."""
    available, end = Manifest.load(corpus_dir).tokens_by_part(TRAIN), cfg.train.steps * cfg.train.seqs_per_step
    phases, _ = plan_phases([], cfg.mixture, available, position=0, end_position=end, seq_len=cfg.train.seq_len)
    samples = Samples(corpus_dir, phases, cfg.train.seq_len, cfg.seed, cfg.mixture.packing)
    for step in range(cfg.train.steps):
        first = step * cfg.train.seqs_per_step
        batch = samples.__getitems__(list(range(first, first + cfg.train.seqs_per_step)))
        yield torch.as_tensor(batch["tokens"]), torch.as_tensor(batch["doc"])


def first_weights(cfg: RunConfig, corpus_dir: Path, seed: int) -> Decoder:
    decoder = Decoder(cfg.model, padded_rows(Manifest.load(corpus_dir).tokenizer.vocab_size))
    init_weights(decoder, seed)
    return decoder


def ours(cfg: RunConfig, corpus_dir: Path, seed: int = 1, off: float = 0.0) -> list[float]:
    """The losses from the first weights of a seed, each times 1 - `off`, 1, or 1 + `off`."""
    model = NextTokenLoss(first_weights(cfg, corpus_dir, seed))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + off * torch.randint(-1, 2, parameter.shape, generator=generator)
    return train(cfg, corpus_dir, model, lambda batch: model(*batch)[0])


def theirs(cfg: RunConfig, corpus_dir: Path) -> list[float]:
    model = to_transformers(first_weights(cfg, corpus_dir, 1), seq_len=cfg.train.seq_len).train()

    def loss(batch: Batch) -> Tensor:
        tokens_BT1, doc_BT1 = batch
        is_last_BT = doc_BT1[:, 1:] != doc_BT1[:, :-1]
        labels_BT = tokens_BT1[:, 1:].masked_fill(is_last_BT, IGNORED)
        doc_BT = doc_BT1[:, :-1]
        sees_BTT = (doc_BT[:, :, None] == doc_BT[:, None, :]).tril()
        logits_BTV = model(input_ids=tokens_BT1[:, :-1], attention_mask=sees_BTT[:, None], use_cache=False).logits
        total = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / labels_BT.numel()

    return train(cfg, corpus_dir, model, loss)


def train(cfg: RunConfig, corpus_dir: Path, model: Any, loss_of: Callable[[Batch], Tensor]) -> list[float]:
    """A loop that owes nothing to the engine; all matrices but the input embedding are decayed."""
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": cfg.optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(cfg.optim.beta1, cfg.optim.beta2), eps=cfg.optim.eps)
    found = []
    for step, batch in enumerate(batches(cfg, corpus_dir)):
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg.train.steps, cfg.optim, cfg.schedule)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.item())
    return found


def apart(one: list[float], other: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a / b - 1) for a, b in zip(one, other, strict=True))


def draw(path: Path, our_curve: list[float], their_curve: list[float]) -> None:
    width, height, left, bottom = 720, 260, 44, 34
    low, high = min(our_curve) - 0.2, max(our_curve) + 0.2

    def place(step: float, loss: float) -> tuple[float, float]:
        x = left + (width - left - 8) * step / len(our_curve)
        return round(x, 1), round(8 + (height - bottom - 8) * (high - loss) / (high - low), 1)

    def curve(losses: list[float], style: str) -> str:
        points = " ".join("{},{}".format(*place(step, loss)) for step, loss in enumerate(losses, 1))
        return f'<polyline points="{points}" fill="none" {style}/>'

    ticks = "".join(
        f'<text x="{left - 6}" y="{place(0, loss)[1]}" text-anchor="end" dy="4">{loss}</text>'
        for loss in range(math.ceil(low), math.floor(high) + 1)
    ) + "".join(
        f'<text x="{place(step, low)[0]}" y="{height - bottom + 18}" text-anchor="middle">{step}</text>'
        for step in range(0, len(our_curve) + 1, 20)
    )
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 8} {height}" font-family="sans-serif" '
        f'font-size="12" fill="#555" role="img">'
        f"<title>Loss of our decoder and of transformers' Qwen3ForCausalLM in the same loop</title>"
        f'<rect width="{width + 8}" height="{height}" fill="#fff"/>'
        f'<path d="M{left} 8V{height - bottom}H{width - 8}" fill="none" stroke="#999"/>{ticks}'
        f'<text x="{width - 16}" y="26" text-anchor="end">largest difference '
        f"{apart(our_curve, their_curve):.0e} of the loss</text>"
        f'<text x="{width - 8}" y="{height - 4}" text-anchor="end">step</text>'
        f'<text x="{left + 8}" y="{height - bottom - 10}">loss, nats a position; '
        f"thick: transformers, thin: ours</text>"
        + curve(their_curve, 'stroke="#c2410c" stroke-width="4" opacity="0.55"')
        + curve(our_curve, 'stroke="#111" stroke-width="1"')
        + "</svg>\n",
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--draw", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tokens = f"train.tokens={given.steps * 2048}", "train.tokens_per_step=2048"
        cfg = compose(["experiment=smoke", "optim.lr=1e-3", *tokens, f"cluster.scratch={scratch}"])
        corpus_dir = prepare(cfg)
        torch.set_num_threads(1)
        curves = {
            "ours": ours(cfg, corpus_dir),
            "transformers": theirs(cfg, corpus_dir),
            "ours, off by a rounding": ours(cfg, corpus_dir, off=2**-23),
            "ours, other first weights": ours(cfg, corpus_dir, seed=2),
        }
    marks = [step for step in (1, 10, 20, 50, 100) if step <= given.steps]
    print(
        "loss at step", *(f"{step:>9}" for step in marks), "  largest relative difference from ours, to the same step"
    )
    for who, losses in curves.items():
        off = " ".join(f"{apart(losses[:step], curves['ours'][:step]):>9.1e}" for step in marks)
        print(f"{who:<28}", *(f"{losses[step - 1]:>9.5f}" for step in marks), "  ", off)
    if given.draw:
        draw(given.draw, curves["ours"], curves["transformers"])


if __name__ == "__main__":
    main()
