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
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config import Config
from megatron_ext.model.kernels import plain
from megatron_ext.planning.parameters import count_parameters
from megatron_ext.planning.plan import Plan, flops_per_token, make_plan
from megatron_ext.planning.preflight import checkpoint_bytes_per_parameter
from megatron_ext.planning.verdicts import (
    Line,
    balance_lines,
    disk_line,
    memory_line,
    optimizer_line,
    parameters_line,
    slurm_line,
)

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
        lines += [
            parameters_line(config, world_size, built),
            optimizer_line(config, world_size, built),
        ]
    if not failed:
        lines += [*missing, memory_line(plan, built), *balance_lines(config, plan)]
    lines += [disk_line(config), *([slurm_line(slurm, world_size)] if slurm else [])]
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
