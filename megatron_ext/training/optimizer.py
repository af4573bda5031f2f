"""AdamW over Megatron-Core's gradient buffers, its state divided over the data-parallel ranks when
parallel.distributed_optimizer says so.

    optimizer = build_optimizer(model, config)
    grad_norm = clip_gradients(optimizer, config.optimizer.clip_grad)
"""

import math

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_ext.config import Config
from megatron_ext.model.kernels import choose, look


def build_optimizer(model: list[DistributedDataParallel], config: Config) -> MegatronOptimizer:
    """The optimizer of this rank's model chunks. One-dimensional weights (norms) are not decayed;
    with precision.dtype=bf16 or fp16 it keeps float32 master weights."""
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.optimizer.lr,
        weight_decay=config.optimizer.weight_decay,
        adam_beta1=config.optimizer.beta1,
        adam_beta2=config.optimizer.beta2,
        adam_eps=config.optimizer.eps,
        clip_grad=config.optimizer.clip_grad,
        bf16=config.precision.dtype == "bf16",
        fp16=config.precision.dtype == "fp16",
        params_dtype=model[0].config.params_dtype,
        initial_loss_scale=config.precision.loss_scale,
        loss_scale_window=config.precision.loss_scale_window,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=model[0].ddp_config.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(settings, model, use_gloo_process_groups=False)
    if choose(config, look()).optimizer.name == "torch":
        for part in optimizer.chained_optimizers:
            _take_torch_adamw(part)
    if settings.fp16:
        # All chunks share one config; Megatron-Core's schedules scale the loss by it.
        model[0].config.grad_scale_func = optimizer.scale_loss
    for group in optimizer.param_groups:
        group["weight_decay"] = config.optimizer.weight_decay * group["wd_mult"]
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            _make_state(part.optimizer)
    return optimizer


def clip_gradients(optimizer: MegatronOptimizer, most: float) -> float:
    """Scale all gradients so that their global 2-norm is at most `most`, unless `most` is 0 or the
    norm not finite; returns the norm before. Collective, and waits for the device once.

    Megatron-Core's own clipping is as good with Transformer Engine or apex only. Without them it
    waits for the device once a weight, and writes every gradient twice.
    """
    gradients = optimizer.get_main_grads_for_grad_norm()
    if not gradients:  # of a small model some rank may have none
        gradients = [torch.zeros(1, device=torch.cuda.current_device())]
    square = torch.nn.utils.get_total_norm(gradients).square()
    dist.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
    norm = square.sqrt()
    value = norm.item()
    if most and most < value < math.inf:
        torch.nn.utils.clip_grads_with_norm_(optimizer.get_parameters(), most, norm)
    return value


def _take_torch_adamw(part: MegatronOptimizer) -> None:
    """Megatron-Core takes the fused AdamW that it can import, whatever the config says."""
    if isinstance(part.optimizer, torch.optim.AdamW):
        return
    # Made of nothing: of the groups it would refuse those of the distributed optimizer, whose
    # tensors are views of weights.
    adamw = torch.optim.AdamW([torch.empty(0)])
    adamw.param_groups = part.optimizer.param_groups
    for group in adamw.param_groups:
        for name, value in adamw.defaults.items():
            group.setdefault(name, value)
    part.optimizer = adamw


def _make_state(adamw: torch.optim.AdamW) -> None:
    """What PyTorch makes in the first step, so that a checkpoint finds its place before it."""
    for group in adamw.param_groups:
        # One pass over a weight instead of a dozen; Megatron-Core 0.16.1 does not ask for it.
        group["fused"], group["foreach"] = True, False
        for weight in group["params"]:
            adamw.state[weight] = {
                "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
