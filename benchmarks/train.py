"""How fast a decoder trains, beside Hugging Face's Trainer and a plain compiled loop, on the same model and tokens.

    python benchmarks/train.py [--sizes 10M 50M] [--lengths 512 2048] [--vocabularies 16384 131072] [--repeats 7]

In turns, in processes of their own that wait for each other; of three steps in a turn the last two count, since the
first finds code and data that the others have driven out of caches and memory:

  marathon       our decoder, loss and engine: DeepSpeed with ZeRO-1 in one process, blocks compiled
  bare           the same without DeepSpeed: a loop with torch's AdamW, to see what the engine costs
  one document   marathon where every sequence is one document; in the others documents end as real ones do
  compiled       transformers' Qwen3ForCausalLM under torch.compile, in a plain loop with the same AdamW
  trainer        the same in transformers' Trainer, as it is

All train on the same tokens with as many threads as there are cores. Ours have what they train with: in fp32 products
of oneDNN, and memory that glibc keeps (train/dist.py); the peers are as people run them, and do not keep documents
apart, so they attend over whole sequences. FLOPs are counted alike for all (model/decoder.py: flops_per_token, causal
half). MFU is against the best of eight products of 1024 x 1024 matrices, taken again in each turn; medians.
With `--precision bf16` all compute in bf16 over weights in fp32: ours by DeepSpeed, so without bare, the peers by
autocast.
On a GPU: `--device cuda --precision bf16 --sizes 1B --lengths 4096 --vocabularies 131072 --micro-batch 4`; MFU is then
against 989 TFLOP/s, an H100's.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from configs.compose import compose
from configs.enums import Precision
from configs.schema import RunConfig
from model.decoder import Decoder, count_parameters, flops_per_token, init_weights

SIZES = {
    "10M": "n_layer=6 d_model=256 n_head=4 n_kv_head=2 head_dim=64 d_ff=1024",
    "50M": "n_layer=11 d_model=512 n_head=8 n_kv_head=4 head_dim=64 d_ff=2048",
    "1B": "n_layer=16 d_model=2048 n_head=16 n_kv_head=4 head_dim=128 d_ff=6144",
}
MEAN_DOCUMENT_TOKENS = 500
"""Lengths are geometric: about what the text of docs/performance.md has."""


def configuration(given: argparse.Namespace, size: str, seq_len: int, micro_batch: int, scratch: str) -> RunConfig:
    cores = len(os.sched_getaffinity(0))
    return compose(
        [
            "experiment=smoke",
            *(f"model.{setting}" for setting in SIZES[size].split()),
            f"train.seq_len={seq_len}",
            f"train.tokens_per_step={micro_batch * seq_len}",
            f"train.max_micro_batch_seqs={micro_batch}",
            "cluster.devices_per_node=1",
            f"cluster.cpus_per_device={cores}",
            f"cluster.scratch={scratch}",
            "engine.compile=true",
            f"engine.precision={given.precision}",
            *(["cluster.device=cuda", "cluster.peak_tflops=989", "engine=zero1"] if given.device == "cuda" else []),
        ]
    )


def draw(cfg: RunConfig, vocabulary: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Micro batches of tokens and numbers of documents, [B, T + 1] each, always the same ones."""
    rng, shape = np.random.default_rng(1), (cfg.train.seqs_per_step, cfg.train.seq_len + 1)
    while True:
        ends = rng.random(shape) < 1 / MEAN_DOCUMENT_TOKENS
        yield torch.from_numpy(rng.integers(4, vocabulary, shape)), torch.from_numpy(ends.cumsum(1).astype(np.int32))


