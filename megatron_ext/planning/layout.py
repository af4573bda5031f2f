"""Layouts of one run on a number of GPUs, and which of them is fastest.

    choices = search(config, gpus=128, gpu="a100-80gb")
    choices[0].config.parallel, choices[0].step_time_s, reason(choices)
    print(parallel_section(choices[0]))         # lines for the config file

Tried are all tensor, context and pipeline sizes that the rules of a config allow, stages of up to
four chunks (interleaved), stages that count the embedding and the output projection as a layer
each, micro-batches that divide the batch, and recompute; sequence parallelism wherever there is
tensor parallelism, as it costs nothing, and the sharded optimizer. Refuses (UserError) a batch that
no layout divides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.config import Config
from megatron_ext.config.rules import (
    check_context,
    check_layout,
    check_overlap,
    check_pipeline,
    check_precision,
    check_tasks,
    check_tensor,
    divisors,
)
from megatron_ext.errors import ConfigError, UserError
from megatron_ext.model.kernels import loss_chunk
from megatron_ext.planning.memory import memory, peak_memory
from megatron_ext.planning.prediction import constants
from megatron_ext.planning.sources import GIB
from megatron_ext.planning.throughput import StepTime, step_time
from megatron_ext.planning.workload import GPUS_PER_NODE, Workloads, from_rows, gpu_table

_RECOMPUTE = ("none", "selective", "full")
_MOST_CHUNKS = 4  # of a stage: a quarter of the bubble, four times its messages
_LARGEST_MICRO_BATCH = 16
_ROOM = 0.95  # of the GPU's memory: the prediction's own error stays free


@dataclass(frozen=True)
class Choice:
    """One layout with what is predicted of it."""

    config: Config
    step_time_s: float
    memory_gib: float
    """Of the fullest rank."""
    fits: bool
    """With 5% of the GPU's memory to spare."""
    parts: dict[str, float]
    """Seconds of the step by cause."""

    @property
    def name(self) -> str:
        """As `TP2 PP4 x2 micro-batch 4`: four stages of two chunks each."""
        parallel, training = self.config.parallel, self.config.training
        chunks = f" x{parallel.virtual_pipeline}" if parallel.virtual_pipeline > 1 else ""
        ends = f" ends {parallel.last_stage_layers}" if parallel.last_stage_layers else ""
        context = f" CP{parallel.context}" if parallel.context > 1 else ""
        recompute = "" if training.recompute == "none" else f", recompute {training.recompute}"
        return (
            f"TP{parallel.tensor} PP{parallel.pipeline}{chunks}{ends}{context} micro-batch "
            f"{training.micro_batch_size}{recompute}"
        )


def workload(config: Config, gpus: int, gpu: str, gpu_file: Path | None = None) -> Workloads:
    """The config on `gpus` GPUs as a table of one row."""
    return workloads([config], gpus, gpu, gpu_file)


def workloads(
    configs: list[Config], gpus: int, gpu: str, gpu_file: Path | None = None
) -> Workloads:
    """One row for each config."""
    return from_rows([_row(config, gpus, gpu) for config in configs], gpu_table(gpu_file))


def _row(config: Config, gpus: int, gpu: str) -> dict[str, Any]:
    model, parallel, training = config.model, config.parallel, config.training
    fused = config.kernels.backend == "transformer_engine"
    return {
        "row_id": "config",
        # PyTorch's kernels are reckoned with unless the config insists on fused ones.
        "framework": "Megatron-Core" if fused else "mcore, PyTorch kernels",
        "gpu": gpu,
        "gpus": gpus,
        "num_layers": model.num_layers,
        "hidden": model.hidden_size,
        "heads": model.num_heads,
        "kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "ffn": model.ffn_hidden_size,
        "gated": 1,
        "vocab": model.vocab_size,
        "tied": int(model.tied_embeddings),
        "seq_len": training.sequence_length,
        "tp": parallel.tensor,
        "pp": parallel.pipeline,
        "vpp_chunks": parallel.virtual_pipeline,
        "cp": parallel.context,
        "dp": gpus // parallel.model_ranks,
        "first_layers": parallel.first_stage_layers or 0,
        "last_layers": parallel.last_stage_layers or 0,
        "seq_parallel": int(parallel.sequence),
        "zero_stage": int(parallel.distributed_optimizer),
        "micro_batch": training.micro_batch_size,
        "global_batch": training.global_batch_size,
        # The tables call it selective when the attention core is repeated.
        "recompute": "mlp" if training.recompute == "selective" else training.recompute,
        "precision": _precision(config),
        "loss_chunk": loss_chunk(config) or 0,
    }


