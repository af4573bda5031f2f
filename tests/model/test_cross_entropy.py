"""Chunked cross-entropy against PyTorch's own in float64, and in training against the whole one."""

import functools
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ext.config import load_config
from megatron_ext.model.cross_entropy import chunked_cross_entropy
from megatron_ext.model.kernels import loss_chunk
from tests.conftest import ROOT, metrics, pretrain

SEQUENCE, BATCH, HIDDEN, VOCAB = 10, 3, 16, 50


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    """hidden, weight, labels, and what each token's loss counts: some nothing at all."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=generator)
    counts = torch.rand(BATCH, SEQUENCE, generator=generator, dtype=torch.float64)
    return hidden, weight, labels, counts * (counts > 0.3)


def losses_and_gradients(function, hidden, weight, labels, counts, dtype):
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    losses = function(hidden, weight, labels)
    (losses * counts.to(losses.dtype)).sum().backward()
    return losses.detach(), hidden.grad, weight.grad


def whole(hidden, weight, labels):
    logits = (hidden @ weight.t()).permute(1, 2, 0)
    return F.cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize("chunk_tokens", [1, 7, 15, 30, 1000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_losses_and_gradients_are_those_of_float64(
    inputs, chunk_tokens, dtype, tolerance, device
) -> None:
    def chunked(hidden, weight, labels):
        return chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)

    # The same rounded inputs for both: what is judged is the arithmetic.
    inputs = [x.to(device) for x in inputs]
    rounded = [x.to(dtype).double() if x.is_floating_point() else x for x in inputs]
    expected = losses_and_gradients(whole, *rounded, torch.float64)
    found = losses_and_gradients(chunked, *rounded, dtype)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert error < tolerance


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_no_tensor_holds_the_logits_of_more_than_a_chunk() -> None:
    hidden = torch.randn(64, 4, 8, requires_grad=True)
    weight = torch.randn(100, 8, requires_grad=True)
    labels = torch.randint(0, 100, (4, 64))
    with LargestTensor() as chunked:
        chunked_cross_entropy(hidden, weight, labels, chunk_tokens=32).sum().backward()
    with LargestTensor() as unchunked:
        whole(hidden, weight, labels).sum().backward()
    assert unchunked.elements == 64 * 4 * 100
    assert chunked.elements == 32 * 100


@pytest.mark.parametrize(
    ("settings", "chunk"),
    [
        (["training.micro_batch_size=1"], None),  # 4,096 tokens of 125,696 logits
        (["training.micro_batch_size=4"], 1024),
        (["training.micro_batch_size=4", "parallel.tensor=2"], None),
        (["kernels.cross_entropy=whole", "training.micro_batch_size=8"], None),
        (["kernels.cross_entropy=chunked", "parallel.tensor=8"], 1024),
    ],
)
def test_auto_takes_chunks_where_the_logits_of_the_2b_are_large(settings, chunk) -> None:
    assert loss_chunk(load_config(ROOT / "configs/models/llama_2b.yaml", settings)) == chunk


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, []),
        (2, ["parallel.tensor=2", "parallel.sequence=true"]),
        pytest.param(2, ["parallel.tensor=2"], marks=pytest.mark.slow),
        pytest.param(
            2, ["parallel.pipeline=2", "model.tied_embeddings=true"], marks=pytest.mark.slow
        ),
    ],
)
def test_training_is_the_same_in_chunks(
    processes: int, layout: list[str], config_file: Path, tmp_path: Path
) -> None:
    model = [setting for setting in layout if setting.startswith("model.")]
    runs = {"whole": (1, model), "chunked": (processes, layout)}
    records = {}
    for kind, (size, extra) in runs.items():
        run_dir = f"training.run_dir={tmp_path / kind}"
        wanted = f"kernels.cross_entropy={kind}"
        printed = pretrain(config_file, run_dir, wanted, *extra, "training.steps=5", processes=size)
        assert ("in chunks of" in printed) == (kind == "chunked")
        records[kind] = metrics(tmp_path / kind)
    for ours, theirs in zip(records["chunked"], records["whole"], strict=True):
        for name in {"loss", "grad_norm", "validation_loss"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_the_compiled_form_that_a_gpu_gets_is_the_same(inputs) -> None:
    forms = [
        losses_and_gradients(
            functools.partial(chunked_cross_entropy, chunk_tokens=7, compiled=compiled),
            *inputs,
            torch.float32,
        )
        for compiled in (True, False)
    ]
    for ours, theirs in zip(*forms, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
