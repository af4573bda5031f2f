"""AdamW over Megatron-Core's gradient buffers, its state divided over the data-parallel ranks when
parallel.distributed_optimizer says so.

    optimizer = build_optimizer(model, config)
"""

import torch
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
