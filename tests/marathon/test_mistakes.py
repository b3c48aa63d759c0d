"""Mistakes with files, by the command: one message with value, rule and repair, no traceback, status not 0."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from configs.errors import UserError
from marathon.stages import open_run

SAMPLE = Path(__file__).resolve().parents[2] / "data/samples/udhr-europe.jsonl.zst"


def run(*arguments, scratch):
    environment = {**os.environ, "MARATHON_SCRATCH": str(scratch)}
    return subprocess.run(
        [sys.executable, "-m", "marathon.cli", *arguments], env=environment, capture_output=True, text=True, check=False
    )


def assert_one_message(told, *said):
    text = told.stdout + told.stderr
    assert told.returncode != 0
    assert "Traceback" not in text
    assert len(re.findall(r"^error", text, re.MULTILINE)) == 1, text
    for part in (*said, "rule:", "repair:"):
        assert part in text


def damaged(path):
    whole = SAMPLE.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def flipped(path):
    whole = bytearray(SAMPLE.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(bytes(whole))


def empty(path):
    path.write_bytes(zstandard.compress(b""))


def other_languages(path):
    path.write_bytes(zstandard.compress(b'{"id": "1", "lang": "tr", "article": 4, "text": "merhaba"}\n'))


@pytest.mark.parametrize("make", [damaged, flipped, empty, other_languages])
def test_a_bad_file_is_named(tmp_path, make):
    path = tmp_path / "text.jsonl.zst"
    make(path)
    told = run("data", "experiment=smoke", f"corpus.sources.udhr.path={path}", scratch=tmp_path / "scratch")
    assert_one_message(told)
    if make in (damaged, flipped):
        assert str(path) in told.stdout + told.stderr
    assert not list((tmp_path / "scratch").glob("corpora/*/manifest.json"))


def test_a_missing_file_is_named(tmp_path):
    told = run("run", "experiment=smoke", "corpus.sources.udhr.path=/nowhere/x.jsonl", scratch=tmp_path)
    assert_one_message(told, "/nowhere/x.jsonl")


def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    """Rights do not bind root; the kernel's own file system lets nobody make a folder."""
    told = run("data", "experiment=smoke", scratch="/sys/marathon")
    assert_one_message(told, "cannot be written", "MARATHON_SCRATCH")


@pytest.mark.parametrize("mistake", ["+model.typo=1", "model.n_head=7", "corpus=nope", "model.n_head"])
def test_a_wrong_setting_is_named(tmp_path, mistake):
    assert_one_message(
        run("train", "experiment=smoke", mistake, scratch=tmp_path), mistake.strip("+").split("=")[0].split(".")[-1]
    )


def test_an_unknown_command_is_answered_with_those_there_are(tmp_path):
    assert_one_message(run("trian", scratch=tmp_path), "train")


@pytest.mark.parametrize(
    ("override", "told"),
    [("train.tokens=204800", "train.tokens=409600 or more"), ("optim.lr=1e-5", "these settings differ from theirs")],
)
def test_a_start_that_is_refused_leaves_the_settings_of_the_run(tmp_path, monkeypatch, override, told):
    monkeypatch.setenv("MARATHON_SCRATCH", str(tmp_path))
    _, run_dir = open_run(["experiment=smoke"])
    (run_dir / "checkpoints" / "step-000000100").mkdir(parents=True)
    before = [(run_dir / name).read_bytes() for name in ("config.yaml", "ledger.jsonl")]
    with pytest.raises(UserError, match=re.escape(told)):
        open_run(["experiment=smoke", override])
    assert [(run_dir / name).read_bytes() for name in ("config.yaml", "ledger.jsonl")] == before


def test_a_checkpoint_that_is_not_there_is_told_before_there_is_a_corpus(tmp_path):
    told = run("run", "experiment=smoke", "train.begin_from=gone/checkpoints/step-000000008", scratch=tmp_path)
    assert_one_message(told, "gone/checkpoints/step-000000008", "cannot be read")
    assert not list(tmp_path.glob("corpora"))


@pytest.mark.parametrize(("done", "is_told"), [(80, False), (100, True)])
def test_a_rate_that_would_rise_again_is_told(tmp_path, monkeypatch, capsys, done, is_told):
    """The smoke run stays at its peak until step 80 of 100."""
    monkeypatch.setenv("MARATHON_SCRATCH", str(tmp_path))
    _, run_dir = open_run(["experiment=smoke"])
    (run_dir / "checkpoints" / f"step-{done:09d}").mkdir(parents=True)
    open_run(["experiment=smoke", "train.tokens=819_200"])
    assert ("rises again" in capsys.readouterr().err) is is_told
