"""The way of a GPU without one: real CUDA builds of torch and Triton on a runtime that computes
nothing (runtime.py). What runs, and what a step asks of the GPU; no number here means anything."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, metrics
from tests.simulated_gpu.runtime import build, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc"),
]

BF16, TORCH = "precision.dtype=bf16", "kernels.backend=torch"
# cuDNN, which Transformer Engine's attention and Hopper's SDPA take, is not simulated.
SDPA = "kernels.attention=sdpa"
FP32_OUTPUT = " type 0"  # of a cuBLAS product


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("library"))


@pytest.fixture
def config_file(tmp_path: Path, corpus: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"""\
model: {{num_layers: 2, hidden_size: 256, ffn_hidden_size: 512, num_heads: 4, num_kv_heads: 2,
         vocab_size: 512}}
rope: {{base: 1e4}}
data: {{num_workers: 0, corpora: {{stdlib: {{path: {corpus}}}}}}}
training: {{sequence_length: 128, global_batch_size: 8, micro_batch_size: 2, steps: 4}}
optimizer: {{lr: 1e-3}}
precision: {{dtype: fp32}}
checkpoint: {{interval: 2}}
evaluation: {{batches: 1}}
logging: {{interval: 1}}
"""
    )
    return file


def on_the_gpu(library: Path, *command: object, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)],
        env=environment(library) | variables, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


RUNS = [
    [],
    [BF16],
    [BF16, TORCH],
    [BF16, TORCH, "kernels.optimizer=torch"],
    [BF16, TORCH, "kernels.fusions=none", "kernels.grad_accumulation=none"],
    [BF16, "kernels.cross_entropy=chunked", "model.tied_embeddings=true"],
    [BF16, "training.recompute=full"],
    [BF16, "training.recompute=selective", "data.num_workers=1"],
    [BF16, "precision.grad_reduce=bf16", "parallel.distributed_optimizer=true"],
    [BF16, "data.mask_documents=true", "data.reset_positions=true"],
    [BF16, "rope.scaling={type: yarn, factor: 2, original_context_length: 64}"],
    ["precision.dtype=fp16", "precision.loss_scale=16"],
]  # fmt: skip


@pytest.mark.parametrize("settings", RUNS, ids=lambda settings: " ".join(settings) or "fp32")
def test_a_run_trains_validates_saves_and_goes_on(
    settings: list[str], library: Path, config_file: Path, tmp_path: Path
) -> None:
    command = ["pretrain.py", config_file, f"training.run_dir={tmp_path / 'run'}", SDPA, *settings]
    # Each tensor then has memory of its own, where no kernel left a zero to divide by.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert steps_of(on_the_gpu(library, *command, **alone)) == [1, 2, 3, 4]
    last = tmp_path / "run/checkpoints/step_00000004"
    shutil.rmtree(last)
    assert steps_of(on_the_gpu(library, *command, **alone)) == [3, 4]
    assert last.exists()
    assert "validation_loss" in metrics(tmp_path / "run")[-1]


def steps_of(log: str) -> list[int]:
    return [int(step) for step in re.findall(r"step (\d)/4 ", log)]


def one_step(library: Path, config_file: Path, *settings: str) -> dict:
    wanted = [config_file, f"training.run_dir={config_file.parent / 'run'}", SDPA, *settings]
    return json.loads(on_the_gpu(library, "-m", "tests.simulated_gpu.one_step", *wanted))


def test_a_step_waits_for_the_gpu_three_times_however_many_layers(
    library: Path, config_file: Path
) -> None:
    """For Megatron-Core's count of tokens, the gradient's norm, and the sums over all ranks."""
    base = [BF16, TORCH, "kernels.optimizer=torch"]
    for layers in (2, 4):
        step = one_step(library, config_file, *base, f"model.num_layers={layers}")
        assert step["waits"] <= 3
        within = [size for size, direction in step["copies"] if direction == 3]
        assert max(within) < 1024  # no gradient is copied


@pytest.mark.parametrize("loss", ["whole", "chunked"])
def test_gradients_of_matrices_are_added_up_within_their_products(
    loss: str, library: Path, config_file: Path
) -> None:
    step = {}
    for way in ("torch", "none"):
        settings = [BF16, TORCH, f"kernels.grad_accumulation={way}"]
        step[way] = one_step(library, config_file, *settings, f"kernels.cross_entropy={loss}")
    products = {
        way: sum(n for name, n in step[way]["kernels"].items() if name.endswith(FP32_OUTPUT))
        for way in step
    }
    micro_batches, matrices = 4, 2 * 4 + 1
    in_chunks = micro_batches if loss == "chunked" else 0  # summed in float32 either way
    assert products == {"torch": micro_batches * matrices, "none": in_chunks}
    launches = {way: sum(step[way]["kernels"].values()) for way in step}
    assert launches["none"] - launches["torch"] >= micro_batches * (matrices - 1)
