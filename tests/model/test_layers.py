"""The norm of our own against PyTorch's in float64."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext import cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_and_its_gradients_equal_those_in_float64(dtype: torch.dtype) -> None:
    from megatron_ext.model.layers import RMSNorm

    cpu.prepare()
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1, hidden_size=96, num_attention_heads=1, params_dtype=dtype
    )
    norm = RMSNorm(config, 96, eps=1e-5).to(dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    x = (torch.randn(7, 3, 96) * torch.logspace(-4, 2, 7)[:, None, None]).to(dtype)
    x.requires_grad_()
    grad = torch.randn(7, 3, 96).to(dtype)
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double()
    weight.requires_grad_()
    expected = F.rms_norm(wide, (96,), weight, 1e-5)
    answers = (norm(x), *torch.autograd.grad(norm(x), (x, norm.weight), grad))
    oracles = (expected, *torch.autograd.grad(expected, (wide, weight), grad.double()))
    for ours, theirs in zip(answers, oracles, strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < (1e-6 if dtype == torch.float32 else 5e-3)


def test_rms_norm_of_numbers_whose_square_overflows_is_not_silently_zero() -> None:
    from megatron_ext.model.layers import RMSNorm

    cpu.prepare()
    norm = RMSNorm(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1), 8)
    assert norm(torch.full((2, 8), 1e30)).isnan().all()
    assert norm(torch.full((2, 8), 1e15)).isfinite().all()
