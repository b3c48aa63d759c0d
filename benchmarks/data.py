"""How fast text becomes tokens on disk: JSON lines to shards, end to end, against two peers in the same run.

    python benchmarks/data.py TEXT [--repeats 5] [--megabytes 100] [--vocabulary 32768] [--folder FOLDER]

TEXT is a folder of JSONL.zst files, as benchmarks/text.py brings them. In turns, each in a process of its own that is
timed from its first line, imports and starting of workers included, with as many workers as there are cores:

  marathon        reading with all checks, cleaned documents on disk, encoding by gigatoken, shards with index,
                  provenance and hashes: all of `marathon data` with a given tokenizer and no optional cleaning
  datatrove       its JsonlReader and DocumentTokenizer, shuffling off
  sentencepiece   a loop of json, encode, tofile

Tokens have to be the same, document by document, in all three; documents with U+2581, which marathon refuses, and
repeated ids are left out. Memory is the largest sum over the process tree, in a run of its own: looking takes time.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

BEGAN = time.perf_counter()
CORES = len(os.sched_getaffinity(0))


def marathon(text: Path, model: Path, out: Path) -> None:
    from configs.text import TasksConfig
    from data.engine import warm_up

    warm_up(TasksConfig())  # as the command does
    from configs.compose import compose
    from configs.enums import SourceFormat
    from configs.text import SourceConfig
    from data.pipeline import prepare

    cfg = compose(["experiment=smoke", f"cluster.scratch={out}", f"tokenizer.path={model / 'tokenizer.model'}"])
    path = f"{text}/*.jsonl.zst"
    cfg.corpus.sources = {"text": SourceConfig(SourceFormat.jsonl, path, "LicenseRef-measured-only", "Debian")}
    cfg.corpus.languages, cfg.corpus.dedup.exact = [], False
    cfg.corpus.holdout.by_field, cfg.corpus.holdout.by_values, cfg.corpus.holdout.share = "", [], 0.03
    prepare(cfg)


def datatrove(text: Path, model: Path, out: Path) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    steps = [
        JsonlReader(str(text), glob_pattern="*.jsonl.zst"),
        DocumentTokenizer(str(out / "tokens"), str(model / "tokenizer.json"), shuffle_documents=False, batch_size=1000),
    ]
    LocalPipelineExecutor(steps, tasks=8 * CORES, workers=CORES, logging_dir=str(out / "logs")).run()


def sentencepiece(text: Path, model: Path, out: Path) -> None:
    from concurrent.futures import ProcessPoolExecutor

    files = sorted(text.glob("*.jsonl.zst"), key=lambda p: -p.stat().st_size)
    with ProcessPoolExecutor(CORES) as pool:
        list(pool.map(_encode_file, files, [model] * len(files), [out] * len(files)))


def _encode_file(path: Path, model: Path, out: Path) -> None:
    import numpy as np
    import sentencepiece
    import zstandard

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    lengths = []
    with zstandard.open(path, "rt", encoding="utf-8") as lines, (out / f"{path.name}.bin").open("wb") as tokens:
        for line in lines:
            ids = np.array(pieces.encode(json.loads(line)["text"]), np.uint16)
            lengths.append(len(ids))
            ids.tofile(tokens)
    np.array(lengths).tofile(out / f"{path.name}.lengths")


def documents_of(who: str, out: Path) -> str:
    """A hash of all documents' tokens, whatever their order."""
    import numpy as np

    digests = []
    if who == "marathon":
        from data.shards import Shard

        for index in out.glob("corpora/*/shards/*.idx"):
            shard = Shard(index.with_suffix(""))
            digests += [hashlib.md5(shard.document(row)[1:-1].tobytes()).digest() for row in range(shard.n_docs)]
    elif who == "datatrove":
        for path in out.glob("tokens/*.ds"):
            tokens = np.fromfile(path, np.uint16)
            ends = np.fromfile(f"{path}.index", np.uint64).astype(np.int64)
            # Its post-processor puts <s> before each document.
            digests += [hashlib.md5(d[1:].tobytes()).digest() for d in np.split(tokens, ends[:-1])]
    else:
        for path in out.glob("*.bin"):
            ends = np.cumsum(np.fromfile(path.with_suffix(".lengths"), np.int64))
            if not len(ends):
                continue
            digests += [hashlib.md5(d.tobytes()).digest() for d in np.split(np.fromfile(path, np.uint16), ends[:-1])]
    return f"{len(digests)} documents, {hashlib.md5(b''.join(sorted(digests))).hexdigest()}"


