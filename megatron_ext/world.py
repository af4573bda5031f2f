"""Processes, device, process groups and seeds: the same code under plain `python`, `torchrun` and
`srun`; NCCL on GPUs, gloo on CPUs.

    with world(config) as here:
        here.rank, here.size, here.device

Refuses (UserError) a world that the layout does not divide.
"""

import datetime
import os
import random
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import distributed_c10d

from megatron_ext import cpu
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.launch import launched_as

_AFTER_WATCHDOG_S = 60.0  # which needs some seconds to dump stacks and to name the late ranks


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 speaks; the others write files."""
        return self.rank == 0


def _print(error: Exception) -> None:
    traceback.print_exception(error)


@contextmanager
def world(config: Config, report: Callable[[Exception], None] = _print) -> Iterator[World]:
    """Join the other processes, build Megatron-Core's groups, seed; leave cleanly at the end.

    Raises UserError when the number of processes does not fit the layout. Among several processes
    any other exception ends this one with exit code 1, after `report` has told of it.
    """
    rank, size, local_rank = launched_as()
    model_ranks = config.parallel.model_ranks
    if size % model_ranks:
        parallel = config.parallel
        raise UserError(
            f"{size} processes were started, but parallel.tensor={parallel.tensor} x pipeline="
            f"{parallel.pipeline} x context={parallel.context} needs a multiple of {model_ranks}: "
            f"start e.g. torchrun --nproc-per-node {model_ranks} pretrain.py ..."
        )
    cpu.prepare()
    if torch.cuda.is_available():
        # A launcher may show each process one GPU only, its own.
        local_device = local_rank % torch.cuda.device_count()
        torch.cuda.set_device(local_device)
        device = torch.device("cuda", local_device)
    else:
        device = torch.device("cpu")
    _set_rendezvous()
    patience = datetime.timedelta(seconds=config.faults.startup_timeout_s + _AFTER_WATCHDOG_S)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=size,
            timeout=patience,
            device_id=device if device.type == "cuda" else None,
        )
        build_groups(config, patience)
        _seed(config.training.seed)
        yield World(rank, size, local_rank, device)
    except Exception as error:
        if size > 1 and not isinstance(error, UserError):
            # The others may wait for us in a collective, and so would a tidy end here: say what
            # happened and go, which makes the launcher end them.
            report(error)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        raise
    finally:
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()


def build_groups(
    config: Config, patience: datetime.timedelta = datetime.timedelta(minutes=30)
) -> None:
    """Megatron-Core's process groups for the layout, over the processes that have met. `patience`:
    how long their collective operations wait."""
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        # Megatron-Core knows virtual stages by their number being set, also when it is one.
        parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        # Gloo groups beside NCCL's serve old checkpoint formats, which are not used.
        create_gloo_process_groups=False,
        distributed_timeout_minutes=patience.total_seconds() / 60,  # type: ignore[arg-type]
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or that it is a CPU, of so many cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({os.cpu_count()} cores)"


def limit_collectives(config: Config) -> None:
    """From now on a collective operation fails after faults.hang_timeout_s; until here, while one
    rank builds an index or verifies a checkpoint, the others waited for faults.startup_timeout_s.
    The watchdog, which knows which rank is late, comes first in both."""
    timeout = datetime.timedelta(seconds=config.faults.hang_timeout_s + _AFTER_WATCHDOG_S)
    for group in list(distributed_c10d._world.pg_map):
        if group != dist.GroupMember.NON_GROUP_MEMBER:
            distributed_c10d._set_pg_timeout(timeout, group)


def _set_rendezvous() -> None:
    """Where the processes meet: what the launcher said, the first host of a Slurm step, or here."""
    if "MASTER_ADDR" in os.environ:
        return
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if nodes and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        os.environ["MASTER_ADDR"] = hosts.stdout.split()[0]
        # Every rank derives the same port from the step; two steps of one job differ.
        job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
        os.environ.setdefault("MASTER_PORT", str(20000 + (job * 64 + step) % 20000))
        return
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.setdefault("MASTER_PORT", "0")  # alone: any free port will do


def _seed(seed: int) -> None:
    # Weights are drawn by megatron_ext/model/initialization.py and samples by the data set, both
    # from config.training.seed alone; these seeds serve whatever else asks for random numbers.
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
