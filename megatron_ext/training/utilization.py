"""How much of the hardware a run uses: FLOPs of a token, and the peak that they are a share of.

    tflops = tokens_per_s_per_gpu * flops_per_token(config) / 1e12
    peak = peak_of(here, config)                # peak.tflops, peak.name
    mfu = tflops / peak.tflops

Two conventions differ by the attention: 6 N + 12 L h s counts its scores in full (Chowdhery et al.
2022, appendix B), 6 N + 6 L h s only the half that the causal mask leaves (Megatron-LM, Dao 2023).
Recomputation counts in neither.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ext.config import Config
from megatron_ext.world import World, device_name

CONVENTION = (
    "mfu: 6 N + 12 L h s FLOPs a token, attention in full; mfu_causal: 6 N + 6 L h s, its causal "
    "half; N weights of matrix products, recomputation not counted"
)
# Dense bf16 peaks from NVIDIA's data sheets, TFLOP/s; the first key found in the device's name.
PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H200 NVL": 835.5,
    "H100": 989.4,
    "H200": 989.4,
    "GB200": 2500.0,
    "B200": 2250.0,
}
_MATMUL_SIZE = 512  # milliseconds a product
_MATMUL_REPEATS = 5


@dataclass(frozen=True)
class Peak:
    """What one rank's device could do at most."""

    tflops: float | None
    name: str
    """Whose figure it is."""


def flops_per_token(config: Config, attention_share: float = 1.0) -> float:
    """FLOPs of one token's forward and backward pass, 6 N + 12 L h s (Kaplan et al. 2020; Chowdhery
    et al. 2022, appendix B), the scores times `attention_share`: N the weights of matrix products
    (all but the input embedding), L layers, h the heads' total width, s the sequence length."""
    model = config.model
    heads_width = model.num_heads * model.head_dim
    kv_width = model.num_kv_heads * model.head_dim
    attention = model.hidden_size * (2 * heads_width + 2 * kv_width)
    mlp = 3 * model.hidden_size * model.ffn_hidden_size
    weights = model.num_layers * (attention + mlp) + model.vocab_size * model.hidden_size
    scores = 12 * model.num_layers * heads_width * config.training.sequence_length
    return float(6 * weights + attention_share * scores)


def peak_of(here: World, config: Config) -> Peak:
    """The peak that MFU is a share of: the setting, the data sheet's, or on a CPU the matmul rate
    that all ranks reach together, measured. Every rank calls it."""
    if config.logging.peak_tflops is not None:
        return Peak(config.logging.peak_tflops, "logging.peak_tflops")
    if here.device.type == "cpu":
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = dtypes[config.precision.dtype]
        rate = measured_matmul_tflops(dtype)
        name = str(dtype).removeprefix("torch.")
        return Peak(rate, f"{name} matmul of this CPU, measured, {here.size} ranks at once")
    return data_sheet(device_name(here.device))


def data_sheet(device: str) -> Peak:
    """The peak of a GPU by its name."""
    known = next((key for key in PEAK_TFLOPS if key in device), None)
    if known is None:
        return Peak(None, device)
    return Peak(PEAK_TFLOPS[known], f"{known} data sheet, dense bf16")


def measured_matmul_tflops(dtype: torch.dtype) -> float:
    """TFLOP/s of this rank's threads in a square matrix product while all ranks do the same: the
    best of a few, some 10 ms each."""
    a = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE, generator=torch.Generator().manual_seed(0))
    a = a.to(dtype)
    dist.barrier()
    best = min(_seconds(a) for _ in range(_MATMUL_REPEATS))
    rate = torch.tensor([2 * _MATMUL_SIZE**3 / best / 1e12], dtype=torch.float64)
    dist.all_reduce(rate)
    return rate.item() / dist.get_world_size()


def _seconds(a: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.matmul(a, a)
    return time.perf_counter() - started
