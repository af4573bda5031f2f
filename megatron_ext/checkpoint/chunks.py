"""A run's state as chunks: rectangles of whole tensors, named and placed without regard to layout.

    for chunk in state_chunks(model, optimizer):
        chunk.key, chunk.shape, chunk.offset, chunk.tensor      # the tensor is a view of live state

Weights stand under Megatron-Core's own checkpoint keys, AdamW's state beside them under
`optimizer.state.{fp32_param, exp_avg, exp_avg_sq}.KEY`. The distributed optimizer gives each
data-parallel rank a flat stretch of every weight; a stretch of a row-major tensor is a few
rectangles of it, so each rank writes and reads exactly what it holds. Nothing is gathered, and one
format serves every layout, with and without the distributed optimizer.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule

Model = Sequence[torch.nn.Module]


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a whole tensor, in elements."""

    key: str
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    tensor: torch.Tensor  # of the rectangle's size


def bare(model: Model) -> list[MegatronModule]:
    """The model chunks of this stage without their gradient reduction, whose names would otherwise
    stand in every key."""
    chunks = [part.module if isinstance(part, DistributedDataParallel) else part for part in model]
    assert all(isinstance(chunk, MegatronModule) for chunk in chunks)
    return chunks  # type: ignore[return-value]


def gather_weights(model: Model) -> None:
    """Fetch the weights that other ranks updated in the last step, where that was left to the next
    forward pass (parallel.overlap_param_gather). Every rank calls it."""
    for part in model:
        if isinstance(part, DistributedDataParallel) and part.use_forward_hook:
            part.start_param_sync(force_sync=True)


def state_chunks(
    model: Model, optimizer: MegatronOptimizer | None = None, to_write: bool = False
) -> list[Chunk]:
    """What this rank holds of weights and optimizer state.

    With `to_write` only what this rank is to write: every element of every tensor is then in one
    chunk of one rank, replicas sharing the work tensor by tensor.
    """
    data_parallel = parallel_state.get_data_parallel_group(with_context_parallel=True)
    rank, size = data_parallel.rank(), data_parallel.size()
    weights: list[Chunk] = []
    placed: dict[torch.Tensor, list[tuple[int, ShardedTensor]]] = {}  # a weight's shards by place
    turn: dict[str, int] = {}
    for number, (weight, place, shard) in enumerate(_shards(model)):
        placed.setdefault(weight, []).append((place, shard))
        turn[shard.key] = number % size
        if not to_write or (_is_first(shard) and number % size == rank):
            weights += _chunks(shard.key, shard, 0, shard.data)
    state: list[Chunk] = []
    for part in [] if optimizer is None else optimizer.chained_optimizers:
        divided = isinstance(part, DistributedOptimizer)
        for weight, start, main in main_weights(part):
            for place, shard in placed[weight]:
                if to_write and not _is_first(shard):
                    continue
                if to_write and not divided and turn[shard.key] != rank:
                    continue
                low = max(start, place)
                high = min(start + main.numel(), place + math.prod(shard.local_shape))
                if low >= high:
                    continue
                for name, tensor in _optimizer_tensors(part, weight, main).items():
                    flat = tensor.detach().view(-1)[low - start : high - start]
                    key = f"optimizer.state.{name}.{shard.key}"
                    state += _chunks(key, shard, low - place, flat)
    return weights + state


def main_weights(part: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """Each weight of the model that this optimizer updates, and the tensor it does it on: elements
    `start` and following of the flattened weight."""
    if isinstance(part, DistributedOptimizer):
        for weight, (group, place) in part.model_param_group_index_map.items():
            start = part._get_model_param_range_map(weight)["param"].start
            yield weight, start, part.optimizer.param_groups[group]["params"][place]
        return
    master = {}  # of weights in bf16
    for weights, mains in zip(
        getattr(part, "float16_groups", []),
        getattr(part, "fp32_from_float16_groups", []),
        strict=True,
    ):
        master.update({main: weight for weight, main in zip(weights, mains, strict=True)})
    for group in part.optimizer.param_groups:
        for main in group["params"]:
            yield master.get(main, main), 0, main


def rectangles(
    shape: Sequence[int], start: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of the fewest rectangles that are, in order, the elements start .. end - 1
    of a row-major tensor; at most 2 len(shape) - 1 of them."""
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    first, within = divmod(start, row)
    if within:
        stop = min(end - first * row, row)
        for offset, size in rectangles(shape[1:], within, stop):
            yield (first, *offset), (1, *size)
        first += 1
    last, rest = divmod(end, row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if rest and first <= last:
        for offset, size in rectangles(shape[1:], 0, rest):
            yield (last, *offset), (1, *size)


def _shards(model: Model) -> Iterator[tuple[torch.Tensor, int, ShardedTensor]]:
    """A weight, the place of a shard within it in elements, and the shard: two of SwiGLU's gate and
    up matrices, which lie in one weight."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for module in bare(model):
        for entry in nested_values(module.sharded_state_dict(metadata=metadata)):
            built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
            parts = built.values() if isinstance(built, dict) else built
            for shard in parts if isinstance(built, (dict, list)) else [built]:
                if isinstance(shard, ShardedTensor):
                    ahead = shard.data.data_ptr() - entry.data.data_ptr()
                    yield entry.data, ahead // entry.data.element_size(), shard


def _is_first(shard: ShardedTensor) -> bool:
    """No other tensor-parallel rank or stage holds the same: replica numbers end with the
    data-parallel rank."""
    assert isinstance(shard.replica_id, tuple)
    return not any(shard.replica_id[:-1])


def _chunks(key: str, shard: ShardedTensor, start: int, data: torch.Tensor) -> Iterator[Chunk]:
    """The elements `start` and following of a shard as chunks of its whole tensor."""
    flat, ahead = data.detach().view(-1), shard.prepend_axis_num
    done = 0
    for offset, size in rectangles(shard.local_shape, start, start + flat.numel()):
        count = math.prod(size)
        within = (*shard.global_offset[:ahead], *_add(shard.global_offset[ahead:], offset))
        tensor = flat[done : done + count].view(*[1] * ahead, *size)
        yield Chunk(key, tuple(shard.global_shape), within, tensor)
        done += count


def _add(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _optimizer_tensors(
    part: MegatronOptimizer, weight: torch.Tensor, main: torch.Tensor
) -> dict[str, torch.Tensor]:
    state = part.optimizer.state[main]
    tensors = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
    return tensors if weight.dtype == torch.float32 else {"fp32_param": main, **tensors}
