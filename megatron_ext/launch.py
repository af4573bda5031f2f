"""Which process of how many this is, as torchrun's or srun's environment says. Needs no torch.

rank, size, local_rank = launched_as()
"""

import os


def launched_as() -> tuple[int, int, int]:
    """Rank, world size and rank on this node, as the launcher's environment says.

    torchrun sets RANK. srun sets SLURM_STEP_NUM_TASKS, which a batch script's own shell lacks, so
    plain `python` inside a job does not wait for processes that nobody started.
    """
    if "RANK" in os.environ:
        return tuple(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))  # type: ignore[return-value]
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        return tuple(int(os.environ[name]) for name in names)  # type: ignore[return-value]
    return 0, 1, 0
