"""Whole runs on one GPU against the same run on the CPU; `make test-gpu`.

Each test is one of the CPU as well, marked slow: so it is known to run before there is a GPU.
Tolerances are relative differences of losses over 20 steps.
"""

import shutil
from pathlib import Path

import pytest
import torch

from megatron_ext.model.kernels import look
from tests.conftest import metrics, pretrain

LIKE_FP32, LIKE_BF16 = 1e-4, 1e-2
BF16, FP16 = "precision.dtype=bf16", "precision.dtype=fp16"
DISTRIBUTED = "parallel.distributed_optimizer=true"
TE, FLASH_ATTN, APEX = "transformer_engine", "flash_attn", "fused_weight_gradient_mlp_cuda"


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow),
                        pytest.param("cuda", marks=pytest.mark.gpu)])  # fmt: skip
def gpu(request: pytest.FixtureRequest) -> bool:
    """Whether the run under test is on a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU: run `make test-gpu` on a machine that has one")
    return request.param == "cuda"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> list[float]:
    """Losses of 20 steps in fp32 on the CPU; a folder of its own."""
    folder = tmp_path_factory.mktemp("reference")
    return losses(folder, write_config(folder, corpus))


def write_config(folder: Path, corpus: Path) -> Path:
    """Heads of 64 dimensions and sizes in multiples of 16, which every kernel takes."""
    file = folder / "run.yaml"
    file.write_text(
        f"""\
model: {{num_layers: 4, hidden_size: 256, ffn_hidden_size: 512, num_heads: 4, num_kv_heads: 2,
         vocab_size: 512}}
rope: {{base: 1e4}}
data: {{num_workers: 0, corpora: {{stdlib: {{path: {corpus}}}}}}}
training:
  sequence_length: 128
  global_batch_size: 8
  micro_batch_size: 2
  steps: 20
optimizer: {{lr: 1e-3}}
schedule: {{type: constant}}
precision: {{dtype: fp32}}
evaluation: {{batches: 1}}
logging: {{interval: 1}}
"""
    )
    return file


def losses(folder: Path, config: Path, *settings: str, gpu: bool = False) -> list[float]:
    if FP16 in settings and not gpu:
        pytest.skip("takes minutes on a CPU: tests/training/test_precision.py is smaller")
    pretrain(config, f"training.run_dir={folder / 'run'}", *settings, gpu=gpu)
    return [record["loss"] for record in metrics(folder / "run") if "loss" in record]


def assert_close(ours: list[float], reference: list[float], tolerance: float) -> None:
    for step, (a, b) in enumerate(zip(ours, reference, strict=True)):
        assert a == pytest.approx(b, rel=tolerance), f"step {step + 1}"


# Settings, and the tolerance or the package without which there is no such kernel.
RUNS = [
    pytest.param([], LIKE_FP32, id="fp32"),
    pytest.param([BF16], LIKE_BF16, id="bf16"),
    pytest.param([FP16, "precision.loss_scale=16"], LIKE_BF16, id="fp16"),
    pytest.param([BF16, "precision.grad_reduce=bf16", DISTRIBUTED], LIKE_BF16,
                 id="bf16 gradients, distributed optimizer"),
    pytest.param(["kernels.cross_entropy=chunked", DISTRIBUTED,
                  "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true",
                  "parallel.bucket_size=50_000"], LIKE_FP32, id="overlapped, logits in chunks"),
    pytest.param(["training.recompute=full", BF16], LIKE_BF16, id="recompute"),
]  # fmt: skip
GPU_RUNS = [
    pytest.param([BF16, "kernels.backend=torch"], "", id="torch backend"),
    pytest.param([BF16, "kernels.backend=torch", "kernels.attention=flash"], "", id="flash"),
    pytest.param([BF16, "kernels.backend=torch", "kernels.attention=cudnn"], "", id="cudnn"),
    pytest.param([BF16, "kernels.attention=flash_attn"], FLASH_ATTN, id="flash_attn"),
    pytest.param([BF16, "kernels.fusions=none"], "", id="nothing compiled"),
    pytest.param([BF16, "kernels.fusions=compiled", "kernels.cross_entropy=chunked"], "triton",
                 id="compiled"),
    pytest.param([BF16, "kernels.optimizer=torch"], "", id="torch AdamW"),
    pytest.param([BF16, "kernels.backend=transformer_engine"], TE, id="Transformer Engine"),
    pytest.param([BF16, "kernels.optimizer=transformer_engine"], TE, id="its AdamW"),
    pytest.param([BF16, "kernels.grad_accumulation=apex"], APEX, id="apex's accumulation"),
    pytest.param([BF16, "kernels.grad_accumulation=torch"], "", id="PyTorch's accumulation"),
    pytest.param([BF16, "kernels.grad_accumulation=none"], "", id="gradients added afterwards"),
    pytest.param([BF16, "precision.fp8=tensorwise"], TE, id="fp8"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "tolerance"), RUNS)
def test_a_run_has_the_losses_of_the_cpu_in_fp32(
    settings: list[str], tolerance: float, gpu: bool, reference: list[float],
    corpus: Path, tmp_path: Path,
) -> None:  # fmt: skip
    config = write_config(tmp_path, corpus)
    assert_close(losses(tmp_path, config, *settings, gpu=gpu), reference, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(("settings", "package"), GPU_RUNS)
def test_every_kernel_trains_as_the_cpu_does(
    settings: list[str], package: str, reference: list[float], corpus: Path, tmp_path: Path
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: run `make test-gpu` on a machine that has one")
    if missing := package and look().lacks(package):
        pytest.skip(missing)
    # 8 bits have 3 of mantissa.
    tolerance = 5e-2 if "precision.fp8=tensorwise" in settings else LIKE_BF16
    config = write_config(tmp_path, corpus)
    assert_close(losses(tmp_path, config, *settings, gpu=True), reference, tolerance)


@pytest.mark.parametrize("begins_on_gpu", [False, True], ids=["cpu to gpu", "gpu to cpu"])
def test_a_checkpoint_goes_on_on_the_other_device(
    begins_on_gpu: bool, gpu: bool, reference: list[float], corpus: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, corpus)
    common = ["checkpoint.interval=10", "checkpoint.keep_every=10"]
    losses(tmp_path, config, *common, gpu=gpu and begins_on_gpu)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000020")
    kept = (tmp_path / "run/checkpoints/step_00000010/manifest.json").stat().st_mtime_ns
    again = losses(tmp_path, config, *common, gpu=gpu and not begins_on_gpu)
    assert_close(again, reference, LIKE_FP32)
    # Not begun anew: that would have written it again.
    assert (tmp_path / "run/checkpoints/step_00000010/manifest.json").stat().st_mtime_ns == kept


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_run_goes_on_as_if_nothing_had_happened(
    dtype: str, gpu: bool, corpus: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, corpus)
    common = [dtype, "checkpoint.interval=10", "checkpoint.keep_every=10"]
    whole = losses(tmp_path, config, *common, gpu=gpu)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000020")
    again = losses(tmp_path, config, *common, gpu=gpu)
    # Additions of a GPU have no fixed order: within bf16's own noise there, the same bits here.
    assert_close(again, whole, 2e-3 if gpu else 0.0)
