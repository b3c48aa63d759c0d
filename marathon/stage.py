"""One process of one stage: `python -m marathon.stage STAGE RUN`, started once by the machine or once a device.

Job scripts and the `marathon` command start stages in this one way, so a run is the same wherever it runs.
"""

import errno
import json
import os
import platform
import sys
import traceback
from pathlib import Path

from configs.compose import load
from configs.errors import EXIT_MISTAKE, EXIT_UNFINISHED, UserError
from configs.schema import RunConfig
from data.files import write_whole
from ledger.record import Ledger
from marathon.choices import commands
from marathon.stages import inputs_of, is_done, mark_done, note_start, prepared_corpus

DISK_TROUBLE = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room in your quota (lfs quota, saldo, lumi-workspaces)",
    errno.EROFS: "have the file system made writable",
}
"""What only a person can mend, and how; any other failure of a file system may pass with a new start."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a stage unless it is done; returns the exit status."""
    stage, run = sys.argv[1:] if arguments is None else arguments
    run_dir, is_first = Path(run), _rank() == 0
    try:
        cfg = load(run_dir / "config.yaml")
        inputs = inputs_of(stage, cfg, run_dir)
        if is_done(stage, inputs, run_dir):
            if is_first:
                print(f"{stage}: complete, skipped", flush=True)
            return 0
        if is_first:
            print(f"{stage}: {commands()[stage]['line']}", flush=True)
            note_start(stage, run_dir)
        status = RUN_STAGE[stage](cfg, run_dir)
        if is_first and status == 0:
            mark_done(stage, inputs, run_dir, OUTPUTS[stage](cfg, run_dir))
        if is_first:
            _write_report(run_dir)
        return status
    except (UserError, OSError) as error:
        mistake = error if isinstance(error, UserError) else _disk_trouble(error, run_dir)
        # The first rank tells it whole; of the others a line each, since the error may be theirs alone.
        told = f"error in {stage}: {mistake}" if is_first else f"[rank {_rank()}] {mistake.found}"
        print(told, file=sys.stderr, flush=True)
        return EXIT_MISTAKE


def _disk_trouble(error: OSError, run_dir: Path) -> UserError:
    """What a person can mend; any other failure is raised again."""
    if error.errno not in DISK_TROUBLE:
        raise error
    return UserError(
        f"{error.filename or run_dir}: {error.strerror}",
        f"a run writes under {run_dir}; what it has saved is whole",
        DISK_TROUBLE[error.errno] + ", then start the same line again",
    )


def run_data(cfg: RunConfig, run_dir: Path) -> int:
    """Prepares the corpus and tells the ledger what it holds."""
    from data.manifest import Manifest
    from data.pipeline import prepare

    corpus_dir = prepare(cfg)
    if corpus_dir is None:
        return EXIT_UNFINISHED
    Ledger(run_dir).append("corpus", path=str(corpus_dir), **Manifest.load(corpus_dir).facts())
    return 0


def run_train(cfg: RunConfig, run_dir: Path) -> int:
    """Trains as one rank."""
    _tell_rank(run_dir)
    from train.run import run

    return run(cfg, run_dir, prepared_corpus(run_dir)["path"])


def run_eval(cfg: RunConfig, run_dir: Path) -> int:
    """Evaluates every checkpoint as one rank."""
    from data.heldout import ValidDocuments
    from eval.run import evaluate

    corpus = prepared_corpus(run_dir)
    documents, tokenizer_dir = ValidDocuments(corpus["path"]).read_all(), corpus["path"] / "tokenizer"
    evaluate(cfg, run_dir, documents=documents, tokenizer_dir=tokenizer_dir, corpus_hash=corpus["corpus_hash"])
    return 0


def run_release(cfg: RunConfig, run_dir: Path) -> int:
    """Exports and verifies the last checkpoint."""
    from release.run import release

    release(cfg, run_dir, prepared_corpus(run_dir)["path"])
    return 0


RUN_STAGE = {"data": run_data, "train": run_train, "eval": run_eval, "release": run_release}

OUTPUTS = {
    "data": lambda cfg, run_dir: [prepared_corpus(run_dir)["path"] / "manifest.json"],
    "train": lambda cfg, run_dir: [run_dir / "checkpoints" / f"step-{cfg.train.steps:09d}" / "manifest.json"],
    "eval": lambda cfg, run_dir: sorted((run_dir / "eval").glob("step-*.json")),
    "release": lambda cfg, run_dir: [run_dir / "release" / "verified.json"],
}
"""What has to be there for a stage to count as done."""


def _rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def _tell_rank(run_dir: Path) -> None:
    """Leaves what this rank was given, for whoever has to find out why one of many behaves unlike the others."""
    facts = {
        "rank": _rank(),
        "local_rank": int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0),
        "world_size": int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1),
        "host": os.environ.get("SLURMD_NODENAME") or platform.node(),
        "master_addr": os.environ.get("MASTER_ADDR"),
        "master_port": os.environ.get("MASTER_PORT"),
        "cpu_bind_list": os.environ.get("SLURM_CPU_BIND_LIST"),
        "cores": sorted(os.sched_getaffinity(0)),
    }
    write_whole(run_dir / "logs" / f"rank-{facts['rank']}.json", json.dumps(facts) + "\n")


def _write_report(run_dir: Path) -> None:
    """The page is a rendering of the run: that it cannot be drawn must not fail what it is about."""
    from marathon.report import write_report

    try:
        write_report(run_dir)
    except Exception:
        print(f"the report could not be written:\n{traceback.format_exc()}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
