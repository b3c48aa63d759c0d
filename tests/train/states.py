"""Small states of a run without an engine, and checkpoints of them."""

import torch

from model.weights import MASTER
from train import checkpoint
from train.checkpoint import Snapshot
from train.engine import OwnedFragment
from train.optim import MOMENTS
from train.progress import Progress

IDENTITY = {"corpus_hash": "c", "seq_len": 32, "seed": 1, "vocab_rows": 256}
NUMEL = 50


class Weights:
    """Stands for an engine where none has to step: one parameter with its moments, shared out over the ranks."""

    def __init__(self, seed, rank=0, world_size=1):
        generator = torch.Generator().manual_seed(seed)
        self.start, end = (NUMEL * r // world_size for r in (rank, rank + 1))
        self.tensors = {k: torch.randn(NUMEL, generator=generator)[self.start : end] for k in (MASTER, *MOMENTS[:2])}

    def fragments(self):
        yield OwnedFragment("weight", self.start, self.tensors, 0.9)

    def fill(self, reader, updates):
        for kind, tensor in self.tensors.items():
            tensor.copy_(reader.read(kind, "weight", self.start, tensor.numel()))

    def snapshot(self):
        """Without random states, so that every byte of the files can be tried."""
        tensors = {f"{kind}/weight/{self.start}": tensor for kind, tensor in self.tensors.items()}
        return Snapshot(tensors, [("weight", self.start, self.tensors[MASTER].numel())])


def write(run_dir, step, world_size=2):
    """A checkpoint whose weights are drawn with its step as seed."""
    folder = checkpoint.writing_folder(run_dir, step)
    for rank in range(world_size):
        checkpoint.write_part(folder, rank, Weights(step, rank, world_size).snapshot())
    return checkpoint.commit(run_dir, Progress(step=step, updates=step).to_json(), IDENTITY, world_size)
