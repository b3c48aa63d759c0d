"""Listing and tab completion, in a real shell."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from marathon.choices import commands, complete_words, completion_script, help_text, list_choices
from marathon.cli import COMMANDS, main


def test_every_command_is_told_of_and_can_be_completed():
    assert {name for name in COMMANDS if not name.startswith("_")} == commands().keys()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([""], "train"),
        (["rel"], "release"),
        (["train", "exp"], "experiment="),
        (["train", "experiment=sm"], "experiment=smoke"),
        (["train", "cluster=l"], "cluster=lumi"),
        (["train", "corpus/clean=w"], "corpus/clean=web"),
        (["train", "model.n_kv"], "model.n_kv_head="),
        (["train", "corpus.holdout.s"], "corpus.holdout.share="),
    ],
)
def test_what_may_follow(words, found):
    assert found in complete_words(words)


def test_names_of_runs_are_offered_where_a_command_takes_one(tmp_path, monkeypatch):
    monkeypatch.setenv("MARATHON_SCRATCH", str(tmp_path))
    for name in ("finnish", "finnish-2", "german"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    (tmp_path / "runs" / "half").mkdir()
    assert complete_words(["move", ""]) == ["finnish", "finnish-2", "german"]
    assert complete_words(["move", "fin"]) == complete_words(["report", "fin"]) == ["finnish", "finnish-2"]
    assert complete_words(["move", "german", ""]) == ["--to"]
    assert complete_words(["move", "german", "--to", ""]) == []
    assert complete_words(["report", "exp"]) == ["experiment="]
    assert complete_words(["configs", ""]) == complete_words(["no-command", ""]) == []
    assert complete_words(["completion", ""]) == ["bash", "zsh"]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("marathon train experiment=sm", "smoke"),
        ("marathon train experiment=smoke engine.zer", "engine.zero_stage="),
        ("marathon mo", "move"),
        ("marathon move s3://bucket/pack ", "--to"),
    ],
)
def test_bash_completes_the_word_at_the_cursor(tmp_path, line, offered):
    """Behind the equals sign only what stands behind it; and though readline takes a URL apart."""
    shim = tmp_path / "marathon"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m marathon.cli "$@"\n')
    shim.chmod(0o755)
    script = f"""PATH={tmp_path}:$PATH
compopt() {{ :; }}
{completion_script("bash")}
COMP_LINE='{line} and more'; COMP_POINT={len(line)}
_marathon; echo "${{COMPREPLY[@]}}"
"""
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == offered, told.stderr


@pytest.mark.parametrize("command", commands())
def test_help_of_a_command_tells_what_it_takes_and_an_example(command, capsys):
    assert main([command, "--help"]) == main(["help", command]) == 0
    first, again = capsys.readouterr().out.split(f"marathon {command}: ")[1:]
    assert first == again
    assert f"usage: marathon {command}" in first
    assert "example: " in first and f"marathon {command}" in first.split("example: ")[1]
    assert first.splitlines()[0] in help_text()


def test_an_unknown_shell_is_refused():
    with pytest.raises(UserError, match="bash, zsh"):
        completion_script("csh")


def test_every_file_of_every_group_is_listed_with_its_line():
    listed = list_choices()
    for path in (Path(__file__).resolve().parents[2] / "configs").glob("*/**/*.yaml"):
        line = next(line for line in listed.splitlines() if line.split() and line.split()[0] == path.stem)
        assert len(line.split()) > 3
    assert "\ncorpus/clean\n  none " in listed
