"""Seconds of a training step, from data sheets and a few fitted constants.

    parts = step_time(read_rows(Path("rows.csv")), constants)
    parts.total                  # seconds a step, one a row
    parts.matmul, parts.launch   # where they go; the fields add up to the total

A layer takes what its kernels take on the GPU, or what the CPU needs to launch them if that is
longer; stages and micro-batches add up as in 1F1B (Narayanan et al. 2021, section 2.2). The
constants are fitted by benchmarks/fit_planner.py. Needs numpy, not torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from megatron_ext.planning.memory import layer_parameters
from megatron_ext.planning.sources import (
    gradient_messages,
    has_fused_kernels,
    network_gb_per_s,
    reduces_everywhere,
    stage_layers,
)
from megatron_ext.planning.workload import GPUS_PER_NODE, Column, Workloads

# Structure, not fitted: which kernels there are follows from the model.
_HBM = 0.85  # share of the bandwidth that a streaming kernel reaches
# Outputs of one thread block of a matmul, and its rate relative to the largest kind's: a small
# matmul is cut into smaller blocks, which load more for each output but leave fewer SMs idle.
_TILES = ((128 * 256, 1.0), (128 * 128, 0.9))
_LLAMA_KERNELS = 1.4  # RoPE, RMSNorm and the gate launch so many times the kernels of a GPT layer
_UNFUSED_SOFTMAX = 1 / 3  # more kernels where Megatron's fused softmax refuses the shape
_SCORE_BYTES = 12  # a score unfused, forward: written, softmax, dropout and its mask, read
_BEHIND_MATMUL = 0.25  # with sequence parallelism: the backward pass gathers beside a matmul
_STEP_S = 5e-3  # gradient norm, logging, data
_FUSED_LOSS_BYTES = 20  # traffic a logit: read, exponentiate, gradient
_OPTIMIZER_BYTES = 30  # traffic a parameter: master weight, two moments, gradient, weight


@dataclass(frozen=True)
class TimeConstants:
    """The thirteen fitted numbers that all sources share."""

    matmul: float = 0.95
    """Matmuls without idle SMs, relative to the best rate measured on the GPU."""
    hopper: float = 0.85
    """The same again on Hopper and later, which run into their power limit."""
    fp8: float = 0.9
    """Gain of fp8 over bf16, relative to that of the data sheet."""
    wave: float = 1.0
    """Waves of thread blocks that a matmul loses at its end."""
    attention: float = 0.7
    """FlashAttention, relative to its published rate."""
    elementwise: float = 2.0
    """Memory traffic of norms and activations as separate kernels, relative to fused ones."""
    loss: float = 3.0
    """Traffic of a logit in Megatron stacks of 2022 and before, relative to later ones."""
    launch_ms: float = 0.75
    """CPU time to launch a GPT layer's forward kernels; backward counts twice."""
    jitter: float = 0.2
    """Longer launches where 8 tensor-parallel ranks wait for each other."""
    collective_us: float = 30.0
    """Start of a collective over 2 ranks; grows with the logarithm of the ranks."""
    nvlink: float = 0.75
    """Share of NVLink's bandwidth that collectives reach."""
    network: float = 0.8
    """Share of the network's bandwidth that collectives reach."""
    dp_exposed: float = 1.0
    """Gradient reduction and parameter gathering, relative to their bytes over the bandwidth:
    stragglers and copies against overlap with the backward pass."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the critical path, by cause; one a row."""

    matmul: Column
    attention: Column
    memory_bound: Column
    launch: Column
    recompute: Column
    tensor_parallel: Column
    context_parallel: Column
    sharded_weights: Column
    logits: Column
    pipeline_bubble: Column
    pipeline_transfer: Column
    data_parallel: Column
    optimizer: Column
    fixed: Column

    @property
    def total(self) -> Column:
        """Their sum."""
        return sum((getattr(self, f.name) for f in fields(self)), np.zeros_like(self.matmul))


