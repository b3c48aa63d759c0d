"""What slurm/launch.sh decides without a Slurm: the container's command line, options, and who wins."""

import re
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
SCRIPTS = ("lumi", "leonardo")


def in_launch(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs lines of bash after slurm/launch.sh has been read."""
    return subprocess.run(
        ["bash", "-c", f"source {CHECKOUT}/slurm/launch.sh\n{script}"],
        env={"PATH": "/usr/bin:/bin", "MARATHON_HOME": str(CHECKOUT), **env},
        capture_output=True,
        text=True,
    )


def test_the_image_is_named_by_what_its_link_means_and_the_environment_lies_over_it(tmp_path: Path) -> None:
    for name in ("image-20260415.sif", "environment.sqsh"):
        (tmp_path / name).touch()
    latest = tmp_path / "latest.sif"
    latest.symlink_to("image-20260415.sif")
    done = in_launch(
        'use_container singularity run; echo "${python[@]}"; echo "$MARATHON_IMAGE $SINGULARITYENV_PREPEND_PATH"',
        MARATHON_CONTAINER=str(latest),
        MARATHON_SQSH=str(tmp_path / "environment.sqsh"),
        MARATHON_SCRATCH=str(tmp_path / "scratch"),
    )
    command, facts = done.stdout.splitlines()
    assert command == (
        f"singularity run -B {CHECKOUT},{tmp_path}/scratch -B {tmp_path}/environment.sqsh:/user-software:image-src=/ "
        f"{tmp_path}/image-20260415.sif python3"
    )
    assert facts == f"{tmp_path}/image-20260415.sif /user-software/bin"


@pytest.mark.parametrize("missing", ["MARATHON_CONTAINER", "MARATHON_SQSH"])
def test_a_missing_image_is_told_with_its_path(tmp_path: Path, missing: str) -> None:
    (tmp_path / "there.sif").touch()
    paths = {"MARATHON_CONTAINER": str(tmp_path / "there.sif"), missing: str(tmp_path / "gone")}
    done = in_launch("use_container singularity run", MARATHON_SCRATCH=str(tmp_path / "scratch"), **paths)
    assert done.returncode == 1 and f"{missing}={tmp_path}/gone" in done.stderr and "repair:" in done.stderr


@pytest.mark.parametrize(
    "spelling", ["-A them", "-Athem", "--account=them", "--account them", "-N 2 --account=them -p x"]
)
def test_an_option_of_sbatch_is_found_in_any_spelling(spelling: str) -> None:
    assert in_launch(f"asked_for '-A|--account' nobody {spelling}").stdout == "them\n"
    assert in_launch(f"asked_for '-q|--qos' nothing {spelling}").stdout == "nothing\n"


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ("experiment=smoke", "cluster=lumi cluster.nodes=4 experiment=smoke"),
        ("experiment=smoke cluster=local", "cluster.nodes=4 experiment=smoke cluster=local"),
        ("cluster.nodes=2 experiment=smoke", "cluster=lumi cluster.nodes=2 experiment=smoke"),
    ],
)
def test_what_the_user_says_of_the_cluster_wins(tmp_path: Path, given: str, passed: str) -> None:
    done = in_launch(
        f'cluster=lumi python=(tell); tell() {{ echo "$*" >&2; echo {tmp_path}; }}; freeze {given}; echo RUN=$RUN',
        SLURM_JOB_NUM_NODES="4",
    )
    assert done.stderr == f"-m marathon.cli freeze {passed}\n"
    assert done.stdout.endswith(f"RUN={tmp_path}\n")


@pytest.mark.parametrize("cluster", SCRIPTS)
def test_every_variable_of_a_cluster_yields_to_the_user_and_has_its_reason(cluster: str) -> None:
    text = (CHECKOUT / f"slurm/{cluster}.sh").read_text()
    exported = text.partition("set -a")[2].partition("set +a")[0].splitlines()[1:]
    assert len(exported) > 5
    for line in filter(None, exported):
        assert re.fullmatch(r': "\$\{[A-Z0-9_]+:?=.*\}" +# .+', line), line


@pytest.mark.parametrize("cluster", SCRIPTS)
def test_a_job_can_go_on_and_keeps_one_log_in_a_folder_that_exists(cluster: str) -> None:
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", (CHECKOUT / f"slurm/{cluster}.sh").read_text(), re.M))
    assert options["open-mode"] == "append" and "requeue" in options
    assert "/" not in options["output"]
    assert "signal" not in options, "training minds the end of its job itself, with the time its own saves take"


def test_a_job_that_nobody_pays_for_stops() -> None:
    done = in_launch("cluster=lumi devices_per_node=8; check_job experiment=smoke", SLURM_JOB_ID="7")
    assert done.returncode == 1 and "job 7 has no account" in done.stderr and "sbatch --account=" in done.stderr


@pytest.mark.parametrize(("network", "said"), [("AWS Libfabric", "Using network AWS Libfabric"), ("", "")])
def test_the_log_tells_which_network_the_collectives_found(tmp_path: Path, network: str, said: str) -> None:
    if network:
        (tmp_path / "logs").mkdir()
        for rank in range(2):
            (tmp_path / f"logs/nccl-7-nid-{rank}.log").write_text(f"nid:1:2 [0] NCCL INFO Using network {network}\n")
    done = in_launch("tell_network; echo survived", RUN=str(tmp_path), SLURM_JOB_ID="7")
    assert done.stdout == (f"== marathon: collectives: {said}\n" if said else "") + "survived\n"
