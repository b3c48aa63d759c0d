"""The doctor: each check says yes where things are right, and no, with a repair, where they are not."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from configs.compose import compose
from configs.schema import RunConfig
from data.pipeline import prepare
from marathon import doctor
from marathon.doctor import failed, passed, print_checks, run_doctor, warned
from train.retention import checkpoint_bytes, checkpoints_on_disk

LUMI_MASKS = (
    "0xfe000000000000,0xfe00000000000000,0xfe0000,0xfe000000,0xfe,0xfe00,0xfe00000000,0xfe0000000000"  # user guide
)
WATCHED = ("SLURM_", "OMP_NUM", "HF_HUB", "NCCL_", "GLOO_", "ROCR_", "HIP_", "CUDA_VISIBLE", "MARATHON_")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(WATCHED):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def smoke() -> RunConfig:
    return compose(["experiment=smoke"])


@pytest.fixture(scope="module")
def lumi() -> RunConfig:
    return compose(["experiment=eu24_1b", "cluster=lumi", "cluster.nodes=2"])


@pytest.fixture(scope="module")
def leonardo() -> RunConfig:
    return compose(["experiment=eu24_1b", "cluster=leonardo", "cluster.nodes=2"])


def with_scratch(scratch: Path, *overrides: str) -> RunConfig:
    return compose(["experiment=smoke", f"cluster.scratch={scratch}", *overrides])


def install(folder: Path, name: str, version: str) -> None:
    """A real, if empty, installed distribution of that version, which importlib.metadata finds."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def start_as_task(monkeypatch: pytest.MonkeyPatch, n_tasks: int, **variables: str) -> None:
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": str(n_tasks), **variables}.items():
        monkeypatch.setenv(name, value)


def test_this_machine_is_ready_for_the_smoke_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = run_doctor(with_scratch(tmp_path / "not" / "yet"))
    assert [name for name, outcome in checks.items() if outcome.status == "fail"] == []
    assert not list(tmp_path.rglob("*")), "the doctor leaves nothing behind"
    assert print_checks(checks) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in checks) and "0 fail" in printed


def test_without_an_experiment_only_general_checks_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GENERAL", {"versions": doctor.check_versions})
    checks = run_doctor(None)
    assert sys.version.split()[0] in checks.pop("versions").found
    assert all(c.status == "skip" and c.found.startswith("not applicable") for c in checks.values())
    assert checks.keys() == doctor.CONFIGURED.keys()


def test_a_failed_check_gives_exit_status_1_and_shows_its_repair(capsys: pytest.CaptureFixture[str]) -> None:
    mendable = {"a": passed("fine"), "b": warned("so so", "mend")}
    assert print_checks({**mendable, "c": failed("bad", "mend it")}) == 1
    assert print_checks(mendable) == 0
    assert "repair: mend it" in capsys.readouterr().out


def test_a_library_out_of_range_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.check_versions()[0] == "pass"
    install(tmp_path, "transformers", "4.57.0")
    monkeypatch.syspath_prepend(tmp_path)
    status, found, repair = doctor.check_versions()
    assert status == "fail" and "transformers 4.57.0" in found and "transformers" in repair
    assert "torch" not in found


def test_a_checkout_that_is_not_installed_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTION", "marathon-that-is-not-there")
    assert doctor.check_versions()[0] == "warn"


def test_a_clusters_own_build_is_within_range(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(tmp_path, "torch", "2.10.0a0+git1234.rocm7.0")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.check_versions()[0] == "pass"


@pytest.mark.parametrize(
    ("deepspeed", "torch_version", "harm"),
    [
        ("0.18.7", "2.9.0", "micro batch"),
        ("0.18.5", "2.10.1+rocm7.0", "NaN"),
        ("0.19.4", "2.13.0", "mended up to"),
        ("0.19.5", "2.13.0", ""),
    ],
)
def test_known_bad_pairs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, deepspeed: str, torch_version: str, harm: str
) -> None:
    install(tmp_path, "deepspeed", deepspeed)
    install(tmp_path, "torch", torch_version)
    monkeypatch.syspath_prepend(tmp_path)
    status, found, _ = doctor.check_known_bad_versions()
    assert (status, harm in found) == ("fail" if harm else "pass", True)


def test_rendezvous_through_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothere0")
    status, found, repair = doctor.check_rendezvous()
    assert status == "fail" and "nothere0" in found and "GLOO_SOCKET_IFNAME" in repair


