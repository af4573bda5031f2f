"""The shipped slurm/pretrain.sbatch on a real Slurm: it trains, and goes on whatever ends it."""

from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import log_of, numbers, sbatch, wait_for_step


def finish(cluster: Cluster, run_dir: Path, job: str) -> dict[str, str]:
    fields = cluster.wait(job)
    assert fields["JobState"] == "COMPLETED" and fields["ExitCode"] == "0:0", log_of(run_dir, job)
    return fields


def test_two_nodes_give_the_losses_of_a_plain_run(
    cluster: Cluster, training: Path, reference: list[tuple], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = sbatch(cluster, run_dir, training)
    fields = finish(cluster, run_dir, job)
    assert fields["Restarts"] == "0"
    assert numbers(run_dir) == reference


def test_signal_saves_requeues_and_goes_on(
    cluster: Cluster, training: Path, reference: list[tuple], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = sbatch(cluster, run_dir, training)
    wait_for_step(cluster, run_dir, job, 13)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    fields = finish(cluster, run_dir, job)
    assert fields["Restarts"] == "1"
    assert numbers(run_dir) == reference