def step_time(w: Workloads, c: TimeConstants) -> StepTime:
    """Seconds of one optimizer step, for every row."""
    layer = _layer(w, c)
    full, half = w.recompute == "full", w.recompute == "selective_block"
    again = full + 0.5 * half
    once = layer.matmul + layer.attention + layer.elementwise + 2 * layer.reduce + layer.ring
    # Selective recompute repeats the attention core, which FlashAttention does anyway.
    core = ((w.recompute == "selective") & (w.flash_attn == 0)) * layer.attention
    mlp = (w.recompute == "mlp") * layer.mlp
    recompute = again * once + core + mlp
    backward_attention = np.where(w.flash_attn > 0, 2.5, 2.0) * layer.attention
    on_gpu = 3 * (layer.matmul + layer.ring) + layer.attention + backward_attention
    on_gpu = on_gpu + 2.5 * layer.elementwise + 4 * layer.reduce + recompute
    on_cpu = layer.launch * (3 + again)
    alone = np.maximum(on_gpu, on_cpu)
    together = _join(alone, _gather_weights(w, c))

    tokens = w.micro_batch * w.seq_len / w.cp
    head = _head(w, c, tokens)
    layers, has_head = _slowest_stage(w, head / together)
    micro_batches = w.micro_batches
    passes = micro_batches * layers
    hop = _between_stages(w, c, tokens)
    params = layers * layer_parameters(w) / w.tp + w.vocab * w.hidden / w.tp
    sharded = np.where(w.zero_stage > 0, w.dp * w.cp, 1)
    return StepTime(
        matmul=passes * 3 * layer.matmul,
        attention=passes * (layer.attention + backward_attention),
        memory_bound=passes * 2.5 * layer.elementwise,
        launch=passes * (alone - on_gpu),
        recompute=passes * recompute,
        tensor_parallel=passes * 4 * layer.reduce,
        context_parallel=passes * 3 * layer.ring,
        sharded_weights=passes * (together - alone),
        logits=micro_batches * head * has_head,
        pipeline_bubble=(w.num_layers - layers) * together / w.vpp_chunks,
        pipeline_transfer=2 * hop * (micro_batches * w.vpp_chunks + w.pp - 1),
        data_parallel=_reduce_gradients(w, c, params),
        optimizer=_OPTIMIZER_BYTES * params / sharded / _hbm(w),
        fixed=np.full(len(w), _STEP_S),
    )


def _slowest_stage(w: Workloads, head: Column) -> tuple[Column, NDArray[np.bool_]]:
    """Layers of the stage that the others wait for, and whether it is the last one, whose output
    projection takes as long as `head` layers."""
    first, middle, last = stage_layers(w)
    others = np.where(w.pp > 2, np.maximum(first, middle), first)
    has_head = last + head >= others
    return np.where(has_head, last, others), has_head


@dataclass(frozen=True)
class _Layer:
    """Seconds of one layer's forward pass of one micro-batch on one rank."""

    matmul: Column
    attention: Column
    elementwise: Column
    mlp: Column
    """Of all of these what the MLP takes."""
    reduce: Column
    """One of the two all-reduces over the tensor-parallel ranks."""
    ring: Column
    """Keys and values going round the context-parallel ranks."""
    launch: Column


def _layer(w: Workloads, c: TimeConstants) -> _Layer:
    head_dim, query, kv, hbm = w.head_dim, w.query_width, w.kv_width, _hbm(w)
    tokens = w.micro_batch * w.seq_len / w.cp
    matmul_of_mlp = _matmul(w, c, tokens, w.ffn * (1 + w.gated) / w.tp, w.hidden)
    matmul_of_mlp = matmul_of_mlp + _matmul(w, c, tokens, w.hidden, w.ffn / w.tp)
    matmul = (
        _matmul(w, c, tokens, (query + 2 * kv) / w.tp, w.hidden)
        + _matmul(w, c, tokens, w.hidden, query / w.tp)
        + matmul_of_mlp
    )
    pairs = w.micro_batch * w.heads / w.tp * w.seq_len**2 / w.cp
    flops = 4 * pairs * head_dim
    rate = w.gpu.attention_tflops * 1e12 * c.attention
    flash = 4 * pairs * _flash_width(head_dim) / 2 / rate  # half: causal
    # Megatron's fused softmax takes four rows of scores at a time; tensor cores need dimensions
    # divisible by 8, which some of BigScience's trials had not.
    unfused = (w.flash_attn == 0) & ((w.micro_batch * w.heads / w.tp) % 4 != 0)
    crooked = np.where(head_dim % 8 == 0, 1, 3)
    plain = crooked * flops / _rate(w, c) + pairs * _SCORE_BYTES * np.where(unfused, 2, 1) / hbm

    split = np.where(w.seq_parallel > 0, w.tp, 1)
    activation = w.ffn * (2 + w.gated) / w.tp
    widths = 11 * w.hidden / split + 2 * (query + 2 * kv) / w.tp + activation
    a_width = np.where(has_fused_kernels(w), 1, c.elementwise) * 2 * tokens / hbm
    elementwise = a_width * widths

    bandwidth, start = _link(w, c, w.tp, np.ones(len(w)))
    reduce = start + 2 * (w.tp - 1) / w.tp * 2 * tokens * w.hidden / bandwidth
    reduce = np.where(w.tp > 1, reduce * (1 - _BEHIND_MATMUL * (w.seq_parallel > 0)), 0)
    bandwidth, start = _link(w, c, w.cp, w.tp)
    # Half of the ring is hidden behind the attention of the block at hand.
    ring = (w.cp - 1) * (start + tokens * 2 * kv / w.tp / bandwidth)
    waiting = c.jitter * (np.minimum(w.tp, GPUS_PER_NODE) - 1) / (GPUS_PER_NODE - 1)
    kernels = np.where(w.gated > 0, _LLAMA_KERNELS, 1) * (1 + waiting + _UNFUSED_SOFTMAX * unfused)
    return _Layer(
        matmul=matmul,
        attention=np.where(w.flash_attn > 0, flash, plain),
        elementwise=elementwise,
        mlp=matmul_of_mlp + a_width * activation + reduce,
        reduce=reduce,
        ring=np.where(w.cp > 1, ring, 0),
        launch=c.launch_ms * 1e-3 * kernels,
    )


