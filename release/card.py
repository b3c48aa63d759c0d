"""The model card: a rendering of the ledger, the corpus manifest and the evaluations; card.md.j2 has its words."""

from pathlib import Path

from configs.schema import RunConfig
from eval.results import read_results
from ledger.pages import render
from ledger.record import Ledger


def write_card(cfg: RunConfig, run_dir: Path, checkpoint_sha256: str, folder: Path) -> None:
    """Writes README.md with its YAML head into a release folder."""
    last, evaluations = Ledger(run_dir).last, read_results(run_dir)
    page = render(
        Path(__file__).with_name("card.md.j2"),
        cfg=cfg,
        corpus=last("corpus") or {},
        start=last("train_start") or {},
        end=last("train_end") or {},
        checkpoint=last("checkpoint") or {},
        checkpoint_sha256=checkpoint_sha256,
        evaluation=evaluations[-1] if evaluations else None,
    )
    (folder / "README.md").write_text(page, encoding="utf-8")
