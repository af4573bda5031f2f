"""Every way to compute a kernel, output and gradients, against its formula in float64."""

import pytest
import torch

from benchmarks.kernel_paths import KERNELS, SMALL, TOLERANCE, differences, lacking
from megatron_ext import cpu

PATHS = [
    pytest.param(
        kernel, path, id=f"{name}, {path.name}",
        marks=[pytest.mark.slow] if path.needs == "compiler" else
        [pytest.mark.gpu] if path.needs else [],
    )
    for name, kernel in KERNELS.items()
    for path in kernel.paths
]  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("kernel", "path"), PATHS)
def test_output_and_gradients_are_those_of_the_formula(kernel, path, dtype, device) -> None:
    cpu.prepare()
    if missing := lacking(path, device):
        pytest.skip(missing)
    if kernel is KERNELS["attention"] and path.name != "sdpa" and dtype == torch.float32:
        pytest.skip("this kernel has no fp32")
    assert max(differences(kernel, path, SMALL, device, dtype)) < TOLERANCE[dtype]
