"""slurm/leonardo.sh on a Slurm of LEONARDO's shape: QOS by size, torchrun, and going on after a warning."""

import json
import re

import pytest

from tests.cluster.conftest import CHECKOUT, QUESTIONS, SMALL, environment
from tests.cluster.rig import ACCOUNT, Rig

pytestmark = pytest.mark.slurm
SCRIPT = str(CHECKOUT / "slurm/leonardo.sh")


def test_a_warned_job_saves_requeues_itself_and_completes_under_one_log(leonardo: Rig) -> None:
    job = leonardo.submit(
        f"--account={ACCOUNT}", "--nodes=2", SCRIPT, *SMALL, *QUESTIONS, "train.tokens=98304", **environment(leonardo)
    )
    run = leonardo.root / "scratch/runs/smoke"
    metrics = run / "metrics.jsonl"
    leonardo.wait_for("a step", lambda: metrics.exists() and metrics.stat().st_size > 0, timeout_s=300)
    leonardo.run("scancel", "--signal=USR1", job)
    leonardo.wait_until_ended(job, timeout_s=600)

    log = (leonardo.root / "submit" / f"marathon-{job}.log").read_text()
    assert leonardo.state(job) == "COMPLETED", log
    assert re.findall(r"restart (\d+)", log) == ["0", "1"]
    assert "saved before the end" in log, log
    starts = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines() if "train_start" in line]
    assert len(starts) == 2 and starts[0]["step"] == 0 < starts[1]["step"] < 12
    for rank in range(8):
        facts = json.loads((run / f"logs/rank-{rank}.json").read_text())
        assert (facts["rank"], facts["local_rank"], facts["world_size"]) == (rank, rank % 4, 8)
        assert facts["host"] == leonardo.shape.nodes[rank // 4]
        assert (facts["master_addr"], facts["master_port"]) == (leonardo.shape.nodes[0], str(10000 + int(job) % 10000))


@pytest.mark.parametrize(
    ("options", "repair"),
    [
        (("--nodes=65",), "add --qos=boost_qos_bprod"),
        (("-N", "64", "--qos=boost_qos_bprod"), "leave --qos out"),
        (("-N257", "-q", "boost_qos_bprod"), "--reservation from CINECA"),
    ],
)
def test_the_qos_has_to_follow_the_number_of_nodes(leonardo: Rig, options: tuple[str, ...], repair: str) -> None:
    asked = leonardo.run(SCRIPT, "-A", ACCOUNT, *options, *SMALL, check=False)
    assert asked.returncode == 1 and repair in asked.stderr
    assert leonardo.run("sbatch", "-A", ACCOUNT, *options, SCRIPT, *SMALL, check=False).returncode, "Slurm agrees"


def test_the_debug_qos_has_its_own_limits(leonardo: Rig) -> None:
    asked = leonardo.run(SCRIPT, "-A", ACCOUNT, "--qos=boost_qos_dbg", "--nodes=3", "--time=10", *SMALL, check=False)
    assert asked.returncode == 1 and "QOSMaxNodePerJobLimit" in asked.stderr


def test_a_job_without_account_is_refused(leonardo: Rig) -> None:
    refused = leonardo.run("sbatch", SCRIPT, *SMALL, check=False)
    assert refused.returncode and "Invalid account" in refused.stderr


def test_a_job_without_image_says_which_one_fits(leonardo: Rig) -> None:
    log = leonardo.log_of_failed_job(
        SCRIPT, "--account", ACCOUNT, arguments=SMALL, MARATHON_SCRATCH=str(leonardo.root / "scratch")
    )
    assert "no MARATHON_CONTAINER" in log and "MARATHON_CONTAINER=none" in log
