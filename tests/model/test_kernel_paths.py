"""Every way to compute a kernel, output and gradients, against its formula in float64."""

from collections.abc import Iterator
from dataclasses import replace
from math import isnan

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernel import SMALL, TOLERANCE, difference, function, lacking, placed, prepared
from benchmarks.kernel_paths import KERNELS, one_process

PATHS = [
    pytest.param(
        kernel, path, id=f"{name}, {path.name}",
        marks=[pytest.mark.slow] if path.needs == "compiler" else
        [pytest.mark.gpu] if path.needs else [],
    )
    for name, kernel in KERNELS.items()
    for path in kernel.paths
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def groups() -> Iterator[None]:
    with one_process(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        yield


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("kernel", "path"), PATHS)
def test_output_and_gradients_are_those_of_the_formula(kernel, path, dtype, device) -> None:
    if missing := lacking(path, device):
        pytest.skip(missing)
    if dtype not in path.dtypes:
        pytest.skip(f"this way does not take {dtype}")
    assert difference(kernel, path, SMALL, device, dtype) < TOLERANCE[dtype]


def test_a_gradient_that_is_no_number_is_seen_behind_a_sound_output() -> None:
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return torch.nn.functional.linear(x, weight)

        @staticmethod
        def backward(ctx, gradient):
            of_weight = torch.zeros(2 * SMALL.ffn, SMALL.hidden)
            return torch.full((SMALL.tokens, SMALL.hidden), torch.nan), of_weight

    linear = KERNELS["linear"]
    path = replace(linear.paths[0], build=function(Bad.apply))
    assert isnan(difference(linear, path, SMALL, torch.device("cpu"), torch.float32))


class Operators(TorchDispatchMode):
    """The names of those that run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_timed_is_the_kernel_and_not_the_making_of_its_inputs(kernel, device) -> None:
    path = KERNELS[kernel].paths[0]
    inputs = placed(KERNELS[kernel].inputs(SMALL), device, torch.bfloat16)
    work = prepared(path.build, inputs)
    work()
    with Operators() as ran:
        work()
    assert ran.names
    assert not {"randn", "normal_", "uniform_", "randint"} & set(ran.names)
    exact = {
        "AdamW": 5 * ["_foreach_add_", "_fused_adamw_"],
        "SwiGLU": ["split", "silu", "mul", "mul", "mul", "silu_backward", "cat"],
        "its weight's gradient": ["t", "mm", "add_"],
    }
    if kernel in exact:
        others = ("detach", "profiler::")
        assert [name for name in ran.names if not name.startswith(others)] == exact[kernel]
