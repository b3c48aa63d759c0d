"""slurm/lumi.sh on a Slurm of LUMI's shape: what is refused, what every rank is given, what the job leaves."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from tests.cluster.conftest import CHECKOUT, SMALL, environment
from tests.cluster.rig import ACCOUNT, Rig

pytestmark = pytest.mark.slurm
SCRIPT = str(CHECKOUT / "slurm/lumi.sh")
# docs.lumi-supercomputer.eu, "GPU binding": cores beside GCD 0 to 7, without the first of each CCD.
CORES_OF_GCD = [range(first, first + 7) for first in (49, 57, 17, 25, 1, 9, 33, 41)]
RUN_ENTRIES = {"config.yaml", "ledger.jsonl", "metrics.jsonl", "report.html", "checkpoints", "eval", "release", "logs"}


@pytest.fixture(scope="module")
def job(lumi: Rig) -> str:
    """A job on two nodes, submitted with the line that the front door prints, after it has ended."""
    options = (f"--account={ACCOUNT}", "--nodes=2", "--time=00:30:00")
    advice = lumi.run(SCRIPT, *options, *SMALL, "suite=bpb", "train.tokens=16384", **environment(lumi)).stdout
    line = next(line for line in advice.splitlines() if line.startswith("  sbatch "))
    lumi.run(*shlex.split(line), **environment(lumi))
    job = lumi.newest_job()
    lumi.wait_until_ended(job, timeout_s=600)
    return job


def test_the_job_completes_and_leaves_what_every_run_leaves(lumi: Rig, job: str) -> None:
    log = (lumi.root / "submit" / f"marathon-{job}.log").read_text()
    assert lumi.state(job) == "COMPLETED", log
    run = lumi.root / "scratch/runs/smoke"
    assert {path.name for path in run.iterdir()} == RUN_ENTRIES
    assert f"complete: {run}" in log
    assert not Path(f"/tmp/marathon-{job}").exists(), "node-local caches outlived the job"


def test_every_rank_has_its_own_place_and_the_cores_beside_its_gcd(lumi: Rig, job: str) -> None:
    logs = lumi.root / "scratch/runs/smoke/logs"
    for rank in range(16):
        facts = json.loads((logs / f"rank-{rank}.json").read_text())
        assert (facts["rank"], facts["local_rank"], facts["world_size"]) == (rank, rank % 8, 16)
        assert facts["host"] == lumi.shape.nodes[rank // 8]
        assert (facts["master_addr"], facts["master_port"]) == (lumi.shape.nodes[0], str(10000 + int(job) % 10000))
        mask = int(facts["cpu_bind_list"].split(",")[facts["local_rank"]], 16)
        assert mask == sum(1 << core for core in CORES_OF_GCD[facts["local_rank"]])


def test_slurm_refuses_a_job_without_account_and_the_front_door_says_why(lumi: Rig) -> None:
    refused = lumi.run("sbatch", SCRIPT, *SMALL, check=False)
    assert refused.returncode and "Job violates accounting/QOS policy" in refused.stderr
    asked = lumi.run(SCRIPT, *SMALL, check=False)
    assert asked.returncode == 1
    assert "no --account" in asked.stderr and ACCOUNT in asked.stderr, "the accounts to choose from are named"


def test_an_account_from_the_environment_is_an_account(lumi: Rig) -> None:
    assert "Slurm would accept it" in lumi.run(SCRIPT, *SMALL, SBATCH_ACCOUNT=ACCOUNT).stdout


@pytest.mark.parametrize(
    ("options", "found", "told"),
    [
        (("--account=project_465009999",), "Invalid account", ACCOUNT),
        (("--time=2-00:00:01",), "time limit is invalid", "standard-g 2-00:00:00"),
        (("--partition=dev-g", "--time=03:00:01"), "time limit is invalid", "dev-g 3:00:00"),
        (("--partition=small-g", "--nodes=5"), "Node count", "fewer --nodes"),
        (("--cpus-per-task=8",), "node configuration is not available", "leave tasks, cores and devices"),
    ],
)
def test_what_slurm_refuses_is_explained_before_it_is_submitted(
    lumi: Rig, options: tuple[str, ...], found: str, told: str
) -> None:
    asked = lumi.run(SCRIPT, "-A", ACCOUNT, *options, *SMALL, check=False)
    assert asked.returncode == 1
    said, _, advice = asked.stderr.partition("rule:")
    assert found in said and told in advice


def test_a_job_in_the_wrong_shape_stops_with_the_rule(lumi: Rig) -> None:
    log = lumi.log_of_failed_job(SCRIPT, "--account", ACCOUNT, "--ntasks-per-node=3", arguments=SMALL)
    assert "--ntasks-per-node=3" in log and "rule:" in log


def test_a_script_without_its_checkout_says_where_it_looked(lumi: Rig) -> None:
    alone = shutil.copy(SCRIPT, lumi.root / "submit/job.sh")
    log = lumi.log_of_failed_job(str(alone), "--account", ACCOUNT, arguments=SMALL)
    assert "no checkout of Marathon" in log and "export MARATHON_HOME" in log


def test_a_mistake_in_the_configuration_ends_the_job_before_any_stage(lumi: Rig) -> None:
    arguments = (*SMALL, "model.d_modle=3")
    log = lumi.log_of_failed_job(SCRIPT, "--account", ACCOUNT, arguments=arguments, **environment(lumi))
    assert "d_modle" in log and "data," not in log


def test_a_job_without_the_image_names_it(lumi: Rig) -> None:
    env = {name: value for name, value in environment(lumi).items() if name != "MARATHON_CONTAINER"}
    log = lumi.log_of_failed_job(SCRIPT, "--account", ACCOUNT, arguments=SMALL, **env)
    assert "lumi-multitorch-latest.sif is not there" in log and "repair:" in log
