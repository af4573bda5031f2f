"""The clipping of gradients; PyTorch's AdamW in the place of another that Megatron-Core took."""

from pathlib import Path
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


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", ["true", "false"])
@pytest.mark.parametrize(
    ("most", "worst"), [(1.0, 3.0), (100.0, 3.0), (0.0, 3.0), (1.0, torch.inf)]
)
def test_gradients_are_clipped_to_a_norm(
    dtype: str, distributed: str, most: float, worst: float, config_file: Path
) -> None:
    from megatron_ext.config import load_config
    from megatron_ext.model.llama import build_model
    from megatron_ext.training.optimizer import build_optimizer, clip_gradients
    from tests.model.conftest import single_process

    settings = [f"precision.dtype={dtype}", f"parallel.distributed_optimizer={distributed}"]
    config = load_config(config_file, settings)
    with single_process(config):
        model = build_model(config)
        optimizer = build_optimizer(model, config)
        noise = torch.Generator().manual_seed(1)
        for weight in model[0].parameters():
            weight.main_grad.normal_(std=0.01, generator=noise)
        weight.main_grad.view(-1)[0] = worst
        before = torch.cat([w.main_grad.double().flatten() for w in model[0].parameters()])
        optimizer.prepare_grads()
        norm = clip_gradients(optimizer, most)
        after = torch.cat([w.grad.double().flatten() for w in optimizer.get_parameters()])
    assert norm == pytest.approx(before.norm().item(), rel=1e-6)
    left_alone = most == 0 or not most < norm < torch.inf
    expected = norm if left_alone else most
    assert after.norm().item() == pytest.approx(expected, rel=1e-5)
