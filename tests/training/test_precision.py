"""bf16 and fp16 on a CPU: they train as fp32 does, and fp16's loss scale is searched and kept."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ext.config import load_config
from megatron_ext.rope.embedding import RotaryEmbedding
from megatron_ext.training.guard import LossGuard
from megatron_ext.training.step import StepResult
from tests.conftest import metrics, pretrain
from tests.training.test_guard import FINE

# No gradient of fp16 holds that factor.
FAR_TOO_HIGH = "precision.loss_scale=1e7"
FP16, DISTRIBUTED = "precision.dtype=fp16", "parallel.distributed_optimizer=true"
BF16 = ["precision.dtype=bf16", "precision.grad_reduce=bf16"]


def steps_of(config_file: Path, count: int, *settings: str) -> list[StepResult]:
    """Training in this very process, on sentences of a pattern."""
    from megatron_ext.model.llama import build_model
    from megatron_ext.training.optimizer import build_optimizer
    from megatron_ext.training.step import train_step
    from tests.model.conftest import single_process

    config = load_config(
        config_file, ["training.micro_batch_size=4", "schedule.type=constant", *settings]
    )

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            begin = torch.randint(0, 512, (4, 1), generator=generator)
            text = (begin + 7 * torch.arange(65)) % 512
            yield {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": torch.ones(4, 64)}

    with single_process(config):
        model = build_model(config)
        optimizer = build_optimizer(model, config)
        data = batches()
        return [train_step(step, data, model, optimizer, config) for step in range(count)]


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        # Relative: bf16 has 8 bits of mantissa, fp16 11; the optimizer's sums are float32 in all.
        ([FP16, "precision.loss_scale=16"], 1e-3),
        (["precision.dtype=bf16", DISTRIBUTED], 1e-2),
        (BF16, 1e-2),
    ],
    ids=str,
)
def test_16_bits_train_as_32_do(settings: list[str], tolerance: float, config_file: Path) -> None:
    wide = steps_of(config_file, 6)
    assert wide[-1].loss < wide[0].loss - 0.3
    for ours, reference in zip(steps_of(config_file, 6, *settings), wide, strict=True):
        assert not ours.skipped
        assert ours.loss == pytest.approx(reference.loss, rel=tolerance)
        assert ours.grad_norm == pytest.approx(reference.grad_norm, rel=10 * tolerance)


def test_fp16_searches_for_its_loss_scale(config_file: Path) -> None:
    results = steps_of(config_file, 28, FP16, FAR_TOO_HIGH, "precision.loss_scale_window=3")
    scales = [result.loss_scale for result in results]
    skipped = [result.skipped for result in results]
    first = skipped.index(False)
    assert first > 5 and all(result.overflowed for result in results[:first])
    # Megatron-Core's rule, told once more: the first overflow is let pass, each further one halves,
    # three sound steps in a row double and let one pass again.
    scale, patience, sound = 1e7, 2, 0
    for given, was_skipped in zip(scales, skipped, strict=True):
        assert given == pytest.approx(scale)
        sound = 0 if was_skipped else sound + 1
        patience -= was_skipped
        if was_skipped and patience <= 0:
            scale /= 2
        if sound == 3:
            scale, patience, sound = 2 * scale, 2, 0
    assert results[-1].loss < results[0].loss


def test_an_overflow_at_the_lowest_scale_is_a_fault(config_file: Path) -> None:
    guard = LossGuard(load_config(config_file, ["faults.max_consecutive_skips=0"]), {})
    overflow = replace(FINE, grad_norm=math.inf, skipped=True, loss_scale=2.0)
    assert guard.judge(overflow) == "" and guard.skips == 0
    assert guard.judge(replace(overflow, loss_scale=1.0)) == "non-finite gradient"
    assert guard.judge(replace(overflow, loss=math.nan)) == "non-finite loss"
    assert guard.judge(replace(overflow, loss_scale=None)) == "non-finite gradient"
    assert guard.skips == 3


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_loss_scale_goes_on_where_it_was_stopped(
    processes: int, config_file: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = [FP16, FAR_TOO_HIGH, "precision.loss_scale_window=5", "training.steps=40"]
    # Fewer skips allowed than the search takes: it is no fault.
    settings += ["checkpoint.interval=8", "checkpoint.keep_every=8"]
    settings += ["faults.max_consecutive_skips=3"]
    settings += [DISTRIBUTED] if processes > 1 else []

    def run() -> list[dict]:
        pretrain(config_file, *settings, processes=processes)
        assert not any("fault" in record for record in metrics(run_dir))
        return [record for record in metrics(run_dir) if "loss" in record]

    whole = run()
    assert whole[0]["skipped"] and not all(record["skipped"] for record in whole)
    last = run_dir / "checkpoints/step_00000040/run.json"
    updates = sum(not record["skipped"] for record in whole)
    assert json.loads(last.read_text())["optimizer_steps"] == updates
    # Begun again in the search, and behind it: the rest is the same bit for bit.
    for kept in (8, 32):
        for folder in (run_dir / "checkpoints").glob("step_*"):
            if int(folder.name.removeprefix("step_")) > kept:
                shutil.rmtree(folder)
        again = run()
        for name in ("loss", "loss_scale", "grad_norm", "skipped"):
            assert [record[name] for record in again] == [record[name] for record in whole]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [[*BF16, DISTRIBUTED], [*BF16], [FP16, "precision.loss_scale=16", DISTRIBUTED],
     [FP16, "precision.loss_scale=16", "parallel.pipeline=2", "parallel.virtual_pipeline=2"]],
    ids=str,
)  # fmt: skip
def test_two_processes_in_16_bits_train_as_one_in_32(
    settings: list[str], config_file: Path, tmp_path: Path
) -> None:
    pretrain(config_file)
    pretrain(config_file, f"training.run_dir={tmp_path / 'two'}", *settings, processes=2)
    ours, reference = (
        [record["loss"] for record in metrics(tmp_path / run) if "loss" in record]
        for run in ("two", "run")
    )
    assert len(reference) == 20
    assert ours == pytest.approx(reference, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_angles_are_the_same_in_every_precision(dtype: torch.dtype) -> None:
    rotary = RotaryEmbedding(base=5e5, head_dim=128)
    angles = rotary.to(dtype).forward(4096)
    assert angles.dtype == torch.float32
    frequencies = 5e5 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    exact = torch.arange(4096, dtype=torch.float64)[:, None] * frequencies
    # In turns; a whole turn is no difference. float32 holds an angle within pi to 2^-23.
    turns = (angles[:, 0, 0, :64].double() - exact) / (2 * math.pi)
    assert (turns - turns.round()).abs().max() < 2**-23
