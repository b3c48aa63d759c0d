import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.text import TasksConfig
from data.engine import Step, run_here


class Files:
    """A step whose units each leave a file with the pid of who made it."""

    def __init__(self, folder: Path, n: int, bad: str = "", deadly: str = "", seconds: float = 0.0) -> None:
        self.folder, self.n, self.bad, self.deadly, self.seconds = folder, n, bad, deadly, seconds

    def units(self) -> list[str]:
        return [f"{i:02d}" for i in range(self.n)]

    def is_done(self, unit: str) -> bool:
        return (self.folder / unit).exists()

    def run(self, unit: str) -> None:
        time.sleep(self.seconds)
        if unit == self.bad:
            raise UserError(f"unit {unit}", "units are good", "mend it")
        if unit == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        (self.folder / unit).write_text(str(os.getpid()))

    @property
    def step(self) -> Step:
        return Step("files", self.units, self.is_done, self.run)


@pytest.mark.parametrize("workers", [1, 3])
def test_each_unit_is_done_once_and_only_those_that_lack(tmp_path: Path, workers: int) -> None:
    files = Files(tmp_path / "out", 12)
    files.folder.mkdir()
    (files.folder / "05").write_text("before")
    run_here([files.step], TasksConfig(workers=workers))
    made = {unit: (files.folder / unit).read_text() for unit in files.units()}
    assert made.pop("05") == "before"
    assert len(set(made.values())) == workers
    assert (str(os.getpid()) in made.values()) == (workers == 1)


def test_what_a_worker_finds_wrong_is_told_whole_and_what_is_done_stays(tmp_path: Path) -> None:
    files = Files(tmp_path / "out", 12, bad="07")
    files.folder.mkdir()
    with pytest.raises(UserError) as error:
        run_here([files.step], TasksConfig(workers=2))
    assert (error.value.found, error.value.rule, error.value.repair) == ("unit 07", "units are good", "mend it")
    assert not files.is_done("07") and files.is_done("00")
    run_here([Files(files.folder, 12).step], TasksConfig(workers=2))
    assert all(map(files.is_done, files.units()))


def test_a_worker_that_is_killed_ends_the_step_and_does_not_hang_it(tmp_path: Path) -> None:
    files = Files(tmp_path / "out", 12, deadly="03")
    files.folder.mkdir()
    with pytest.raises(UserError, match="a process of the step files was killed") as error:
        run_here([files.step], TasksConfig(workers=2))
    assert "tasks.workers=1" in error.value.repair
    run_here([Files(files.folder, 12).step], TasksConfig(workers=2))
    assert all(map(files.is_done, files.units()))


SLOW = """
import sys
from pathlib import Path
from configs.text import TasksConfig
from data.engine import run_here
from tests.data.test_engine import Files
run_here([Files(Path(sys.argv[1]), 40, seconds=0.2).step], TasksConfig(workers=2))
"""


def test_workers_end_with_the_command_that_started_them(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", SLOW, tmp_path / "out"], cwd=root)
    while len(made := list((tmp_path / "out").iterdir())) < 2:
        time.sleep(0.02)
    workers = {int(path.read_text()) for path in made if path.read_text()}
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(_is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its command"
        time.sleep(0.05)
    assert len(list((tmp_path / "out").iterdir())) < 40


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
