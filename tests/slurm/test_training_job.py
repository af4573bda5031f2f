"""The shipped slurm/pretrain.sbatch on a real Slurm: it trains, and goes on whatever ends it."""

import os
import signal
from pathlib import Path

from megatron_ext.checkpoint.manifest import find_checkpoints
from megatron_ext.jobs import journal
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import (
    NODES,
    log_of,
    numbers,
    sbatch,
    wait_for_life,
    wait_for_step,
)


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


def test_dead_node_requeue_from_outside_and_crashed_rank_cost_only_steps(
    cluster: Cluster, training: Path, reference: list[tuple], tmp_path: Path
) -> None:
    """One job meets all three, one after the other, and still ends as if nothing had happened."""
    run_dir = tmp_path / "run"
    job = sbatch(cluster, run_dir, training)

    wait_for_step(cluster, run_dir, job, 23)
    cluster.kill_node(NODES[1])
    wait_for_life(cluster, run_dir, job, 1)
    wait_for_step(cluster, run_dir, job, 33)
    assert cluster.job(job)["NodeList"] == "127.0.0.[1,3]"
    cluster.start_node(NODES[1])

    cluster.run("scontrol", "requeue", job)
    wait_for_life(cluster, run_dir, job, 2)
    wait_for_step(cluster, run_dir, job, 53)
    os.kill(cluster.rank_pid(job, 1), signal.SIGKILL)

    fields = finish(cluster, run_dir, job)
    # Slurm, when it is slow to tidy up, may end the first step of a new life: one more start.
    assert int(fields["Restarts"]) >= 3
    assert numbers(run_dir) == reference
    failed = [life.ended["reason"] for life in journal.read(run_dir) if life.ended.get("error")]
    assert failed and all(reason.startswith("failed at step") for reason in failed)


def test_the_same_failure_at_the_same_step_is_not_requeued_for_ever(
    cluster: Cluster, training: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = sbatch(cluster, run_dir, training)
    for restart in range(2):
        wait_for_life(cluster, run_dir, job, restart)
        os.kill(cluster.rank_pid(job, 1), signal.SIGKILL)  # before its first step, both times
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("FAILED", "1"), log_of(run_dir, job)
    assert "verdict: stop, failed twice at step 0: " in log_of(run_dir, job)


def test_a_job_that_its_user_cancels_saves_and_stays_away(
    cluster: Cluster, training: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = sbatch(cluster, run_dir, training, "training.steps=4000")
    wait_for_step(cluster, run_dir, job, 3)
    cluster.run("scancel", job)
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")
    assert find_checkpoints(run_dir)


def test_mistakes_and_bad_nodes_are_told_before_any_rank_starts(
    cluster: Cluster, training: Path, tmp_path: Path
) -> None:
    # Two jobs at once: neither computes anything.
    wrong = sbatch(cluster, tmp_path / "wrong", training, "training.global_batch_size=7")
    run_dir = tmp_path / "run"
    sick = "--export=ALL,HEALTH_CHECK=yes,HEALTH_COMMAND=test $SLURMD_NODENAME != 127.0.0.1"
    job = sbatch(cluster, run_dir, training, "training.steps=2", options=(sick,))

    assert cluster.wait(wrong)["ExitCode"] == "2:0"
    log = log_of(tmp_path / "wrong", wrong)
    assert "training.global_batch_size=7" in log and "Traceback" not in log

    fields = finish(cluster, run_dir, job)
    assert (fields["Restarts"], fields["ExcNodeList"]) == ("1", "127.0.0.1")
    assert "node 127.0.0.1 is not well: HEALTH_COMMAND ended with 1" in log_of(run_dir, job)