def measure(who: str, text: Path, model: Path, folder: Path, is_watched: bool = False) -> tuple[float, float, str]:
    """Seconds, MiB at most where that is watched, and what came out."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = [sys.executable, __file__, str(text), "--run", who, "--model", str(model), "--folder", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "LOGURU_LEVEL": "ERROR"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = [0.0]
    if is_watched:
        threading.Thread(target=_watch, args=(process.pid, peak), daemon=True).start()
    said, _ = process.communicate()
    assert process.returncode == 0, f"{who} failed"
    return float(said.split()[-1]), peak[0], documents_of(who, out)


def _watch(pid: int, peak: list[float]) -> None:
    import psutil

    top = psutil.Process(pid)
    while top.is_running() and top.status() != psutil.STATUS_ZOMBIE:
        total = 0
        for process in [top, *top.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        peak[0] = max(peak[0], total / 2**20)
        time.sleep(0.1)


def choose_text(source: Path, folder: Path, megabytes: int) -> tuple[Path, float, int]:
    """A folder with an even sample of the documents, its size in MB and the number of languages."""
    import zstandard

    files = sorted(source.glob("*.jsonl.zst"))
    sizes = {path: sum(len(json.loads(line)["text"].encode()) for line in zstandard.open(path, "rt")) for path in files}
    share = min(1.0, megabytes * 1e6 / sum(sizes.values()))
    chosen, n_bytes, languages, ids = folder / "text", 0, set(), set()
    chosen.mkdir()
    for path in files:
        with zstandard.open(path, "rt") as lines, zstandard.open(chosen / path.name, "wt") as kept:
            for line in lines:
                record = json.loads(line)
                if "\u2581" in record["text"] or record["id"] in ids:
                    continue
                ids.add(record["id"])
                if int.from_bytes(hashlib.md5(record["id"].encode()).digest()[:4]) < share * 2**32:
                    kept.write(line)
                    n_bytes += len(record["text"].encode())
                    languages.add(record["lang"])
    return chosen, n_bytes / 1e6, len(languages)


def train_tokenizer(text: Path, vocabulary: int, folder: Path) -> Path:
    from collections import Counter

    import zstandard

    from configs.text import TokenizerConfig
    from data import tokenizer

    counts: Counter[str] = Counter()
    for path in sorted(text.glob("*.jsonl.zst")):
        for line in zstandard.open(path, "rt"):
            tokenizer.count_words(json.loads(line)["text"], counts)
    tokenizer.export(tokenizer.train(counts, TokenizerConfig(vocab_size=vocabulary)), folder / "model")
    return folder / "model"


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("text", type=Path)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--megabytes", type=int, default=250)
    arguments.add_argument("--vocabulary", type=int, default=32768)
    arguments.add_argument("--folder", type=Path)
    arguments.add_argument("--model", type=Path)
    arguments.add_argument("--run", choices=WHO)
    given = arguments.parse_args()
    if given.run:
        WHO[given.run](given.text, given.model, given.folder)
        print(time.perf_counter() - BEGAN)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        text, megabytes, n_languages = choose_text(given.text, folder, given.megabytes)
        model = given.model or train_tokenizer(text, given.vocabulary, folder)
        print(f"{megabytes:.1f} MB of text in {n_languages} languages, {CORES} cores, {given.vocabulary:,} entries")
        found: dict[str, list[tuple[float, float, str]]] = {who: [] for who in WHO}
        for _ in range(given.repeats):
            for who, runs in found.items():
                runs.append(measure(who, text, model, folder))
        print(found, flush=True)
        assert len({run[2] for runs in found.values() for run in runs}) == 1, found
        ours = statistics.median(run[0] for run in found["marathon"])
        for who, runs in found.items():
            seconds = statistics.median(run[0] for run in runs)
            peak = measure(who, text, model, folder, True)[1]
            print(
                f"{who:<15}{seconds:>8.2f} s {megabytes / seconds:>8.1f} MB/s {peak:>8.0f} MiB"
                f"   marathon is {seconds / ours:.2f} times as fast"
            )
        print(f"the same tokens: {found['marathon'][0][2]}")
        four = folder / "four"
        four.mkdir()
        for path in text.glob("*.jsonl.zst"):
            for i in range(4):
                rename = f"zstd -dcq '{path}' | sed 's/\"id\":\\s*\"/&{i}\\//' | zstd -q -1 -o '{four}/{i}-{path.name}'"
                subprocess.run(rename, shell=True, check=True)
        print(f"marathon with four times the text: {measure('marathon', four, model, folder, True)[1]:.0f} MiB")


WHO = {"marathon": marathon, "datatrove": datatrove, "sentencepiece": sentencepiece}

if __name__ == "__main__":
    main()
