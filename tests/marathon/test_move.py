"""A run goes from machine to machine: by folder, by OpenSSH's server, by an S3 server; and what may happen on the way."""

import getpass
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from ledger.record import Ledger
from marathon.move import move
from marathon.places import Place
from marathon.stages import open_run
from model.weights import file_sha256, list_checkpoints, manifest_sha256, read_manifest, verify_files
from tests.marathon.conftest import SMALL, Command
from tests.marathon.servers import s3_server, ssh_server


@pytest.fixture(scope="module")
def sftp(tmp_path_factory):
    if os.geteuid() and not Path("/usr/sbin/sshd").exists():
        pytest.skip("a server for SSH: root installs one")
    with ssh_server(tmp_path_factory.mktemp("ssh")) as (url, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield url


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as (url, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield url


@pytest.fixture
def lumi(finished, tmp_path):
    """Scratch folder with the run as a kill between steps 4 and 8 leaves it."""
    whole, _ = finished
    scratch = tmp_path / "lumi"
    run = scratch / "runs" / "whole"
    skipped = shutil.ignore_patterns("step-000000008*", "release", "report.html", "logs")
    shutil.copytree(whole, run, ignore=skipped)
    shutil.copytree(whole.parents[1] / "corpora", scratch / "corpora")
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    n = next(i for i, line in enumerate(lines) if '"event": "checkpoint"' in line and json.loads(line)["step"] == 4)
    (run / "ledger.jsonl").write_text("".join(lines[: n + 1]))
    return scratch


def test_a_run_goes_through_disk_ssh_and_s3_and_ends_as_its_twin(lumi, finished, sftp, s3, tmp_path, capsys):
    disk, server, leonardo = (tmp_path / name for name in ("disk", "server", "leonardo"))
    move(str(lumi / "runs" / "whole"), str(disk))
    shutil.rmtree(lumi)
    move(str(disk / "runs" / "whole"), f"{sftp}{server}")
    shutil.rmtree(disk)
    capsys.readouterr()
    move(str(server), f"{s3}/ends")
    assert '\n  marathon move s3://bucket/ends --to "${MARATHON_SCRATCH:-scratch}"\n' in capsys.readouterr().out
    shutil.rmtree(server)
    move(f"{s3}/ends/runs/whole", str(leonardo))
    told = capsys.readouterr().out
    assert f"\n  export MARATHON_SCRATCH={leonardo}\n" in told
    arguments = shlex.split(told.partition("\n  marathon run ")[2].splitlines()[0])
    assert arguments == [*SMALL, "name=whole"]

    run = leonardo / "runs" / "whole"
    listed = json.loads((run / "moved.json").read_text())["files"]
    there = {str(p.relative_to(leonardo)) for p in leonardo.rglob("*") if p.is_file()} - {"runs/whole/moved.json"}
    assert there == set(listed)
    for name, file in listed.items():
        assert file == {"n_bytes": (leonardo / name).stat().st_size, "sha256": file_sha256(leonardo / name)}
    assert [p.name for p in list_checkpoints(run)] == ["step-000000004"]
    hops = [record for record in Ledger(run).read() if record["event"] in ("moved", "arrived")]
    assert [hop["event"] for hop in hops] == ["moved", "arrived"] * 3 + ["arrived"]
    assert hops[2]["to"] == hops[3]["at"] == f"{sftp}{server}"
    assert hops[-1]["from"] == "s3://bucket/ends"

    # Neither the old scratch folder nor the text is on this machine; one process instead of two, another stage.
    other = ("cluster.devices_per_node=1", "engine.zero_stage=2", "corpus.sources.udhr.path=/nowhere/text.jsonl")
    marathon = Command(leonardo)
    status, output = marathon("data", *arguments, *other)
    assert status == 0, output
    assert output.splitlines()[-1] == "data: complete, skipped"
    status, output = marathon("train", *arguments, *other)
    assert status == 0, output
    assert "resuming at step 4" in output
    assert "was moved" not in output
    twin, _ = finished
    ours, theirs = (read_manifest(list_checkpoints(r)[-1])["progress"] for r in (run, twin))
    for fact in ("step", "order_hash", "consumed"):
        assert ours[fact] == theirs[fact]
    assert ours["order_hash"]


def test_a_move_cut_off_or_killed_within_a_file_goes_on_and_sends_no_finished_file_again(lumi, sftp, tmp_path):
    big = with_a_large_file(lumi / "runs/whole/checkpoints/step-000000004", n_bytes=128 << 20)
    leonardo = tmp_path / "leonardo"
    arriving = leonardo / "runs/whole/checkpoints/.arriving-step-000000004" / f".arriving-{big.name}"
    with started_move(lumi / "runs" / "whole", f"{sftp}{leonardo}") as mover:
        wait_for_half(arriving, mover)
        (server,) = (pid for pid in children(os.getpid()) if Path(f"/proc/{pid}/comm").read_text() == "sshd\n")
        os.kill(max(children(server)), signal.SIGKILL)  # the youngest session; this process may have one too
        output, _ = mover.communicate(timeout=60)
    assert mover.returncode == 1
    assert output.startswith(f"error: {sftp}{leonardo}/runs/whole/checkpoints/"), "the network breaks: one message"
    with started_move(lumi / "runs" / "whole", f"{sftp}{leonardo}") as mover:
        wait_for_half(arriving, mover)
        mover.send_signal(signal.SIGKILL)
    assert arriving.stat().st_size < 128 << 20
    run = leonardo / "runs" / "whole"
    assert not list(run.glob("checkpoints/step-*")), "half a checkpoint is none"
    assert not {"config.yaml", "ledger.jsonl", "moved.json"} & {p.name for p in run.iterdir()}, "half a run is none"
    with pytest.raises(UserError, match="no run whole"):
        move(str(run), str(tmp_path / "elsewhere"))
    finished_files = {p.stat().st_ino for p in leonardo.rglob("*") if p.is_file() and p.name[0] != "."}
    assert len(finished_files) > 20

    move(str(lumi / "runs" / "whole"), f"{sftp}{leonardo}")
    assert finished_files <= {p.stat().st_ino for p in leonardo.rglob("*")}
    verify_files(run / "checkpoints" / "step-000000004")
    assert (run / "checkpoints/step-000000004" / big.name).stat().st_size == 128 << 20
    assert not [p for p in leonardo.rglob(".*") if p.name.startswith((".arriving", ".moving"))]
    assert [r["event"] for r in Ledger(lumi / "runs/whole").read()].count("moved") == 1


def test_a_damaged_shard_is_named_before_anything_is_sent(lumi, tmp_path):
    shard = next(lumi.glob("corpora/*/shards/*.train.*.bin"))
    flip_a_byte(shard)
    with pytest.raises(UserError, match=re.escape(shard.name)):
        move(str(lumi / "runs" / "whole"), str(tmp_path / "leonardo"))
    assert not [p for p in tmp_path.glob("leonardo/**/*") if p.is_file()]
    assert Ledger(lumi / "runs" / "whole").last("moved") is None


def test_of_checkpoints_the_newest_whole_one_goes(lumi, tmp_path, capsys):
    damaged = lumi / "runs/whole/checkpoints/step-000000004/rank-00001.safetensors"
    flip_a_byte(damaged)
    move(str(lumi / "runs" / "whole"), str(tmp_path / "leonardo"))
    assert f"not moved: {damaged}" in capsys.readouterr().out
    assert [p.name for p in list_checkpoints(tmp_path / "leonardo/runs/whole")] == ["step-000000000"]


def test_what_a_pack_lost_or_changed_is_named_and_gets_no_name(lumi, s3, tmp_path):
    import s3fs

    pack, leonardo = f"{s3}/damaged", tmp_path / "leonardo"
    move(str(lumi / "runs" / "whole"), pack)
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    path = "bucket/damaged/runs/whole/checkpoints/step-000000004/rank-00000.safetensors"
    content = bytearray(fs.cat_file(path))
    content[len(content) // 2] ^= 1
    fs.pipe_file(path, bytes(content))
    with pytest.raises(UserError, match=r"rank-00000\.safetensors arrived with .* sha256"):
        move(pack, str(leonardo))
    assert not list(leonardo.rglob("*rank-00000*"))
    fs.rm(path)
    with pytest.raises(UserError, match=r"rank-00000\.safetensors has no bytes, the list says \d+"):
        move(pack, str(leonardo))
    fs.rm("bucket/damaged/runs/whole/moved.json")
    with pytest.raises(UserError, match=r"moved\.json is not there"):
        move(pack, str(leonardo))


def test_a_corpus_that_stands_over_there_is_neither_sent_nor_replaced(lumi, tmp_path, capsys):
    leonardo = tmp_path / "leonardo"
    shutil.copytree(lumi / "corpora", leonardo / "corpora")
    sidecar, manifest = (
        next(leonardo.glob(f"corpora/*/{name}")) for name in ("shards/de*train*parquet", "manifest.json")
    )
    # Another version of a library wrote it; its own manifest says so, and the tokens are the same.
    known = file_sha256(sidecar)
    sidecar.write_bytes(sidecar.read_bytes() + b"\0")
    manifest.write_text(manifest.read_text().replace(known, file_sha256(sidecar)))
    before = {p: p.stat().st_mtime_ns for p in (leonardo / "corpora").rglob("*")}
    move(str(lumi / "runs" / "whole"), str(leonardo))
    assert {p: p.stat().st_mtime_ns for p in (leonardo / "corpora").rglob("*")} == before
    assert json.loads((leonardo / "runs/whole/moved.json").read_text())["files"][str(sidecar.relative_to(leonardo))][
        "sha256"
    ] == file_sha256(sidecar)
    capsys.readouterr()
    move(str(lumi / "runs" / "whole"), str(leonardo))
    assert ", 0.0 MB of " in capsys.readouterr().out, "nothing is sent twice"

    # Files that a site has purged are sent again, and a corpus with other tokens is refused.
    sidecar.unlink()
    move(str(lumi / "runs" / "whole"), str(leonardo))
    assert sidecar.exists()
    tokens = json.loads(manifest.read_text())
    tokens["shards"][0]["sha256"][".bin"] = "0" * 64
    manifest.write_text(json.dumps(tokens))
    with pytest.raises(UserError, match="tokens and the tokenizer it began with"):
        move(str(lumi / "runs" / "whole"), str(leonardo))


def test_a_run_that_went_on_over_there_is_not_overwritten_and_comes_back(lumi, tmp_path):
    leonardo = tmp_path / "leonardo"
    move(str(lumi / "runs" / "whole"), str(leonardo))
    move(str(lumi / "runs" / "whole"), str(leonardo))
    Ledger(leonardo / "runs" / "whole").append("train_start", step=4)
    with pytest.raises(UserError, match="history of its own: `train_start`"):
        move(str(lumi / "runs" / "whole"), str(leonardo))
    move(str(leonardo / "runs" / "whole"), str(lumi))
    assert Ledger(lumi / "runs" / "whole").last("arrived")["from"].endswith("/leonardo")


def test_the_old_place_says_once_that_the_run_was_moved(lumi, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MARATHON_SCRATCH", str(lumi))
    move("whole", str(tmp_path / "leonardo"))
    capsys.readouterr()
    open_run([*SMALL, "name=whole"])
    warnings = [line for line in capsys.readouterr().err.splitlines() if "was moved" in line]
    assert warnings == [
        f"warning: run whole was moved to {Place(str(tmp_path / 'leonardo'))}; what is done here stays here"
    ]
    Ledger(lumi / "runs" / "whole").append("train_start", step=4)
    open_run([*SMALL, "name=whole"])
    assert "was moved" not in capsys.readouterr().err


def test_no_password_is_written_or_told(lumi, sftp, tmp_path, capfd):
    leonardo = tmp_path / "leonardo"
    url = sftp.replace("//", f"//{getpass.getuser()}:geheim@")
    move(str(lumi / "runs" / "whole"), f"{url}{leonardo}")
    with pytest.raises(UserError) as error:
        move(str(lumi / "runs" / "whole"), "sftp://somebody:geheim@127.0.0.1:9/pack")
    told = capfd.readouterr()
    assert "sftp://127.0.0.1" in told.out
    assert "geheim" not in told.out + told.err + str(error.value)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"geheim" in p.read_bytes()]


def test_a_full_disk_is_told_and_leaves_no_half_file(lumi, tmp_path):
    """The limit on the size of a file stands for the end of a quota: the kernel refuses in the middle of a write."""
    leonardo = tmp_path / "leonardo"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(
            UserError, match=r"rank-00000\.safetensors: .*File too large(.|\n)*has space(.|\n)*make room"
        ):
            move(str(lumi / "runs" / "whole"), str(leonardo))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(leonardo.rglob("*rank-*"))
    move(str(lumi / "runs" / "whole"), str(leonardo))
    verify_files(leonardo / "runs/whole/checkpoints/step-000000004")


@pytest.mark.parametrize(
    ("to", "found", "rule", "repair"),
    [
        ("gopher://host/pack", "gopher:// is not known", "another URL that fsspec knows", "sftp://HOST/FOLDER"),
        ("login.leonardo.cineca.it:/scratch", "login.leonardo", "a folder or a URL", "sftp://HOST/FOLDER"),
        ("sftp://127.0.0.1:9/pack", "sftp://127.0.0.1:9/pack", "the host answers", "its name and port"),
        ("s3://no-such-bucket/pack", "does not exist", "a bucket is made before", "make the bucket"),
        ("/sys/marathon", "not permitted", "you may write where", "--to a folder of yours"),
        ("{sftp}/sys/marathon", "No such file", "you may write where", "--to a folder of yours"),
        ("{lumi}/runs/whole/config.yaml", "config.yaml", "goes into a folder", "--to a folder"),
    ],
)
def test_why_a_place_refuses_is_told_with_the_rule_and_repair_that_fit(lumi, sftp, s3, to, found, rule, repair):
    """Rights do not bind root; nobody makes a folder in the kernel's own file system."""
    with pytest.raises(UserError) as error:
        move(str(lumi / "runs" / "whole"), to.format(sftp=sftp, lumi=lumi))
    assert found in error.value.found
    assert rule in error.value.rule
    assert repair in error.value.repair


@pytest.mark.parametrize(
    ("environment", "rule", "repair"),
    [
        ({"AWS_ACCESS_KEY_ID": "", "HOME": "/nowhere"}, "S3 has to know who asks", "export AWS_ACCESS_KEY_ID="),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}, "the host answers", "its name and port"),
    ],
)
def test_a_store_that_knows_nobody_or_does_not_answer_is_told_so(lumi, s3, environment, rule, repair):
    marathon = Command(lumi)
    marathon.environment |= environment
    marathon.environment = {name: value for name, value in marathon.environment.items() if value}
    status, output = marathon("move", "whole", "--to", "s3://bucket/pack")
    assert status == 1
    assert output.startswith("error: s3://bucket/pack")
    assert f"rule:   {rule}" in output
    assert repair in output


def test_a_host_that_is_not_known_is_not_trusted(lumi, sftp, tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(os.environ["HOME"], home)
    (home / ".ssh" / "known_hosts").unlink()
    monkeypatch.setenv("HOME", str(home))
    # With a user in it, it is another connection than that of the tests before.
    with pytest.raises(UserError, match=r"Host key is not trusted(.|\n)*log in there once with `ssh`"):
        move(str(lumi / "runs" / "whole"), f"{sftp.replace('//', f'//{getpass.getuser()}@')}{tmp_path}/pack")


def test_a_host_that_does_not_know_you_is_told_from_a_folder_that_is_not_yours(lumi, sftp, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(os.environ["HOME"], home)
    (home / ".ssh" / "id_ed25519").unlink()
    marathon = Command(lumi)
    marathon.environment["HOME"] = str(home)
    status, output = marathon("move", "whole", "--to", f"{sftp}{tmp_path}/pack")
    assert status == 1
    assert "lets in whom it knows by a key" in output
    assert "ssh USER@HOST" in output


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/x", "s3fs"), ("ssh://host/x", "sshfs")])
def test_a_package_that_is_missing_is_named_with_its_installation(lumi, monkeypatch, url, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        move(str(lumi / "runs" / "whole"), url)


def test_a_run_that_is_none_is_answered_with_those_there_are(lumi, tmp_path, monkeypatch):
    monkeypatch.setenv("MARATHON_SCRATCH", str(lumi))
    with pytest.raises(UserError, match=r"no run wohle in .*; there: whole"):
        move("wohle", str(tmp_path / "leonardo"))
    marathon = Command(lumi)
    status, output = marathon("move", "whole", str(tmp_path / "leonardo"))
    assert status == 1
    assert "marathon move RUN --to FOLDER" in output


def started_move(run, to):
    code = "import sys, marathon.cli as c, marathon.move as m; m.LIST_EVERY_S = 0; sys.exit(c.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "move", str(run), "--to", to]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_half(arriving, mover):
    before = arriving.stat().st_ctime_ns if arriving.exists() else 0
    deadline = time.monotonic() + 60
    while not arriving.exists() or arriving.stat().st_size < 4 << 20 or arriving.stat().st_ctime_ns == before:
        assert mover.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def with_a_large_file(checkpoint, n_bytes):
    """Adds a rank's file that takes a while to send."""
    path = checkpoint / "rank-00009.safetensors"
    path.touch()
    os.truncate(path, n_bytes)
    manifest = read_manifest(checkpoint)
    manifest["files"][path.name] = {"sha256": file_sha256(path), "bytes": n_bytes, "fragments": []}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (checkpoint / "manifest.sha256").write_bytes(manifest_sha256((checkpoint / "manifest.json").read_bytes()))
    return path


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
