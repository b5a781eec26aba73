"""torchrun.sh and slurm.sbatch, run as a user runs them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from clusters import ARGUMENTS, CARD, LAUNCH, block_files, checkpoints, environment, undisturbed, wait_until

TORCHRUN, SBATCH = str(LAUNCH / "torchrun.sh"), str(LAUNCH / "slurm.sbatch")


@pytest.mark.parametrize("script", [TORCHRUN, SBATCH])
def test_shellcheck_finds_nothing(script):
    command = [Path(sys.executable).parent / "shellcheck", script]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "no card; usage:"),
        ([CARD], {"NNODES": 2}, "NNODES is 2: set HEAD=address:port"),
        ([CARD], {"NNODES": 2, "HEAD": "no.such.host.invalid:1"}, "no host no.such.host.invalid is known here"),
        ([CARD, "--modle.blocks", "3"], {}, "did you mean model.blocks?"),
    ],
)
def test_a_mistake_is_one_line_once_and_exit_code_2(arguments, variables, message, tmp_path):
    command = [TORCHRUN, *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment(**variables), capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert not list(tmp_path.iterdir())


def test_after_kill_9_of_a_rank_all_start_again_and_the_end_is_the_same_and_nothing_listens_outside(tmp_path):
    run, log = tmp_path / "runs/dt", tmp_path / "log"
    with log.open("w") as output:
        script = psutil.Popen(
            [TORCHRUN, CARD, *ARGUMENTS], cwd=tmp_path, env=environment(RANKS=2), stdout=output, stderr=subprocess.STDOUT
        )
    wait_until(lambda: checkpoints(run), f"a checkpoint\n{log.read_text()}")
    ranks = {each.environ()["RANK"]: each for each in script.children() if "RANK" in each.environ()}
    heard_at = {port.laddr.ip for each in (script, *ranks.values()) for port in each.net_connections() if not port.raddr}
    ranks["1"].send_signal(signal.SIGKILL)
    assert script.wait(timeout=600) == 0, log.read_text()
    assert "resumes runs/dt/checkpoints/step-" in log.read_text()
    assert block_files(run) == undisturbed()
    assert heard_at == {"127.0.0.1"}


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    """A real Slurm of one node: its configuration file."""
    daemons = ("munged", "slurmctld", "slurmd")
    if missing := [name for name in daemons if not shutil.which(name)]:
        pytest.skip(f"no Slurm here: {', '.join(missing)} not found (Debian: slurmctld, slurmd, slurm-client, munge)")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))  # not pytest's: munge trusts no folder below it
        folder.chmod(0o755)
        key, conf, host = folder / "key", folder / "slurm.conf", socket.gethostname().split(".")[0]
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        ports = []
        for _ in range(2):
            with socket.create_server(("127.0.0.1", 0)) as server:
                ports.append(server.getsockname()[1])
        conf.write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthInfo=socket={folder}/munge,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
KillWait=60
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES
""")

        def start(*command: str) -> None:
            with (folder / f"{command[0]}.log").open("w") as log:
                daemon = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)

        start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge", f"--pid-file={folder}/pid",
              f"--seed-file={folder}/seed")  # fmt: skip
        wait_until((folder / "munge").exists, "munged", 30)
        start("slurmctld", "-D", "-f", str(conf))
        start("slurmd", "-D", "-f", str(conf))
        stack.callback(wait_until, lambda: not call(conf, "squeue", "--noheader"), "no jobs left", 60)
        stack.callback(call, conf, "scancel", "--user=root")
        wait_until(lambda: "idle" in call(conf, "sinfo", "--noheader", "--format=%T"), "a node that is idle", 60)
        yield conf


def call(conf: Path, *command: str) -> str:
    result = subprocess.run(command, env=environment(SLURM_CONF=conf), capture_output=True, text=True, timeout=60)
    return result.stdout


def submit(conf: Path, cwd: Path, *arguments: str) -> str:
    command = ["sbatch", "--parsable", "--ntasks=2", "--output=log", SBATCH, CARD, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment(SLURM_CONF=conf), capture_output=True, text=True, check=True
    ).stdout.strip()


def end(conf: Path, job: str) -> str:
    """What Slurm says of a job that has ended."""
    shown = ["scontrol", "show", "job", job]
    wait_until(lambda: re.search("JobState=(COMPLETED|FAILED|CANCELLED|TIMEOUT)", call(conf, *shown)), f"the end of {job}")
    return call(conf, *shown)


def test_a_slurm_job_requeued_or_stopped_goes_on_and_ends_the_same(slurm, tmp_path):
    """Requeued from outside, as by a preemption; then its ranks get SIGTERM alone, as shortly before the time limit."""
    job = submit(slurm, tmp_path, *ARGUMENTS)
    run, log = tmp_path / f"runs/noprop-{job}", tmp_path / "log"
    for stops, command in enumerate((["scontrol", "requeue"], ["scancel", "--signal=TERM"]), 1):
        there = checkpoints(run)
        wait_until(lambda there=there: checkpoints(run)[-1:] > there[-1:], f"a new checkpoint of {job}")
        call(slurm, *command, job)
        wait_until(lambda stops=stops: log.read_text().count("stopped by SIGTERM") == stops, f"{command} of {job}")
    shown = end(slurm, job)
    assert "JobState=COMPLETED" in shown and "Restarts=2" in shown, shown + log.read_text()
    assert block_files(run) == undisturbed()


def test_a_slurm_job_with_a_mistake_is_not_started_again(slurm, tmp_path):
    job = submit(slurm, tmp_path, "--modle.blocks", "3")
    shown = end(slurm, job)
    assert "JobState=FAILED" in shown and "Restarts=0" in shown and "ExitCode=2:0" in shown, shown
    assert "error: command line: unknown setting modle.blocks; did you mean model.blocks?" in (tmp_path / "log").read_text()