def test_torch_build_is_a_warning_outside_of_jobs_and_a_failure_inside(
    monkeypatch: pytest.MonkeyPatch, smoke: RunConfig, lumi: RunConfig, leonardo: RunConfig
) -> None:
    assert doctor.check_torch_build(smoke)[0] == "pass"
    other = leonardo if torch.version.hip else lumi
    assert doctor.check_torch_build(other)[0] == "warn"
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert doctor.check_torch_build(other)[0] == "fail"


def test_devices_are_not_asked_for_on_a_login_node_but_in_a_job(
    monkeypatch: pytest.MonkeyPatch, smoke: RunConfig, lumi: RunConfig
) -> None:
    assert doctor.check_devices(smoke)[1] == "not applicable: cluster.device = cpu"
    monkeypatch.setattr(lumi.cluster, "devices_per_node", torch.cuda.device_count() + 3)
    if torch.cuda.device_count() == 0:
        assert doctor.check_devices(lumi)[0] == "skip"
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "3")
    status, found, repair = doctor.check_devices(lumi)
    assert status == "fail" and f"{torch.cuda.device_count()} devices" in found and "ROCR_VISIBLE_DEVICES=3" in found
    assert "--gpus-per-node" in repair


def test_cores(monkeypatch: pytest.MonkeyPatch, lumi: RunConfig) -> None:
    cores = len(os.sched_getaffinity(0))
    fitting = compose(["experiment=smoke", "cluster.devices_per_node=1", f"cluster.cpus_per_device={cores}"])
    greedy = compose(["experiment=smoke", "cluster.devices_per_node=1", f"cluster.cpus_per_device={cores + 1}"])
    assert doctor.check_cores(fitting)[0] == "pass"
    assert doctor.check_cores(greedy)[0] == "warn"
    assert doctor.check_cores(lumi)[1].startswith("not applicable")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert doctor.check_cores(greedy)[0] == "fail"


def test_a_task_of_one_device_needs_cores_for_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    two = compose(["experiment=smoke", "cluster.devices_per_node=2", f"cluster.cpus_per_device={cores}"])
    start_as_task(monkeypatch, 1)
    assert doctor.check_cores(two)[0] == "fail"
    start_as_task(monkeypatch, 2)
    assert doctor.check_cores(two)[0] == "pass"


@pytest.mark.parametrize(
    ("masks", "kind", "status", "words"),
    [
        (LUMI_MASKS, "mask_cpu:", "pass", "nearest"),
        (",".join(hex(int(m, 16) * (1 + 2**64)) for m in LUMI_MASKS.split(",")), "mask_cpu:", "pass", "nearest"),
        (
            ",".join(hex(0xFE << 8 * n) for n in range(8)),
            "mask_cpu:",
            "fail",
            "[0, 1, 4, 5, 6, 7] are not at the cores",
        ),
        (",".join(["0xfe"] * 8), "mask_cpu:", "fail", "share cores"),
        (LUMI_MASKS.replace("fe", "7e"), "mask_cpu:", "fail", "fewer than 7"),
        (LUMI_MASKS.rsplit(",", 1)[0], "mask_cpu:", "fail", "7 masks for 8"),
        ("49,57,17,25,1,9,33,41", "map_cpu:", "warn", "no list of masks"),
    ],
)
def test_core_masks(
    monkeypatch: pytest.MonkeyPatch, lumi: RunConfig, masks: str, kind: str, status: str, words: str
) -> None:
    start_as_task(monkeypatch, 16, SLURM_CPU_BIND_LIST=masks, SLURM_CPU_BIND_TYPE=kind)
    found = doctor.check_core_masks(lumi)
    assert found[0] == status and words in found[1]
    if status == "fail":
        assert LUMI_MASKS in found[2], "the repair is the line to copy"


def test_core_masks_do_not_apply_to_one_task_a_node(monkeypatch: pytest.MonkeyPatch, lumi: RunConfig) -> None:
    assert doctor.check_core_masks(lumi)[1].startswith("not applicable")
    start_as_task(monkeypatch, 2, SLURM_CPU_BIND_LIST="0xffff", SLURM_CPU_BIND_TYPE="mask_cpu:")
    assert doctor.check_core_masks(lumi)[1].startswith("not applicable")


