"""A bar on a real terminal, plain lines in a pipe."""

import os
import pty
import subprocess
import sys

COUNT = """
from ledger.progress import Progress
with Progress("reading", "documents", {total}) as progress:
    for n in range(3):
        progress.advance(2)
        progress.say(f"line {{n}}")
"""


def test_a_pipe_gets_plain_lines():
    told = subprocess.run([sys.executable, "-c", COUNT.format(total=None)], capture_output=True, text=True, check=True)
    assert told.stdout == "line 0\nline 1\nline 2\nreading: 6 documents\n"


def test_a_terminal_gets_a_bar_and_the_same_lines():
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", COUNT.format(total=6)], stdout=terminal, env={**os.environ, "TERM": "xterm-256color"}
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(controller, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0
    text = shown.decode()
    assert all(f"line {n}" in text for n in range(3))
    assert "6/6" in text
    assert "\x1b[" in text


def test_a_silent_rank_says_nothing():
    code = COUNT.replace("{total})", "None, shown=False)").replace("{{", "{").replace("}}", "}")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == ""
