"""A run begins on a Slurm of LUMI's shape, is moved, and ends on one of LEONARDO's; draws docs/move.svg.

    python benchmarks/move.py [--draw docs/move.svg]      as root, on Debian; about five minutes on two cores

8 ranks under ZeRO-1 there, 4 under ZeRO-2 here, and beside it the same run on two processes that nobody moves. The
hash over consumed samples has to be equal, and the losses are compared step by step.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from model.weights import list_checkpoints, read_manifest
from tests.cluster.conftest import CHECKOUT, SMALL, environment
from tests.cluster.rig import ACCOUNT, LEONARDO, LUMI, Rig

STEPS = 40
SETTINGS = (
    *SMALL,
    "name=moved",
    "suite=bpb",
    f"train.tokens={STEPS * 4096}",
    "train.log_every_steps=1",
    "train.save_every_steps=10",
    "train.validate_every_steps=40",
)


def marathon(scratch: Path, *arguments: str) -> None:
    told = {**os.environ, "MARATHON_SCRATCH": str(scratch), "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-m", "marathon.cli", *arguments], env=told, check=True, cwd=CHECKOUT)


def hop(lumi: Rig, leonardo: Rig) -> Path:
    """Runs, stops, moves and ends the run; returns its folder on the second machine."""
    there, here = (rig.root / "scratch" for rig in (lumi, leonardo))
    script = str(CHECKOUT / "slurm/lumi.sh")
    job = lumi.submit(f"--account={ACCOUNT}", "--time=60", script, *SETTINGS, **environment(lumi))
    lumi.wait_for("the middle of the run", lambda: len(losses(there / "runs/moved")) >= STEPS // 2 - 4, 600)
    lumi.run("scancel", job)
    lumi.wait_until_ended(job, timeout_s=120)
    marathon(there, "move", "moved", "--to", str(here))
    script = str(CHECKOUT / "slurm/leonardo.sh")
    arguments = (*SETTINGS, "engine.zero_stage=2")
    job = leonardo.submit(f"--account={ACCOUNT}", "--time=60", script, *arguments, **environment(leonardo))
    leonardo.wait_until_ended(job, timeout_s=600)
    return here / "runs/moved"


def losses(run: Path) -> dict[int, float]:
    """Loss of each step; what was repeated after a restart counts as it was the last time."""
    metrics = run / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def draw(path: Path, moved: dict[int, float], whole: dict[int, float], hop_at: int) -> None:
    width, height, left, bottom = 720, 260, 44, 34
    low, high = min(whole.values()) - 0.2, max(whole.values()) + 0.2

    def place(step: float, loss: float) -> str:
        x = left + (width - left - 8) * step / STEPS
        return f"{x:.1f},{8 + (height - bottom - 8) * (high - loss) / (high - low):.1f}"

    def curve(points: dict[int, float], style: str) -> str:
        return f'<polyline points="{" ".join(place(*p) for p in sorted(points.items()))}" fill="none" {style}/>'

    ticks = "".join(
        f'<text x="{left - 6}" y="{place(0, loss).split(",")[1]}" text-anchor="end" dy="4">{loss}</text>'
        for loss in range(math.ceil(low), math.floor(high) + 1)
    ) + "".join(
        f'<text x="{place(step, low).split(",")[0]}" y="{height - bottom + 18}" text-anchor="middle">{step}</text>'
        for step in range(0, STEPS + 1, 10)
    )
    middle = place(hop_at, low).split(",")[0]
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" fill="#555" role="img">'
        f"<title>Loss of a run that was moved at step {hop_at}, and of one that was not</title>"
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
        f'<path d="M{left} 8V{height - bottom}H{width - 8}" fill="none" stroke="#999"/>{ticks}'
        f'<path d="M{middle} 8V{height - bottom}" stroke="#999" stroke-dasharray="3 4"/>'
        f'<text x="{float(middle) - 8}" y="22" text-anchor="end">LUMI: 8 ranks, ZeRO-1</text>'
        f'<text x="{float(middle) + 8}" y="22">LEONARDO: 4 ranks, ZeRO-2</text>'
        f'<text x="{width - 8}" y="{height - 4}" text-anchor="end">step</text>'
        f'<text x="{left + 8}" y="{height - bottom - 10}">loss, nats a token; thin: not moved</text>'
        + curve({s: v for s, v in moved.items() if s <= hop_at}, 'stroke="#c2410c" stroke-width="4" opacity="0.55"')
        + curve({s: v for s, v in moved.items() if s >= hop_at}, 'stroke="#1d4ed8" stroke-width="4" opacity="0.55"')
        + curve(whole, 'stroke="#111" stroke-width="1"')
        + "</svg>\n",
        encoding="utf-8",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=Path, default=None)
    given = parser.parse_args()
    subprocess.run([CHECKOUT / "tests/cluster/install.sh"], check=True, stdout=subprocess.DEVNULL)
    lumi, leonardo, began = Rig(LUMI), Rig(LEONARDO), time.monotonic()
    try:
        lumi.start()
        leonardo.start()
        run = hop(lumi, leonardo)
        alone = lumi.root / "alone"
        for stage in ("data", "train"):
            marathon(alone, stage, *SETTINGS)
        ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
        starts = [(r["cluster"], r["world_size"], r["step"]) for r in ledger if r["event"] == "train_start"]
        found, expected = (read_manifest(list_checkpoints(r)[-1])["progress"] for r in (run, alone / "runs/moved"))
        moved, whole = losses(run), losses(alone / "runs/moved")
        off = {step: abs(moved.get(step, 0) / whole[step] - 1) for step in whole}
        early = max(off[step] for step in off if step <= 20)
        hops = [record["event"] for record in ledger if record["event"] in ("moved", "arrived")]
        print(f"starts (cluster, ranks, step): {starts}; the ledger tells: {', '.join(hops)}")
        # What is summed in another order differs in its last bits, and training lets that grow.
        print(f"loss differs by {early:.1e} at most over 20 steps, by {max(off.values()):.1e} over {len(off)}")
        print(f"{time.monotonic() - began:.0f} s")
        same = all(found[key] == expected[key] for key in ("step", "order_hash", "consumed"))
        print(f"step, sample hash {found['order_hash']} and tokens by language {'equal' if same else 'DIFFER'}")
        if given.draw:
            draw(given.draw, moved, whole, starts[-1][2])
        return 0 if same and early < 1e-5 and max(off.values()) < 1e-2 else 1
    finally:
        lumi.stop()
        leonardo.stop()


if __name__ == "__main__":
    sys.exit(main())
