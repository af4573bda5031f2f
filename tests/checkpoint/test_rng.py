"""Random numbers go on where they were."""

import random

import numpy as np
import torch

from megatron_ext.checkpoint.rng import random_state, set_random_state


def draw() -> list[float]:
    return [
        *(random.gauss(0, 1) for _ in range(3)),  # an odd number: one is kept back for the next
        *np.random.standard_normal(3).tolist(),
        *torch.randn(3).tolist(),
    ]


def test_state_goes_through_tensors_and_back() -> None:
    draw()
    state = random_state()
    wanted = draw(), draw()
    assert wanted[0] != wanted[1]
    set_random_state(state)
    assert (draw(), draw()) == wanted
