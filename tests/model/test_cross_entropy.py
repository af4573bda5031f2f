"""Our cross-entropies against PyTorch's own in float64, and in training against Megatron-Core's."""

import functools
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ext.config import Config, load_config
from megatron_ext.model.cross_entropy import OwnLossModel, chunked_cross_entropy, cross_entropy
from megatron_ext.model.initialization import initialize_weights
from megatron_ext.model.kernels import PACKAGES, Found, choose, loss_chunk
from tests.conftest import ROOT, metrics, pretrain
from tests.model.conftest import settings

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


def ours(chunk_tokens: int | None, **options):
    """In chunks, or with the whole logits kept."""
    if chunk_tokens:
        return functools.partial(chunked_cross_entropy, chunk_tokens=chunk_tokens, **options)
    return lambda hidden, weight, labels: cross_entropy(hidden @ weight.t(), labels, **options)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 15, 30, 1000, None])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_losses_and_gradients_are_those_of_float64(
    inputs, chunk_tokens, dtype, tolerance, device
) -> None:
    # The same rounded inputs for both: what is judged is the arithmetic.
    inputs = [x.to(device) for x in inputs]
    rounded = [x.to(dtype).double() if x.is_floating_point() else x for x in inputs]
    expected = losses_and_gradients(whole, *rounded, torch.float64)
    found = losses_and_gradients(ours(chunk_tokens), *rounded, dtype)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        error = (mine.double() - theirs).abs().max() / theirs.abs().max()
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
    ("settings", "name", "compiled_name"),
    [
        (["training.micro_batch_size=2"], "whole", "whole, compiled"),  # the shipped 2B's
        (["training.micro_batch_size=4"], "in chunks of 1,024 tokens",
         "in chunks of 4,096 tokens, compiled"),
        (["kernels.cross_entropy=chunked"], "in chunks of 1,024 tokens",
         "in chunks of 4,096 tokens, compiled"),
    ],
)  # fmt: skip
def test_where_kernels_are_compiled_so_is_the_loss(settings, name, compiled_name) -> None:
    config = load_config(ROOT / "configs/models/llama_2b.yaml", settings)
    gpu = Found((9, 0), {})
    bare = Found((9, 0), dict.fromkeys(PACKAGES, "not installed"))
    assert choose(config, bare).cross_entropy.name == name
    assert choose(config, gpu).cross_entropy.name == compiled_name


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        # The fast tests have chunks on four processes in tests/distributed.
        pytest.param(1, [], marks=pytest.mark.slow),
        pytest.param(2, ["parallel.tensor=2", "parallel.sequence=true"], marks=pytest.mark.slow),
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


@pytest.mark.usefixtures("here")
def test_a_models_losses_and_gradients_are_those_of_megatron_cores() -> None:
    from megatron_ext.model.llama import build_gpt, transformer_config

    tokens = torch.randint(0, 160, (2, 49), generator=torch.Generator().manual_seed(0))
    counts = torch.rand(2, 48, generator=torch.Generator().manual_seed(1))
    found = {}
    for kind in ("whole", "chunked", "kept"):
        given = {**settings(), "kernels": {"cross_entropy": kind.replace("kept", "chunked")}}
        config = Config.model_validate(given)
        model = build_gpt(config, transformer_config(config))
        initialize_weights(model, config)
        assert isinstance(model, OwnLossModel) == (kind != "whole")
        if kind == "kept":  # as where it is compiled, which needs a GPU
            model.loss_chunk = None
        losses = model(tokens[:, :-1], None, None, labels=tokens[:, 1:])
        (losses * counts).sum().backward()
        found[kind] = losses.detach(), *(weight.grad for weight in model.parameters())
    for kind in ("chunked", "kept"):
        for mine, theirs in zip(found[kind], found["whole"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile needs a C++ compiler"
)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("chunk_tokens", [7, None])
def test_the_compiled_form_that_a_gpu_gets_is_the_same(inputs, chunk_tokens) -> None:
    forms = [
        losses_and_gradients(ours(chunk_tokens, compiled=compiled), *inputs, torch.float32)
        for compiled in (True, False)
    ]
    for mine, theirs in zip(*forms, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@needs_compiler
def test_compiled_it_makes_no_tensor_as_large_as_the_logits() -> None:
    """What a kernel of torch.compile's writes to memory stands in the code that calls it."""
    logits = torch.randn(64, 100).bfloat16().requires_grad_()
    labels = torch.randint(0, 100, (1, 64))

    def forward_and_backward():
        cross_entropy(logits.unsqueeze(1), labels, compiled=True).sum().backward()

    torch._dynamo.reset()
    _, code = run_and_get_code(forward_and_backward)
    assert len(code) == 2
    made = re.findall(r"empty_strided_\w+\(\((.*?)\),", "".join(code))
    shapes = [tuple(map(int, re.findall(r"\d+", shape))) for shape in made]
    assert shapes and max(map(math.prod, shapes)) == 64, shapes


@pytest.mark.slow
def test_each_tensor_parallel_rank_has_its_part_of_whole_logits(inputs, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(compare_on_a_rank, (tmp_path / "store", inputs), nprocs=2)


def compare_on_a_rank(rank: int, store: Path, inputs: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, labels, counts = inputs
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    expected = losses_and_gradients(whole, *inputs, torch.float64)
    part = weight.chunk(2)[rank]

    def sharded(hidden, weight, labels):
        logits = (hidden @ weight.t()).float()
        return cross_entropy(logits, labels, torch.distributed.group.WORLD)

    losses, of_hidden, of_weight = losses_and_gradients(
        sharded, hidden, part, labels, counts, torch.float64
    )
    torch.distributed.all_reduce(of_hidden)
    torch.testing.assert_close(losses.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_hidden, expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_weight, expected[2].chunk(2)[rank], rtol=1e-5, atol=1e-5)
    torch.distributed.destroy_process_group()
