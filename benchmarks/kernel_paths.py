"""Every way that a kernel of the model can be computed, beside what it has to equal.

    for kernel in KERNELS.values():
        for path in kernel.paths:
            if not lacking(path, device):
                differences(kernel, path, SMALL, device, torch.bfloat16)

Used by benchmarks/gpu_kernels.py (parity and speed) and by tests/model/test_kernel_paths.py. The
reference of each is written in float64 from its formula, on the same rounded inputs.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.model.cross_entropy import chunked_cross_entropy
from megatron_ext.model.kernels import problem_of
from megatron_ext.model.layers import RMSNorm, SdpaAttention
from megatron_ext.rope.embedding import RotaryEmbedding, apply_rotary

# Largest difference from float64, norm over norm, of the output and of each gradient: a few
# roundings of the format (2^-24, 2^-8, 2^-11), more of them where sums are long.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BETAS, EPS, LR, DECAY = (0.9, 0.95), 1e-8, 1e-3, 0.1


@dataclass(frozen=True)
class Size:
    """A micro-batch of one layer."""

    length: int
    batch: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def tokens(self) -> int:
        return self.length * self.batch


SMALL = Size(96, 2, 64, 176, 4, 2, 16, 203)
LARGE = Size(4096, 2, 2048, 5504, 16, 16, 128, 125_696)  # the 2B's


@dataclass(frozen=True)
class Path:
    """One way: `run` takes the kernel's inputs; `needs` is a package, "cuda", "compiler" or ""."""

    name: str
    run: Callable[..., Tensor]
    needs: str = ""


@dataclass(frozen=True)
class Kernel:
    """Inputs (those that are floating point are differentiated), the reference, the ways, and what
    one forward and backward pass must at least move (bytes) or compute (FLOPs)."""

    inputs: Callable[[Size], tuple[Tensor, ...]]
    reference: Callable[..., Tensor]
    paths: tuple[Path, ...]
    bytes: Callable[[Size, int], float] | None = None
    flops: Callable[[Size], float] | None = None


def lacking(path: Path, device: torch.device) -> str:
    """Why a way cannot be gone here, or ""."""
    gpu = device.type == "cuda"
    if path.needs == "compiler":
        found = problem_of("triton") if gpu else ("" if shutil.which("g++") else "no g++")
        return f"triton is {found}" if gpu and found else found
    if path.needs and not gpu:
        return "no GPU"
    return "" if path.needs in ("", "cuda") else problem_of(path.needs)


def differences(
    kernel: Kernel, path: Path, size: Size, device: torch.device, dtype: torch.dtype
) -> list[float]:
    """Distance from the reference, norm over norm: of the output, then of each gradient."""
    rounded = [
        x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in kernel.inputs(size)
    ]
    ours = results(path.run, rounded)
    exact = [x.double() if x.is_floating_point() else x for x in rounded]
    theirs = results(kernel.reference, exact)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)]


def results(run: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output and, where it has any, the gradients of the inputs for a fixed one of its own."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    output = run(*leaves)
    if not output.requires_grad:
        return [output]
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
    given = [x for x in leaves if x.is_floating_point()]
    return [output.detach(), *torch.autograd.grad(output, given, gradient)]


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


def _config(size_of: Tensor, heads: int = 1) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1, hidden_size=size_of.shape[-1] * heads, num_attention_heads=heads,
        params_dtype=size_of.dtype,
    )  # fmt: skip


# RMSNorm


def _norm_formula(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return (normed * weight.to(wide.dtype)).to(x.dtype)


def _norm_of_ours(x: Tensor, weight: Tensor) -> Tensor:
    module = RMSNorm(_config(x), x.shape[-1])
    return torch.func.functional_call(module, {"weight": weight}, (x,))


def _norm_of_te(x: Tensor, weight: Tensor) -> Tensor:
    import transformer_engine.pytorch as te

    module = te.RMSNorm(x.shape[-1], eps=1e-6, params_dtype=x.dtype)
    return torch.func.functional_call(module, {"weight": weight}, (x,))


# Attention: query, key and value [length, batch, heads, head_dim]


def _attention_formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / query.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    shares = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", shares, value).flatten(2)


def _attention(kernel: str) -> Callable[..., Tensor]:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        config = _config(query, query.shape[2])
        module = SdpaAttention(config, 1, AttnMaskType.causal, "self", kernel=kernel)
        return module(query, key, value, None)

    return run


def _attention_of_te(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    import transformer_engine.pytorch as te

    module = te.DotProductAttention(
        query.shape[2], query.shape[3], num_gqa_groups=key.shape[2], attention_dropout=0.0,
        attn_mask_type="causal", qkv_format="sbhd",
    )  # fmt: skip
    return module(query, key, value)


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


def _rotation(apply: Callable[[], Callable[..., Tensor]]) -> Callable[..., Tensor]:
    def run(t: Tensor) -> Tensor:
        return apply()(t, _angles(t.shape[0], t.shape[-1], t.device))

    return run


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


def _loss(compiled: bool) -> Callable[..., Tensor]:
    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        chunk = max(1, min(1024, labels.numel() // 3))
        return chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk, compiled=compiled)

    return run


# AdamW: five updates of a weight with the gradient given; always float32, as master weights are


def _adamw_formula(weight: Tensor, gradient: Tensor) -> Tensor:
    m = v = torch.zeros((), dtype=torch.float64, device=weight.device)
    w, g = weight.detach(), gradient.detach()
    for step in range(1, 6):
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        unbiased = (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)
        w = w - LR * DECAY * w - LR * unbiased
    return w - weight.detach()


def _adamw(optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[..., Tensor]:
    def run(weight: Tensor, gradient: Tensor) -> Tensor:
        before = weight.detach().float()
        updated = before.clone().requires_grad_()
        updated.grad = gradient.detach().float()
        adamw = optimizer([updated])
        for _ in range(5):
            adamw.step()
        return updated.detach().double() - before.double()

    return run


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
            Path("compiled", lambda *a: _compiled(_norm_formula)(*a), "compiler"),
            Path("Transformer Engine", _norm_of_te, "transformer_engine"),
        ),
        bytes=lambda s, width: 5 * s.tokens * s.hidden * width,  # x, y; x, dy, dx
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
            Path("flash", _attention("flash"), "cuda"),
            Path("cudnn", _attention("cudnn"), "cuda"),
            Path("flash_attn", _attention("flash_attn"), "flash_attn"),
            Path("Transformer Engine", _attention_of_te, "transformer_engine"),
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
            Path("PyTorch", _swiglu),
            Path("compiled", lambda x: bias_swiglu_impl(x, None), "compiler"),
        ),
        bytes=lambda s, width: (2 + 1 + 2 + 1 + 2) * s.tokens * s.ffn * width,
    ),
    "cross-entropy": Kernel(
        lambda s: (
            _random(s.length, s.batch, s.hidden),
            _random(s.vocab, s.hidden) / s.hidden**0.5,
            torch.randint(0, s.vocab, (s.batch, s.length)),
        ),
        _loss_formula,
        (Path("chunked", _loss(False)), Path("chunked, compiled", _loss(True), "compiler")),
        flops=lambda s: 8 * s.tokens * s.vocab * s.hidden,  # the logits are made twice
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
