"""Which process am I, under each launcher."""

import pytest

from megatron_ext.launch import launched_as

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        (TORCHRUN, (5, 8, 1)),
        (SRUN, (3, 4, 1)),
        (SRUN | TORCHRUN, (5, 8, 1)),  # torchrun started by srun, one task a node
        (BATCH_SCRIPT, (0, 1, 0)),  # plain python in a batch script waits for nobody
    ],
)
def test_launcher_is_recognised(variables, expected, monkeypatch) -> None:
    for name in TORCHRUN | SRUN | BATCH_SCRIPT:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_as() == expected
