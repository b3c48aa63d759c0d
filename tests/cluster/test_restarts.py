"""How a run goes on, on a Slurm of LEONARDO's shape: crashes, refusals, cancelling, time limits, lost scripts and nodes.

Most jobs run no Python: MARATHON_PYTHON names a script of the test that stands in for it. At its n-th start of a run,
a stage does what line n of RUN/STAGE says, which is a line of bash; where there is none, it completes. All of it is
real but the stages: Slurm, slurm/leonardo.sh, slurm/launch.sh, four tasks of a node.
"""

import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.conftest import CHECKOUT, SMALL, environment
from tests.cluster.rig import ACCOUNT, Rig

pytestmark = pytest.mark.slurm
SCRIPT = str(CHECKOUT / "slurm/leonardo.sh")
RANKS = ("--ntasks-per-node=4", "--cpus-per-task=8")
STAND_IN = """#!/bin/bash
# python3 -m marathon.cli freeze …   or   python3 -m marathon.stage STAGE RUN
if [ "$2" = marathon.cli ]; then
    echo "$STAND_IN_RUN"
    exit
fi
start=$(wc -l <"$4/logs/jobs")
echo "$3 $SLURM_JOB_ID $start ${RANK:-0} $MARATHON_JOB_ENDS_AT $*" >>"$4/began"
[ ! -e "$4/$3" ] || eval "$(sed -n "${start}p" "$4/$3")"
"""
WAIT = "sleep 300 & wait"
SAVE_ON_SIGTERM = f"trap 'sleep 1; exit 75' TERM; {WAIT}"


@dataclass(frozen=True)
class StandIn:
    """A run whose stages are scripted."""

    rig: Rig
    name: str

    @property
    def dir(self) -> Path:
        return self.rig.root / self.name

    def submit(self, *options: str, **stages: list[str]) -> str:
        """Submits it; `train=["exit 75"]` is what that stage does at the first start."""
        self.dir.mkdir(exist_ok=True)
        for stage, lines in stages.items():
            (self.dir / stage).write_text("\n".join(lines) + "\n")
        program = self.rig.root / "stand-in"
        if not program.exists():
            program.write_text(STAND_IN)
            program.chmod(0o755)
        env = environment(self.rig) | {"MARATHON_PYTHON": str(program), "STAND_IN_RUN": str(self.dir)}
        options = (f"--account={ACCOUNT}", f"--job-name={self.name}", "--time=20", *RANKS, *options)
        return self.rig.submit(*options, SCRIPT, "experiment=smoke", **env)

    def began(self, stage: str) -> list[list[str]]:
        """Job, start, rank and the job's end of each process of a stage so far."""
        events = self.dir / "began"
        lines = [line.split() for line in events.read_text().splitlines()] if events.exists() else []
        return [words[1:] for words in lines if words[0] == stage]

    def wait_for_ranks(self, start: int) -> None:
        """Returns when all ranks of a start of training are there."""
        self.rig.wait_for(f"start {start}", lambda: [w[1] for w in self.began("train")].count(str(start)) == 4, 60)

    def wait_until_over(self, timeout_s: float = 60) -> None:
        """Returns when no job of this run is left, waiting ones included."""
        queue = ("squeue", "-h", "-o", "%A", f"--name={self.name}")
        self.rig.wait_for(f"the end of {self.name}", lambda: not self.rig.run(*queue).stdout, timeout_s)

    def jobs(self) -> list[str]:
        """The job of each start."""
        return [line.split()[0] for line in (self.dir / "logs/jobs").read_text().splitlines()]

    def log(self, job: str) -> str:
        """All that was written since the first job of this run."""
        return (self.rig.root / f"submit/{self.name}-{job}.log").read_text()


@pytest.fixture
def run(leonardo: Rig, request: pytest.FixtureRequest) -> StandIn:
    return StandIn(leonardo, request.node.name)


@pytest.fixture(scope="module", autouse=True)
def long_data(leonardo: Rig) -> tuple[StandIn, str]:
    """A run whose data stage outlives its time limit. That takes a minute at least, so the other tests go on beside."""
    run = StandIn(leonardo, "long_data")
    return run, run.submit("--time=1", data=[WAIT])


def test_a_killed_rank_costs_a_restart_and_the_real_trainer_completes(leonardo: Rig) -> None:
    program = leonardo.root / "without-eval"  # what follows training takes half a minute and is not asked here
    program.write_text(
        f"""#!/bin/bash\ncase "$*" in *"stage eval "* | *"stage release "*) ;; *) exec {sys.executable} "$@" ;; esac\n"""
    )
    program.chmod(0o755)
    env = environment(leonardo) | {"MARATHON_PYTHON": str(program)}
    settings = ("suite=bpb", "train.tokens=24576", "train.save_every_steps=2", "name=killed")
    job = leonardo.submit(f"--account={ACCOUNT}", "--job-name=killed", SCRIPT, *SMALL, *settings, **env)
    run = leonardo.root / "scratch/runs/killed"
    leonardo.wait_for("a checkpoint", lambda: any(run.glob("checkpoints/step-*[1-9]/manifest.json")), timeout_s=120)
    leonardo.kill_rank(job, 2)
    leonardo.wait_until_ended(job, timeout_s=120)

    log = (leonardo.root / f"submit/killed-{job}.log").read_text()
    assert leonardo.state(job) == "COMPLETED", log
    assert re.findall(r"restart (\d+)", log) == ["0", "1"] and "train ended with 137" in log
    starts = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines() if "train_start" in line]
    assert [start["step"] for start in starts] in ([0, 2], [0, 4])
    leonardo.wait_for("the successor's end", lambda: not leonardo.run("squeue", "-h", "--name=killed").stdout)


