"""Norm and attention core, ours and the packages', as a layer spec.

    kernels = choose(config, look())                        # kernels.py
    spec = block_spec(kernels, transformer_config, self_attention)

Ours need nothing but PyTorch and run on a CPU and on a GPU; Transformer Engine's and flash-attn
need their package and a GPU.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ext.config import Config
from megatron_ext.model.context import attend
from megatron_ext.model.kernels import Kernels

# Of SDPA's kernels, for each choice; in order, the first that takes the tensors.
_SDPA = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "hopper": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
}


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, reduced in float32 (Zhang and
    Sennrich 2019). Unlike Megatron-Core's wrapper of torch's norm it allows sequence parallel: the
    weight says so, and its gradient is then summed over the tensor-parallel ranks.

    Input and output [..., hidden_size] in the model's dtype.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cpu:
            return _RMSNormOnCpu.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _RMSNormOnCpu(torch.autograd.Function):
    """The same in few passes over memory and with one tensor saved: on a CPU PyTorch makes it of a
    dozen operators. With n = x / rms and g the gradient, those of weight and x are sum(g n) and
    (g w - n mean(g w n)) / rms."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
        # A square beyond float32 would make zeros, whose loss and gradient look sound.
        scale = torch.rsqrt(mean_square + eps).masked_fill_(mean_square.isinf(), torch.nan)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        product = grad * normed
        mean = (product @ weight.float())[..., None] / x.shape[-1]
        of_x = (grad * weight.float()).addcmul_(normed, mean, value=-1).mul_(scale)
        return of_x.to(x.dtype), product.flatten(0, -2).sum(0).to(weight.dtype), None


class SdpaAttention(MegatronModule):
    """Causal or masked attention of one tensor-parallel rank's heads through PyTorch's SDPA, or
    (`kernel` "flash_attn") the package flash-attn.

    Queries [sequence, batch, heads, head_dim], keys and values [sequence, batch, kv_heads,
    head_dim]; output [sequence, batch, heads * head_dim], all in the model's dtype. A mask is bool
    [batch, 1, sequence, sequence], true where a key is hidden from a query. With context
    parallelism `sequence` is this rank's part of it, but a mask has the keys of all.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        kernel: str = "sdpa",
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.kernel = kernel
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"SdpaAttention is causal, not {attn_mask_type}")
        self.softmax_scale = softmax_scale
        self.context_group = None
        if config.context_parallel_size > 1:
            self.context_group = parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        if self.context_group is not None:
            output = attend(
                query, key, value, attention_mask, self.context_group, self.softmax_scale
            )
            return output.permute(2, 0, 1, 3).flatten(2).contiguous()
        if self.kernel == "flash_attn":
            return self._flash_attn(query, key, value)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        with self._backends(query):
            output = F.scaled_dot_product_attention(
                query,
                key,
                value,
                # Megatron-Core's mask says what is hidden, SDPA's what is seen; none means causal.
                attn_mask=None if attention_mask is None else ~attention_mask,
                is_causal=attention_mask is None,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return output.permute(2, 0, 1, 3).flatten(2).contiguous()

    def _backends(self, query: torch.Tensor) -> AbstractContextManager:
        if not query.is_cuda:
            return nullcontext()
        name = self.kernel
        if name == "sdpa" and torch.cuda.get_device_capability(query.device) >= (9, 0):
            name = "hopper"
        return sdpa_kernel(_SDPA[name], set_priority=True) if name in _SDPA else nullcontext()

    def _flash_attn(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        from flash_attn import flash_attn_func

        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        output = flash_attn_func(query, key, value, softmax_scale=self.softmax_scale, causal=True)
        return output.transpose(0, 1).flatten(2).contiguous()


def block_spec(
    kernels: Kernels,
    config: TransformerConfig,
    self_attention: type,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules | ModuleSpec:
    """The transformer layers and last norm of this pipeline stage, or of one of its chunks, with
    `self_attention` as the attention module.

    Checkpoint keys are those of Transformer Engine's fused layers in both cases.
    """
    own = ModuleSpec(module=SdpaAttention, params={"kernel": kernels.attention.name})
    if kernels.backend.name == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec()
        spec.submodules.self_attention.module = self_attention
        if kernels.attention.name != "transformer_engine":
            spec.submodules.self_attention.submodules.core_attention = own
        return spec
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=self_attention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=own,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
    # The last norm is named here: left to itself, Megatron-Core takes apex's or torch's.
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)


def begin_tensor_overlap(config: Config, dtype: torch.dtype) -> None:
    """Transformer Engine's buffers for parallel.tensor_overlap, of a whole micro-batch on a
    context-parallel rank in the model's dtype; once, before the layers are built."""
    from transformer_engine.pytorch.module.base import initialize_ub

    parallel, training = config.parallel, config.training
    tokens = training.sequence_length // parallel.context * training.micro_batch_size
    initialize_ub(
        shape=[tokens, config.model.hidden_size],
        tp_size=parallel.tensor,
        use_fp8=config.precision.fp8 != "none",
        dtype=dtype,
        bootstrap_backend="nccl",
    )
