"""Every way that a kernel of the model can be computed, beside what it has to equal.

    with one_process(device):                  # Megatron-Core's loss asks for its groups
        for kernel in KERNELS.values(): ...    # what to do with one: kernel.py

Used by benchmarks/gpu_kernels.py (parity and speed) and by tests/model/test_kernel_paths.py. The
reference of each is written in float64 from its formula, on the same rounded inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from benchmarks.kernel import SIXTEEN_BITS, Build, Kernel, Path, function
from megatron_ext import cpu
from megatron_ext.model.cross_entropy import chunked_cross_entropy, cross_entropy
from megatron_ext.model.kernels import CHUNK_TOKENS, COMPILED_CHUNK_TOKENS
from megatron_ext.model.layers import RMSNorm, SdpaAttention
from megatron_ext.model.weight_gradient import add_weight_gradient
from megatron_ext.rope.embedding import RotaryEmbedding, apply_rotary

BETAS, EPS, LR, DECAY = (0.9, 0.95), 1e-8, 1e-3, 0.1


@contextmanager
def one_process(device: torch.device) -> Iterator[None]:
    """Megatron-Core's groups of this process alone."""
    cpu.prepare()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    parallel_state.initialize_model_parallel()
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator)


@functools.cache
def _compiled(of_inputs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(of_inputs)


def _config(size_of: Tensor, heads: int = 1) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1, hidden_size=size_of.shape[-1] * heads, num_attention_heads=heads,
        params_dtype=size_of.dtype,
    )  # fmt: skip


