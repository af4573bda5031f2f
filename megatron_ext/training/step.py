"""One step: micro-batches forward and backward, gradient clip, optimizer, learning rate.

    result = train_step(step, batches, model, optimizer, config)
    result.loss, result.grad_norm, result.lr, result.skipped

`model` is the list of model chunks of this pipeline stage, as Megatron-Core's schedules want it.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ext.config import Config
from megatron_ext.data.positions import attention_mask
from megatron_ext.model.context import my_part
from megatron_ext.training.optimizer import clip_gradients

Batch = dict[str, torch.Tensor]
Batches = Iterator[Batch]
Model = list[DistributedDataParallel]


@dataclass(frozen=True)
class StepResult:
    """What one step was, the same on every rank."""

    loss: float  # mean over the tokens of the global batch, in nats
    grad_norm: float  # global 2-norm before clipping
    lr: float
    skipped: bool  # the weights were left as they were
    stop: bool  # some rank was asked to stop
    loss_scale: float | None = None  # fp16: by which the gradients were scaled

    @property
    def overflowed(self) -> bool:
        """Whether only the loss scale was too high, which the optimizer has noted and can lower."""
        finite = math.isfinite(self.loss) and not math.isfinite(self.grad_norm)
        return finite and self.loss_scale is not None and self.loss_scale > 1


def train_step(
    step: int,
    batches: Batches,
    model: Model,
    optimizer: MegatronOptimizer,
    config: Config,
    stop_requested: Callable[[], bool] = lambda: False,
    refuse: Callable[[float], bool] = lambda loss: False,
) -> StepResult:
    """Step number `step` (the first is 0): accumulate gradients, reduce, clip, update the weights.

    `stop_requested()` of any rank, asked behind the backward pass, comes back as `result.stop` on
    all, so that they stop together. The weights stay as they were when loss or gradient is not
    finite, or `refuse(loss)`. Behind the backward pass the device is waited for by Megatron-Core's
    count of tokens (once a model chunk), the gradient norm and the sum of three numbers over all
    ranks; in fp16 twice more, for the loss scale and whether it was too high.
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses = forward_backward(batches, model, config, config.training.batch_sizes.of(step))

    scale = optimizer.get_loss_scale().item() if config.precision.dtype == "fp16" else None
    optimizer.prepare_grads()  # which lowers the loss scale when it finds an overflow
    grad_norm = clip_gradients(optimizer, config.optimizer.clip_grad)
    loss_sum, tokens, stop = _sum_over_ranks(losses, stop_requested())
    loss, lr = loss_sum / tokens, learning_rate(step, config)
    skipped = not (math.isfinite(grad_norm) and math.isfinite(loss)) or refuse(loss)
    if not skipped:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step_with_ready_grads()

    return StepResult(loss, grad_norm, lr, skipped, stop=stop > 0, loss_scale=scale)


def evaluate_loss(
    batches: Batches,
    model: Model,
    config: Config,
    count: int,
    stop_requested: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean loss in nats a token over `count` global batches, without gradients, on every rank.
    None when some rank was asked to stop meanwhile; all stop after the same batch."""
    for chunk in model:
        chunk.eval()
    totals, stop = torch.zeros(2, dtype=torch.float64), 0.0
    with torch.no_grad():
        for _ in range(count):
            losses = forward_backward(
                batches, model, config, config.training.global_batch_size, forward_only=True
            )
            loss_sum, tokens, stop = _sum_over_ranks(losses, stop_requested())
            totals += torch.tensor([loss_sum, tokens], dtype=torch.float64)
            if stop:
                break
    for chunk in model:
        chunk.train()
    return None if stop else (totals[0] / totals[1]).item()


def on_any_rank(flag: bool) -> bool:
    """Whether the flag is set on some rank; called by every rank."""
    return _sum_over_ranks([], flag)[2] > 0


def forward_backward(
    batches: Batches, model: Model, config: Config, batch_size: int, forward_only: bool = False
) -> list[dict[str, torch.Tensor]]:
    """All micro-batches of one global batch, of `batch_size` sequences, through this stage, in
    Megatron-Core's schedule for the layout. Returns, on the last stage, a {"loss": [sum, tokens]}
    for each micro-batch."""
    count = batch_size // (
        config.training.micro_batch_size * parallel_state.get_data_parallel_world_size()
    )
    # Every chunk of a stage takes the same micro-batches, each at its own time.
    iterators = itertools.tee(itertools.islice(batches, count), len(model))
    return get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=list(iterators) if len(model) > 1 else iterators[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=count,
        seq_length=config.training.sequence_length,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=forward_only,
    )


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of step `step` (the first is 0), a function of the step alone: a resumed run
    needs no state for it."""
    schedule, peak = config.schedule, config.optimizer.lr
    warmup, total = schedule.warmup_steps, config.training.steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.type == "constant":
        return peak
    after_warmup = total - warmup
    default = max(1, total // 10) if schedule.type == "wsd" else after_warmup
    length = schedule.decay_steps or default
    # wsd decays at the end of the run; the others begin right after the warm-up
    start = total - length if schedule.type == "wsd" else warmup
    done = min(max((step - start) / length, 0.0), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * done)) if schedule.type == "cosine" else 1 - done
    return schedule.min_lr + (peak - schedule.min_lr) * share


def _forward_step(batches: Batches, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    device = torch.cuda.current_device()
    batch = {name: x.to(device, non_blocking=True) for name, x in next(batches).items()}
    documents, mask = batch.pop("document_ids", None), None
    if documents is not None:
        rows = my_part(torch.arange(documents.shape[1], device=device), dim=0)
        mask = attention_mask(documents, rows)
    batch = {name: my_part(x, dim=1) for name, x in batch.items()}
    output = model(
        batch["tokens"],
        # Positions 0, 1, 2, .. need not be said: the rotary module keeps their table.
        position_ids=batch.get("position_ids"),
        attention_mask=mask,
        labels=batch["labels"],
    )
    return output, partial(_loss, batch["loss_mask"])


def _loss(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    # The sum, and the number of tokens beside it: Megatron-Core divides by the tokens of the whole
    # global batch, so that a masked token weighs the same on every rank and in every micro-batch.
    total = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    return total, tokens.int(), {"loss": torch.stack([total.detach(), tokens])}


def _sum_over_ranks(
    losses: list[dict[str, torch.Tensor]], stop_requested: bool = False
) -> tuple[float, float, float]:
    """Loss sum, tokens and stop requests over the whole world: one small collective a step."""
    told = torch.tensor([0.0, 0.0, float(stop_requested)], dtype=torch.float64)
    numbers = told.to(torch.cuda.current_device(), non_blocking=True)
    # The last stage holds the losses, the same on each of its tensor-parallel ranks.
    if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
        numbers[:2] = torch.stack([entry["loss"] for entry in losses]).double().sum(0)
    dist.all_reduce(numbers)
    return tuple(numbers.tolist())  # type: ignore[return-value]