def ours(cfg: RunConfig, vocabulary: int, wait: Callable[[], None], has_engine: bool, has_documents: bool) -> None:
    from train.dist import join
    from train.engine import Engine, NextTokenLoss
    from train.optim import build_optimizer

    decoder = Decoder(cfg.model, vocabulary)
    init_weights(decoder, cfg.seed)
    rank = join(cfg)
    if has_engine:
        engine = Engine(decoder, cfg, rank)
    else:
        for block in decoder.blocks:
            block.compile(dynamic=False)
        model, optimizer = NextTokenLoss(decoder.to(rank.device)), build_optimizer(decoder, cfg)
    for tokens_BT1, doc_BT1 in draw(cfg, vocabulary):
        if not has_documents:
            doc_BT1.zero_()
        wait()
        if has_engine:
            engine.backward(tokens_BT1, doc_BT1)
            engine.step(1e-4)
        else:
            loss, _ = model(tokens_BT1.to(rank.device), doc_BT1.to(rank.device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), cfg.optim.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def theirs(cfg: RunConfig, vocabulary: int) -> Any:
    """Their decoder in fp32, on the CPU."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from model.hf import to_their_config

    with torch.device("meta"):
        config = to_their_config(Decoder(cfg.model, vocabulary), seq_len=cfg.train.seq_len)
    return Qwen3ForCausalLM(Qwen3Config(**config)).train()


def compiled(cfg: RunConfig, vocabulary: int, wait: Callable[[], None]) -> None:
    device, is_bf16 = cfg.cluster.device.value, cfg.engine.precision is Precision.bf16
    model = theirs(cfg, vocabulary).to(device)
    optimizer, run = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), torch.compile(model)
    for tokens_BT1, _ in draw(cfg, vocabulary):
        wait()
        tokens_BT = tokens_BT1[:, :-1].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=is_bf16):
            loss = run(input_ids=tokens_BT, labels=tokens_BT).loss  # it shifts labels itself
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def trainer(cfg: RunConfig, vocabulary: int, wait: Callable[[], None]) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Waiting(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait()

    class Sequences(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            for tokens_BT1, _ in draw(cfg, vocabulary):
                for tokens_T1 in tokens_BT1:
                    yield {"input_ids": tokens_T1[:-1], "labels": tokens_T1[:-1]}

    arguments = TrainingArguments(
        output_dir=str(Path(cfg.cluster.scratch) / "trainer"),
        per_device_train_batch_size=cfg.train.seqs_per_step,
        max_steps=10_000,
        use_cpu=cfg.cluster.device.value == "cpu",
        bf16=cfg.engine.precision is Precision.bf16,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(theirs(cfg, vocabulary), arguments, train_dataset=Sequences(), callbacks=[Waiting()]).train()


CONTENDERS: dict[str, Callable[..., None]] = {
    "marathon": lambda cfg, vocabulary, wait: ours(cfg, vocabulary, wait, True, True),
    "bare": lambda cfg, vocabulary, wait: ours(cfg, vocabulary, wait, False, True),
    "one document": lambda cfg, vocabulary, wait: ours(cfg, vocabulary, wait, True, False),
    "compiled": compiled,
    "trainer": trainer,
}


def contend(who: str, cfg: RunConfig, vocabulary: int, port: int, pipe: Connection) -> None:
    """Trains; before each step it tells that the one before has ended, and waits until it may go on."""
    os.environ["MASTER_PORT"] = str(port)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(cfg.cluster.cpus_per_device)

    def wait() -> None:
        if cfg.cluster.device.value != "cpu":
            torch.cuda.synchronize()
        pipe.send("ready")
        pipe.recv()

    CONTENDERS[who](cfg, vocabulary, wait)


def measure(cfg: RunConfig, vocabulary: int, names: list[str], repeats: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of the steps of each that count, and operations a second of a plain matrix product."""
    pipes, processes, peaks = {}, [], []
    dtype = torch.bfloat16 if cfg.engine.precision is Precision.bf16 else torch.float32
    for number, who in enumerate(names):
        pipes[who], there = get_context("spawn").Pipe()
        given = (who, cfg, vocabulary, 29500 + number, there)
        process = get_context("spawn").Process(target=contend, args=given, daemon=True)
        process.start()
        there.close()  # so that a contender that dies is noticed
        processes.append(process)
        pipes[who].recv()
        for _ in range(2):
            pipes[who].send("go")
            pipes[who].recv()
    seconds: dict[str, list[float]] = {who: [] for who in names}
    for _ in range(repeats):
        a, b = torch.randn(2, 1024, 1024).to(dtype)
        peaks.append(2 * 1024**3 / min(timeit.repeat(lambda a=a, b=b: torch.mm(a, b), number=1, repeat=8)))
        for who, pipe in pipes.items():
            for is_timed in (False, True, True):
                began_s = time.perf_counter()
                pipe.send("go")
                pipe.recv()
                if is_timed:
                    seconds[who].append(time.perf_counter() - began_s)
    for process in processes:
        process.kill()
        process.join()
    peak = statistics.median(peaks) if cfg.cluster.peak_tflops <= 0 else cfg.cluster.peak_tflops * 1e12
    return seconds, peak


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sizes", nargs="+", default=["10M", "50M"], choices=SIZES)
    arguments.add_argument("--lengths", nargs="+", type=int, default=[512, 2048])
    arguments.add_argument("--vocabularies", nargs="+", type=int, default=[16_384, 131_072])
    arguments.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--micro-batch", type=int, help="sequences a step; 4,096 tokens where it is not given")
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments.add_argument("--precision", choices=list(Precision), default="fp32")
    given = arguments.parse_args()
    if given.precision == "bf16" and "bare" in given.contenders:
        given.contenders.remove("bare")  # the mixture of precisions is DeepSpeed's
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print("model, vocabulary, sequence; a plain matrix product; how many times as fast as each the first is")
    for size in given.sizes:
        for vocabulary in given.vocabularies:
            for seq_len in given.lengths:
                with tempfile.TemporaryDirectory() as scratch:
                    micro_batch = given.micro_batch or max(4096 // seq_len, 1)
                    cfg = configuration(given, size, seq_len, micro_batch, scratch)
                    seconds, peak = measure(cfg, vocabulary, given.contenders, given.repeats)
                flops = flops_per_token(cfg.model, vocabulary, seq_len)
                millions = count_parameters(cfg.model, vocabulary) / 1e6
                print(f"{size} ({millions:.1f}M), {vocabulary:,}, {seq_len}; {peak / 1e9:.0f} GFLOP/s", flush=True)
                first = statistics.median(seconds[given.contenders[0]])
                for who, found in seconds.items():
                    rate = micro_batch * seq_len / statistics.median(found)
                    times = statistics.median(found) / first
                    print(f"  {who:<14}{rate:>9,.0f} tokens/s  MFU {rate * flops / peak:.1%}  {times:.2f}", flush=True)


if __name__ == "__main__":
    main()
