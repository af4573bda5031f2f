"""Tasks measured while training: those of `megatron-ext evaluate`, without a trace in the run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from megatron_ext.config.schema import TaskName
from megatron_ext.evaluation.retrieval import TASKS
from tests.conftest import ROOT, environment, metrics, pretrain

SETTINGS = ["evaluation.lengths=[64,400]", "evaluation.depths=2", "evaluation.samples=2",
            "evaluation.max_tokens=1500", "data.validation_fraction=0.1"]  # fmt: skip
WITH_TASKS = ["evaluation.tasks=[perplexity,lines]", "evaluation.tasks_interval=10"]


def test_the_config_knows_every_task() -> None:
    assert set(get_args(TaskName)) == {"perplexity", *TASKS}


def test_tasks_are_those_of_evaluate_and_change_nothing(config_file: Path, tmp_path: Path) -> None:
    with_tasks, without = tmp_path / "with", tmp_path / "without"
    pretrain(config_file, *SETTINGS, *WITH_TASKS, f"training.run_dir={with_tasks}")
    pretrain(config_file, *SETTINGS, f"training.run_dir={without}")
    records = metrics(with_tasks)
    assert losses(records) == losses(metrics(without))

    subprocess.run(
        [sys.executable, "-m", "megatron_ext.cli", "evaluate", str(with_tasks),
         "--tasks", "perplexity,lines"],
        cwd=ROOT, env=environment(), check=True, capture_output=True,
    )  # fmt: skip
    for task, figure in (("perplexity", "token_weighted_perplexity"), ("lines", "accuracy")):
        folder = with_tasks / "evaluation"
        ours = json.loads((folder / f"in_training/step_00000020/{task}.json").read_text())
        theirs = json.loads((folder / f"{task}.json").read_text())
        assert ours["checkpoint"] == {"step": 20, "in_training": True}
        assert {**ours, "checkpoint": theirs["checkpoint"]} == theirs
        recorded = next(r for r in records if r["step"] == 20 and any(task in key for key in r))
        expected = {f"{task}/{entry['length']}": entry[figure] for entry in theirs["lengths"]}
        assert recorded == {"step": 20, **expected}
    assert (with_tasks / "evaluation/in_training/step_00000010/lines.json").is_file()


def test_a_length_too_short_is_refused_before_the_first_step(
    config_file: Path, tmp_path: Path
) -> None:
    wrong = [*WITH_TASKS, "evaluation.lengths=[32]"]
    printed = pretrain(config_file, *wrong, code=2)
    assert "lines: a prompt of 32 tokens is too short" in printed and "Traceback" not in printed
    assert not (tmp_path / "run").exists()
    assert "lines: a prompt of 32 tokens is too short" in pretrain(
        config_file, *wrong, "--check", code=2
    )


def test_an_unknown_task_is_refused(config_file: Path) -> None:
    printed = pretrain(config_file, "evaluation.tasks=[paskey]", code=2)
    assert "passkey" in printed and "Traceback" not in printed


def losses(records: list[dict]) -> list[float]:
    return [r[key] for r in records for key in ("loss", "validation_loss") if key in r]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["precision.dtype=bf16", "precision.fp8=tensorwise"], "precision.fp8"),
        (["parallel.tensor=2", "parallel.sequence=true", "rope.scaling.type=dynamic",
          "rope.scaling.factor=2", "rope.scaling.original_context_length=32"],
         "rope.scaling.type=dynamic"),
    ],
)  # fmt: skip
def test_what_takes_texts_of_one_length_only_is_refused(
    config_file: Path, settings: list[str], said: str
) -> None:
    printed = pretrain(config_file, *WITH_TASKS, *settings, "--check", "--world-size", "2", code=2)
    assert "evaluation.tasks asks for texts of any length" in printed and said in printed


def test_a_disk_that_is_full_ends_no_training(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run/evaluation").mkdir(parents=True)
    (tmp_path / "run/evaluation/in_training").write_text("no folder: nothing can be written here")
    printed = pretrain(config_file, *SETTINGS, *WITH_TASKS)
    assert "perplexity.json could not be written" in printed
    assert any("lines/400" in record for record in metrics(tmp_path / "run"))
