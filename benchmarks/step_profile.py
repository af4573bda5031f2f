"""Where the time of a step goes: its kernels by kind, and how long none was running.

    profile = profiled(step, gpu=True)
    for what, microseconds in by_category(profile.kernels): ...
    profile.idle_us, profile.step_us

On a CPU operators stand for kernels.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# What a kernel is, by its name; the first that fits. CPU operators are named as well.
CATEGORIES = [
    ("communication", r"nccl|gloo|all_?reduce|all_gather|reduce_scatter"),
    ("attention", r"flash|fmha|attention|sdpa|softmax.*bhs|cudnn_generated"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|sm\d+_.*mma|aten::(mm|addmm|bmm|linear)"),
    ("optimizer", r"adam|multi_tensor|_foreach|l2norm|lpnorm|NormTwoOps"),
    (
        "cross-entropy",
        r"cross_?entropy|log_?softmax|logsumexp|nll|gather|scatter|exp_?$|exp_kernel|fused.*exp",
    ),
    ("embedding", r"embedding|index_(select|put|add)"),
    ("norm", r"rms|layer_?norm|vector_norm|rsqrt"),
    ("rotation", r"rotary|fused.*(cos|sin)|aten::(cos|sin)"),
    ("SwiGLU", r"silu|sigmoid|swiglu"),
    ("copies and casts", r"copy|memcpy|memset|fill|zero|cat|to_copy|contiguous"),
]
OTHER = "other"


@dataclass(frozen=True)
class Profile:
    """Microseconds of one step: each kernel's, the time when none was running, the step's own. The
    kernels of several streams may run at once, and then are more than the step."""

    kernels: list[tuple[str, float]]
    idle_us: float
    step_us: float


def profiled(step: Callable[[], object], gpu: bool) -> Profile:
    """What ran on the device in one step. Annotations (Optimizer.step, nccl:...) are no kernels:
    they span those that ran meanwhile."""
    import torch
    from torch.profiler import ProfilerActivity

    device = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=activities) as recorded:
        started = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize()
        whole = (time.perf_counter() - started) * 1e6
    kernels = []
    for event in recorded.key_averages():
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        if spent and event.device_type == device and not event.is_user_annotation:
            kernels.append((event.key, spent))
    busy = covered(
        (event.time_range.start, event.time_range.end)
        for event in recorded.events()
        if event.device_type == device and not event.is_user_annotation
    )
    return Profile(kernels, whole - busy, whole)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans from start to end."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def category(kernel: str) -> str:
    return next((what for what, rule in CATEGORIES if re.search(rule, kernel, re.I)), OTHER)


def by_category(kernels: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Microseconds of each category, the largest first."""
    spent: dict[str, float] = {}
    for name, microseconds in kernels:
        what = category(name)
        spent[what] = spent.get(what, 0.0) + microseconds
    return sorted(spent.items(), key=lambda row: -row[1])


def longest_of(what: str, kernels: list[tuple[str, float]], count: int) -> list[tuple[str, float]]:
    """The longest kernels of a category."""
    mine = [row for row in kernels if category(row[0]) == what]
    return sorted(mine, key=lambda row: -row[1])[:count]