def _precision(config: Config) -> str:
    """In the words of a table: its fp16 has gradients of 16 bits, its bf16 and fp8 of 32."""
    if config.precision.fp8 != "none":
        return "fp8"
    return "bf16" if config.precision.grad_reduce == "fp32" else "fp16"


def search(config: Config, gpus: int, gpu: str, gpu_file: Path | None = None) -> list[Choice]:
    """Every layout, those that fit first, each kind by step time.

    Raises UserError when no layout divides model and batch.
    """
    tried = list(layouts(config, gpus))
    if not tried:
        raise UserError(
            f"no layout of training.global_batch_size={config.training.global_batch_size} and this "
            f"model divides over --gpus {gpus}: choose a number of GPUs that divides the batch"
        )
    work = workloads(tried, gpus, gpu, gpu_file)
    c = constants()
    parts = step_time(work, c.time)
    seconds, peak = parts.total, peak_memory(work, c.memory)[0]
    room = _ROOM * work.gpu.memory_gib * GIB
    choices = [
        Choice(
            config=one,
            step_time_s=float(seconds[i]),
            memory_gib=float(peak[i] / GIB),
            fits=bool(peak[i] <= room[i]),
            parts=seconds_by_cause(parts, i),
        )
        for i, one in enumerate(tried)
    ]
    return sorted(choices, key=lambda choice: (not choice.fits, choice.step_time_s))


def seconds_by_cause(parts: StepTime, row: int) -> dict[str, float]:
    """The row's seconds, without the causes that it has not."""
    everything = {name: float(values[row]) for name, values in vars(parts).items()}
    return {name: value for name, value in everything.items() if value > 0}


def layouts(config: Config, gpus: int) -> Iterator[Config]:
    """Configs that differ in layout, micro-batch and recompute, and break no rule."""
    sizes = divisors(GPUS_PER_NODE)
    for tensor, context, stages in product(sizes, sizes, _stages(config.model.num_layers)):
        parallel = config.parallel.model_copy(
            update={
                "tensor": tensor,
                "context": context,
                "sequence": tensor > 1,
                "distributed_optimizer": True,
                **stages,
            }
        )
        if gpus % parallel.model_ranks:
            continue
        share = config.training.global_batch_size * parallel.model_ranks // gpus
        micro_batches = [n for n in divisors(share) if n <= _LARGEST_MICRO_BATCH] if share else []
        for micro_batch, recompute in product(micro_batches, _RECOMPUTE):
            training = config.training.model_copy(
                update={"micro_batch_size": micro_batch, "recompute": recompute}
            )
            one = config.model_copy(update={"parallel": parallel, "training": training})
            if _is_allowed(one, gpus):
                yield one


