"""transformers' rotary functions with more digits than they ship with.

    with in_float64(modeling_rope_utils, modeling_llama):
        inv_freq, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")      # float64

Its code stays its own; only the word float is read as float64, in the three places it is said:
`torch.float` and `torch.float32` in a module, `tensor.float()`, and a whole-number tensor times a
Python float.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch


class Float64Torch:
    """torch for a module that says torch.float and means "enough digits"."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def in_float64(*modules: ModuleType) -> Iterator[None]:
    """Within this context these modules, which have imported torch, work in float64."""
    default = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "torch", Float64Torch())
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)
