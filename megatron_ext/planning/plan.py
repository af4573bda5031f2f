"""A run on a number of GPUs as numbers: memory of each stage, seconds of a step, days, MFU.

    plan = make_plan(config, gpus=128, gpu="a100-80gb")
    print(plan.text()); plan.as_dict()

MFU is FLOPs of the model over peak FLOPs, in two conventions that differ by the attention: 6 N +
12 L h s counts the scores in full (PaLM, the journal of a run), 6 N + 6 L h s the causal half
(Megatron-LM). Recomputation counts in neither. Raises ConfigError when the layout does not divide.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.config import Config, validate
from megatron_ext.errors import UserError
from megatron_ext.planning.layout import seconds_by_cause, stage_memory, workload
from megatron_ext.planning.parameters import count_parameters
from megatron_ext.planning.prediction import constants
from megatron_ext.planning.sources import GIB
from megatron_ext.planning.throughput import step_time
from megatron_ext.planning.workload import Workloads

log = logging.getLogger(__name__)

# What the driver calls a GPU -> its name here; the first that fits.
_OF_DRIVER = {
    "A100-SXM4-40GB": "a100_40gb",
    "A100": "a100_80gb",
    "H200": "h200",
    "H100": "h100_80gb",
    "B200": "b200",
}


@dataclass(frozen=True)
class Plan:
    """One layout on one machine."""

    gpu: str
    gpus: int
    layout: dict[str, Any]
    parameters: int
    memory_gib: list[dict[str, float]]
    """By pipeline stage: GiB of one rank by cause."""
    gpu_memory_gib: float
    fits: bool
    step_time_s: float
    step_parts_s: dict[str, float]
    tokens_per_s_per_gpu: float
    tflops_per_gpu: float
    """Model FLOPs of full attention."""
    mfu_full_attention: float
    mfu_causal_attention: float
    steps: int
    days: float
    days_range: tuple[float, float]
    """At the fast and the slow end of what published stacks reach of the model (80% of them)."""
    gpu_hours: float

    @property
    def peak_memory_gib(self) -> float:
        """Of the fullest rank."""
        return max(sum(stage.values()) for stage in self.memory_gib)

    def as_dict(self) -> dict[str, Any]:
        """The fields and the peak, for JSON."""
        return {**asdict(self), "peak_memory_gib": self.peak_memory_gib}

    def text(self) -> str:
        """A page for a person."""
        layout = ", ".join(f"{name} {value}" for name, value in self.layout.items())
        room = self.gpu_memory_gib - self.peak_memory_gib
        fit = f"fits, {room:.1f} GiB left" if self.fits else f"does not fit by {-room:.1f} GiB"
        return "\n".join(
            [
                f"{self.gpus} x {self.gpu}: {layout}; {self.parameters:,} parameters",
                "",
                "Memory of one rank, GiB",
                _memory_table(self.memory_gib),
                f"  a GPU has {self.gpu_memory_gib:.1f} GiB: {fit}",
                "",
                "A step, seconds on the critical path",
                _waterfall(self.step_parts_s),
                "",
                f"{self.tokens_per_s_per_gpu:,.0f} tokens/s a GPU, {self.tflops_per_gpu:.1f} "
                "TFLOP/s a GPU",
                f"MFU {self.mfu_full_attention:.1%} (6 N + 12 L h s: attention in full), "
                f"{self.mfu_causal_attention:.1%} (6 N + 6 L h s: its causal half); recompute is "
                "not counted",
                f"{self.steps:,} steps: {self.days:.2f} days, {self.gpu_hours:,.0f} GPU-hours; "
                f"{self.days_range[0]:.1f} to {self.days_range[1]:.1f} days over the stacks that "
                "were fitted",
            ]
        )


def make_plan(config: Config, gpus: int, gpu: str, gpu_file: Path | None = None) -> Plan:
    """Predict the config's own layout on `gpus` GPUs."""
    if gpus < 1:
        raise UserError(f"--gpus {gpus} must be at least 1")
    validate(config, gpus)
    return plan_of(config, workload(config, gpus, gpu, gpu_file))


def expected_on(device: str, config: Config, gpus: int) -> dict[str, Any] | None:
    """What to expect of so many GPUs that the driver calls `device`, to stand beside what a run
    measures. None for a device that is not known, and, after a warning, where no plan can be made:
    a run needs none."""
    name = device.replace(" ", "-")
    gpu = next((gpu for key, gpu in _OF_DRIVER.items() if key in name), None)
    if gpu is None:
        return None
    try:
        plan = make_plan(config, gpus, gpu)
    except Exception as error:
        log.warning("no prediction for %d x %s: %s", gpus, gpu, error)
        return None
    first = plan.memory_gib[0]
    return {
        "gpu": gpu,
        "step_time_s": plan.step_time_s,
        "tokens_per_s_per_gpu": plan.tokens_per_s_per_gpu,
        "tflops_per_gpu": plan.tflops_per_gpu,
        "mfu": plan.mfu_full_attention,
        "mfu_causal": plan.mfu_causal_attention,
        "memory_gib": plan.peak_memory_gib,
        # What a run's journal has: the tensors of rank 0 at their peak, 10^9 bytes.
        "memory_gb": (sum(first.values()) - first["allocator"]) * GIB / 1e9,
    }


