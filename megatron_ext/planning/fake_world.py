"""Ranks of a large layout, built one after another in this process without storage or partners.

    from megatron_ext.planning.fake_world import main
    main()          # a request on standard input, the ranks on standard output, both JSON

A child of planning/ranks.py, in a process of its own because Megatron-Core's state is the
process's. Real are Megatron-Core's groups (`parallel_state`) for the whole world, GPTModel, its
gradient buffers and the optimizer's partition; only the communication backend is torch's fake one,
and tensors live on the meta device. A rank that cannot be built is reported with its error.
"""

import json
import sys
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ext import cpu
from megatron_ext.config import Config
from megatron_ext.model.llama import build_chunks, reduced, transformer_config
from megatron_ext.training.optimizer import build_optimizer
from megatron_ext.world import build_groups


@dataclass(frozen=True)
class Rank:
    """What one rank holds, as built."""

    rank: int
    stage: int
    """Pipeline stage."""
    tensor_rank: int
    data_rank: int
    layers: int
    parameters: int
    """Weights in this rank's memory."""
    of_the_model: int
    """Weights of the whole model that this stage stands for: split ones times the tensor-parallel
    size, copies (norms; a tied projection) once."""
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    """Master weights and moments of this rank's shard."""


def build(config: Config, world_size: int, rank: int) -> Rank:
    """One rank of the world, torn down again."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        build_groups(config)
        tensor_parallel.model_parallel_cuda_manual_seed(config.training.seed)
        transformer = transformer_config(config)
        chunks = build_chunks(config, transformer)
        model = reduced(config, transformer, chunks)
        optimizer = build_optimizer(model, config)
        weights = [weight for chunk in chunks for weight in chunk.parameters()]
        buffers = [b for part in model for b in (*part.buffers, *part.expert_parallel_buffers)]
        return Rank(
            rank=rank,
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            data_rank=parallel_state.get_data_parallel_rank(),
            layers=sum(len(chunk.decoder.layers) for chunk in chunks),
            parameters=sum(weight.numel() for weight in weights),
            of_the_model=sum(_of_the_model(weight, config) for weight in weights),
            weight_bytes=sum(map(_bytes, weights)),
            gradient_bytes=sum(_bytes(buffer.grad_data) for buffer in buffers),
            optimizer_bytes=sum(_state_bytes(part, weights) for part in _parts(optimizer)),
        )
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _of_the_model(weight: torch.Tensor, config: Config) -> int:
    copied = getattr(weight, "shared_embedding", False) or getattr(weight, "shared", False)
    if copied and not parallel_state.is_pipeline_first_stage():
        return 0
    split = getattr(weight, "tensor_model_parallel", False)
    return weight.numel() * (config.parallel.tensor if split else 1)


def _parts(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _state_bytes(part: Any, weights: list[torch.Tensor]) -> int:
    """Moments, and the master weights that are not the model's own tensors."""
    own = {id(weight) for weight in weights}
    size = 0
    for group in part.optimizer.param_groups:
        for weight in group["params"]:
            size += 2 * 4 * weight.numel() + (0 if id(weight) in own else 4 * weight.numel())
    return size


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def main() -> None:
    warnings.filterwarnings("ignore")
    request = json.load(sys.stdin)
    config = Config.model_validate(request["config"])
    cpu.prepare("meta")
    answers: list[dict[str, Any]] = []
    for rank in request["ranks"]:
        try:
            answers.append(asdict(build(config, request["world_size"], rank)))
        except Exception as error:  # whatever Megatron-Core says against a layout is the answer
            answers.append({"rank": rank, "error": " ".join(str(error).split()) or repr(error)})
    json.dump(answers, sys.stdout)
