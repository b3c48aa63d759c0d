"""What a checkpoint costs: how long the loop stands still, how long until it is on disk, and how long a start takes.

    python benchmarks/checkpoint.py [--parameters 50] [--repeats 7] [--folder FOLDER]

In one process and in turns: the snapshot that stops the loop, the whole write behind it, and `torch.save` of the same
tensors (without forcing them to disk, which is torch.save's way, and with). Then a run is started again, and the
time from its start to its first step is taken apart. Figures are medians; ratios compare what ran beside each other.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from configs.compose import compose
from model.decoder import Decoder, count_parameters, init_weights
from train.checkpoint import Saver, Staging
from train.dist import join, leave
from train.engine import Engine
from train.progress import Progress
from train.schedule import step_shape

VOCAB_ROWS = 16_384


def settings(parameters: int, folder: Path) -> list[str]:
    d_model = 64 * round((parameters * 1e6 / 12 / 10) ** 0.5 / 64)
    return [
        "experiment=smoke",
        "cluster.devices_per_node=1",
        "cluster.cpus_per_device=2",
        f"cluster.scratch={folder}",
        f"model={{n_layer: 8, d_model: {d_model}, n_head: {d_model // 64}, n_kv_head: {d_model // 64}, head_dim: 64, "
        f"d_ff: {3 * d_model}, tie_embeddings: true}}",
    ]


def saves(overrides: list[str], folder: Path, repeats: int) -> None:
    cfg = compose(overrides)
    rank = join(cfg)
    decoder = Decoder(cfg.model, VOCAB_ROWS)
    init_weights(decoder, 1)
    engine = Engine(decoder, cfg, rank)
    tokens = torch.randint(VOCAB_ROWS, (1, 33))
    for _ in range(step_shape(cfg).accumulation_steps):
        engine.backward(tokens, torch.zeros_like(tokens))
    engine.step(1e-3)
    state = {(f.name, kind): tensor for f in engine.fragments() for kind, tensor in f.tensors.items()}
    n_bytes = sum(tensor.nbytes for tensor in state.values())
    parameters = count_parameters(cfg.model, VOCAB_ROWS)
    saver = Saver(folder, engine, rank, {}, (1, 0), say=lambda _: None)
    began = time.perf_counter()
    Staging(rank.device).copy(engine)
    first_s = time.perf_counter() - began
    took: dict[str, list[float]] = {}
    for step in range(1, repeats + 2):
        begin(saver, step, took)
        for name, synced in (("torch.save", False), ("torch.save and fsync", True)):
            began = time.perf_counter()
            with open(folder / "plain.pt", "wb") as file:
                torch.save(state, file)
                if synced:
                    os.fsync(file.fileno())
            took.setdefault(name, []).append(time.perf_counter() - began)
            (folder / "plain.pt").unlink()
    medians = {name: statistics.median(times[1:]) for name, times in took.items()}
    written = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*.safetensors"))
    print(f"{parameters:,} parameters, {n_bytes / 1e6:.0f} MB of weights and moments; medians of {repeats}")
    print(
        f"{'loop stands still':<34}{medians['blocked']:8.3f} s   (the first time, with fresh memory: {first_s:.3f} s)"
    )
    for name in ("torch.save", "torch.save and fsync"):
        print(
            f"{name:<34}{medians[name]:8.3f} s   loop stands still for {medians['blocked'] / medians[name]:.3f} of it"
        )
    print(f"{'until it is on disk, hashed':<34}{medians['whole']:8.3f} s   {n_bytes / medians['whole'] / 1e6:.0f} MB/s")
    print(f"{'bytes a parameter':<34}{written / parameters:8.3f}")
    leave()


def begin(saver: Saver, step: int, took: dict[str, list[float]]) -> None:
    began = time.perf_counter()
    saver.begin(Progress(step=step))
    took.setdefault("blocked", []).append(time.perf_counter() - began)
    saver.finish()
    took.setdefault("whole", []).append(time.perf_counter() - began)


def restart(folder: Path) -> None:
    """A smoke run of two processes, stopped by its job's time, and started again."""
    command = [sys.executable, "-m", "marathon.cli"]
    small = ["experiment=smoke", f"cluster.scratch={folder}", "train.log_every_steps=1", "name=restart"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    subprocess.run([*command, "data", *small], env=environment, check=True, capture_output=True)
    metrics = folder / "runs/restart/metrics.jsonl"
    for attempt in ("first start (validates, saves, tests itself)", "restart"):
        began = time.time()
        lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        run = subprocess.Popen([*command, "train", *small], env=environment, stdout=subprocess.DEVNULL)
        while not metrics.exists() or not any('"train"' in line for line in metrics.read_text().splitlines()[lines:]):
            time.sleep(0.01)
        print(f"{attempt + ' to first step':<58}{time.time() - began:6.1f} s")
        run.terminate()
        run.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=50, help="millions")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="a file system to measure (default: temporary)")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="marathon-checkpoint-", dir=given.folder))
    try:
        saves(settings(given.parameters, folder), folder, given.repeats)
        restart(folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
