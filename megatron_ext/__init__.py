"""Pre-training on Megatron-Core to measure how the base of RoPE bounds context length."""

from megatron_ext import gpu_packages

gpu_packages.hide()

__version__ = "0.1.0"
