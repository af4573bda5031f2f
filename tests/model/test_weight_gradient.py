"""kernels.grad_accumulation=torch: the gradients of two micro-batches, within the products and
without."""

import pytest
import torch

from megatron_ext.config import Config
from megatron_ext.model.cross_entropy import chunked_cross_entropy
from megatron_ext.model.weight_gradient import add_weight_gradient
from tests.model.conftest import settings


@pytest.mark.parametrize(
    ("dtype", "total_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_product_is_added(dtype: torch.dtype, total_dtype: torch.dtype) -> None:
    x, gradient, total = torch.randn(9, 5), torch.randn(9, 4), torch.randn(4, 5)
    x, gradient, total = x.to(dtype), gradient.to(dtype), total.to(total_dtype)
    expected = total.double() + gradient.double().t() @ x.double()
    add_weight_gradient(x, gradient, total)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=5 * tolerance)


def gradients(way: str, **given: dict) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The float32 sums by weight, and the names of those that no later addition made."""
    from megatron_ext.model.llama import build_model

    everything = settings(**given.pop("model", {}))
    for section, values in given.items():
        everything[section] = everything.get(section, {}) | values
    everything["kernels"] = everything.get("kernels", {}) | {"grad_accumulation": way}
    [model] = build_model(Config.model_validate(everything))
    model.zero_grad_buffer()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        tokens = torch.randint(0, 160, (2, 49), generator=generator)
        model(tokens[:, :-1], None, None, labels=tokens[:, 1:]).sum().backward()
    weights = dict(model.named_parameters())
    fused = {name for name, weight in weights.items() if weight.grad_added_to_main_grad}
    return {name: weight.main_grad.clone() for name, weight in weights.items()}, fused


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("loss", ["whole", "chunked"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradients_are_those_without(tied: bool, loss: str, recompute: str) -> None:
    given = {
        "model": {"tied_embeddings": tied},
        "kernels": {"cross_entropy": loss},
        "training": {"recompute": recompute},
        "parallel": {"overlap_grad_reduce": True},
    }
    ours, fused = gradients("torch", **given)
    theirs, later = gradients("none", **given)
    assert not later
    matrices = {name for name, total in ours.items() if total.dim() == 2}
    embedding = {name for name in matrices if "word_embeddings" in name}
    assert fused == (matrices if tied else matrices - embedding)
    for name, total in theirs.items():
        torch.testing.assert_close(ours[name], total, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_the_loss_are_summed_in_fp32(dtype: torch.dtype) -> None:
    """Right where the sum of the micro-batches is when that is float32, else beside it."""
    hidden, labels = torch.randn(8, 2, 6), torch.randint(0, 20, (2, 8))
    expected = torch.nn.Parameter(torch.randn(20, 6))
    weight = torch.nn.Parameter(expected.detach().clone())
    weight.main_grad = torch.ones(20, 6, dtype=dtype)
    chunked_cross_entropy(hidden, expected, labels, chunk_tokens=3).sum().backward()
    chunked_cross_entropy(hidden, weight, labels, chunk_tokens=3, accumulate=True).sum().backward()
    if dtype == torch.float32:
        torch.testing.assert_close(weight.main_grad, 1 + expected.grad)
    else:
        assert torch.equal(weight.main_grad, torch.ones_like(weight.main_grad))
        assert torch.equal(weight.grad, expected.grad)
