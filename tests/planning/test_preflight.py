"""`pretrain.py --check` through the real entry point; its estimates against what a run writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.config import load_config
from megatron_ext.planning.preflight import checkpoints_kept, preflight
from tests.conftest import ROOT, pretrain

LLAMA_2B = ROOT / "configs/models/llama_2b.yaml"


def test_the_2b_on_128_ranks_passes_on_a_laptop() -> None:
    shown = pretrain(LLAMA_2B, "--check")
    for part in (
        "2,133,985,280 parameters (1,619,134,464 without embeddings)",
        "238,419 steps x 4,194,304 tokens",
        "128 ranks = tensor 1 x pipeline 1 x data 128; 4 micro-batches",
        "base 5e5 at head dim 128 supports 4,096 tokens",
        "usable context 18,437 tokens",
        "needs a base of at least 26,952.3",
        "warning: data.corpora is empty",
    ):
        assert part in shown
    assert shown.rstrip().endswith("ok")


def test_json_has_the_same_numbers() -> None:
    report = json.loads(pretrain(LLAMA_2B, "rope.base=100", "rope.bound=warn", "--check", "--json"))
    assert report["ok"] is True
    assert report["parameters"] == 2_133_985_280
    assert report["bound"]["first_failing_distance"] == 59
    assert report["bound"]["usable_context"] == 58
    assert len(report["warnings"]) == 2


def test_another_world_size_is_judged() -> None:
    shown = pretrain(LLAMA_2B, "--check", "--world-size", 96, code=2)
    assert "global_batch_size=1024 is no multiple of" in shown
    assert "data 64" in pretrain(LLAMA_2B, "parallel.tensor=2", "--check")


def test_missing_token_files_are_named_and_exit_2(tmp_path: Path) -> None:
    (tmp_path / "a.bin").touch()
    shown = pretrain(LLAMA_2B, f"data.corpora.web.path={tmp_path / 'a'}", "--check", code=2)
    assert f"error: data.corpora.web.path={tmp_path / 'a'}: {tmp_path / 'a'}.idx does not" in shown
    assert "data-tools tokenize" in shown
    assert not shown.rstrip().endswith("ok")


def test_real_token_files_pass(config_file: Path) -> None:
    assert pretrain(config_file, "--check").rstrip().endswith("ok")


def test_tokens_that_the_model_does_not_know_are_refused(config_file: Path) -> None:
    shown = pretrain(config_file, "model.vocab_size=256", "--check", code=2)
    assert "tokenized with 512 ids" in shown


def test_a_source_of_weights_that_is_not_there_yet_is_a_warning(tmp_path: Path) -> None:
    config = load_config(LLAMA_2B, [f"training.init_from={tmp_path / 'none'}"])
    report = preflight(config, 128)
    assert report.ok
    assert any("init_from" in warning for warning in report.warnings)


def test_it_writes_nothing(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "pretrain.py"), str(LLAMA_2B), "--check"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "distributed"),
    [
        ("fp32", False),
        ("bf16", True),
        pytest.param("fp32", True, marks=pytest.mark.slow),
        pytest.param("bf16", False, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_has_about_the_size_that_was_estimated(
    config_file: Path, dtype: str, distributed: bool
) -> None:
    overrides = [
        # Large enough that the optimizer's and the format's own records do not count.
        "model.hidden_size=256", "model.ffn_hidden_size=704", "training.steps=1",
        "training.global_batch_size=1", "training.sequence_length=16", "evaluation.batches=1",
        "schedule.warmup_steps=0", f"precision.dtype={dtype}",
        f"parallel.distributed_optimizer={str(distributed).lower()}",
    ]  # fmt: skip
    report = preflight(load_config(config_file, overrides), 1)
    pretrain(config_file, *overrides)
    folder = config_file.parent / "run/checkpoints/step_00000001"
    written = sum(file.stat().st_size for file in folder.rglob("*"))
    assert written == pytest.approx(report.checkpoint_bytes, rel=0.03)


@pytest.mark.parametrize(
    ("steps", "interval", "keep_last", "keep_every", "kept"),
    [
        (100, 10, 2, "null", 2),
        (5, 10, 2, "null", 1),
        (100, 10, 1, 50, 2),  # 50 and 100
        (105, 10, 2, 50, 3),  # 50, 100 and 105
        (100, 10, 99, 50, 10),
    ],
)
def test_checkpoints_that_stay_are_counted(
    config_file: Path, steps: int, interval: int, keep_last: int, keep_every: object, kept: int
) -> None:
    config = load_config(
        config_file,
        [f"training.steps={steps}", f"checkpoint.interval={interval}",
         f"checkpoint.keep_last={keep_last}", f"checkpoint.keep_every={keep_every}"],
    )  # fmt: skip
    assert checkpoints_kept(config) == kept
