"""Weight gradients added to their sum over the micro-batches within the matrix product that makes
them, by PyTorch alone.

    add_weight_gradient(x, gradient, total)     # total += gradient^T x
    take_the_place_of_apex()                    # once, before the model is built

Megatron-Core 0.16.1's linear layers can do so with an extension of apex only, which has to be
compiled (tensor_parallel/layers.py: imported in 46, asked for in 924, called in 569 and 573). It
calls cuBLAS as PyTorch's addmm does, so that function goes where the extension would be, for all
models of the process.
"""

from types import SimpleNamespace

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor


def add_weight_gradient(x: Tensor, gradient: Tensor, total: Tensor) -> None:
    """total [out, in] += gradient [tokens, out]^T x [tokens, in]: x and gradient in the model's
    dtype, total in that or float32, in which it is summed on a GPU."""
    if total.dtype == x.dtype:
        total.addmm_(gradient.t(), x)
    elif total.is_cuda:
        torch.addmm(total, gradient.t(), x, out_dtype=total.dtype, out=total)
    else:
        total.add_(gradient.t() @ x)


def take_the_place_of_apex() -> None:
    """Let gradient_accumulation_fusion of Megatron-Core's layers take `add_weight_gradient`."""
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient
    )
    layers._grad_accum_fusion_available = True
