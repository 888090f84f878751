"""A real SLURM on this machine's loopback: a controller, three nodes with two pretend GPUs each, two
partitions.

Everything lies in one folder and ends with the cluster. A node is a slurmd with an address of its own;
`crash` kills it as a power cut would: daemon, step daemons and all that they started.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2", "n3")
ENDS = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY", "DEADLINE"}
GPUS = 2  # of a node; character devices that nobody opens

# What differs from a common cluster serves to be quick (timeouts, scheduling at once) or to run without
# systemd and cgroups. A job in `high` preempts those in `low`, which get their user signal and two minutes.
CONF = """
ClusterName=iomm
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=50000,bf_interval=1
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=low Nodes=n[1-3] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=n[1-3] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.{number} Port={port} CPUs=16 Boards=1 "
    "SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=64000 Gres=gpu:{gpus}"
)


def why_not() -> str | None:
    """The reason why no cluster can be started here, or None."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"no {', '.join(missing)} here (Debian: apt-get install slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "a SLURM of our own needs root"
    with tempfile.TemporaryDirectory() as folder:
        try:
            _pretend_gpu(Path(folder) / "gpu0")
        except PermissionError as error:
            return f"pretend GPUs need the right to make device files: {error}"
    return None


def _pretend_gpu(path: Path) -> None:
    os.mknod(path, 0o20666, os.makedev(1, 3))


class Cluster:
    """Started by entering it.

    Args:
        folder: an empty one.
        variables: added to the environment of all that `run` starts, and so of the jobs.
    """

    def __init__(self, folder: Path, variables: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self._variables = dict(variables or {})
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._hurried: set[tuple[str, str]] = set()

    @property
    def environment(self) -> dict[str, str]:
        """This process's, in which SLURM's commands find the cluster."""
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        return os.environ | self._variables | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def __enter__(self) -> "Cluster":
        self._write_configuration()
        munge = self.folder / "munge"
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "seed")]
        self._start("munged", "munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
        wait_until(lambda: (munge / "socket").exists(), 10, "munged opens its socket")
        self._start("slurmctld", "slurmctld", "-D", "-c", "-f", self.environment["SLURM_CONF"])
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: len(self.idle_nodes()) == len(NODES), 30, "the nodes are idle")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired, AssertionError):
            for job in self.run("squeue", "-h", "-o", "%A").split():
                self.run("scancel", job)
            wait_until(lambda: not self.run("squeue", "-h"), 15, "the jobs end")
        for name in (*NODES, "slurmctld", "munged"):
            daemon = self._daemons[name]
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self._descendants():
            process.kill()

    def run(self, *command: str, check: bool = True) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"])

    def idle_nodes(self) -> list[str]:
        return self.run("sinfo", "-h", "-p", "low", "-N", "-t", "idle", "-o", "%N", check=False).split()

    def crash(self, node: str) -> None:
        """Cut a node's power: all its processes stop before the first one dies, so that none reports
        another's end."""
        victims = [psutil.Process(self._daemons[node].pid), *self._descendants(node)]
        for act in (psutil.Process.suspend, psutil.Process.kill):
            for process in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    act(process)
        self._daemons[node].wait()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by name."""
        words = self.run("scontrol", "-o", "show", "job", job, check=False).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, states: set[str], timeout_s: float) -> str:
        """Wait until a job is in one of these states, and say which. Ending in another fails the test."""
        seen: list[str] = []

        def there() -> bool:
            self.hurry(job)
            now = self.job(job)
            state = f"{now.get('JobState')} {now.get('Reason')}"
            if seen[-1:] != [state]:
                seen.append(state)
            ended = now.get("JobState") in ENDS
            assert not ended or now["JobState"] in states, f"job {job} was {seen}, not {states}"
            return now.get("JobState") in states

        wait_until(there, timeout_s, lambda: f"job {job} is in {states}: it was {seen}")
        return seen[-1].split()[0]

    def hurry(self, job: str) -> None:
        """Let a requeued job, which SLURM has rest for two minutes, start in two seconds. Not at once: a node
        refuses what comes in the second in which it cleared up the job's last life."""
        now = self.job(job)
        life = (job, now.get("Restarts", ""))
        if now.get("Reason") == "BeginTime" and life not in self._hurried:
            self._hurried.add(life)
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2", check=False)

    def _descendants(self, node: str | None = None) -> list[psutil.Process]:
        """What nodes (or one of them) have running: step daemons hold its log open, tasks have its name."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                environment = process.environ()
                here = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                name = environment.get("SLURMD_NODENAME")
                if process.name().startswith("slurmstepd"):
                    logs = {Path(file.path).name for file in process.open_files()}
                    name = next((n for n in NODES if f"slurmd.{n}.log" in logs), None)
                if here and name is not None and node in (None, name):
                    found.append(process)
        return found

    def _start(self, name: str, *command: str) -> None:
        """Start a daemon that ends when the tests do, however they end."""
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                ("setpriv", "--pdeathsig", "TERM", *command),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _write_configuration(self) -> None:
        self.folder.chmod(0o755)
        for name in ("state", "munge", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        ports = free_ports(1 + len(NODES))
        nodes = [
            NODE.format(name=name, number=11 + n, port=ports[1 + n], gpus=GPUS)
            for n, name in enumerate(NODES)
        ]
        conf = CONF.format(folder=self.folder, ports=ports, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(conf)
        for n in range(GPUS):
            _pretend_gpu(self.folder / f"gpu{n}")
        (self.folder / "gres.conf").write_text(
            "AutoDetect=off\nNodeName=n[1-3] Name=gpu Flags=nvidia_gpu_env "
            f"File={self.folder}/gpu[0-{GPUS - 1}]\n"
        )


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


def wait_until(is_so: Callable[[], bool], timeout_s: float, what: str | Callable[[], str]) -> None:
    """Look every 0.1 s until `is_so`; an AssertionError after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end, (
            f"after {timeout_s} s not so: {what if isinstance(what, str) else what()}"
        )
        time.sleep(0.1)
