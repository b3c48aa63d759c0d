"""Listing and tab completion, in a real shell."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from marathon.choices import COMMANDS, complete_words, completion_script, list_choices
from marathon.cli import COMMANDS as RUNNABLE


def test_every_command_can_be_completed():
    assert {name for name in RUNNABLE if not name.startswith("_")} == set(COMMANDS)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([""], "train"),
        (["rel"], "release"),
        (["train", "exp"], "experiment="),
        (["train", "experiment=sm"], "experiment=smoke"),
        (["train", "cluster=l"], "cluster=lumi"),
        (["train", "model.n_kv"], "model.n_kv_head="),
        (["train", "corpus.holdout.s"], "corpus.holdout.share="),
    ],
)
def test_what_may_follow(words, found):
    assert found in complete_words(words)


def test_bash_completes_values_behind_the_equals_sign(tmp_path):
    shim = tmp_path / "marathon"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m marathon.cli "$@"\n')
    shim.chmod(0o755)
    script = f"""PATH={tmp_path}:$PATH
{completion_script("bash")}
COMP_LINE='marathon train experiment=sm'; COMP_POINT=${{#COMP_LINE}}
COMP_WORDS=(marathon train experiment = sm); COMP_CWORD=4
_marathon; echo "${{COMPREPLY[@]}}"
"""
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "smoke", told.stderr


def test_an_unknown_shell_is_refused():
    with pytest.raises(UserError, match="bash, zsh"):
        completion_script("csh")


def test_every_file_of_every_group_is_listed_with_its_line():
    listed = list_choices()
    for path in (Path(__file__).resolve().parents[2] / "configs").glob("*/*.yaml"):
        line = next(line for line in listed.splitlines() if line.split() and line.split()[0] == path.stem)
        assert len(line.split()) > 3
