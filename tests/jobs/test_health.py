"""A node says what is wrong with it, in one sentence."""

import pytest

from megatron_ext.jobs.health import all_reduce_problem, gpu_problem, problem

# As `nvidia-smi --query-gpu=index,ecc.errors.uncorrected.volatile.total` prints it.
WELL = "".join(f"{i}, 0\n" for i in range(8))


@pytest.mark.parametrize(
    ("listing", "says"),
    [
        (WELL, ""),
        (WELL.replace(" 0\n", " [N/A]\n"), ""),
        (WELL.replace("5, 0", "5, 3"), "GPU 5 has 3 uncorrected ECC errors"),
        (WELL.replace("7, 0\n", ""), "7 of 8 GPUs answer"),
        ("is not installed", "0 of 8 GPUs answer (nvidia-smi: is not installed)"),
        ("No devices were found\n", "0 of 8 GPUs answer (nvidia-smi: No devices were found)"),
    ],
)
def test_gpus_are_counted_and_their_memory_errors_told(listing: str, says: str) -> None:
    assert gpu_problem(8, listing).startswith(says) and bool(gpu_problem(8, listing)) == bool(says)


@pytest.mark.slurm  # seconds, and part of what a job does: beside the tests of jobs
def test_processes_of_a_node_add_up_a_tensor() -> None:
    assert all_reduce_problem(2) == ""


def test_ranks_that_do_not_come_to_the_all_reduce_are_named() -> None:
    # Too little time even to import torch stands for a rank that hangs.
    assert all_reduce_problem(2, timeout_s=0.2).endswith("waiting for 0, 1")


def test_the_sites_own_command_is_asked_too() -> None:
    assert problem(0, "true") == ""
    assert problem(0, "echo 3 links down; exit 4") == "HEALTH_COMMAND ended with 4: 3 links down"
    assert problem(0, "sleep 60", command_s=0.1) == "HEALTH_COMMAND did not end within 0.1 s"