def _called(module: torch.nn.Module, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.func.functional_call(module, {"weight": weight}, (x,))


# RMSNorm


def _norm_formula(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return (normed * weight.to(wide.dtype)).to(x.dtype)


def _norm_of_ours(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return _called(RMSNorm(_config(x), x.shape[-1]), x, weight)


def _norm_of_te(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    import transformer_engine.pytorch as te

    return _called(te.RMSNorm(x.shape[-1], eps=1e-6, params_dtype=x.dtype), x, weight)


# Residual stream: x and what is added to it [length, batch, hidden]


def _residual(fused: bool) -> Build:
    add = get_bias_dropout_add(training=True, fused=fused)
    return lambda x, residual: lambda: add((x, None), residual, 0.0)


# Linear layer: x [tokens, hidden], weight [2 ffn, hidden], the first of the MLP


def _linear_of_te(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    import transformer_engine.pytorch as te

    return _called(te.Linear(*weight.t().shape, bias=False, params_dtype=x.dtype), x, weight)


# Its weight's gradient, into the float32 sum over micro-batches: x, and the gradient of its output


def _weight_gradient(accumulate: Callable[[Tensor, Tensor, Tensor], object]) -> Build:
    def build(x: Tensor, gradient: Tensor) -> Callable[[], Tensor]:
        x, gradient = x.detach(), gradient.detach()
        total = torch.zeros(
            gradient.shape[1], x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32),
            device=x.device,
        )  # fmt: skip

        def work() -> Tensor:
            accumulate(x, gradient, total)
            return total

        return work

    return build


def _add_product(x: Tensor, gradient: Tensor, total: Tensor) -> None:
    total.add_(gradient.t() @ x)


def _accumulate_by_apex(x: Tensor, gradient: Tensor, total: Tensor) -> None:
    import fused_weight_gradient_mlp_cuda

    fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x, gradient, total)


# Attention: query, key and value [length, batch, heads, head_dim]


def _attention_formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / query.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    shares = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", shares, value).flatten(2)


def _attention(kernel: str) -> Build:
    def build(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
        config = _config(query, query.shape[2])
        module = SdpaAttention(config, 1, AttnMaskType.causal, "self", kernel=kernel)
        return partial(module, query, key, value, None)

    return build


def _attention_of_te(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    import transformer_engine.pytorch as te

    module = te.DotProductAttention(
        query.shape[2], query.shape[3], num_gqa_groups=key.shape[2], attention_dropout=0.0,
        attn_mask_type="causal", qkv_format="sbhd",
    )  # fmt: skip
    return partial(module, query, key, value)


# Rotation: t [length, batch, heads, head_dim]


def _angles(length: int, head_dim: int, device: torch.device) -> Tensor:
    return RotaryEmbedding(base=5e5, head_dim=head_dim).to(device)(length)


def _rotation_formula(t: Tensor) -> Tensor:
    length, half = t.shape[0], t.shape[-1] // 2
    frequency = 5e5 ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angle = torch.arange(length, device=t.device)[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle)[:, None, None]
    turned = torch.complex(t[..., :half], t[..., half:]) * turn
    return torch.cat((turned.real, turned.imag), -1)


def _rotation(apply: Callable[[], Callable[..., Tensor]]) -> Build:
    return lambda t: partial(apply(), t, _angles(t.shape[0], t.shape[-1], t.device))


def _rotation_of_te() -> Callable[..., Tensor]:
    from megatron.core.models.common.embeddings.rope_utils import fused_apply_rotary_pos_emb

    return fused_apply_rotary_pos_emb


# SwiGLU: x [tokens, 2 ffn], gate and up


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


# Cross-entropy: hidden [length, batch, hidden], weight [vocab, hidden], labels [batch, length]


def _loss_formula(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).permute(1, 2, 0)
    return F.cross_entropy(logits, labels, reduction="none")


def _loss_in_chunks(compiled: bool) -> Build:
    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        usual = COMPILED_CHUNK_TOKENS if compiled else CHUNK_TOKENS
        chunk = min(usual, labels.numel() // 2 + 1)  # two at least, the last one smaller
        return chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk, compiled=compiled)

    return function(run)


def _whole_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(hidden @ weight.t(), labels, compiled=True)


def _whole_loss_of_core(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return vocab_parallel_cross_entropy(hidden @ weight.t(), labels.t().contiguous()).t()


def _whole_fused_loss_of_core(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    return fused_vocab_parallel_cross_entropy(
        hidden @ weight.t(), labels.t().contiguous(), group
    ).t()


# AdamW: five updates of a weight with the gradient given; always float32, as master weights are


def _adamw_formula(weight: Tensor, gradient: Tensor) -> Tensor:
    m = v = torch.zeros((), dtype=torch.float64, device=weight.device)
    w, g = weight.detach(), gradient.detach()
    for step in range(1, 6):
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        unbiased = (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)
        w = w - LR * DECAY * w - LR * unbiased
    return w


def _adamw(optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Build:
    def build(weight: Tensor, gradient: Tensor) -> Callable[[], Tensor]:
        updated = weight.detach().to(torch.float32, copy=True).requires_grad_()
        updated.grad = gradient.detach().float()
        adamw = optimizer([updated])

        def work() -> Tensor:
            for _ in range(5):
                adamw.step()
            return updated.detach()

        return work

    return build


def _torch_adamw(weights: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, LR, BETAS, EPS, DECAY, fused=True)


def _te_adam(weights: list[Tensor]) -> torch.optim.Optimizer:
    from transformer_engine.pytorch.optimizers import FusedAdam

    return FusedAdam(weights, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, adam_w_mode=True)


def _apex_adam(weights: list[Tensor]) -> torch.optim.Optimizer:
    from apex.optimizers import FusedAdam

    return FusedAdam(weights, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, adam_w_mode=True)


KERNELS: dict[str, Kernel] = {
    "RMSNorm": Kernel(
        lambda s: (_random(s.length, s.batch, s.hidden), 1 + 0.2 * _random(s.hidden)),
        _norm_formula,
        (
            Path("ours", _norm_of_ours),
            Path("compiled", lambda *a: partial(_compiled(_norm_formula), *a), "compiler"),
            Path("Transformer Engine", _norm_of_te, "transformer_engine"),
        ),
        bytes=lambda s, width: 5 * s.tokens * s.hidden * width,  # x, y; x, dy, dx
    ),
    "residual add": Kernel(
        lambda s: (
            _random(s.length, s.batch, s.hidden),
            3 * _random(s.hidden).expand(s.length, s.batch, -1),
        ),
        torch.add,
        (
            Path("PyTorch", _residual(fused=False)),
            Path("compiled", _residual(fused=True), "compiler"),
        ),
        bytes=lambda s, width: 3 * s.tokens * s.hidden * width,  # backward there is nothing to do
    ),
    "linear": Kernel(
        lambda s: (_random(s.tokens, s.hidden), _random(2 * s.ffn, s.hidden) / s.hidden**0.5),
        F.linear,
        (
            Path("PyTorch", function(F.linear)),
            Path("Transformer Engine", _linear_of_te, "transformer_engine", SIXTEEN_BITS),
        ),
        flops=lambda s: 12 * s.tokens * s.hidden * s.ffn,
    ),
    "its weight's gradient": Kernel(
        lambda s: (_random(s.tokens, s.hidden), _random(s.tokens, 2 * s.ffn)),
        lambda x, gradient: gradient.detach().t() @ x.detach(),
        (
            Path("PyTorch", _weight_gradient(_add_product)),
            Path("PyTorch, within the product", _weight_gradient(add_weight_gradient)),
            Path(
                "apex",
                _weight_gradient(_accumulate_by_apex),
                "fused_weight_gradient_mlp_cuda",
                SIXTEEN_BITS,
            ),
        ),
        flops=lambda s: 4 * s.tokens * s.hidden * s.ffn,
    ),
    "attention": Kernel(
        lambda s: (
            _random(s.length, s.batch, s.heads, s.head_dim),
            _random(s.length, s.batch, s.kv_heads, s.head_dim),
            0.5 * _random(s.length, s.batch, s.kv_heads, s.head_dim) + 0.1,
        ),
        _attention_formula,
        (
            Path("sdpa", _attention("sdpa")),
            Path("flash", _attention("flash"), "cuda", SIXTEEN_BITS),
            Path("cudnn", _attention("cudnn"), "cuda", SIXTEEN_BITS),
            Path("flash_attn", _attention("flash_attn"), "flash_attn", SIXTEEN_BITS),
            Path("Transformer Engine", _attention_of_te, "transformer_engine", SIXTEEN_BITS),
        ),
        # Two products forward, five backward, of the causal half.
        flops=lambda s: 7 * s.batch * s.heads * s.head_dim * s.length**2,
    ),
    "RoPE": Kernel(
        lambda s: (_random(s.length, s.batch, s.heads, s.head_dim),),
        _rotation_formula,
        (
            Path("ours", _rotation(lambda: apply_rotary)),
            Path("compiled", _rotation(lambda: _compiled(apply_rotary)), "compiler"),
            Path("Transformer Engine", _rotation(_rotation_of_te), "transformer_engine"),
        ),
        bytes=lambda s, width: 4 * s.tokens * s.heads * s.head_dim * width,  # x, y; dy, dx
    ),
    "SwiGLU": Kernel(
        lambda s: (_random(s.tokens, 2 * s.ffn),),
        _swiglu,
        (
            Path("PyTorch", function(_swiglu)),
            Path("compiled", lambda x: partial(bias_swiglu_impl, x, None), "compiler"),
        ),
        bytes=lambda s, width: (2 + 1 + 2 + 1 + 2) * s.tokens * s.ffn * width,
    ),
    "cross-entropy": Kernel(
        lambda s: (
            _random(s.length, s.batch, s.hidden),
            _random(s.vocab, s.hidden) / s.hidden**0.5,
            torch.randint(s.vocab, (s.batch, s.length), generator=torch.Generator().manual_seed(0)),
        ),
        _loss_formula,
        (
            Path("whole, Megatron-Core's", function(_whole_loss_of_core)),
            Path(  # no setting takes it: the backward pass casts to bfloat16, whatever came in
                "whole, Megatron-Core's fused",
                function(_whole_fused_loss_of_core),
                "compiler",
                (torch.bfloat16,),
            ),
            Path("whole, compiled", function(_whole_loss), "compiler"),
            Path("chunked", _loss_in_chunks(compiled=False)),
            Path("chunked, compiled", _loss_in_chunks(compiled=True), "compiler"),
        ),
        flops=lambda s: 6 * s.tokens * s.vocab * s.hidden,
    ),
    "AdamW": Kernel(
        lambda s: (0.02 * _random(s.hidden, s.ffn), _random(s.hidden, s.ffn)),
        _adamw_formula,
        (
            Path("torch", _adamw(_torch_adamw)),
            Path("Transformer Engine", _adamw(_te_adam), "transformer_engine"),
            Path("apex", _adamw(_apex_adam), "apex"),
        ),
        bytes=lambda s, width: 5 * 7 * 4 * s.hidden * s.ffn,  # five updates: w, m, v in and out; g
    ),
}
