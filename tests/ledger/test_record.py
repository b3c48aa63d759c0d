"""The ledger under kills and repeated writes."""

import json
import os
import signal
import subprocess
import sys
import time

from hypothesis import given
from hypothesis import strategies as st

from ledger import host
from ledger.record import Ledger, gap

WRITER = """
import sys
from pathlib import Path
from ledger.record import Ledger
ledger = Ledger(Path(sys.argv[1]))
n = 0
while True:
    ledger.append("tick", n=n, filler="x" * 5000)
    n += 1
"""


def test_what_was_appended_is_read_in_order(tmp_path):
    ledger = Ledger(tmp_path / "run")
    assert list(ledger.read()) == []
    for n in range(3):
        ledger.append("a", n=n)
    ledger.append("b", text="ñ")
    assert [record["n"] for record in ledger.read("a")] == [0, 1, 2]
    assert ledger.last("a")["n"] == 2
    assert ledger.last("a", n=1)["n"] == 1
    assert ledger.last("a", n=7) is None
    assert ledger.last("b")["text"] == "ñ"


def test_a_killed_writer_loses_no_finished_record(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    while not (tmp_path / "ledger.jsonl").exists() or (tmp_path / "ledger.jsonl").stat().st_size < 50_000:
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    ledger = Ledger(tmp_path)
    numbers = [record["n"] for record in ledger.read("tick")]
    assert numbers == list(range(len(numbers)))
    ledger.append("after")
    assert ledger.last("after") is not None
    assert [record["n"] for record in ledger.read("tick")] == numbers


@given(cut=st.integers(1, 60))
def test_a_half_written_line_is_passed_over_and_not_glued_to_the_next(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("ledger")
    ledger = Ledger(folder)
    ledger.append("first", n=1)
    ledger.append("second", n=2, filler="y" * 40)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[:-cut])
    ledger.append("third", n=3)
    events = [record["event"] for record in ledger.read()]
    assert events[0] == "first"
    assert events[-1] == "third"
    assert len(ledger.path.read_bytes().splitlines()) in (2, 3)


def test_host_facts_are_json_and_never_blank():
    facts = {**host.software(), **host.hardware(), "commit": host.commit(), "container": host.container()}
    assert json.loads(json.dumps(facts)) == facts
    assert all(value not in ("", None) for value in facts.values())
    assert facts["torch"].startswith("2.")
    assert gap("why") == "GAP: why"
