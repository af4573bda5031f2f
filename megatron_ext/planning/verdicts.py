"""What is said of ranks that were built: one line for each thing that was checked.

    line = memory_line(plan, built)
    line.good, line.name, line.text

`built` is what planning/ranks.py has of every distinct rank; empty where none could be built.
Raises UserError for a batch script that cannot be read.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.planning.layout import workload
from megatron_ext.planning.parameters import count_parameters
from megatron_ext.planning.plan import Plan, plan_of
from megatron_ext.planning.preflight import checkpoint_bytes_per_parameter, checkpoints_kept
from megatron_ext.planning.sources import GIB

_NEARLY_FULL = 0.92  # memory beyond this share is within the prediction's error of not fitting
_UNBALANCED = 1.25  # a stage this much slower than the mean is worth another division


@dataclass(frozen=True)
class Line:
    """One thing that was checked."""

    good: bool | None
    """None: worth knowing, neither good nor bad."""
    name: str
    text: str
    """With what to write instead when it is not good."""


def parameters_line(config: Config, world_size: int, built: list[dict[str, Any]]) -> Line:
    """Whether the stages hold the whole model, no more and no less."""
    first = {rank["stage"]: rank for rank in reversed(built)}
    total = sum(rank["of_the_model"] for rank in first.values())
    whole = count_parameters(config.model).total
    text = f"{len(built)} distinct of {world_size} built; they hold {total:,} parameters"
    if total != whole:
        return Line(
            False, "ranks", f"{text}, but the model has {whole:,}: this is a mistake of ours"
        )
    return Line(True, "ranks", f"{text}, exactly the model's")


def optimizer_line(config: Config, world_size: int, built: list[dict[str, Any]]) -> Line:
    """Bytes of master weights and moments, and what sharding them would save."""
    size = max(rank["optimizer_bytes"] for rank in built)
    parallel = config.parallel
    data = world_size // (parallel.tensor * parallel.pipeline)  # and context
    if parallel.distributed_optimizer:
        of = "data- and context-parallel" if parallel.context > 1 else "data-parallel"
        text = f"state over {data} {of} ranks, {size / GIB:.2f} GiB on the fullest"
        return Line(True, "optimizer", text)
    text = f"state on every rank, {size / GIB:.2f} GiB"
    if data > 1:
        text += f"; parallel.distributed_optimizer=true would leave {size / data / GIB:.2f} GiB"
    return Line(None, "optimizer", text)


def memory_line(plan: Plan, built: list[dict[str, Any]]) -> Line:
    """Weights, gradients and optimizer state as built; activations and the rest as predicted."""
    reckoned = [sum(parts.values()) for parts in plan.memory_gib]
    most, stage = (0.0, 0) if built else max((m, s) for s, m in enumerate(reckoned))
    for rank in built:
        parts = plan.memory_gib[rank["stage"]]
        rest = sum(parts.values()) - parts["weights"] - parts["gradients"] - parts["optimizer"]
        held = rank["weight_bytes"] + rank["gradient_bytes"] + rank["optimizer_bytes"]
        rank["memory_gib"] = held / GIB + rest
        if rank["memory_gib"] > most:
            most, stage = rank["memory_gib"], rank["stage"]
    parts = plan.memory_gib[stage]
    text = f"{most:.1f} GiB on the fullest rank (stage {stage}) of {plan.gpu_memory_gib:.1f} GiB"
    if most > plan.gpu_memory_gib:
        sizes = {
            "activations": parts["activations"],
            "logits": parts["logits"],
            "optimizer state": parts["optimizer"],
            "weights and gradients": parts["weights"] + parts["gradients"],
        }
        largest = max(sizes, key=lambda name: sizes[name])
        fix = {
            "activations": "lower training.micro_batch_size, or set training.recompute=full",
            "logits": "lower training.micro_batch_size, or raise parallel.tensor",
            "optimizer state": "set parallel.distributed_optimizer=true",
            "weights and gradients": "raise parallel.tensor or parallel.pipeline",
        }[largest]
        return Line(False, "memory", f"{text}, {sizes[largest]:.1f} of them {largest}: {fix}")
    if most > _NEARLY_FULL * plan.gpu_memory_gib:
        return Line(None, "memory", f"{text}: nearly full, a smaller micro-batch would be safe")
    return Line(True, "memory", text)


def balance_lines(config: Config, plan: Plan) -> list[Line]:
    """How much longer the slowest stage takes than the mean, and the bubble."""
    stages = config.parallel.pipeline
    if stages == 1:
        return []
    layers = config.parallel.stage_layers(config.model.num_layers)
    parts = _with_even_stages(config, plan).step_parts_s
    apart = (
        "logits",
        "pipeline_bubble",
        "pipeline_transfer",
        "data_parallel",
        "optimizer",
        "fixed",
    )
    of_all_layers = stages * sum(s for name, s in parts.items() if name not in apart)
    seconds = [of_all_layers * number / config.model.num_layers for number in layers]
    seconds[-1] += parts["logits"]  # the output projection
    slowest = max(seconds) / (sum(seconds) / stages)
    which = seconds.index(max(seconds))
    name = "the last, with the output projection," if which == stages - 1 else f"stage {which}"
    shown = f"{layers[0]}" if len(set(layers)) == 1 else " + ".join(map(str, layers))
    text = f"{stages} stages of {shown} layers; {name} takes {slowest:.2f} x the mean"
    unbalanced = slowest > _UNBALANCED
    if unbalanced:
        text += ": fewer stages (parallel.pipeline), or another parallel.last_stage_layers, would "
        text += "wait less for it"
    bubble = parts["pipeline_bubble"] / plan.step_time_s
    waits = f"{plan.layout['micro-batches']} micro-batches: the pipeline's bubble is {bubble:.0%}"
    if bubble > 0.2:
        waits += "; lower parallel.pipeline or training.micro_batch_size, or raise "
        waits += "parallel.virtual_pipeline"
    return [
        Line(None if unbalanced else True, "balance", text),
        Line(None if bubble > 0.2 else True, "bubble", waits),
    ]


def _with_even_stages(config: Config, plan: Plan) -> Plan:
    work = workload(config, plan.gpus, plan.gpu)
    none = np.zeros(len(work))
    return plan_of(config, replace(work, first_layers=none, last_layers=none))


def disk_line(config: Config) -> Line:
    """Whether the checkpoints that stay fit the file system of the run folder."""
    folder = config.training.run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    each = count_parameters(config.model).total * checkpoint_bytes_per_parameter(config)
    needed = each * (checkpoints_kept(config) + 1)  # one more while the next is written
    text = f"checkpoints of {each / 1e9:.1f} GB need {needed / 1e9:,.0f} GB, "
    text += f"{free / 1e9:,.0f} GB are free at {folder}"
    if needed > free:
        return Line(None, "disk", f"{text}: run elsewhere, or lower checkpoint.keep_last")
    return Line(True, "disk", text)


def slurm_line(script: Path, world_size: int) -> Line:
    """Nodes x tasks a node of a batch script against the world size."""
    try:
        text = script.read_text()
    except OSError as error:
        raise UserError(f"--slurm {script} cannot be read ({error.strerror})") from None
    found = {}
    for key in ("nodes", "ntasks-per-node", "gpus-per-node"):
        match = re.search(rf"^#SBATCH\s+--{key}[=\s]+(?:\w+:)*(\d+)", text, re.MULTILINE)
        found[key] = int(match.group(1)) if match else None
    tasks = found["ntasks-per-node"] or found["gpus-per-node"]
    if found["nodes"] is None or tasks is None:
        return Line(None, "slurm", f"{script} names no --nodes and --ntasks-per-node to compare")
    started = found["nodes"] * tasks
    shown = f"{script} starts {found['nodes']} nodes x {tasks} tasks = {started} ranks"
    if started != world_size:
        return Line(False, "slurm", f"{shown}, not {world_size}: change --nodes or the layout")
    return Line(True, "slurm", shown)