def test_masks_of_other_nodes_need_only_be_disjoint(monkeypatch: pytest.MonkeyPatch, leonardo: RunConfig) -> None:
    masks = ",".join(hex(0xFF << 8 * n) for n in range(4))
    start_as_task(monkeypatch, 8, SLURM_CPU_BIND_LIST=masks, SLURM_CPU_BIND_TYPE="mask_cpu:")
    assert doctor.check_core_masks(leonardo) == ("pass", "4 masks, disjoint", "")


@pytest.mark.parametrize(
    ("value", "status"), [(None, "pass"), ("7", "pass"), ("8", "warn"), ("x", "warn"), ("0", "warn")]
)
def test_threads(monkeypatch: pytest.MonkeyPatch, lumi: RunConfig, value: str | None, status: str) -> None:
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert doctor.check_threads(lumi)[0] == status


def test_hub(monkeypatch: pytest.MonkeyPatch, smoke: RunConfig) -> None:
    online = compose(["experiment=smoke", "cluster.online=true"])
    assert [doctor.check_hub(cfg)[0] for cfg in (smoke, online)] == ["pass", "pass"]
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert [doctor.check_hub(cfg)[0] for cfg in (smoke, online)] == ["warn", "pass"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [doctor.check_hub(cfg)[0] for cfg in (smoke, online)] == ["pass", "warn"]


@pytest.mark.parametrize(
    ("there", "given", "status"),
    [
        (["lo", "hsn0", "hsn1"], "hsn0,hsn1", "pass"),
        (["lo", "hsn0", "hsn1"], "hsn", "pass"),
        (["lo", "hsn0", "hsn1"], None, "fail"),
        (["lo", "hsn0", "hsn1"], "ib0", "fail"),
        (["lo", "eth0", "ib0"], "eth0", "warn"),
        (["lo", "eth0", "ib0"], "^lo", "pass"),
        (["lo", "eth0"], None, "skip"),
    ],
)
def test_interfaces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lumi: RunConfig, there: list[str], given: str | None, status: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    for name in there:
        (tmp_path / name).mkdir()
    if given is not None:
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", given)
    assert doctor.check_network_interface(lumi, tmp_path)[0] == status


def test_interfaces_do_not_matter_on_one_node(smoke: RunConfig) -> None:
    assert doctor.check_network_interface(smoke)[1] == "not applicable: one node"


def test_scratch(tmp_path: Path) -> None:
    assert doctor.check_scratch(with_scratch(tmp_path / "new"))[0] == "pass"
    (tmp_path / "file").touch()
    for nowhere in (Path("/proc/marathon"), tmp_path / "file" / "below"):
        status, _, repair = doctor.check_scratch(with_scratch(nowhere))
        assert status == "fail" and "MARATHON_SCRATCH" in repair


def test_space_counts_what_is_kept_and_what_is_there(tmp_path: Path) -> None:
    every = with_scratch(tmp_path, "train.save_every_steps=10")
    few = with_scratch(tmp_path, "train.save_every_steps=10", "train.keep_checkpoints=2")
    steps = every.train.steps
    assert checkpoints_on_disk(every.train) == 1 + steps // 10
    assert checkpoints_on_disk(few.train) == 4, "step 0, two kept, one being written"
    assert doctor.check_space(few)[0] == "pass"


def test_too_little_space_fails_until_it_has_been_written(tmp_path: Path) -> None:
    big = compose(["experiment=eu24_8b", f"cluster.scratch={tmp_path}", "train.keep_checkpoints=1"])
    one = checkpoint_bytes(big)
    big.train.keep_checkpoints = shutil.disk_usage(tmp_path).free // one + 1
    status, _, repair = doctor.check_space(big)
    assert status == "fail" and "keep_checkpoints" in repair
    checkpoints = tmp_path / "runs" / big.name / "checkpoints"
    checkpoints.mkdir(parents=True)
    with (checkpoints / "weights").open("wb") as file:
        file.truncate(checkpoints_on_disk(big.train) * checkpoint_bytes(big))  # sparse: it takes no room
    assert doctor.check_space(big)[0] == "pass"


def test_a_flipped_byte_in_a_prepared_corpus_is_found(tmp_path: Path) -> None:
    cfg = with_scratch(tmp_path)
    assert doctor.check_corpus(cfg)[1].startswith("not applicable")
    shard = next(prepare(cfg).glob("shards/*.bin"))
    assert doctor.check_corpus(cfg)[0] == "pass"
    whole = bytearray(shard.read_bytes())
    whole[7] ^= 1
    shard.write_bytes(whole)
    status, found, _ = doctor.check_corpus(cfg)
    assert status == "fail" and str(shard) in found
