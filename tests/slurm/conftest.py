"""One small cluster for all tests that run jobs, and one run to compare their losses with."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ext.jobs import journal
from tests.conftest import ROOT, metrics, pretrain
from tests.slurm.cluster import ACTIVE, Cluster, missing_programs

NODES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
STEPS = 80


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.slurm)
        if missing := missing_programs():
            reason = (
                f"needs {', '.join(missing)}: apt-get install slurmctld slurmd munge shellcheck"
            )
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three nodes: two to train on and a spare one."""
    with Cluster(nodes=len(NODES), gpus=2) as started:
        started.environment["OMP_NUM_THREADS"] = "1"
        # As on a cluster where the project's environment is the activated one.
        python = Path(sys.executable).parent
        started.environment["PATH"] = f"{python}:{started.environment['PATH']}"
        started.environment["HEALTH_CHECK"] = "no"  # its test asks for it
        yield started


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A config of a run of under a minute on two ranks."""
    file = tmp_path_factory.mktemp("training") / "tiny.yaml"
    file.write_text(
        f"""\
model: {{num_layers: 2, hidden_size: 64, ffn_hidden_size: 176, num_heads: 4, vocab_size: 512}}
rope: {{base: 1e4}}
data: {{num_workers: 0, corpora: {{stdlib: {{path: {corpus}}}}}}}
training: {{sequence_length: 64, global_batch_size: 8, micro_batch_size: 2, steps: {STEPS}}}
optimizer: {{lr: 1e-3}}
schedule: {{type: constant}}
precision: {{dtype: fp32}}
checkpoint: {{interval: 20}}
logging: {{interval: 1}}
"""
    )
    return file


@pytest.fixture(scope="session")
def reference(training: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """What each step of that run gives when nothing interrupts it and no Slurm is near."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    pretrain(training, f"training.run_dir={run_dir}", processes=2)
    return numbers(run_dir)


def numbers(run_dir: Path) -> list[tuple]:
    """Every number of a run that does not depend on the clock."""
    names = ("step", "loss", "grad_norm", "lr", "validation_loss")
    return [tuple(record.get(name) for name in names) for record in metrics(run_dir)]


def sbatch(cluster: Cluster, run_dir: Path, *arguments: object, options: tuple = ()) -> str:
    """Submit the shipped script on two nodes without GPUs, one rank each, from the repository."""
    shape = ["--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1", f"--chdir={ROOT}"]
    log = f"--output={run_dir.parent}/%j.out"
    settings = [f"training.run_dir={run_dir}"]
    script = ROOT / "slurm" / "pretrain.sbatch"
    return cluster.submit(*shape, log, *options, script, *arguments, *settings)


def log_of(run_dir: Path, job: str) -> str:
    return (run_dir.parent / f"{job}.out").read_text()


def wait_for_life(cluster: Cluster, run_dir: Path, job: str, restart: int) -> None:
    """Until the job has begun again so many times, and wrote so."""
    deadline = time.monotonic() + 240
    while not any(life.job == job and life.restart >= restart for life in journal.read(run_dir)):
        assert time.monotonic() < deadline, log_of(run_dir, job)
        time.sleep(0.05)


def wait_for_step(cluster: Cluster, run_dir: Path, job: str, step: int) -> None:
    """Until metrics.jsonl tells of the step."""
    file, deadline = run_dir / "metrics.jsonl", time.monotonic() + 240
    while not (file.is_file() and f'"step": {step},' in file.read_text()):
        state = cluster.job(job)["JobState"]
        assert state in ACTIVE, (state, log_of(run_dir, job))
        assert time.monotonic() < deadline, log_of(run_dir, job)
        time.sleep(0.02)
