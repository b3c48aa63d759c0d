"""How much of ordinary text is taken for personal data, what it is, and how fast that goes.

    python -P benchmarks/privacy.py FOLDER [--sample 30] [--kinds email phone]

Reads every .jsonl.zst in the folder (benchmarks/text.py brings some), prints items for each kind and MB, the speed on
one core, and a sample of each kind with what stands around it: whether it is right is for a reader to say.
"""

import argparse
import random
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import orjson

from data.files import read_lines
from data.privacy import TOKENS, find_items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sample", type=int, default=30)
    parser.add_argument("--kinds", nargs="+", default=list(TOKENS), choices=list(TOKENS))
    args = parser.parse_args()
    found, n_bytes, seconds = defaultdict(list), 0, 0.0
    for path in sorted(args.folder.glob("*.jsonl.zst")):
        texts = [orjson.loads(line)["text"] for line in read_lines(path)]
        n_bytes += sum(len(text.encode()) for text in texts)
        began = time.perf_counter()
        items = [find_items(text, args.kinds) for text in texts]
        seconds += time.perf_counter() - began
        for text, items_of_text in zip(texts, items, strict=True):
            for start, end, kind in items_of_text:
                found[kind].append(
                    f"{path.name:32} …{text[max(start - 50, 0) : start]}⟦{text[start:end]}⟧{text[end : end + 20]}…"
                )
    print(f"{n_bytes / 1e6:.1f} MB at {n_bytes / 1e6 / seconds:.1f} MB/s on one core")
    for kind in args.kinds:
        print(f"\n{kind}: {len(found[kind])} items, {len(found[kind]) / n_bytes * 1e6:.2f} a MB")
        for line in sorted(random.Random(0).sample(found[kind], min(args.sample, len(found[kind])))):
            print("   ", line.replace("\n", "⏎"))


if __name__ == "__main__":
    main()
