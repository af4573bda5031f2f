"""A kernel of the model, the ways to compute it, and how far each is from what it has to equal.

    if not lacking(path, device):
        difference(kernel, path, SMALL, device, torch.bfloat16)       # parity
        work = prepared(path.build, inputs); work()                   # once: compiles, tunes
        seconds(work)                                                 # again: nothing but the work

The kernels themselves: kernel_paths.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_ext.model.kernels import problem_of

# Largest difference from float64, norm over norm, of the output and of each gradient: a few
# roundings of the format (2^-24, 2^-8, 2^-11), more of them where sums are long.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SIXTEEN_BITS = (torch.bfloat16, torch.float16)

Build = Callable[..., Callable[[], Tensor]]


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
    """One way: `build` takes the kernel's inputs, makes all that a model makes once, and returns
    the work; `needs` is a package, "cuda", "compiler" or ""; `dtypes` are those that it takes."""

    name: str
    build: Build
    needs: str = ""
    dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCE)


@dataclass(frozen=True)
class Kernel:
    """Inputs (those that are floating point are differentiated), the reference, the ways, and what
    one forward and backward pass must at least move (bytes) or compute (FLOPs)."""

    inputs: Callable[[Size], tuple[Tensor, ...]]
    reference: Callable[..., Tensor]
    paths: tuple[Path, ...]
    bytes: Callable[[Size, int], float] | None = None
    flops: Callable[[Size], float] | None = None


def function(of_inputs: Callable[..., Tensor]) -> Build:
    """The work of a way that has nothing to make beforehand."""
    return lambda *inputs: partial(of_inputs, *inputs)


def lacking(path: Path, device: torch.device) -> str:
    """Why a way cannot be gone here, or ""."""
    gpu = device.type == "cuda"
    if path.needs == "compiler":
        found = problem_of("triton") if gpu else ("" if shutil.which("g++") else "no g++")
        return f"triton is {found}" if gpu and found else found
    if path.needs and not gpu:
        return "no GPU"
    return "" if path.needs in ("", "cuda") else problem_of(path.needs)


def placed(inputs: tuple[Tensor, ...], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in inputs]


def prepared(build: Build, inputs: list[Tensor]) -> Callable[[], list[Tensor]]:
    """The forward and, where there is one, the backward pass: the output and the gradients of the
    inputs. The first call draws the output's gradient; later ones only do the work."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    given = [x for x in leaves if x.is_floating_point()]
    forward = build(*leaves)
    gradient: Tensor | None = None

    def work() -> list[Tensor]:
        nonlocal gradient
        output = forward()
        if not output.requires_grad:
            return [output]
        if gradient is None:
            drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
            gradient = drawn.to(output.device, output.dtype)
        return [output, *torch.autograd.grad(output, given, gradient)]

    return work


def difference(
    kernel: Kernel, path: Path, size: Size, device: torch.device, dtype: torch.dtype
) -> float:
    """Distance from the reference, norm over norm: of the output or of a gradient, whichever is
    farthest; NaN when one of them is no number."""
    rounded = placed(kernel.inputs(size), device, dtype)
    exact = placed(tuple(rounded), device, torch.float64)
    ours = prepared(path.build, rounded)()
    theirs = prepared(function(kernel.reference), exact)()
    each = [(a.double() - b).norm() / b.norm() for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(each).max().item()
