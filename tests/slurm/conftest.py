"""A real Slurm of two emulated nodes on this machine: munged, slurmctld and a slurmd each in namespaces of their own.

Every daemon is a child of the test process and dies with it. Nodes have their own host name, address, mounts and process
numbers, so whatever a job leaves behind ends with its node. Needs root (namespaces) and Debian's
munge, slurmctld, slurmd, slurm-client, iproute2 and libpmix-dev (for MPI ranks).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODES = {"ctl": "10.77.0.1", "n1": "10.77.0.11", "n2": "10.77.0.12"}
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "ip", "unshare", "nsenter", "setpriv")

CONFIGURATION = """\
ClusterName=trimline
SlurmctldHost=ctl({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
TmpFS={root}/tmp.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
MinJobAge=3600
KillWait=2
SlurmdParameters=config_overrides
NodeName=n[1-2] CPUs=8 CoresPerSocket=8 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """`call` runs a client command on the login node; `submit` and the others are what the tests ask of Slurm."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.env = os.environ | {
            "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def up(self) -> None:
        for directory in ("munge", "state", "spool.n1", "spool.n2", "tmp.n1", "tmp.n2"):
            (self.root / directory).mkdir()
        (self.root / "slurm.conf").write_text(CONFIGURATION.format(root=self.root, address=NODES["ctl"]))
        (self.root / "hosts").write_text("".join(f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **NODES}.items()))
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        places = [f"--{name}-file={self.root}/munge/{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", ["munged", "--foreground", f"--socket={self.root}/munge/socket", *places])
        bridge = f"ip link add br0 type bridge; ip addr add {NODES['ctl']}/24 dev br0; ip link set br0 up"
        self._node("ctl", f"{bridge}; exec slurmctld -D")
        for name in ("n1", "n2"):
            plug_in = f"until ip link show eth0; do sleep 0.02; done; ip addr add {NODES[name]}/24 dev eth0; ip link set eth0 up"
            self._node(name, f"{plug_in}; exec slurmd -D")
            cable = f"ip link add v-{name} type veth peer name eth0 netns {self._inside(name)} && ip link set v-{name} master br0 up"
            self.wait(lambda: self.call("ip", "link", "show", "br0", check=False).returncode == 0, "the bridge")
            subprocess.run(["nsenter", "--net", "--target", self._inside("ctl"), "sh", "-c", cable], check=True)
        self.wait(lambda: self.call("sinfo", "-hN", "-o%T", check=False).stdout.split() == ["idle", "idle"], "two idle nodes")

    def _node(self, name: str, then: str) -> None:
        script = f"hostname {name}; mount --bind {self.root}/hosts /etc/hosts; ip link set lo up; {then}"
        namespaces = ["unshare", "--net", "--uts", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
        self._daemon(name, [*namespaces, "bash", "-c", script])

    def _daemon(self, name: str, command: list[str]) -> None:
        log = (self.root / f"{name}.out").open("wb")
        self.daemons[name] = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], env=self.env, stdout=log, stderr=log)

    def _inside(self, name: str) -> str:
        """Number of the process that is number 1 of a node."""
        children = Path(f"/proc/{self.daemons[name].pid}/task/{self.daemons[name].pid}/children")
        self.wait(lambda: bool(children.read_text().split()), f"{name} to start")
        return children.read_text().split()[0]

    def down(self) -> None:
        for name, daemon in reversed(self.daemons.items()):
            if daemon.poll() is None:
                os.kill(daemon.pid if name == "munged" else int(self._inside(name)), signal.SIGKILL)
            daemon.wait(10)
        shutil.rmtree(self.root, ignore_errors=True)

    def call(self, *command: str, check: bool = True, timeout: float = 60, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", "--net", "--uts", "--mount", "--pid", "--target", self._inside("ctl"), f"--wd={cwd or ROOT}"]
        done = subprocess.run([*enter, *command], env=self.env, capture_output=True, text=True, timeout=timeout)
        assert not check or done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def wait(self, holds: Callable[[], bool], what: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"waited {seconds:g} s for {what}\n{self.tell()}"
            time.sleep(0.05)

    def tell(self) -> str:
        """What a failed wait shows: the queue and the end of every log."""
        logs = [f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in sorted(self.root.glob("*.out"))]
        return "\n".join([self.call("squeue", "-t", "all", check=False).stdout, *logs])

    def job(self, number: str | int) -> dict[str, str]:
        """Slurm's record of a job (`JobState`, `Reason`, `ExitCode`, `Restarts`, `Dependency`, ...)."""
        words = self.call("scontrol", "show", "job", str(number), "--oneliner").stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def resume(self, number: str | int) -> None:
        """Let a requeued job start: Slurm would hold it back for two minutes, and has to end its last run first."""
        self.wait(lambda: self.job(number)["Reason"] == "BeginTime", f"job {number} to be requeued", 60)
        time.sleep(2.5)
        self.call("scontrol", "update", f"jobid={number}", "StartTime=now")

    def ended(self, number: str | int, seconds: float = 60) -> str:
        """The state that a job ends in."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: self.job(number)["JobState"] in over, f"job {number} to end", seconds)
        return self.job(number)["JobState"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    why = f"{', '.join(missing)} not found" if missing else "" if os.geteuid() == 0 else "needs root, to emulate nodes in namespaces"
    if not why and subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        why = "this machine does not let namespaces be made"
    if why and os.environ.get("TRIMLINE_REQUIRE_SLURM") == "1":
        pytest.fail(f"TRIMLINE_REQUIRE_SLURM=1, but no Slurm can be started: {why}")
    if why:
        pytest.skip(f"no Slurm here: {why} (apt-get install munge slurmctld slurmd slurm-client iproute2 libpmix-dev)")
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    root.chmod(0o755)  # munge wants to be reachable by every user, which tmp_path is not
    cluster = Cluster(root)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
