"""A real Slurm for tests: slurmctld, slurmd and munged as plain processes in a folder of their own.

    with Cluster(nodes=3, gpus=2) as cluster:
        job = cluster.submit("slurm/pretrain.sbatch", "config.yaml")
        cluster.kill_node("127.0.0.2")
        assert cluster.wait(job)["JobState"] == "COMPLETED"

Nodes are called 127.0.0.1, 127.0.0.2, ... so that their names resolve; they share this machine's
ports and files. GPUs are links to /dev/null: asked for, counted and numbered like real ones, and
nothing to compute on. Any user may start one; nothing is left outside the folder.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED"}


def missing_programs() -> list[str]:
    """What has to be installed before a cluster can start."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Cluster:
    """Nodes of 64 CPUs and 1 TB each, on paper; `controller_only` answers --test-only alone."""

    def __init__(self, nodes: int, gpus: int = 0, controller_only: bool = False) -> None:
        self.names = [f"127.0.0.{i + 1}" for i in range(nodes)]
        self.gpus = gpus
        self.controller_only = controller_only
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        # Unix sockets lie in it: the path must be short, and open to all for munged.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.environment = {**kept, "SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": PATH}

    def __enter__(self) -> "Cluster":
        try:
            self._configure()
            run = self.folder / "run"
            self._start(
                "munged", "--foreground", f"--key-file={self.folder}/munge.key",
                f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid",
                f"--seed-file={run}/munged.seed", f"--log-file={run}/munged.log",
            )  # fmt: skip
            self.until((run / "munge.socket").exists, "munged is ready")
            self._start("slurmctld", "-D")
            self.until(lambda: " UP" in self.run("scontrol", "ping").stdout, "slurmctld answers")
            for name in self.names if not self.controller_only else []:
                self.start_node(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes.values()):
            process.kill()
            process.wait()
        self._kill_marked(f"SLURM_CONF={self.folder}/slurm.conf")
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- use

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command that talks to this cluster; nothing is demanded of its exit code."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True)

    def submit(self, *arguments: object) -> str:
        """sbatch; the job's id."""
        done = self.run("sbatch", "--parsable", *map(str, arguments))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`; of an array, those of its first record."""
        lines: list[str] = []

        def answered() -> bool:
            lines[:] = self.run("scontrol", "show", "job", "--oneliner", job).stdout.splitlines()
            return bool(lines)

        self.until(answered, f"scontrol tells of job {job}", 30)
        line = lines[0]
        return dict(re.findall(r"(?:^|\s)([A-Za-z/:]+)=(\S*)", line))

    def wait(self, job: str, timeout: float = 300) -> dict[str, str]:
        """Wait until no part of the job is active; then its fields."""

        def ended() -> bool:
            text = self.run("scontrol", "show", "job", "--oneliner", job).stdout
            states = set(re.findall(r"JobState=(\w+)", text))
            return bool(states) and not ACTIVE & states  # a controller in a hurry answers nothing

        self.until(ended, f"job {job} ends", timeout)
        return self.job(job)

    def configure(self, line: str) -> None:
        """Add a line to slurm.conf and let all daemons read it."""
        with (self.folder / "slurm.conf").open("a") as file:
            file.write(f"{line}\n")
        done = self.run("scontrol", "reconfigure")
        assert done.returncode == 0, done.stderr

    def log(self) -> str:
        """The controller's own words."""
        return (self.folder / "log" / "slurmctld").read_text(errors="replace")

    # -- faults

    def kill_node(self, name: str) -> None:
        """A power cut: slurmd and everything that runs on the node are gone at once."""
        self.processes.pop(name).kill()
        self._kill_marked(f"SLURM_CONF={self.folder}/slurm.conf", f"SLURMD_NODENAME={name}")

    def start_node(self, name: str) -> None:
        """The node boots and registers."""
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        self._start("slurmd", "-D", "-N", name, node=name)

        def registered() -> bool:
            state = self.run("sinfo", "--noheader", f"--nodes={name}", "--format=%T").stdout
            return state.split()[:1] in (["idle"], ["mixed"], ["allocated"])

        self.until(registered, f"{name} registers")

    def rank_pid(self, job: str, rank: int) -> int:
        """Process of one rank of the job's training, as soon as there is one."""
        marks = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}", "SLURM_STEP_NUM_TASKS=2"}
        found: list[int] = []

        def there() -> bool:
            found[:] = [pid for pid, words in _processes(*marks) if "pretrain.py" in words]
            return bool(found)

        self.until(there, f"rank {rank} of job {job} starts")
        return found[0]

    # -- how

    def _configure(self) -> None:
        for name in ("state", "spool", "run", "log", "dev"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for i in range(self.gpus):
            (self.folder / "dev" / f"gpu{i}").symlink_to("/dev/null")
        devices = f"{self.folder}/dev/gpu[0-{self.gpus - 1}]"
        gres = f"NodeName={','.join(self.names)} Name=gpu File={devices}\n"
        (self.folder / "gres.conf").write_text(gres if self.gpus else "")
        # Loaded and never used. Before 23.02 there is no "disabled", and cgroup/v2 wants systemd.
        version = self.run("slurmctld", "-V").stdout.split()[-1]
        newer = tuple(map(int, version.split(".")[:2])) >= (23, 2)
        plugin = "disabled" if newer else "cgroup/v1"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        (self.folder / "slurm.conf").write_text(self._slurm_conf())

    def _slurm_conf(self) -> str:
        base, user = self.folder, os.geteuid()
        controller, *ports = free_ports(len(self.names) + 1)
        # srun listens where the machine's own name points to, and is called back at 127.0.0.1.
        try:
            local = socket.gethostbyname(socket.gethostname()) == "127.0.0.1"
        except OSError:
            local = False
        bind = "NoCtldInAddrAny,NoInAddrAny" if local else "NoCtldInAddrAny"
        # Without a slurmd a node counts as usable only when it sleeps in the cloud.
        state = "CLOUD" if self.controller_only else "UNKNOWN"
        gres = f"Gres=gpu:{self.gpus}" if self.gpus else ""
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=64 "
            f"RealMemory=1000000 State={state} {gres}"
            for name, port in zip(self.names, ports, strict=True)
        )
        # Short waits: cred_expire is how long a requeued job waits to start, MessageTimeout and
        # SlurmdTimeout how long a dead node goes unnoticed.
        return f"""\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
CommunicationParameters={bind}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/run/munge.socket,cred_expire=5
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd-%n.pid
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={base}/log/jobcomp
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
EnforcePartLimits=ALL
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdTimeout=5
MessageTimeout=2
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=86400
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=7-00:00:00 DefMemPerCPU=15625 GraceTime=120 State=UP
PartitionName=main Default=YES PriorityTier=1
PartitionName=urgent PriorityTier=2
"""

    def _start(self, *command: str, node: str | None = None) -> None:
        name = node or command[0]
        mark = {"SLURMD_NODENAME": node} if node else {}
        with (self.folder / "log" / name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env={**self.environment, **mark}, cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def until(self, ready: Callable[[], bool], what: str, timeout: float = 180) -> None:
        """Wait; fails with the controller's last words."""
        deadline = time.monotonic() + timeout
        while not ready():
            assert time.monotonic() < deadline, (
                f"not within {timeout} s: {what}\n{self.log()[-3000:]}"
            )
            time.sleep(0.05)

    def _kill_marked(self, *marks: str) -> None:
        while found := _processes(*marks):
            # Stopped first, so that none notices another's end.
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid, _ in found:
                    try:
                        os.kill(pid, number)
                    except ProcessLookupError:
                        continue
            time.sleep(0.02)


def _environment(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _processes(*marks: str) -> list[tuple[int, list[str]]]:
    """Process ids and command lines of those with all these variables in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        if pid != os.getpid() and set(marks) <= set(_environment(pid).split("\0")):
            try:
                found.append((pid, (entry / "cmdline").read_text().split("\0")))
            except OSError:
                continue
    return found
