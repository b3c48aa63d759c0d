"""A corpus prepared by arrays of jobs, on a Slurm of LUMI's shape: the same as that of one process, whatever was killed.

All of it is real but the container: a script stands in for singularity. Like an image, it knows nothing of Slurm's
commands; and it holds the jobs of a step while there is a file HOLD/STEP.
"""

import gzip
import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from configs.errors import EXIT_MISTAKE, EXIT_UNFINISHED
from tests.cluster.conftest import environment
from tests.cluster.rig import ACCOUNT, Rig

pytestmark = pytest.mark.slurm
LINE = ("data", "experiment=smoke", "tasks.runner=slurm", "tasks.partition=small-g", "tasks.tasks=3", "tasks.gib=1")
LINE += ("tasks.time=00:10:00", f"tasks.account={ACCOUNT}")
SINGULARITY = """#!/bin/bash
# exec -B PLACES IMAGE PYTHON -m datatrove.tools.launch_pickled_pipeline LOGS/STEP/executor.pik
while [ "$1" != "$MARATHON_IMAGE" ]; do shift; done
shift
step=$(basename "$(dirname "${@: -1}")")
touch "$HOLD/$SLURM_JOB_ID.$step"
while [ -e "$HOLD/$step" ]; do sleep 0.1; done
PATH=/nowhere exec "$@"
"""


@dataclass(frozen=True)
class Login:
    """A user on a login node."""

    rig: Rig
    root: Path

    def marathon(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the command as the user does."""
        env = environment(self.rig) | {
            "MARATHON_SCRATCH": str(self.root),
            "MARATHON_CONTAINER": str(self.root / "image"),
        }
        env |= {"PATH": f"{self.root}:{os.environ['PATH']}", "HOLD": str(self.root / "hold")}
        return self.rig.run(sys.executable, "-m", "marathon.cli", *arguments, check=False, **env)

    def jobs(self, *options: str) -> list[str]:
        """Step, number and state of each job that is queued or running, or that `options` ask for."""
        lines = self.rig.run("squeue", "-h", "-r", *options, "-o", "%j %A %T").stdout.splitlines()
        return sorted(line.split("-", 2)[2] for line in lines)

    def hold(self, step: str) -> Path:
        """Holds the jobs of a step until the file is removed."""
        (self.root / "hold" / step).touch()
        return self.root / "hold" / step

    def wait_for(self, step: str) -> list[str]:
        """Returns the numbers of the three jobs of a step that is held, when all are there."""

        def began() -> list[str]:
            return [path.stem for path in (self.root / "hold").glob(f"*.{step}")]

        self.rig.wait_for(f"the array {step}", lambda: len(began()) == 3, timeout_s=60)
        return began()

    def wait_until_over(self) -> None:
        """Returns when no job is left, waiting ones included."""
        self.rig.wait_for("the last job", lambda: not self.jobs(), timeout_s=90)


@pytest.fixture
def login(lumi: Rig, tmp_path: Path) -> Login:
    (tmp_path / "hold").mkdir()
    (tmp_path / "image").touch()
    (tmp_path / "singularity").write_text(SINGULARITY)
    (tmp_path / "singularity").chmod(0o755)
    return Login(lumi, tmp_path)


def corpora(scratch: Path) -> dict[str, str]:
    """Hashes of all that is in the folders of corpus and documents, by path; logs and what is unfinished stay out."""
    folders = [folder for folder in (scratch / "corpora").iterdir() if folder.is_dir() and folder.name[0] != "."]
    files = [path for folder in folders if folder.name != "logs" for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(scratch)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_arrays_that_are_cancelled_and_killed_make_the_corpus_of_one_process(login: Login, tmp_path: Path) -> None:
    login.hold("dedup")
    first = login.marathon(*LINE)
    assert first.returncode == EXIT_UNFINISHED and "the same line goes on" in first.stdout, first.stderr
    assert "submitted arrays marathon-" in first.stdout and not first.stderr
    login.wait_for("dedup")
    waiting = login.jobs()
    again = login.marathon(*LINE)
    assert again.returncode == EXIT_UNFINISHED and f"{len(waiting)} jobs marathon-" in again.stdout
    assert "queued or running" in again.stdout and login.jobs() == waiting
    cleaned = {path: path.stat().st_mtime_ns for path in tmp_path.glob("corpora/.documents-*/units/*/*/*")}
    login.rig.run("scancel", "--user=root")
    login.wait_until_over()

    login.hold("dedup").unlink()
    hold = login.hold("words")
    second = login.marathon(*LINE)
    assert ": dedup, " in second.stdout, "steps that are complete are not submitted"
    words = login.wait_for("words")
    login.rig.kill_job(words[1])
    hold.unlink()
    login.wait_until_over()
    ends = [job.split()[-1] for job in login.jobs("-t", "all", f"--job={','.join(words)}")]
    assert sorted(ends) == ["COMPLETED", "COMPLETED", "FAILED"]
    assert not list(tmp_path.glob("corpora/.*/plan.json")), "the arrays behind a killed job do not start"

    assert ": words, " in login.marathon(*LINE).stdout
    login.wait_until_over()
    done, skipped = login.marathon(*LINE), login.marathon(*LINE)
    assert done.returncode == skipped.returncode == 0, done.stderr + str(login.jobs("-t", "all"))
    assert "what became of every document" in done.stdout and "complete, skipped" in skipped.stdout
    documents = {str(path).replace("/.documents-", "/documents-"): time for path, time in cleaned.items()}
    assert cleaned and all(Path(path).stat().st_mtime_ns == time for path, time in documents.items())

    local = {"MARATHON_SCRATCH": str(tmp_path / "local")}
    login.rig.run(sys.executable, "-m", "marathon.cli", "data", "experiment=smoke", "tasks.workers=1", **local)
    assert corpora(tmp_path) == corpora(tmp_path / "local")


def test_a_mistake_that_a_job_finds_is_told_where_the_command_is_given_again(login: Login) -> None:
    damaged = login.root / "text.jsonl.gz"
    damaged.write_bytes(gzip.compress(b'{"text": "a", "lang": "de"}\n' * 1000)[:-20])
    line = (*LINE, f"corpus.sources.udhr.path={damaged}", "corpus.languages=[de]")
    assert login.marathon(*line).returncode == EXIT_UNFINISHED
    login.wait_until_over()
    again = login.marathon(*line)
    assert again.returncode == EXIT_UNFINISHED and "submitted arrays" in again.stdout
    assert "a task of the step clean could not go on" in again.stdout
    assert f"{damaged}: " in again.stdout and "repair: fetch or write the file again" in again.stdout
    login.wait_until_over()


def test_what_slurm_refuses_is_told_and_so_is_a_machine_without_slurm(login: Login) -> None:
    refused = login.marathon(*LINE, "tasks.account=project_465009999")
    assert refused.returncode == EXIT_MISTAKE and not login.jobs()
    assert "Invalid account" in refused.stderr and "tasks.account" in refused.stderr
    (login.root / "squeue").write_text("#!/bin/bash\necho no answer >&2\nexit 1\n")
    (login.root / "squeue").chmod(0o755)
    silent = login.marathon(*LINE)
    assert silent.returncode == EXIT_MISTAKE and "squeue refused: no answer" in silent.stderr