def test_a_crash_is_started_again_and_so_is_a_run_that_has_saved(run: StandIn) -> None:
    job = run.submit(train=["[ $RANK != 3 ] || exit 1; " + WAIT, "exit 75"])
    run.wait_until_over()
    assert run.rig.state(job) == "COMPLETED", run.log(job)
    assert run.jobs() == [job] * 3
    assert "train ended with 1:" in run.log(job) and "train saved before the end" in run.log(job)
    ends = {int(words[3]) - time.time() for words in run.began("train")}
    assert all(18 * 60 < end < 21 * 60 for end in ends), "training knows when its job ends"


def test_a_refusal_ends_the_chain(run: StandIn) -> None:
    job = run.submit(train=["exit 1", "exit 78"])
    run.wait_until_over()
    assert run.rig.state(job) == "FAILED" and run.jobs() == [job, job], run.log(job)
    assert "train stopped the run" in run.log(job)
    assert "ExitCode=78:0" in run.rig.run("scontrol", "show", "job", job).stdout


def test_a_cancelled_job_saves_and_nothing_goes_on(run: StandIn) -> None:
    job = run.submit(train=[SAVE_ON_SIGTERM])
    run.wait_for_ranks(1)
    run.rig.run("scancel", job)
    run.wait_until_over()
    assert run.rig.state(job) == "CANCELLED" and run.jobs() == [job], run.log(job)
    assert "train saved before the end" in run.log(job) and "Slurm ended this job: CANCELLED" in run.log(job)


def test_a_job_cancelled_while_it_waits_to_start_again_has_no_successor_that_runs(run: StandIn) -> None:
    job = run.submit(train=["exit 75"])
    waits = ("squeue", "-h", "-t", "PENDING", "-j", job, "-o", "%r")
    run.rig.wait_for("a requeue", lambda: run.rig.run(*waits).stdout.strip() == "BeginTime")
    run.rig.run("scancel", job)
    run.wait_until_over()
    assert run.rig.state(job) == "CANCELLED" and run.jobs() == [job]
    assert f"to go on for job {job}, which was cancelled" in run.log(job)


def test_a_killed_job_script_is_survived(run: StandIn) -> None:
    job = run.submit("--exclude=lrdn0003", train=[WAIT])
    run.wait_for_ranks(1)
    run.rig.kill_batch_script(job)
    run.wait_for_ranks(2)
    run.wait_until_over()
    first, second = run.jobs()
    assert first == job != second and run.rig.state(second) == "COMPLETED", run.log(job)
    assert "ExcNodeList=lrdn0003" in run.rig.run("scontrol", "show", "job", second).stdout
    assert f"complete: {run.dir}" in run.log(job)


def test_without_requeue_the_run_goes_on_in_further_jobs_under_one_log(run: StandIn) -> None:
    job = run.submit("--no-requeue", train=["exit 75", "kill -9 $$"])
    run.wait_until_over()
    jobs = run.jobs()
    assert len(set(jobs)) == 3 and jobs[0] == job, run.log(job)
    assert [run.rig.state(j) for j in jobs] == ["FAILED", "FAILED", "COMPLETED"]
    assert re.findall(r"start (\d) of", run.log(job)) == ["1", "2", "3"]
    assert list((run.rig.root / "submit").glob(f"{run.name}-*")) == [run.rig.root / f"submit/{run.name}-{job}.log"]
    chained = run.began("train")
    assert {words[4] for words in chained} == {chained[0][4]}


def test_a_lost_node_requeues_and_the_successor_keeps_waiting(run: StandIn) -> None:
    job = run.submit(train=[WAIT])
    run.wait_for_ranks(1)
    node = run.rig.run("squeue", "-h", "-j", job, "-o", "%N").stdout.strip()
    run.rig.kill_node(node)
    run.rig.start_node(node)
    run.wait_until_over()
    assert run.rig.state(job) == "COMPLETED" and run.jobs() == [job, job], run.log(job)


def test_a_stage_that_outlives_the_time_limit_is_done_again(long_data: tuple[StandIn, str]) -> None:
    run, job = long_data
    run.wait_until_over(timeout_s=150)
    assert run.rig.state(job) == "TIMEOUT", run.log(job)
    assert len(run.began("data")) == 2 and f"complete: {run.dir}" in run.log(job)
    assert "ended this job: TIMEOUT" in run.log(job)


def test_a_run_that_is_submitted_twice_has_one_job(run: StandIn) -> None:
    first = run.submit(train=[WAIT])
    run.wait_for_ranks(1)
    second = run.submit()
    run.rig.wait_until_ended(second, timeout_s=60)
    assert run.rig.state(second) == "FAILED" and f"job {first} is at {run.dir}" in run.log(second)
    assert run.rig.state(first) == "RUNNING" and run.jobs() == [first]
    run.rig.run("scancel", first)
    run.wait_until_over()
