"""Save and load over `megatron.core.dist_checkpointing`: written at any layout, read at any other.

    save(run_dir, step, model, optimizer, record)
    done_steps = restore(run_dir, model, optimizer, record)     # 0 without a checkpoint

A save goes into a folder named `.unfinished`, gets its manifest last and is then renamed. Restore
verifies every file before anything is read, and takes the next older checkpoint if one is damaged.
"""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint import FileSystemWriter

from megatron_ext.checkpoint import manifest
from megatron_ext.checkpoint.continuity import check_continues
from megatron_ext.errors import UserError

log = logging.getLogger(__name__)


def save(
    run_dir: Path,
    step: int,
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    record: dict[str, Any],
) -> Path:
    """Write the state after `step` steps; `record` (config, data, ...) becomes its run.json.

    Every rank calls this. Returns the finished folder.
    """
    final = manifest.checkpoint_dir(run_dir, step)
    folder = final.with_name(final.name + ".unfinished")
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    state = _sharded_state(model, optimizer)
    dist_checkpointing.save(state, str(folder), SaveInProcess("torch_dist", 1))
    if dist.get_rank() == 0:
        manifest.write_json(folder / "run.json", {"step": step, **record})
    dist.barrier()
    # Each rank reads back its share of the files, as rank 0 lists them: another node's listing of a
    # shared folder may lag behind.
    listed = [sorted(file.name for file in folder.iterdir())] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(listed)
    names = listed[0] or []
    mine = manifest.file_facts(folder, names[dist.get_rank() :: dist.get_world_size()])
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    if dist.get_rank() == 0:
        files = {name: facts for part in gathered for name, facts in part.items()}
        for name in files:
            _sync(folder / name)
        manifest.write_manifest(folder, dict(sorted(files.items())))
        shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
        folder.replace(final)
        _sync(final.parent)
    dist.barrier()
    return final


def restore(
    run_dir: Path,
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    record: dict[str, Any],
) -> int:
    """Load the newest checkpoint that verifies into model and optimizer, in place.

    Every rank calls this, with the `record` that it would save. Returns the steps done, 0 when the
    run has no checkpoint yet. Raises UserError when there are checkpoints but none verifies, or
    when this run does not continue it.
    """
    checkpoint = newest_valid_everywhere(run_dir)
    if checkpoint is None:
        return 0
    saved = json.loads((checkpoint / "run.json").read_text())
    check_continues(saved, record)
    state = _sharded_state(model, optimizer, loading=True)
    loaded = dist_checkpointing.load(state, str(checkpoint))
    bare(model).load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    return saved["step"]


def load_weights(
    source: Path, model: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None = None
) -> Path:
    """Load only the weights of a checkpoint, or of the newest one of a run folder; the optimizer's
    master weights, if given, follow.

    Returns the checkpoint. Raises UserError when there is none or it is damaged.
    """
    checkpoint = newest_valid_everywhere(source)
    if checkpoint is None:
        raise UserError(f"{source} is neither a checkpoint nor a run folder that holds one")
    loaded = dist_checkpointing.load(_sharded_state(model), str(checkpoint))
    bare(model).load_state_dict(loaded["model"])
    if optimizer is not None:
        optimizer.reload_model_params()
    return checkpoint


def newest_valid_everywhere(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that verifies, or the very one named, as rank 0 sees it and
    tells every rank; None when there is none. Raises UserError when none verifies."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        if (run_dir / manifest.MANIFEST).is_file():  # a checkpoint itself
            problems = manifest.verify(run_dir)
            checkpoint = None if problems else run_dir
        else:
            checkpoint, problems = manifest.newest_valid(run_dir)
        for problem in problems:
            log.warning("damaged checkpoint: %s", problem)
        if checkpoint is None and problems:
            answer = [UserError(f"no checkpoint of {run_dir} verifies: {problems[0]}")]
        else:
            answer = [checkpoint]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def bare(model: Sequence[torch.nn.Module]) -> MegatronModule:
    """The model without its gradient reduction, whose names would otherwise stand in every key."""
    chunk = model[0].module if isinstance(model[0], DistributedDataParallel) else model[0]
    assert isinstance(chunk, MegatronModule)
    return chunk


class SaveInProcess(TorchDistSaveShardedStrategy):
    """Megatron-Core's torch_dist format, written by this very process.

    Its own writer forks two processes for each save and keeps a third one, of 280 MB, which a
    SIGTERM to the process group kills in the middle of a save and which a SIGKILL leaves behind.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        torch.distributed.checkpoint.save(
            mcore_to_pyt_state_dict(tensors, False),
            storage_writer=FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
        )


def _sharded_state(
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None = None,
    loading: bool = False,
) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        # Any layout can read it; the other formats tie the file to the data-parallel split.
        "distrib_optim_sharding_type": "fully_reshardable",
    }
    weights = bare(model).sharded_state_dict(metadata=metadata)
    state: dict[str, Any] = {"model": weights}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            weights, is_loading=loading, metadata=metadata
        )
    return state


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
