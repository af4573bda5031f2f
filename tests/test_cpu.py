"""CUDA's absence is answered on a CPU, noticed when Megatron-Core changes, silent on a GPU."""

import subprocess
import sys

import pytest
import torch

from megatron_ext import cpu


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_literals_are_exchanged_and_nothing_else() -> None:
    def function(x: str) -> tuple:
        return x, "cuda", "cuda:1", ("torch.cuda.FloatTensor", 3), None

    cpu._exchange_literals(function)
    assert function("cuda") == ("cuda", "cpu", "cuda:1", ("torch.FloatTensor", 3), None)


def test_function_without_the_literal_is_noticed() -> None:
    def function() -> str:
        return "cpu"

    with pytest.raises(RuntimeError, match=r"not the 0\.16\.1"):
        cpu._exchange_literals(function)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_prepare_twice_is_prepare_once() -> None:
    assert "cpu cpu" in run(
        "import torch; from megatron_ext import cpu; cpu.prepare(); cpu.prepare();"
        "print(torch.cuda.current_device(), torch.ones(1).cuda().device)"
    )


def test_nothing_changes_where_cuda_is_available() -> None:
    assert "untouched" in run(
        "import torch; torch.cuda.is_available = lambda: True\n"
        "before = torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.cuda\n"
        "from megatron_ext import cpu; cpu.prepare()\n"
        "from megatron.core.optimizer import clip_grads\n"
        "assert before == (torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.cuda)\n"
        "assert 'cuda' in clip_grads.get_grad_norm_fp32.__code__.co_consts\n"
        "print('untouched')"
    )
