"""The scripts as they are shipped: bash and shellcheck read them, a real Slurm controller of the
cluster they are meant for accepts them, and refuses what does not fit."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm.cluster import Cluster

SCRIPTS = sorted((ROOT / "slurm").glob("*.s*"))
BATCH = [script for script in SCRIPTS if script.suffix == ".sbatch"]
PRETRAIN = str(ROOT / "slurm" / "pretrain.sbatch")


@pytest.fixture(scope="module")
def big() -> Iterator[Cluster]:
    """The cluster of the paper's run: 16 nodes of 8 GPUs. Nothing runs on it."""
    with Cluster(nodes=16, gpus=8, controller_only=True) as cluster:
        yield cluster


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_and_shellcheck_find_nothing(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck: apt-get install shellcheck")
    done = subprocess.run(
        ["shellcheck", "--external-sources", script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_a_script_is_short_and_explains_itself(script: Path) -> None:
    lines = script.read_text().splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))]
    assert len(lines) <= 80 and lines[0] == "#!/bin/bash"
    assert f"slurm/{script.name} " in "\n".join(header)  # a command to copy
    assert any("Needs:" in line for line in header) and any("site.env" in line for line in header)
    # Slurm ignores, without a word, what stands after the first command.
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_a_128_gpu_cluster_accepts_it(script: Path, big: Cluster) -> None:
    done = big.run("sbatch", "--test-only", str(script), "CONFIG")
    assert done.returncode == 0, done.stderr
    if script.name == "pretrain.sbatch":
        assert "1024 processors on nodes 127.0.0.[1-16]" in done.stderr


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--nodes=17", "Node count specification invalid"),
        ("--gpus-per-node=9", "Requested node configuration is not available"),
        ("--gpus-per-node=h100:8", "Requested node configuration is not available"),
        ("--partition=absent", "invalid partition specified: absent"),
        ("--time=8-00:00:00", "Requested time limit is invalid"),
        ("--signal=B:NOPE@60", "Invalid --signal specification"),
    ],
    ids=lambda value: value.split("=")[0].strip("-") if value.startswith("--") else "",
)
def test_a_request_that_cannot_be_met_is_refused(option: str, says: str, big: Cluster) -> None:
    done = big.run("sbatch", "--test-only", option, PRETRAIN, "CONFIG")
    assert done.returncode != 0
    assert says in done.stderr, done.stderr


def test_steps_of_a_job_get_its_cpus_per_task(cluster: Cluster, tmp_path: Path) -> None:
    """Which srun does not take over by itself since Slurm 22.05."""
    script, log = tmp_path / "job", tmp_path / "log"
    script.write_text("#!/bin/bash\n. slurm/common.sh\nsrun env | grep ^SLURM_CPUS_PER_TASK\n")
    options = ["--ntasks=1", "--cpus-per-task=3", f"--chdir={ROOT}", f"--output={log}"]
    cluster.wait(cluster.submit(*options, script))
    assert log.read_text() == "SLURM_CPUS_PER_TASK=3\n"
