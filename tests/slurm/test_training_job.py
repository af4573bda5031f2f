"""The shipped slurm/pretrain.sbatch on a real Slurm: it trains, and goes on whatever ends it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ext.checkpoint.manifest import find_checkpoints
from megatron_ext.jobs import journal
from megatron_ext.jobs.state import RunState, states
from tests.conftest import pretrain
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import (
    NODES,
    STEPS,
    log_of,
    numbers,
    sbatch,
    wait_for_life,
    wait_for_step,
)


@pytest.fixture(autouse=True)
def same_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What this process asks Slurm, it asks this cluster; a test that fails leaves no job there."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    yield
    cluster.run("scancel", f"--user={os.getuid()}")


def state(run_dir: Path) -> RunState:
    (found,) = states([run_dir])
    return found


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
    cluster.until(lambda: cluster.job(job)["JobState"] == "PENDING", "the job is queued again")
    again = state(run_dir)
    assert again.state == "queued" and "stopped by a signal after step" in again.reason
    fields = finish(cluster, run_dir, job)
    assert fields["Restarts"] == "1"
    assert numbers(run_dir) == reference
    done = state(run_dir)
    assert (done.state, done.step, done.starts, done.job) == ("finished", STEPS, 2, job)


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


def test_preemption_saves_requeues_and_goes_on(
    cluster: Cluster, training: Path, tmp_path: Path
) -> None:
    """By jobs of a better partition: with SIGTERM to the ranks, as clusters do it by default, and
    with the script's own signal, by SlurmctldParameters=preempt_send_user_signal."""
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    # Larger steps: Slurm preempts within a second or two.
    settings = ["training.global_batch_size=64", "training.steps=40"]
    job = sbatch(cluster, run_dir, training, *settings)
    step = 2
    for restart in range(2):
        wait_for_life(cluster, run_dir, job, restart)
        wait_for_step(cluster, run_dir, job, step)
        urgent = cluster.submit(
            "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true"
        )
        assert cluster.wait(urgent)["JobState"] == "COMPLETED"
        ended = journal.read(run_dir)[restart].ended
        assert ended["action"] == "requeue" and ended["stopped"], log_of(run_dir, job)
        assert ended["checkpoint"] == ended["step"] >= step  # no step was lost
        step = ended["step"] + 2
        if restart == 0:
            cluster.configure("SlurmctldParameters=preempt_send_user_signal")
    assert finish(cluster, run_dir, job)["Restarts"] == "2"
    assert log_of(run_dir, job).count("got SIGUSR1") == 1
    pretrain(training, *settings, f"training.run_dir={whole}", processes=2)
    assert numbers(run_dir) == numbers(whole)


@pytest.mark.slow
def test_time_limit_saves_before_it_comes_requeues_and_goes_on(
    cluster: Cluster, training: Path, tmp_path: Path
) -> None:
    """Slurm looks at limits, which are whole minutes, every 30 s."""
    run_dir = tmp_path / "run"
    short = ("--time=2", "--signal=B:USR1@45")
    job = sbatch(cluster, run_dir, training, "training.steps=20000", options=short)
    wait_for_step(cluster, run_dir, job, 3)
    life = len(journal.read(run_dir)) - 1  # a slow machine may need a life to start at all
    cluster.until(lambda: bool(journal.read(run_dir)[life].ended), "the limit comes near")
    ended = journal.read(run_dir)[life].ended
    assert ended["action"] == "requeue" and ended["checkpoint"] == ended["step"] >= 3
    assert "got SIGUSR1" in log_of(run_dir, job) and "DUE TO TIME LIMIT" not in log_of(run_dir, job)
    wait_for_step(cluster, run_dir, job, ended["step"] + 3)
    cluster.run("scancel", job)
    assert int(cluster.wait(job)["Restarts"]) > life
    steps = [step for step, *_ in numbers(run_dir)]
    assert steps == list(range(1, len(steps) + 1))


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
    assert state(run_dir).state == "failed" and "task 1: Killed" in state(run_dir).reason


def test_a_job_that_its_user_cancels_saves_and_stays_away(
    cluster: Cluster, training: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = sbatch(cluster, run_dir, training, "training.steps=4000")
    wait_for_step(cluster, run_dir, job, 3)
    found = state(run_dir)
    assert (found.state, found.job, found.starts) == ("running", job, 1)
    assert found.step >= 3 and found.eta_s is not None and found.eta_s > 0
    cluster.run("scancel", job)
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")
    assert find_checkpoints(run_dir)
    assert state(run_dir).state == "stopped" and "checkpoint saved" in state(run_dir).reason


def test_mistakes_and_bad_nodes_are_told_before_any_rank_starts(
    cluster: Cluster, training: Path, tmp_path: Path
) -> None:
    held = sbatch(cluster, tmp_path / "held", training, options=("--hold",))
    waiting = state(tmp_path / "held")  # known from the queue alone: there is no folder yet
    assert (waiting.state, waiting.job, waiting.reason) == ("queued", held, "JobHeldUser")
    cluster.run("scancel", held)

    # Three jobs at once: none computes anything.
    typo = sbatch(cluster, tmp_path / "typo", training, "optimizer.lrr=1")
    wrong = sbatch(cluster, tmp_path / "wrong", training, "data.corpora.stdlib.path=/nowhere/x")
    run_dir = tmp_path / "run"
    sick = "--export=ALL,HEALTH_CHECK=yes,HEALTH_COMMAND=test $SLURMD_NODENAME != 127.0.0.1"
    job = sbatch(cluster, run_dir, training, "training.steps=2", options=(sick,))

    assert cluster.wait(typo)["ExitCode"] == "2:0"
    found = state(tmp_path / "typo")  # though there is no config to say where the run would be
    assert (found.state, found.job, found.starts) == ("failed", typo, 0)
    assert "optimizer.lrr" in found.reason
    assert cluster.wait(wrong)["ExitCode"] == "2:0"
    assert "Traceback" not in log_of(tmp_path / "wrong", wrong)
    found = state(tmp_path / "wrong")
    assert found.state == "failed" and "/nowhere/x" in found.reason

    fields = finish(cluster, run_dir, job)
    assert (fields["Restarts"], fields["ExcNodeList"]) == ("1", "127.0.0.1")
    assert "node 127.0.0.1 is not well: HEALTH_COMMAND ended with 1" in log_of(run_dir, job)
