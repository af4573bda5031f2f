"""The random numbers of a rank as tensors, so that a checkpoint can hold them.

    state = random_state()                 # name -> uint8 or float64 tensor on the CPU
    chunks = random_chunks(state, rank)    # under this rank's own names
    set_random_state(state)

Weights and samples are drawn from the seed alone, and the model has no dropout: nothing in training
depends on these yet. They are kept so that it may.
"""

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel

from megatron_ext.checkpoint.chunks import Chunk


def random_state() -> dict[str, torch.Tensor]:
    """Generators of Python, numpy, torch, the device and Megatron-Core's tracker."""
    _, words, gauss = random.getstate()
    keys: Any
    _, keys, place, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    state = {
        # 32-bit words and a float, all exact in float64; NaN stands for Python's None.
        "python": torch.tensor(
            [*words, float("nan") if gauss is None else gauss], dtype=torch.float64
        ),
        "numpy": torch.tensor([*keys.tolist(), place, has_gauss, cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["device"] = torch.cuda.get_rng_state()
    for name, tensor in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        state[f"tracker.{name}"] = tensor
    return {name: tensor.cpu().clone() for name, tensor in state.items()}


def random_chunks(state: dict[str, torch.Tensor], rank: int) -> list[Chunk]:
    """What a checkpoint holds of a rank's random numbers; the chunks share the state's memory."""
    return [
        Chunk(f"rng.{rank:05d}.{name}", tuple(tensor.shape), (0,) * tensor.dim(), tensor)
        for name, tensor in state.items()
    ]


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Go on drawing where `random_state` was taken."""
    *words, gauss = state["python"].tolist()
    random.setstate((3, tuple(int(w) for w in words), None if np.isnan(gauss) else gauss))
    *keys, place, has_gauss, cached = state["numpy"].tolist()
    words_of = np.array(keys, dtype=np.uint32)
    np.random.set_state(("MT19937", words_of, int(place), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    if "device" in state:
        torch.cuda.set_rng_state(state["device"])
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states(
        {
            name.removeprefix("tracker."): tensor
            for name, tensor in state.items()
            if name.startswith("tracker.")
        }
    )
