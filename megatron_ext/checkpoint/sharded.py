"""Save and load a run's state: written at any layout, read at any other, model and optimizer, with
and without the distributed optimizer.

    save(run_dir, step, model, optimizer, record)
    done_steps = restore(config, model, optimizer, record)     # 0 without a checkpoint
    load_weights(run_dir, model)

Training saves in the background, see `saving.py`. Restore verifies every file before anything is
read, and takes the next older checkpoint if one is damaged, or refuses, as checkpoint.on_damage
says. Only data is read, never code: see `storage.py`.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_ext.checkpoint import manifest, saving
from megatron_ext.checkpoint.chunks import Model, state_chunks
from megatron_ext.checkpoint.continuity import check_continues
from megatron_ext.checkpoint.rng import random_chunks, random_state, set_random_state
from megatron_ext.checkpoint.storage import holds, read_chunks, read_index
from megatron_ext.config import Config
from megatron_ext.errors import UserError, Verdict

log = logging.getLogger(__name__)


def save(
    run_dir: Path,
    step: int,
    model: Model,
    optimizer: MegatronOptimizer | None,
    record: dict[str, Any],
) -> Path:
    """Write the state after `step` steps and wait for it; `record` (config, data, ...) becomes part
    of its run.json. Every rank calls this. Returns the finished folder. Raises Verdict."""
    begun = saving.begin(run_dir, step, model, optimizer, record)
    path = None if begun is None else saving.seal(begun, begun.write())
    if path is None:
        raise Verdict(f"{run_dir}: step {step} could not be saved: see the warning above")
    return path


def restore(
    config: Config,
    model: Model,
    optimizer: MegatronOptimizer,
    record: dict[str, Any],
    at_most: int | None = None,
) -> int:
    """Load the newest checkpoint that verifies, of `at_most` so many steps if given, into model and
    optimizer, in place.

    Every rank calls this, with the `record` that it would save. Returns the steps done, 0 when the
    run has no checkpoint yet. Raises UserError when there are checkpoints but none verifies (with
    checkpoint.on_damage=refuse: when the newest does not), or when this run does not continue it.
    """
    checkpoint = newest_valid_everywhere(
        config.training.run_dir, config.checkpoint.on_damage == "fall_back", at_most
    )
    if checkpoint is None:
        return 0
    saved = json.loads((checkpoint / "run.json").read_text())
    changed = check_continues(saved, record, config.checkpoint.on_data_change == "allow")
    for difference in changed if dist.get_rank() == 0 else []:
        log.warning("the data is not what the checkpoint was trained on: %s", difference)
    _prepare(optimizer)
    index = read_index(checkpoint)
    chunks = state_chunks(model, optimizer)
    random = {}
    if saved["layout"] == saving.layout():  # random numbers belong to a rank
        random = random_state()
        own = random_chunks(random, dist.get_rank())
        chunks += [chunk for chunk in own if holds(index, chunk)]
        # A GPU has a generator more than a CPU, and another size of its state.
        other = [chunk.key for chunk in own if not holds(index, chunk)]
        if other and dist.get_rank() == 0:
            log.warning(
                "random numbers begin anew: %s came from another kind of device", ", ".join(other)
            )
    read_chunks(checkpoint, chunks, index)
    _set_optimizer_steps(optimizer, saved["optimizer_steps"])
    _set_loss_scale(optimizer, saved.get("loss_scale"))
    if random:
        set_random_state(random)
    return saved["step"]


def load_weights(source: Path, model: Model, optimizer: MegatronOptimizer | None = None) -> Path:
    """Load only the weights of a checkpoint, or of the newest one of a run folder; the optimizer's
    master weights, if given, follow.

    Returns the checkpoint. Raises UserError when there is none or it is damaged.
    """
    checkpoint = newest_valid_everywhere(source)
    if checkpoint is None:
        raise UserError(f"{source} is neither a checkpoint nor a run folder that holds one")
    read_chunks(checkpoint, state_chunks(model))
    if optimizer is not None:
        optimizer.reload_model_params()
    return checkpoint


def newest_valid_everywhere(
    source: Path, fall_back: bool = True, at_most: int | None = None
) -> Path | None:
    """The newest checkpoint of a run that verifies, or the very one named; the same on every rank,
    each of which reads its share of the files. None when there is none. Raises UserError when none
    verifies; without `fall_back` when the newest does not."""
    candidates: list[Any] = [None]
    if dist.get_rank() == 0:
        named = (source / manifest.MANIFEST).is_file()
        folders = [source] if named else manifest.find_folders(source)
        candidates = [[c for c in folders if at_most is None or manifest.step_of(c) <= at_most]]
    dist.broadcast_object_list(candidates)
    problems: list[str] = []
    for checkpoint in candidates[0]:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(
            gathered, manifest.verify(checkpoint, dist.get_rank(), dist.get_world_size())
        )
        found = list(dict.fromkeys(problem for part in gathered for problem in part))
        if not found:
            return checkpoint
        for problem in found if dist.get_rank() == 0 else []:
            log.warning("damaged checkpoint: %s", problem)
        problems += found
        if not fall_back:
            raise UserError(
                f"{problems[0]}; checkpoint.on_damage=refuse: put the file back, delete the folder "
                f"{checkpoint}, or set checkpoint.on_damage=fall_back"
            )
    if problems:
        raise UserError(f"no checkpoint of {source} verifies: {problems[0]}")
    return None


def _prepare(optimizer: MegatronOptimizer) -> None:
    """Make the optimizer's state tensors where they only come with the first step (fused AdamW)."""
    for part in optimizer.chained_optimizers:
        if not isinstance(part.optimizer, torch.optim.AdamW):
            part.init_state_fn(part.optimizer, part.config)


def _set_optimizer_steps(optimizer: MegatronOptimizer, steps: int) -> None:
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state["step"].fill_(steps)
        else:  # fused ones count for a whole group
            for group in part.optimizer.param_groups:
                group["step"] = steps


def _set_loss_scale(optimizer: MegatronOptimizer, saved: dict[str, float] | None) -> None:
    for part in optimizer.chained_optimizers:
        if saved is not None and getattr(part, "grad_scaler", None):
            counts = {name: int(count) for name, count in saved.items() if name != "scale"}
            scale = torch.tensor([saved["scale"]], dtype=torch.float32)
            part.grad_scaler.load_state_dict({"scale": scale, **counts})