def _flash_width(head_dim: Column) -> Column:
    """Head dimension that a score of FlashAttention costs as much as at 128: the kernel pads to a
    multiple of 32, and its softmax takes as long as 14 more (Dao 2023, figure 4: 171 TFLOP/s at 64
    against 187 at 128)."""
    padded = 32 * np.ceil(head_dim / 32)
    return padded + (14 / 128) * (128 - padded)


def _matmul(w: Workloads, c: TimeConstants, m: Column, n: Column, k: Column) -> Column:
    """[m, k] x [k, n]: 2mnk FLOPs, and the last waves of thread blocks that leave SMs idle."""
    idle = [(1 + c.wave * w.gpu.sms * outputs / (m * n)) / rate for outputs, rate in _TILES]
    return 2 * m * n * k / _rate(w, c) * np.minimum.reduce(idle)


def _rate(w: Workloads, c: TimeConstants) -> Column:
    """FLOP/s of a large matmul."""
    eight_bit = c.fp8 * w.gpu.fp8_tflops / w.gpu.peak_tflops
    newer = np.where(w.gpu.sms > 108, c.hopper, 1)
    return (
        w.gpu.matmul_tflops * 1e12 * c.matmul * newer * np.where(w.precision == "fp8", eight_bit, 1)
    )


def _hbm(w: Workloads) -> Column:
    return w.gpu.memory_gb_per_s * 1e9 * _HBM


def _head(w: Workloads, c: TimeConstants, tokens: Column) -> Column:
    """Output projection and cross-entropy of one micro-batch, forward and backward."""
    traffic = np.where(w.flash_attn > 0, _FUSED_LOSS_BYTES, _FUSED_LOSS_BYTES * c.loss)
    logits = tokens * w.vocab / w.tp
    products = np.where(w.loss_chunk > 0, 4, 3)  # chunks make their logits again to differentiate
    return products * _matmul(w, c, tokens, w.vocab / w.tp, w.hidden) + traffic * logits / _hbm(w)


def _link(w: Workloads, c: TimeConstants, size: Column, stride: Column) -> tuple[Column, Column]:
    """Bytes/s a GPU and start of a collective over `size` ranks that lie `stride` apart: NVLink
    within a node; beyond it the ring enters a node through the adapters of all its members."""
    inside = size * stride <= GPUS_PER_NODE
    members = np.minimum(size, np.maximum(1, GPUS_PER_NODE / stride))
    nvlink = w.gpu.nvlink_gb_per_s * 1e9 * c.nvlink
    network = network_gb_per_s(w) * 1e9 * c.network * members
    start = c.collective_us * 1e-6 * np.log2(np.maximum(2, size))
    return np.where(inside, nvlink, np.minimum(network, nvlink)), start


def _gather_weights(w: Workloads, c: TimeConstants) -> Column:
    """ZeRO-3: a layer's weights gathered twice and its gradients reduced, for each micro-batch."""
    bandwidth, start = _link(w, c, w.dp, w.tp * w.cp)
    moved = 3 * 2 * layer_parameters(w) / w.tp * (w.dp - 1) / w.dp
    return np.where(w.zero_stage >= 3, moved / bandwidth + 3 * start, 0)


def _between_stages(w: Workloads, c: TimeConstants, tokens: Column) -> Column:
    """One micro-batch's activations to the next stage, each tensor-parallel rank a part."""
    inside = 2 * w.tp * w.cp * w.dp <= GPUS_PER_NODE
    nvlink, network = w.gpu.nvlink_gb_per_s * c.nvlink, network_gb_per_s(w) * c.network
    moved = 2 * tokens * w.hidden / w.tp / (np.where(inside, nvlink, network) * 1e9)
    return np.where(w.pp > 1, c.collective_us * 1e-6 + moved, 0)


def _reduce_gradients(w: Workloads, c: TimeConstants, params: Column) -> Column:
    """All-reduce, or with a sharded optimizer reduce-scatter of gradients and gather of weights."""
    bandwidth, start = _link(w, c, w.dp * w.cp, w.tp)
    gradient = np.where(w.precision == "fp16", 2, 4)
    reduced = np.where((w.zero_stage == 0) | reduces_everywhere(w), 2 * gradient, gradient)
    moved = params * (reduced + 2 * (w.zero_stage > 0)) * (w.dp - 1) / w.dp
    seconds = c.dp_exposed * moved / bandwidth + gradient_messages(w, params) * start
    return np.where((w.dp > 1) & (w.zero_stage < 3), seconds, 0)


def _join(a: Column, b: Column) -> Column:
    """Two things at once that hinder each other a little where they are alike."""
    return (a**4 + b**4) ** 0.25
