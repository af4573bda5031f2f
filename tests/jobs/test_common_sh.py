"""slurm/common.sh: a controller that is too busy to answer, and signals at any moment. In place of
Slurm's programs there are scripts that fail as often as a test says; tests/slurm has the real ones.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

FAILING = """\
#!/bin/bash
echo "$(basename "$0") $*" >> {calls}
echo x >> "$0.calls"
[ "$(wc -l < "$0.calls")" -gt {failures} ] && printf '%s' '{answer}' && exit
echo "error: Unable to contact slurm controller (connect failure)" >&2
exit 1
"""
ALWAYS = 1000


class Programs:
    """Commands that a script finds before the real ones."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder / "bin", folder / "calls"
        self.folder.mkdir()
        self.calls.touch()
        self.add("sleep")  # between tries

    def add(self, name: str, failures: int = 0, answer: str = "") -> None:
        file = self.folder / name
        file.write_text(FAILING.format(calls=self.calls, failures=failures, answer=answer))
        file.chmod(0o755)

    def called(self, name: str) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if line.startswith(name)]

    def bash(self, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(script), cwd=ROOT, env=self.environment(), capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip

    def command(self, script: str) -> list[str]:
        return ["bash", "-euo", "pipefail", "-c", f". slurm/common.sh\nbad=''\n{script}"]

    def environment(self) -> dict[str, str]:
        path = f"{self.folder}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "SLURM_JOB_ID": "7"}


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path)


def test_a_job_is_requeued_though_the_controller_is_busy_for_a_while(programs: Programs) -> None:
    programs.add("squeue", failures=2, answer="RUNNING")
    programs.add("scontrol", failures=3, answer="JobId=7 ExcNodeList=n1 NodeList=n2")
    done = programs.bash("requeue 1 n3,n4")
    assert done.returncode == 0, done.stderr
    assert programs.called("scontrol")[-2:] == [
        "scontrol requeue 7",
        "scontrol update JobId=7 ExcNodeList=n1,n3,n4",
    ]
    assert len(programs.called("squeue")) == 3 and len(programs.called("sleep")) == 2 + 3


def test_no_answer_about_its_state_is_not_an_end(programs: Programs) -> None:
    programs.add("squeue", failures=ALWAYS)
    programs.add("scontrol", answer="JobId=7 ExcNodeList=(null) NodeList=n2")
    assert programs.bash("requeue 1 ''").returncode == 0
    assert programs.called("scontrol")[-1] == "scontrol requeue 7"
    assert len(programs.called("squeue")) == 5


def test_a_job_that_could_not_be_requeued_has_failed(programs: Programs) -> None:
    programs.add("squeue", answer="RUNNING")
    programs.add("scontrol", failures=ALWAYS)
    assert programs.bash("requeue 0 ''").returncode == 1


@pytest.mark.parametrize(("code", "ends"), [(0, 1), (3, 3)])
def test_a_job_that_slurm_is_ending_is_left_alone(code: int, ends: int, programs: Programs) -> None:
    programs.add("squeue", answer="COMPLETING")
    programs.add("scontrol")
    assert programs.bash(f"requeue {code} ''").returncode == ends
    assert programs.called("scontrol") == []


# As srun: it answers USR1 by an end of its own, after a while, with a code of its own.
CHILD = """\
import signal, sys, time
def leave(*_):
    time.sleep(0.5)
    sys.exit(7)
signal.signal(signal.SIGUSR1, leave)
print("begun", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_reaches_the_child_whose_own_end_is_waited_for(
    name: str, programs: Programs, tmp_path: Path
) -> None:
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    script = f"""\
trap 'on_signal {name}' {name}
code=0
attend {sys.executable} {child} || code=$?
echo "code $code after $signalled"
"""
    process = subprocess.Popen(
        programs.command(script), cwd=ROOT, env=programs.environment(), stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    process.send_signal(signal.Signals[f"SIG{name}"])
    assert process.communicate(timeout=30)[0].endswith(f"code 7 after {name}\n")


def test_a_signal_that_came_before_the_child_is_not_lost(programs: Programs) -> None:
    script = """\
trap 'on_signal USR1' USR1
kill -USR1 $$
code=0
attend /bin/sleep 60 || code=$?
echo "code $code after $signalled"
"""
    killed_by_it = 128 + signal.SIGUSR1
    assert programs.bash(script).stdout.endswith(f"code {killed_by_it} after USR1\n")
