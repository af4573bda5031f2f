"""AdamW over Megatron-Core's gradient buffers, its state divided over the data-parallel ranks when
parallel.distributed_optimizer says so.

    optimizer = build_optimizer(model, config)
"""

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_ext.config import Config


def build_optimizer(model: list[DistributedDataParallel], config: Config) -> MegatronOptimizer:
    """The optimizer of this rank's model chunks. One-dimensional weights (norms) are not decayed;
    with precision.dtype=bf16 it keeps float32 master weights."""
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.optimizer.lr,
        weight_decay=config.optimizer.weight_decay,
        adam_beta1=config.optimizer.beta1,
        adam_beta2=config.optimizer.beta2,
        adam_eps=config.optimizer.eps,
        clip_grad=config.optimizer.clip_grad,
        bf16=config.precision.dtype == "bf16",
        params_dtype=torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=False,
    )
    optimizer = get_megatron_optimizer(settings, model, use_gloo_process_groups=False)
    for group in optimizer.param_groups:
        group["weight_decay"] = config.optimizer.weight_decay * group["wd_mult"]
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            _make_restorable(part)
    return optimizer


def _make_restorable(part: MegatronOptimizer) -> None:
    """Let a checkpoint find its place in PyTorch's AdamW, which differs from the fused ones in one
    point that Megatron-Core 0.16.1 forgets: each weight has a `step` tensor of its own."""
    adamw = part.optimizer
    for group in adamw.param_groups:
        for weight in group["params"]:
            # PyTorch makes the state in the first step, Megatron-Core prepares it without `step`.
            adamw.state[weight] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }

    def own_steps(optimizer: torch.optim.Optimizer) -> None:
        # distrib_optimizer.py:824 gives all weights one tensor, which then counts every weight.
        for state in optimizer.state.values():
            state["step"] = state["step"].clone()

    adamw.register_load_state_dict_post_hook(own_steps)

    def set_state(weight: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        # distrib_optimizer.py:940 wants `step` among the tensors of a file that rightly lacks it.
        group, place = part.model_param_group_index_map[weight]
        main_weight = adamw.param_groups[group]["params"][place]
        main_weight.data.copy_(tensors["param"])
        for name in ("exp_avg", "exp_avg_sq"):
            adamw.state[main_weight][name].copy_(tensors[name])

    if isinstance(part, DistributedOptimizer):
        part._set_main_param_and_optimizer_states = set_state
