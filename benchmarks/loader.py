"""What it costs to begin to read a corpus, and how fast batches come from the page cache; beside megatron-core's.

    python -P benchmarks/loader.py [--folder FOLDER] [--megatron SITE_PACKAGES] [--repeats 5]

Eight shards of 100,000 documents of random tokens (log-normal lengths, 660 million tokens) are written once. A reader
then runs in a fresh process, each of them in turns: start-up (for megatron-core first and with its cached indices),
growth of resident memory by it, samples a second at random positions, one by one and in batches of 16, and how long a
loop whose steps take 50 ms waits for the 64 samples of the next.
The same once more on 10,000 shards that are links to one of them, a thousand million documents together; on the first
1,000 of these for megatron-core, which opens and indexes each.

`--megatron` names a folder with megatron-core (`pip install --no-deps --target FOLDER megatron-core==0.16.1`), whose
GPTDataset reads the very same shards; that both find the same documents is checked first.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

SEQ_LEN, BATCH_SEQS, N_SAMPLES, READ, DOCUMENTS_A_SHARD = 4096, 16, 100_000, 3_200, 100_000
READERS = {
    "marathon": "Marathon, concatenated",
    "marathon_packed": "Marathon, best fit",
    "marathon_large": "Marathon, 10,000 shards of 1e9 documents",
    "megatron_first": "GPTDataset, first start",
    "megatron": "GPTDataset, indices cached",
    "megatron_documents": "GPTDataset, cached, positions and loss by document",
    "megatron_large_first": "GPTDataset, first start, 1,000 shards of 1e8 documents",
    "megatron_large": "GPTDataset, cached, 1,000 shards of 1e8 documents",
}


def write_corpora(folder: Path) -> None:
    from dataclasses import replace

    import pyarrow as pa

    from data.files import sha256
    from data.manifest import ShardEntry
    from data.packing import build_packing, record_packing
    from data.shards import SUFFIXES, ShardWriter

    rng = np.random.default_rng(0)
    small, large = [], []
    (folder / "small" / "shards").mkdir(parents=True)
    (folder / "large" / "shards").mkdir(parents=True)
    for k in range(8):
        stem = f"shards/{('de', 'fr')[k // 4]}.web.train.{k % 4:05d}"
        lengths = np.clip(rng.lognormal(6, 1.2, DOCUMENTS_A_SHARD), 0, 1e6).astype(np.int64)
        writer = ShardWriter(folder / "small" / stem, 32_000, bos_id=1, eos_id=2)
        rows = pa.table({"id": [f"{k}/{i}" for i in range(len(lengths))], "n_bytes": 4 * lengths})
        writer.add(rows, np.cumsum(lengths), rng.integers(3, 32_000, lengths.sum()))
        writer.close()
        hashes = {suffix: sha256(folder / "small" / (stem + suffix)) for suffix in SUFFIXES}
        counts = writer.n_docs, writer.n_tokens, writer.n_bytes
        small.append(ShardEntry(stem, "web", stem[7:9], "train", ["CC0-1.0"], *counts, hashes))
    for i in range(10_000):
        lang, source = f"l{i // 400:02d}", f"s{i // 67 % 6}"
        stem = f"shards/{lang}.{source}.train.{i:05d}"
        hashes = {suffix: rng.bytes(32).hex() for suffix in SUFFIXES}
        for suffix in SUFFIXES:
            (folder / "large" / (stem + suffix)).hardlink_to(folder / "small" / (small[0].stem + suffix))
        large.append(replace(small[0], stem=stem, source=source, language=lang, sha256=hashes))
    large.sort(key=lambda entry: (entry.language, entry.source, entry.stem))
    _manifest(small).save(folder / "small")
    _manifest(large).save(folder / "large")
    for entry in small:
        build_packing(folder / "small" / entry.stem, SEQ_LEN)
    record_packing(folder / "small", SEQ_LEN)


def _manifest(entries: list[Any]) -> Any:
    from data.manifest import Manifest, TokenizerEntry

    return Manifest(entries, TokenizerEntry(32_000, 1, 2, 0, {"tokenizer.model": ""}), "", {}, {}, [], [], 1, {})


def read_marathon(kind: str, folder: Path) -> dict[str, float]:
    from configs.enums import Packing
    from data.loader import Samples
    from data.order import CYCLE, Phase

    corpus = folder / ("large" if kind == "marathon_large" else "small")
    entries = json.loads((corpus / "manifest.json").read_bytes())["shards"]
    parts = sorted({f"{entry['language']}/{entry['source']}" for entry in entries})
    even, more = divmod(CYCLE, len(parts))
    phase = Phase(0, {part: even + (k < more) for k, part in enumerate(parts)})
    del entries
    packing = Packing.best_fit if kind == "marathon_packed" else Packing.concat
    memory, began = memory_mb(), time.perf_counter()
    samples = Samples(corpus, [phase], SEQ_LEN, 1, packing)
    found = {"start_s": time.perf_counter() - began, "memory_mb": memory_mb() - memory}
    positions = np.random.default_rng(0).integers(0, N_SAMPLES, READ)
    found["one_by_one"] = rate(lambda i: samples[i], positions.tolist())
    found["in_batches"] = BATCH_SEQS * rate(samples.__getitems__, list(positions.reshape(-1, BATCH_SEQS)))
    found["waited_s"] = waited_s(samples)
    return found


def waited_s(samples: Any) -> float:
    import torch

    from data.loader import Portion, batches

    portions, waits = [Portion(64 * step, 64, BATCH_SEQS) for step in range(40)], []
    steps = batches(samples, portions, rank=0, world_size=1, device=torch.device("cpu"))
    for _ in portions:
        began = time.perf_counter()
        next(steps)
        waits.append(time.perf_counter() - began)
        time.sleep(0.05)
    return statistics.median(waits)


def read_megatron(kind: str, folder: Path) -> dict[str, float]:
    import torch.distributed as torch_dist
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from data.shards import Shard

    corpus, cache = folder / ("large" if "large" in kind else "small"), folder / f"cache{'large' in kind}"
    stems = [str(path)[:-4] for path in sorted((corpus / "shards").glob("*.bin"))[:1000]]
    if kind.endswith("first"):
        shutil.rmtree(cache, ignore_errors=True)
        ours, theirs = Shard(Path(stems[0])), IndexedDataset(stems[0])
        assert len(theirs) == ours.n_docs
        assert all(np.array_equal(theirs[row], ours.document(row)) for row in range(0, ours.n_docs, 7))
    torch_dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tempfile.mktemp()}")
    by_document = kind == "megatron_documents"
    memory, began = memory_mb(), time.perf_counter()
    cfg = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ_LEN,
        blend=(stems, [1.0] * len(stems)),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=Tokenizer(),
        reset_position_ids=by_document,
        reset_attention_mask=False,
        eod_mask_loss=by_document,
        create_attention_mask=False,
    )
    samples, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [N_SAMPLES, 0, 0], lambda: True, cfg).build()
    found = {"start_s": time.perf_counter() - began, "memory_mb": memory_mb() - memory}
    positions = np.random.default_rng(0).integers(0, N_SAMPLES, READ)
    found["one_by_one"] = rate(lambda i: samples[i], positions.tolist())
    return found


class Tokenizer:
    eod, pad, vocab_size, unique_identifiers = 2, 0, 32_000, {"class": "Tokenizer"}


def rate(read: Any, places: list[Any]) -> float:
    """Calls a second, once all shards are open and in the page cache."""
    for place in places:
        read(place)
    began = time.perf_counter()
    for place in places:
        read(place)
    return len(places) / (time.perf_counter() - began)


def memory_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="a file system with 2 GB (default: temporary)")
    parser.add_argument("--megatron", type=Path, default=None, help="folder that holds the package megatron")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.reader:
        warnings.simplefilter("ignore")
        read = read_megatron if given.reader.startswith("megatron") else read_marathon
        print(json.dumps(read(given.reader, given.folder)))
        return
    folder = Path(tempfile.mkdtemp(prefix="marathon-loader-", dir=given.folder))
    try:
        write_corpora(folder)
        readers = [reader for reader in READERS if given.megatron or not reader.startswith("megatron")]
        runs = [{reader: run(reader, folder, given.megatron) for reader in readers} for _ in range(given.repeats)]
    finally:
        shutil.rmtree(folder)
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), medians of {given.repeats}\n")
    print("| reader | start, ms | memory, MB | samples/s, one by one | in batches of 16 | M tokens/s | waits, ms |")
    print("|---|---|---|---|---|---|---|")
    for reader in readers:
        median = {key: statistics.median(found[reader][key] for found in runs) for key in runs[0][reader]}
        samples_per_s = [median.get(key, 0) for key in ("one_by_one", "in_batches")]
        cells = [f"{1000 * median['start_s']:,.0f}", f"{median['memory_mb']:,.0f}"]
        cells += [f"{n:,.0f}" if n else "" for n in samples_per_s]
        cells += [f"{max(samples_per_s) * SEQ_LEN / 1e6:,.0f}" if max(samples_per_s) else ""]
        cells += [f"{1000 * median['waited_s']:.2f}" if "waited_s" in median else ""]
        print(f"| {' | '.join([READERS[reader], *cells])} |")


def run(reader: str, folder: Path, megatron: Path | None) -> dict[str, float]:
    # Megatron's package folder may hold other packages too: ours come first.
    path = os.pathsep.join([str(Path(__file__).parents[1]), *([str(megatron)] if megatron else [])])
    command = [sys.executable, "-P", __file__, "--reader", reader, "--folder", str(folder)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
