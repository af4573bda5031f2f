"""Preflight of the layout: its distinct ranks built on this machine, and what they will need.

    check = check_ranks(config, world_size=128, gpu="a100-80gb")
    print(check.text()); check.ok

Ranks of one pipeline stage differ only in their place among tensor- and data-parallel ranks, and
all places between the first and the last are alike: two opposite corners of each stage stand for
all. They are built in another process (planning/fake_world.py), so that this one needs no torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.model.kernels import plain
from megatron_ext.planning.layout import workload
from megatron_ext.planning.parameters import count_parameters
from megatron_ext.planning.plan import Plan, flops_per_token, make_plan, plan_of
from megatron_ext.planning.preflight import checkpoint_bytes_per_parameter, checkpoints_kept
from megatron_ext.planning.sources import GIB

MFU_LEVELS = (0.4, 0.5, 0.6)
_NOT_HERE = 3  # exit code of a child that finds no torch
_CHILD = f"""
import sys
try:
    from megatron_ext.planning.fake_world import main
except Exception as error:
    sys.stderr.write(f"{{type(error).__name__}}: {{error}}")
    sys.exit({_NOT_HERE})
main()
"""
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


class NotHere(Exception):
    """Ranks cannot be built on this machine; says why."""


@dataclass(frozen=True)
class RankCheck:
    """All lines, the ranks behind them and the cost card."""

    lines: list[Line]
    ranks: list[dict[str, Any]]
    cost: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not any(line.good is False for line in self.lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """Lines for a person: green and red on a terminal, `ok` and `error` elsewhere."""
        terminal = sys.stdout.isatty()
        shown = []
        for line in self.lines:
            word = {True: "ok", False: "error", None: "note"}[line.good]
            if terminal and line.good is not None:
                word = f"\033[{32 if line.good else 31}m{word:<5}\033[0m"
            shown.append(f"{word:<5} {line.name:<12}{line.text}")
        return "\n".join(shown)


def check_ranks(
    config: Config, world_size: int, gpu: str = "a100-80gb", slurm: Path | None = None
) -> RankCheck:
    """Build the ranks and judge them. The config has passed `preflight` for this world size.

    Raises UserError for a GPU that is unknown, RuntimeError when the other process dies.
    """
    plan = make_plan(config, world_size, gpu)
    missing = []
    try:
        built = build_ranks(config, world_size)
    except NotHere as reason:
        text = f"not built, only reckoned, as Megatron-Core does not run here ({reason})"
        built, missing = [], [Line(None, "ranks", text)]
    failed = [rank for rank in built if "error" in rank]
    lines = [
        Line(False, "ranks", f"rank {rank['rank']} cannot be built: {rank['error']}")
        for rank in failed
    ]
    if built and not failed:
        lines += [_totals(config, world_size, built), _optimizer(config, world_size, built)]
    if not failed:
        lines += [*missing, _memory(plan, built), *_balance(config, plan)]
    lines += [_disk(config), *([_slurm(slurm, world_size)] if slurm else [])]
    cost = _cost(config, plan)
    return RankCheck([*lines, *_card(plan, cost)], built, cost)


def distinct_ranks(config: Config, world_size: int) -> list[int]:
    """The first and the last rank of each pipeline stage (Megatron-Core's order of ranks: tensor
    fastest, then context, data and pipeline)."""
    each = world_size // config.parallel.pipeline
    return sorted({r for s in range(0, world_size, each) for r in (s, s + each - 1)})


def build_ranks(config: Config, world_size: int) -> list[dict[str, Any]]:
    """What each distinct rank holds, in bytes and numbers; or its `error`.

    Raises NotHere when torch or Megatron-Core cannot be imported, RuntimeError when the child dies.
    """
    # A GPU of this machine is none of the layout's, and Transformer Engine needs one.
    request = {
        "config": plain(config).model_dump(mode="json"),
        "world_size": world_size,
        "ranks": distinct_ranks(config, world_size),
    }
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    child = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        },
    )
    if child.returncode == _NOT_HERE:
        raise NotHere(" ".join(child.stderr.split()))
    if child.returncode:
        raise RuntimeError(f"building the ranks failed:\n{child.stderr[-2000:]}")
    answer: list[dict[str, Any]] = json.loads(child.stdout.splitlines()[-1])
    return answer


def _totals(config: Config, world_size: int, built: list[dict[str, Any]]) -> Line:
    first = {rank["stage"]: rank for rank in reversed(built)}
    total = sum(rank["of_the_model"] for rank in first.values())
    whole = count_parameters(config.model).total
    text = f"{len(built)} distinct of {world_size} built; they hold {total:,} parameters"
    if total != whole:
        return Line(
            False, "ranks", f"{text}, but the model has {whole:,}: this is a mistake of ours"
        )
    return Line(True, "ranks", f"{text}, exactly the model's")


def _optimizer(config: Config, world_size: int, built: list[dict[str, Any]]) -> Line:
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


def _memory(plan: Plan, built: list[dict[str, Any]]) -> Line:
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


def _balance(config: Config, plan: Plan) -> list[Line]:
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


def _disk(config: Config) -> Line:
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


def _slurm(script: Path, world_size: int) -> Line:
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


def _cost(config: Config, plan: Plan) -> dict[str, Any]:
    tokens = config.training.tokens_after(config.training.steps)
    flops = flops_per_token(config) * tokens
    peak = plan.tflops_per_gpu / plan.mfu_full_attention * 1e12
    hours = {mfu: flops / (peak * mfu) / 3600 for mfu in MFU_LEVELS}
    return {
        "gpu": plan.gpu,
        "predicted_days": plan.days,
        "predicted_gpu_hours": plan.gpu_hours,
        "predicted_mfu": plan.mfu_full_attention,
        "days_at_mfu": {f"{mfu:.0%}": h / plan.gpus / 24 for mfu, h in hours.items()},
        "gpu_hours_at_mfu": {f"{mfu:.0%}": h for mfu, h in hours.items()},
        "checkpoint_bytes": count_parameters(config.model).total
        * checkpoint_bytes_per_parameter(config),
    }


def _card(plan: Plan, cost: dict[str, Any]) -> list[Line]:
    levels = ", ".join(
        f"{days:.2f} days or {cost['gpu_hours_at_mfu'][mfu]:,.0f} GPU-hours at {mfu}"
        for mfu, days in cost["days_at_mfu"].items()
    )
    return [
        Line(
            None,
            "predicted",
            f"{plan.step_time_s:.2f} s a step on {plan.gpus} x {plan.gpu}, MFU "
            f"{plan.mfu_full_attention:.1%}, {plan.days:.2f} days, {plan.gpu_hours:,.0f} GPU-hours",
        ),
        Line(None, "at MFU", f"{levels} (6 N + 12 L h s, attention in full)"),
    ]
