"""PyTorch's AdamW in the place of another one that Megatron-Core took."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")


def test_torch_adamw_takes_over_views_of_weights() -> None:
    from megatron_ext.training.optimizer import _take_torch_adamw

    weights = torch.nn.Parameter(torch.ones(10))
    # As the distributed optimizer divides float32 weights: no leaf, which AdamW itself refuses.
    shard = weights.view(-1)[2:6]
    part = SimpleNamespace(optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0))
    part.optimizer.param_groups = [{"params": [shard], "lr": 0.1, "weight_decay": 0.5}]
    _take_torch_adamw(part)
    expected = torch.nn.Parameter(torch.ones(4))
    ours, theirs = part.optimizer, torch.optim.AdamW([expected], lr=0.1, weight_decay=0.5)
    shard.grad = expected.grad = torch.tensor([1.0, -2.0, 3.0, 0.0])
    for _ in range(2):
        ours.step()
        theirs.step()
    assert isinstance(ours, torch.optim.AdamW)
    assert torch.equal(weights.detach()[2:6], expected.detach())
    assert torch.equal(weights.detach()[6:], torch.ones(4))
