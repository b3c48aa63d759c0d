"""A recipe for hundreds of devices, rehearsed on two: its layout really trains."""

from configs.compose import compose
from ledger.record import Ledger
from tests.train.ranks import run_ranks
from tests.train.runs import losses, one_rank


def test_the_8b_recipe_trains_in_its_layout(tmp_path, corpus):
    """ZeRO-2, bf16, selective recomputation, 4 micro batches a step; uncompiled, which would take a minute."""
    fewer = "engine.compile=false", "train.tokens=8192", "train.seq_len=64", "train.tokens_per_step=1024"
    # The ranks of tests are daemons, which may not have workers.
    quick = "schedule.warmup_steps=1", "train.validate_every_steps=100", "train.loader_workers=0"
    cfg = compose(["experiment=eu24_8b", "rehearse=true", *fewer, *quick])
    (tmp_path / "logs").mkdir()
    told = run_ranks(one_rank, 2, cfg, tmp_path, corpus, ())
    assert told.status == 0, told.text
    ledger, found = Ledger(tmp_path), losses(tmp_path)
    layout = ledger.last("self_test")["layout"]
    assert (layout["zero_stage"], layout["precision"], layout["accumulation_steps"]) == (2, "bf16", 4)
    assert ledger.last("self_test")["passed"]
    assert len(found) == 8 and found[8] < found[1] - 0.1
