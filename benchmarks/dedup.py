"""What the search for copies costs: MinHash beside other ways on the same text, and memory of the search by its size.

    python -P benchmarks/dedup.py FOLDER [--documents 60000] [--repeats 5]      FOLDER as benchmarks/text.py leaves it

Every way goes from texts to 14 bands of 8 rows over word 5-grams, one thread, in turns; figures are medians. rensa is
met twice, with shingles as sets of strings, and over our hashes of shingles, which is as fast as it could be here. For
datatrove its own normalisation and signatures; words are split at spaces, since its tokenizers need more packages.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import xxhash

from data import dedup, minhash
from data.decontaminate import Item, Ngrams
from data.files import read_lines

SOURCES = ("descriptions.da", "descriptions.it", "descriptions.fr")
Ways = dict[str, Callable[[list[str]], Any]]


def ours(texts: list[str]) -> Any:
    return minhash.text_hashes(texts, near=True)[2:]


def by_rensa_over_sets(texts: list[str]) -> Any:
    import rensa

    words = [minhash.normalise(text).split() for text in texts]
    sets = [{" ".join(w[i : i + 5]) for i in range(max(len(w) - 4, 1))} for w in words]
    return folded(rensa.RMinHash.digest_matrix_from_token_sets(sets, 112, 1).to_rows())


def by_rensa_over_our_shingles(texts: list[str]) -> Any:
    import rensa

    found, minima = [], minhash._minima

    def instead(shingles: Any, begins: Any) -> Any:
        offsets = np.append(begins, len(shingles)).astype(np.uint64)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, 112, 1)
        return np.array(matrix.to_rows(), np.uint64).T

    minhash._minima = instead
    try:
        found.append(ours(texts))
    finally:
        minhash._minima = minima
    return found[0]


def by_datatrove(texts: list[str]) -> Any:
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.text import simplify_text

    step = object.__new__(MinhashDedupSignature)  # without its tokenizer
    step.config, step._parameters, step.num_hashes = MinhashConfig(), None, 112
    rows = []
    for text in texts:
        words = simplify_text(text).split()
        shingles = [xxhash.xxh64_intdigest(" ".join(words[i : i + 5]).encode()) for i in range(max(len(words) - 4, 1))]
        rows.append(np.concatenate(step.get_signature(np.array(shingles, np.uint64).reshape(-1, 1))))
    return folded(rows)


def folded(rows: list[Any]) -> Any:
    minima = np.array(rows, np.uint64).T.reshape(14, 8, -1)
    return minhash._chain(minima[:, row] for row in range(8))


def exactly(texts: list[str]) -> Any:
    return minhash.text_hashes(texts, near=False)


WAYS: Ways = {
    "Marathon": ours,
    "rensa over our shingles": by_rensa_over_our_shingles,
    "rensa over sets of strings": by_rensa_over_sets,
    "datatrove": by_datatrove,
}


def n_met(bands: Any) -> int:
    """Documents that share a band with another one."""
    is_met = np.zeros(bands.shape[1], bool)
    for band in bands:
        _, inverse, counts = np.unique(band, return_inverse=True, return_counts=True)
        is_met |= counts[inverse] > 1
    return int(is_met.sum())


def read_texts(folder: Path, n: int) -> list[str]:
    texts = []
    for source in SOURCES:
        lines = read_lines(folder / f"{source}.jsonl.zst")
        texts += [json.loads(line)["text"] for line, _ in zip(lines, range(n // len(SOURCES)), strict=False)]
    return texts


def compare(texts: list[str], repeats: int, arguments: list[str]) -> None:
    ngrams = Ngrams([Item(str(i), text) for i, text in enumerate(texts[::20])], 13)
    ways = {
        **WAYS,
        "exact hashes alone": exactly,
        f"13-grams of {len(texts[::20]):,} items": lambda t: ngrams.match(t, 0),
    }
    mb = sum(len(text.encode()) for text in texts) / 1e6
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way(texts)
            seconds[name].append(time.perf_counter() - start)
    print(
        f"\n{len(texts):,} documents, {mb:.1f} MB\n\n| way | MB/s | documents/s | documents met | memory above text |"
    )
    print("|---|---|---|---|---|")
    for name, taken in seconds.items():
        median, rest = statistics.median(taken), "| – | – |"
        if name in WAYS:
            rest = f"| {n_met(WAYS[name](texts)):,} | {measured('--memory-of', name, *arguments)} MB |"
        print(f"| {name} | {mb / median:.1f} | {len(texts) / median:,.0f} {rest}", flush=True)


def measured(*arguments: str) -> str:
    """What this program prints when started anew."""
    command = [sys.executable, "-P", __file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def mb_above(way: Callable[[], Any]) -> float:
    """How much the resident memory rises at most, files that are mapped included."""

    def resident(line: str) -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(next(entry.split()[1] for entry in status.splitlines() if entry.startswith(line)))

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is now what is resident
    before = resident("VmRSS")
    way()
    return (resident("VmHWM") - before) / 1024


def search(folder: Path) -> None:
    dedup.ROWS_AT_ONCE = 1 << 18
    n: list[int] = []
    start = time.perf_counter()
    files = sorted(folder.glob("*.npy"))
    mb = mb_above(lambda: n.extend(len(c.exact) + len(c.near) for _, c in dedup.find_copies(files, {})))
    print(f"{time.perf_counter() - start:.1f} s | {mb:.0f} MB | {sum(n):,}")


def search_by_size() -> None:
    print("\n| documents | hashes on disk | time | memory | left out |\n|---|---|---|---|---|")
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        for first, end in ((0, 10), (10, 40)):
            for number in range(first, end):
                hashes = rng.integers(0, 2**64, (19, 100_000), np.uint64)
                hashes[5:, :20_000] = hashes[5:, 20_000:40_000]  # a fifth are near copies
                dedup.write_columns(Path(folder) / f"{number:02d}.npy", [hashes])
            n_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
            print(f"| {end * 100_000:,} | {n_bytes / 1e6:.0f} MB | {measured('--search', folder)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=60_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--search", action="store_true", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.search:
        search(told.folder)
        return
    texts = read_texts(told.folder, told.documents)
    if told.memory_of:
        WAYS[told.memory_of](texts[:10])  # what is loaded and made once is none of a way's memory
        print(f"{mb_above(lambda: WAYS[told.memory_of](texts)):.0f}")
        return
    compare(texts, told.repeats, [str(told.folder), "--documents", str(told.documents)])
    search_by_size()


if __name__ == "__main__":
    main()
