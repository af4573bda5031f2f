"""Pre-training on Megatron-Core to measure how the base of RoPE bounds context length."""

__version__ = "0.1.0"
