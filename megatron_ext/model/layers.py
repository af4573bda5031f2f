"""Norm and attention core, and the choice between ours and Transformer Engine's.

    backend = choose_backend(config.kernels.backend)
    log(backend.reason)
    spec = block_spec(backend, transformer_config, self_attention)

Ours need nothing but PyTorch and run on a CPU and on a GPU; Transformer Engine's need its package
and a GPU. Refuses (UserError) Transformer Engine when it was asked for and cannot be had.
"""

import importlib.util
from dataclasses import dataclass
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

from megatron_ext.errors import UserError
from megatron_ext.model.context import attend


@dataclass(frozen=True)
class Backend:
    """The implementation in use and, for the log, why."""

    name: str  # "transformer_engine" or "torch"
    reason: str


def choose_backend(wanted: str, mask_documents: bool = False) -> Backend:
    """Settle `kernels.backend`. Raises UserError when the wanted one is not to be had."""
    if mask_documents:
        return Backend("torch", "PyTorch kernels: data.mask_documents=true")
    installed = importlib.util.find_spec("transformer_engine") is not None
    gpu = torch.cuda.is_available()
    if wanted == "torch":
        return Backend("torch", "PyTorch kernels: kernels.backend=torch")
    if installed and gpu:
        return Backend("transformer_engine", "Transformer Engine: installed, and a GPU is there")
    missing = "no GPU" if not gpu else "transformer-engine is not installed"
    if wanted == "transformer_engine":
        raise UserError(
            f"kernels.backend=transformer_engine cannot be had ({missing}): "
            + ("use kernels.backend=torch" if not gpu else "pip install 'megatron-ext[gpu]'")
        )
    return Backend("torch", f"PyTorch kernels (SDPA attention): {missing}")


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
    """Causal or masked attention of one tensor-parallel rank's heads through PyTorch's SDPA.

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
        **_: Any,
    ) -> None:
        super().__init__(config=config)
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
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
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


def block_spec(
    backend: Backend,
    config: TransformerConfig,
    self_attention: type,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules | ModuleSpec:
    """The transformer layers and last norm of this pipeline stage, or of one of its chunks, with
    `self_attention` as the attention module.

    Checkpoint keys are those of Transformer Engine's fused layers in both cases.
    """
    if backend.name == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec()
        spec.submodules.self_attention.module = self_attention
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
                    core_attention=SdpaAttention,
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
