"""Does the best learning rate stay where it is when a model gets wider? With muP and without it.

    python -P benchmarks/mup.py [--quick] [--optimizer adamw] [--untied] [--threads 1]

Each width is trained at each rate on the same tokens: a Markov chain over 512 tokens, whose successors follow Zipf's
law in an order of each token's own, so that there is as much of it as is asked for, and its entropy is known. A line
has the mean loss of the last fifth of steps, by rate, and the best rate: the vertex of the parabola, over log2 of the
rate, through the best one and its neighbours.
"""

import argparse
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["LOCAL_RANK"] = "0"

import torch
import torch.distributed as torch_dist
from torch import Tensor

from configs.compose import compose
from configs.schema import RunConfig
from model.decoder import Decoder, init_weights
from train.dist import Rank
from train.schedule import learning_rate

ROWS, SEQ_LEN, SEQS, HEAD_DIM = 512, 64, 16, 16
WIDTHS = (64, 128, 256)


def configuration(width: int, base: int, rate: float, steps: int, asked: argparse.Namespace) -> RunConfig:
    heads = f"n_head: {width // HEAD_DIM}, n_kv_head: {width // HEAD_DIM // 2}, head_dim: {HEAD_DIM}"
    return compose(
        [
            "experiment=smoke",
            f"optim={asked.optimizer}",
            f"optim.lr={rate}",
            f"model={{n_layer: 3, d_model: {width}, {heads}, d_ff: {3 * width}}}",
            f"model.tie_embeddings={not asked.untied}",
            f"model.mup_base_width={base}",
            "cluster.devices_per_node=1",
            *(f"train.seq_len={SEQ_LEN}", f"train.tokens_per_step={SEQS * SEQ_LEN}"),
            *(f"train.tokens={steps * SEQS * SEQ_LEN}", f"train.max_micro_batch_seqs={SEQS}"),
            "schedule.warmup_steps=5",
        ]
    )


def chain() -> tuple[Tensor, Tensor, float]:
    """Successors of each token by rank, the share of each rank, and the entropy in nats a token."""
    share_V = 1 / torch.arange(1, ROWS + 1) ** 1.5
    share_V /= share_V.sum()
    order_VV = torch.stack([torch.randperm(ROWS, generator=torch.Generator().manual_seed(row)) for row in range(ROWS)])
    return order_VV, share_V, float(-(share_V * share_V.log()).sum())


def draw(order_VV: Tensor, share_V: Tensor) -> Iterator[Tensor]:
    """Batches of tokens [B, T + 1], always the same ones."""
    generator = torch.Generator().manual_seed(1)
    while True:
        ranks_BT = torch.multinomial(share_V, SEQS * (SEQ_LEN + 1), True, generator=generator).view(SEQS, -1)
        tokens = [torch.randint(ROWS, (SEQS,), generator=generator)]
        for rank_B in ranks_BT.T[:-1]:
            tokens.append(order_VV[tokens[-1], rank_B])
        yield torch.stack(tokens, 1)


def train(cfg: RunConfig, rank: Rank, order_VV: Tensor, share_V: Tensor) -> float:
    """Mean loss of the last fifth of steps."""
    from train.engine import Engine

    decoder = Decoder(cfg.model, ROWS)
    init_weights(decoder, 1)
    engine, losses = Engine(decoder, cfg, rank), []
    doc_BT1 = torch.zeros(SEQS, SEQ_LEN + 1, dtype=torch.int32)
    for step, tokens_BT1 in zip(range(cfg.train.steps), draw(order_VV, share_V), strict=False):
        nats, labels = engine.backward(tokens_BT1, doc_BT1).tolist()
        engine.step(learning_rate(step, cfg.train.steps, cfg.optim, cfg.schedule))
        losses.append(nats / labels)
    last = losses[-len(losses) // 5 :]
    return sum(last) / len(last)


def best(rates: list[float], losses: list[float]) -> str:
    """The rate at the vertex of the parabola through the best loss and its neighbours; at an end, just that end."""
    at = min(range(len(losses)), key=losses.__getitem__)
    if at in (0, len(losses) - 1):
        return f"{'<=' if at == 0 else '>='} {rates[at]:.2e}"
    before, here, after = losses[at - 1 : at + 2]
    return f"{rates[at] * 2 ** ((before - after) / (2 * (before - 2 * here + after))):.2e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 steps in place of 300")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="more stall where others compute too")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    steps, began_s = 60 if asked.quick else 300, time.perf_counter()
    rates = [2.0**exponent for exponent in range(-9, -2)]
    order_VV, share_V, entropy = chain()
    with tempfile.TemporaryDirectory() as folder:
        torch_dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{folder}/store")
        rank = Rank(0, 1, torch.device("cpu"), platform.node())
        embeddings = "untied" if asked.untied else "tied"
        print(f"{asked.optimizer}, {embeddings}, {steps} steps of {SEQS * SEQ_LEN} tokens, entropy {entropy:.3f}")
        print("| muP | width |" + "".join(f" {rate:.2e} |" for rate in rates) + " best rate |")
        print("|" + "---|" * (len(rates) + 3))
        narrow: list[float] = []
        for base in (WIDTHS[0], 0):
            for width in WIDTHS:
                if width == WIDTHS[0] and narrow:
                    losses = narrow  # is the same with and without
                else:
                    runs = (configuration(width, base, rate, steps, asked) for rate in rates)
                    losses = [train(cfg, rank, order_VV, share_V) for cfg in runs]
                    narrow = narrow or losses
                cells = "".join(f" {loss:.3f} |" if math.isfinite(loss) else " - |" for loss in losses)
                print(f"| {'yes' if base else 'no'} | {width} |{cells} {best(rates, losses)} |", flush=True)
        torch_dist.destroy_process_group()
    print(
        f"{time.perf_counter() - began_s:.0f} s, {asked.threads} threads, {platform.processor() or platform.machine()}"
    )


if __name__ == "__main__":
    main()