def plan_of(config: Config, work: Workloads) -> Plan:
    """The same for a table of one row that was made from the config."""
    gpus, gpu = int(work.gpus[0]), str(work.gpu_name[0])
    parts = step_time(work, constants().time)
    seconds = float(parts.total[0])
    per_gpu = float(work.tokens[0]) / seconds / gpus
    stages = stage_memory(work)
    peak = float(work.gpu.peak_tflops[0]) * 1e12
    full, causal = (flops_per_token(config, share) for share in (1.0, 0.5))
    training = config.training
    # A smaller batch takes a share of a full one's time: accumulation is all that changes.
    full_steps = training.tokens_after(training.steps) / training.tokens_per_step
    days = full_steps * seconds / 86400
    fast, slow = np.quantile(list(constants().source_time.values()), [0.1, 0.9]).tolist()
    return Plan(
        gpu=gpu,
        gpus=gpus,
        layout={
            "tensor": int(work.tp[0]),
            "pipeline": int(work.pp[0]),
            **_beyond_one(work),
            "data": int(work.dp[0]),
            "micro-batch": int(work.micro_batch[0]),
            "micro-batches": int(work.micro_batches[0]),
            "recompute": config.training.recompute,
        },
        parameters=count_parameters(config.model).total,
        memory_gib=stages,
        gpu_memory_gib=float(work.gpu.memory_gib[0]),
        fits=max(sum(stage.values()) for stage in stages) <= float(work.gpu.memory_gib[0]),
        step_time_s=seconds,
        step_parts_s=seconds_by_cause(parts, 0),
        tokens_per_s_per_gpu=per_gpu,
        tflops_per_gpu=per_gpu * full / 1e12,
        mfu_full_attention=per_gpu * full / peak,
        mfu_causal_attention=per_gpu * causal / peak,
        steps=config.training.steps,
        days=days,
        days_range=(days * fast, days * slow),
        gpu_hours=days * 24 * gpus,
    )


def _beyond_one(work: Workloads) -> dict[str, int]:
    """Kinds of parallelism that most layouts are without."""
    sizes = {"virtual pipeline": int(work.vpp_chunks[0]), "context": int(work.cp[0])}
    return {name: size for name, size in sizes.items() if size > 1}


def flops_per_token(config: Config, attention_share: float = 1.0) -> float:
    """6 N + 12 L h s, the scores times `attention_share` (Kaplan et al. 2020, table 1; Chowdhery et
    al. 2022, appendix B). N: weights of matrix products, without the input embedding."""
    model = config.model
    width, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = model.hidden_size * (2 * width + 2 * kv + 3 * model.ffn_hidden_size)
    weights = model.num_layers * layer + model.vocab_size * model.hidden_size
    scores = 12 * model.num_layers * width * config.training.sequence_length
    return float(6 * weights + attention_share * scores)


def _memory_table(stages: list[dict[str, float]]) -> str:
    """A column for each stage (of many, the first, one of the middle and the last), adding up."""
    shown = list(range(len(stages)))
    if len(stages) > 4:
        shown = [0, len(stages) // 2, len(stages) - 1]
    causes = [name for name in stages[0] if any(stages[s][name] for s in shown)]
    lines = [f"  {'':<18}" + "".join(f"{f'stage {s}':>10}" for s in shown)]
    for name in causes:
        cells = "".join(f"{stages[s][name]:>10.2f}" for s in shown)
        lines.append(f"  {_words(name):<18}{cells}")
    totals = "".join(f"{sum(stages[s].values()):>10.2f}" for s in shown)
    return "\n".join([*lines, f"  {'total':<18}{totals}"])


def _words(name: str) -> str:
    return name.replace("_", " ")


def _waterfall(parts: dict[str, float]) -> str:
    total, reached, lines = sum(parts.values()), 0.0, []
    for name, seconds in parts.items():
        bar = " " * round(40 * reached / total) + "#" * max(1, round(40 * seconds / total))
        reached += seconds
        lines.append(f"  {_words(name):<18}{seconds:>9.3f} {seconds / total:>6.1%}  {bar}")
    return "\n".join([*lines, f"  {'total':<18}{total:>9.3f}"])
