"""Workloads for the planner's tests: a 2B GPT on eight A100, and whatever differs from it."""

from typing import Any

from megatron_ext.planning.workload import Workloads, from_rows

GPT = {
    "row_id": "gpt", "framework": "Megatron-LM", "gpu": "a100_80gb", "gpus": 8, "num_layers": 24,
    "hidden": 2048, "heads": 16, "ffn": 8192, "gated": 0, "vocab": 51200, "tied": 1,
    "seq_len": 2048, "dp": 8, "zero_stage": 0, "micro_batch": 4, "global_batch": 64,
    "flash_attn": 0,
}  # fmt: skip


def row(**different: Any) -> Workloads:
    """One workload."""
    return from_rows([{**GPT, **different}])
