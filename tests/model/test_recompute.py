"""training.recompute: what stays of the forward pass, measured, and the same gradients."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megatron_ext.config import Config
from tests.model.conftest import settings

LENGTH = 48


def saved_and_gradients(recompute: str) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that the backward pass was left, weights aside, and its gradients."""
    from megatron_ext.model.llama import build_model

    given = settings(ffn_hidden_size=172)  # 2.7 x hidden_size, the 2B's ratio
    given["training"]["recompute"] = recompute
    [model] = build_model(Config.model_validate(given))
    weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights:
            saved[pointer] = tensor  # kept, so that no other takes its place
        return tensor

    tokens = torch.randint(0, 160, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(tokens[:, :-1], None, None, labels=None)
    size = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    hidden.square().sum().backward()
    return size, {name: w.main_grad.clone() for name, w in model.named_parameters()}


@pytest.mark.usefixtures("here")
def test_selective_keeps_half_and_full_a_tenth_and_no_gradient_changes() -> None:
    bytes_of, gradients = {}, {}
    for mode in ("none", "selective", "full"):
        bytes_of[mode], gradients[mode] = saved_and_gradients(mode)
    shares = {mode: size / bytes_of["none"] for mode, size in bytes_of.items()}
    assert 0.3 < shares["selective"] < 0.6, bytes_of
    assert shares["full"] < 0.2, bytes_of
    for mode in ("selective", "full"):
        for name, expected in gradients["none"].items():
            assert torch.equal(gradients[mode][name], expected), (mode, name)