def _stages(layers: int) -> Iterator[dict[str, int | None]]:
    """Ways to cut the layers: even stages, whole or in chunks, and ends with a layer less."""
    for pipeline in divisors(layers):
        for chunks in divisors(layers // pipeline):
            if chunks == 1 or (1 < chunks <= _MOST_CHUNKS and pipeline > 1):
                yield _cut(pipeline, chunks, None)
    for pipeline in divisors(layers + 2):
        each = (layers + 2) // pipeline
        if pipeline > 2 and each > 1:
            yield _cut(pipeline, 1, each - 1)


def _cut(pipeline: int, chunks: int, ends: int | None) -> dict[str, int | None]:
    return {
        "pipeline": pipeline,
        "virtual_pipeline": chunks,
        "overlap_p2p_comm": None,
        "first_stage_layers": ends,
        "last_stage_layers": ends,
    }


def _is_allowed(config: Config, gpus: int) -> bool:
    try:
        check_tensor(config)
        check_pipeline(config)
        check_context(config)
        check_layout(config, gpus)
        check_precision(config)
        check_overlap(config)
        check_tasks(config)
    except ConfigError:
        return False
    return True


def reason(choices: list[Choice]) -> str:
    """Why the first of `search` wins, in one sentence."""
    best, others = choices[0], choices[1:]
    if not best.fits:
        return (
            f"nothing fits; {best.name} is the fastest and needs {best.memory_gib:.0f} GiB: take "
            "more or larger GPUs"
        )
    rival = next((o for o in others if o.config.parallel != best.config.parallel), None)
    text = f"{best.name} fits with {best.memory_gib:.0f} GiB and takes {best.step_time_s:.2f} s"
    if rival is None:
        return f"{text}; no other division is allowed"
    slower = rival.step_time_s / best.step_time_s - 1
    causes = {*best.parts, *rival.parts}
    worst = max(causes, key=lambda name: rival.parts.get(name, 0) - best.parts.get(name, 0))
    lost = rival.parts.get(worst, 0) - best.parts.get(worst, 0)
    fit = "" if rival.fits else f", would not fit ({rival.memory_gib:.0f} GiB)"
    return (
        f"{text}; {rival.name} takes {slower:+.1%}{fit}, most of it {worst.replace('_', ' ')} "
        f"({lost:+.2f} s)"
    )


def parallel_section(choice: Choice, gpus: int) -> str:
    """The settings of a layout as lines of a config file."""
    parallel, training = choice.config.parallel, choice.config.training

    def yes(value: bool) -> str:
        return "true" if value else "false"

    return (
        f"# {choice.name}: predicted {choice.step_time_s:.2f} s a step, "
        f"{choice.memory_gib:.1f} GiB on the fullest rank\n"
        "parallel:\n"
        f"  world_size: {gpus}\n"
        f"  tensor: {parallel.tensor}\n"
        f"  pipeline: {parallel.pipeline}\n"
        f"  virtual_pipeline: {parallel.virtual_pipeline}\n"
        f"  first_stage_layers: {parallel.first_stage_layers or 'null'}\n"
        f"  last_stage_layers: {parallel.last_stage_layers or 'null'}\n"
        f"  context: {parallel.context}\n"
        f"  sequence: {yes(parallel.sequence)}\n"
        f"  distributed_optimizer: {yes(parallel.distributed_optimizer)}\n"
        "\ntraining:\n"
        f"  micro_batch_size: {training.micro_batch_size}\n"
        f"  recompute: {training.recompute}\n"
    )


def stage_memory(work: Workloads) -> list[dict[str, float]]:
    """GiB by cause of one rank of each pipeline stage, for a table of one row."""
    stages = []
    for stage in range(int(work.pp[0])):
        parts = memory(work, stage, constants().memory)
        stages.append({name: float(values[0] / GIB) for name, values in vars(parts).items()})
    return stages


def on_gpus(work: Workloads, gpus: int, weak: bool) -> Workloads:
    """The same layout with more data-parallel ranks; `weak` lets the batch grow with them."""
    dp = np.maximum(1, gpus / (work.tp * work.pp * work.cp))
    per_rank = work.global_batch / work.dp
    batch = per_rank * dp if weak else np.maximum(work.global_batch, dp * work.micro_batch)
    return replace(work, gpus=np.full(len(work), float(gpus)), dp=dp, global_batch=batch)
