"""A real Slurm of LUMI's or LEONARDO's shape on this machine: controller, accounting, two nodes.

Everything stands under one temporary folder and listens on loopback; nothing needs systemd or cgroups, and
`stop` ends exactly the processes that belong to that folder. Nodes claim the cores, memory and devices of
the real ones (devices are plain files), so that a job script is accepted, refused and laid out as there;
its processes share what this machine has. Needs root and what `install.sh` installs.

    python tests/cluster/rig.py lumi    # brings one up, says how to use it, ends with Ctrl-C
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ACCOUNT = "project_465000001"
"""The one account whose jobs are accepted."""
MARIADB_TABLES = ("mysql_system_tables.sql", "mysql_system_tables_data.sql")
CRED_EXPIRE_S = 5
"""How long a requeued job waits before it may start again: the least that Slurm takes. 120 where a site sets nothing."""


@dataclass(frozen=True)
class Shape:
    """What a cluster looks like to a job script; limits as published, see docs/clusters.md."""

    name: str
    nodes: tuple[str, str]
    """Nodes that run jobs."""
    other_nodes: str
    """Nodes that only exist, so that large jobs can be asked for."""
    node: str
    """Cores, memory and devices of a node, in the words of slurm.conf."""
    devices_per_node: int
    partitions: tuple[str, ...]
    accounting: tuple[str, ...]
    """Arguments of sacctmgr: QOS, and how the user is associated with accounts."""


LUMI = Shape(
    name="lumi",
    nodes=("nid005001", "nid005002"),
    other_nodes="nid[005003-005040]",
    # Low-noise mode: the first core of each of the 8 CCDs is the system's, so 56 are left.
    node="CPUs=64 Boards=1 SocketsPerBoard=8 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=491520"
    " CpuSpecList=0,8,16,24,32,40,48,56 Gres=gpu:mi250:8",
    devices_per_node=8,
    partitions=(
        "PartitionName=standard-g Nodes=ALL MaxTime=2-00:00:00 MaxNodes=1024 OverSubscribe=EXCLUSIVE",
        "PartitionName=small-g Nodes=ALL MaxTime=3-00:00:00 MaxNodes=4",
        "PartitionName=dev-g Nodes=ALL MaxTime=03:00:00 MaxNodes=32",
    ),
    accounting=(
        # A user's default account takes no jobs, which is why a job without --account "violates policy".
        "add account none",
        f"add account {ACCOUNT}",
        "add user root account=none maxsubmitjobs=0",
        f"add user root account={ACCOUNT}",
        "modify user root set defaultaccount=none",
    ),
)
LEONARDO = Shape(
    name="leonardo",
    nodes=("lrdn0001", "lrdn0002"),
    other_nodes="lrdn[0003-0270]",
    node="CPUs=32 Boards=1 SocketsPerBoard=1 CoresPerSocket=32 ThreadsPerCore=1 RealMemory=514000 Gres=gpu:a100:4",
    devices_per_node=4,
    partitions=(
        "PartitionName=boost_usr_prod Nodes=ALL MaxTime=1-00:00:00 QOS=boost_usr_prod"
        " AllowQos=normal,boost_qos_dbg,boost_qos_bprod",
        "PartitionName=lrd_all_serial Nodes=lrdn0001 MaxTime=04:00:00",
    ),
    accounting=(
        "add qos boost_usr_prod",
        "modify qos normal set maxtresperjob=node=64 flags=denyonlimit",
        "add qos boost_qos_dbg maxtresperjob=node=2 maxwall=00:30:00 priority=80 flags=denyonlimit",
        "add qos boost_qos_bprod mintresperjob=node=65 maxtresperjob=node=256 priority=60 flags=denyonlimit",
        # A user's default account is for another partition, so that a job without --account fits none.
        "add account none",
        f"add account {ACCOUNT}",
        "add user root account=none partition=lrd_all_serial",
        f"add user root account={ACCOUNT} qos=normal,boost_qos_dbg,boost_qos_bprod defaultqos=normal",
        "modify user root set defaultaccount=none",
    ),
)
SHAPES = {shape.name: shape for shape in (LUMI, LEONARDO)}


class Rig:
    """One cluster; `start` returns when its nodes are idle, `stop` leaves neither processes nor files."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.root = Path(tempfile.mkdtemp(prefix=f"marathon-{shape.name}-"))
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.conf = self.root / "slurm.conf"
        self._ports = dict(zip(("controller", "accounting", "database", *shape.nodes), _free_ports(5), strict=True))

    def env(self, **more: str) -> dict[str, str]:
        """Environment in which Slurm's commands mean this cluster."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return kept | {"SLURM_CONF": str(self.conf)} | more

    def run(self, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs a command against this cluster."""
        done = subprocess.run(
            command, env=self.env(**env), cwd=self.root / "submit", capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def state(self, job: str) -> str:
        """State of a job, such as PENDING or COMPLETED."""
        fields = self.run("scontrol", "show", "job", "--oneliner", job).stdout.split()
        return next(f.removeprefix("JobState=") for f in fields if f.startswith("JobState="))

    def submit(self, *arguments: str, **env: str) -> str:
        """Submits with sbatch from the folder ROOT/submit; returns the job's number."""
        return self.run("sbatch", "--parsable", *arguments, **env).stdout.strip()

    def newest_job(self) -> str:
        """The number of the job submitted last."""
        return max(self.run("squeue", "-h", "-t", "all", "-o", "%A").stdout.split(), key=int)

    def wait_until_ended(self, job: str, timeout_s: float) -> None:
        """Returns when a job is neither waiting nor running."""
        going_on = {"PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING"}
        self.wait_for(f"the end of job {job}", lambda: self.state(job) not in going_on, timeout_s)

    def log_of_failed_job(self, script: str, *options: str, arguments: tuple[str, ...], **env: str) -> str:
        """Submits a job that ought to fail at once; returns what it wrote."""
        job = self.submit("--output=%j.log", *options, script, *arguments, **env)
        self.wait_until_ended(job, timeout_s=60)
        log = (self.root / "submit" / f"{job}.log").read_text()
        if self.state(job) != "FAILED":
            raise AssertionError(f"job {job} is {self.state(job)}\n{log}")
        return log

    def wait_for(self, what: str, holds: Callable[[], bool], timeout_s: float = 30) -> None:
        """Returns when `holds` does; raises with the daemons' last words where it never does."""
        end = time.monotonic() + timeout_s
        while not holds():
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > end:
                raise RuntimeError(f"{what}: not after {timeout_s} s; ended: {dead}\n{self.last_words()}")
            time.sleep(0.1)

    def last_words(self, lines: int = 8) -> str:
        """The end of each daemon's log."""
        logs = sorted((self.root / "log").iterdir())
        return "\n".join(f"--- {p.name}\n" + "\n".join(p.read_text().splitlines()[-lines:]) for p in logs)

    def start(self) -> None:
        """Brings the cluster up, in the order in which the daemons need one another."""
        self.root.chmod(0o755)
        for folder in ("log", "state", "spool", "dev", "database", "submit"):
            (self.root / folder).mkdir()
        for i in range(self.shape.devices_per_node):
            (self.root / "dev" / f"gpu{i}").touch()
        self._write_configs()
        self._start_munge()
        self._start_database()
        self._start_daemon("slurmdbd", "slurmdbd", "-D")
        self.wait_for("accounting", lambda: self.run("sacctmgr", "-n", "list", "cluster", check=False).returncode == 0)
        for arguments in (f"add cluster {self.shape.name}", *self.shape.accounting):
            self.run("sacctmgr", "-i", *arguments.split())
        self._start_daemon("slurmctld", "slurmctld", "-D")
        for node in self.shape.nodes:
            self.start_node(node)
        self.wait_for("idle nodes", lambda: self._idle_nodes() == set(self.shape.nodes))

    def start_node(self, node: str) -> None:
        """Starts the daemon of one node, also again after `kill_node`."""
        (self.root / "spool" / node).mkdir(exist_ok=True)
        self._start_daemon(node, "slurmd", "-D", "-N", node, SLURMD_NODENAME=node)

    def kill_node(self, node: str) -> None:
        """A node dies: its daemon and every process of a job on it, at once; the site's monitoring reports it."""
        pids = list(self._pids(f"SLURMD_NODENAME={node}"))
        for number in (signal.SIGSTOP, signal.SIGKILL):  # none may live to tell how another died
            for pid in pids:
                _send(pid, number)
        self.daemons.pop(node).wait()
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=died")  # Slurm would take 40 s

    def kill_rank(self, job: str, rank: int) -> None:
        """SIGKILL for one rank of a job; its loaders, which have its environment too, are its children."""
        pids = set(self._pids(f"SLURM_JOB_ID={job}", f"RANK={rank}"))
        for pid in pids:
            if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) not in pids:
                _send(pid, signal.SIGKILL)

    def kill_batch_script(self, job: str) -> None:
        """SIGKILL for the shell that runs the job's script."""
        script = f"job{int(job):05d}/slurm_script"
        for pid in self._pids(f"SLURM_JOB_ID={job}"):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if len(words) > 1 and words[1].endswith(script):
                _send(pid, signal.SIGKILL)

    def kill_job(self, job: str) -> None:
        """SIGKILL for every process of a job, as where its memory is not enough."""
        for pid in list(self._pids(f"SLURM_JOB_ID={job}")):
            _send(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Ends every process of this cluster, jobs and steps included, and removes its folder."""
        for daemon in self.daemons.values():
            daemon.kill()
        for pid in self._pids():
            _send(pid, signal.SIGKILL)
        for daemon in self.daemons.values():
            daemon.wait()
        self.daemons.clear()
        shutil.rmtree(self.root, ignore_errors=True)

    def _idle_nodes(self) -> set[str]:
        lines = self.run("sinfo", "-h", "-N", "-o", "%N %t", check=False).stdout.split("\n")
        return {name for name, _, state in (line.partition(" ") for line in lines) if state == "idle"}

    def _start_daemon(self, name: str, *command: str, **env: str) -> None:
        with (self.root / "log" / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command,
                env=self.env(**env),
                cwd=self.root,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                preexec_fn=_die_with_parent,
            )

    def _start_munge(self) -> None:
        key, sock = self.root / "munge.key", self.root / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"key-file": key, "socket": sock, "pid-file": self.root / "munge.pid", "seed-file": self.root / "seed"}
        self._start_daemon(
            "munged", "munged", "--foreground", "--force", *(f"--{option}={path}" for option, path in files.items())
        )
        self.wait_for("munge", sock.exists)

    def _start_database(self) -> None:
        """MariaDB without users and without durability: it forgets everything at `stop` anyway."""
        folder, port = self.root / "database", self._ports["database"]
        options = [
            "mariadbd",
            "--no-defaults",
            "--user=root",
            f"--datadir={folder}",
            "--innodb-log-file-size=8M",
            "--innodb-buffer-pool-size=32M",
            "--innodb-flush-log-at-trx-commit=0",
        ]
        tables = "".join(Path("/usr/share/mysql", name).read_text() for name in MARIADB_TABLES)
        subprocess.run(
            [*options, "--bootstrap"],
            input=f"create database mysql;\nuse mysql;\n{tables}".encode(),
            check=True,
            capture_output=True,
        )
        address = (f"--bind-address=127.0.0.1 --port={port} --socket={folder}/socket --pid-file={folder}/pid").split()
        self._start_daemon("mariadbd", *options, "--skip-grant-tables", *address)
        self.wait_for("database", lambda: _answers(port))

    def _write_configs(self) -> None:
        shape, root, ports = self.shape, self.root, self._ports
        nodes = [f"NodeName={n} NodeAddr=127.0.0.1 Port={ports[n]} {shape.node}" for n in shape.nodes]
        self.conf.write_text(
            SLURM_CONF.format(
                name=shape.name,
                host=socket.gethostname().split(".")[0],
                root=root,
                cred_expire_s=CRED_EXPIRE_S,
                controller_port=ports["controller"],
                accounting_port=ports["accounting"],
            )
            + "\n".join(
                [*nodes, f"NodeName={shape.other_nodes} NodeAddr=127.0.0.1 State=DOWN {shape.node}", *shape.partitions]
            )
            + "\n"
        )
        kind = shape.node.rpartition("gpu:")[2].split(":")[0]
        (root / "gres.conf").write_text(f"Name=gpu Type={kind} File={root}/dev/gpu[0-{shape.devices_per_node - 1}]\n")
        accounting = root / "slurmdbd.conf"
        accounting.write_text(
            SLURMDBD_CONF.format(root=root, port=ports["accounting"], database_port=ports["database"])
        )
        accounting.chmod(0o600)

    def _pids(self, *variables: str) -> Iterator[int]:
        """Processes of this cluster, other than this one, that were started with all these variables."""
        wanted = {variable.encode() for variable in (f"SLURM_CONF={self.conf}", *variables)}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = set((process / "environ").read_bytes().split(b"\0"))
                if wanted <= environment and int(process.name) != os.getpid():
                    yield int(process.name)


SLURM_CONF = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthInfo=socket={root}/munge.socket,cred_expire={cred_expire_s}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting_port}
AccountingStoragePass={root}/munge.socket
AccountingStorageEnforce=associations,limits,qos
EnforcePartLimits=ALL
JobRequeue=1
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
# No cgroups in a container. Masks reach the tasks as variables; they are not applied, the host has too few cores.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
MpiDefault=none
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
"""
SLURMDBD_CONF = """\
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
AuthInfo=socket={root}/munge.socket
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=root
PidFile={root}/slurmdbd.pid
"""


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a killed test run leaves no daemons


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _main(name: str) -> None:
    rig = Rig(SHAPES[name])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        began = time.monotonic()
        rig.start()
        print(f"{name} is up after {time.monotonic() - began:.1f} s; in another shell:\n  export SLURM_CONF={rig.conf}")
        print(f"  sbatch --account={ACCOUNT} slurm/{name}.sh experiment=smoke\nlogs: {rig.root}/log; Ctrl-C ends it")
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        rig.stop()


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in SHAPES:
        sys.exit(f"usage: python tests/cluster/rig.py {' | '.join(SHAPES)}")
    _main(sys.argv[1])
