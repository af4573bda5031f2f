"""A sweep as jobs: which, with which options of sbatch, and none of them twice."""

import json
import subprocess
from pathlib import Path

import pytest

from megatron_ext.checkpoint.manifest import checkpoint_dir, write_manifest
from megatron_ext.cli import main
from megatron_ext.errors import UserError
from megatron_ext.jobs import journal
from megatron_ext.study.submission import submission
from megatron_ext.study.sweep import Arm, Sweep, read_sweep
from tests.study.conftest import write_perplexity


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


def test_a_dry_run_is_a_shell_script_of_what_submit_does(
    sweep_file: Path, no_slurm: None, capsys: pytest.CaptureFixture
) -> None:
    main_ends_with_0(["sweep", str(sweep_file), "--submit", "--dry-run", "--sbatch", "--nodes=2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * 2 + 1
    assert lines[0].startswith(
        "job_1=$(sbatch --parsable --job-name=bases-base_100-seed_1 --nodes=2 "
    )
    assert "--dependency=afterok:$job_1 --kill-on-invalid-dep=yes slurm/evaluate.sbatch" in lines[1]
    assert "--dependency=afterany:$job_2:$job_4:$job_6:$job_8 slurm/report.sbatch" in lines[-1]
    # The script is one: with an sbatch that numbers its calls, every job id is filled in.
    script = 'n=0; sbatch() { echo "$*" >&2; echo "$RANDOM"; }\n' + "\n".join(lines)
    done = subprocess.run(["/bin/bash", "-eu", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "$job" not in done.stderr


def main_ends_with_0(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


def finish(arm: Arm) -> None:
    """As training leaves it."""
    last = checkpoint_dir(arm.run_dir, arm.config.training.steps)
    last.mkdir(parents=True)
    write_manifest(last, {})


def planned(sweep: Sweep, arm: Arm) -> list[str]:
    return [one.what for one in submission(sweep, []) if one.arm == arm]


def test_what_is_there_is_not_made_again(sweep_file: Path, no_slurm: None) -> None:
    sweep_file.write_text(sweep_file.read_text() + "export: []\n")
    sweep = read_sweep(sweep_file)
    arm = sweep.arms[0]
    assert planned(sweep, arm) == ["train", "export", "evaluate"]
    finish(arm)
    assert planned(sweep, arm) == ["export", "evaluate"]
    arm.exported.mkdir()
    assert planned(sweep, arm) == ["evaluate"]
    write_perplexity(arm.run_dir, 4, {64: 5.0, 128: 5.0})
    assert planned(sweep, arm) == []
    assert planned(sweep, sweep.arms[1]) == ["train", "export", "evaluate"]
    # Results of fewer lengths, or of an earlier step, are not those that were asked for.
    write_perplexity(arm.run_dir, 4, {64: 5.0})
    assert planned(sweep, arm) == ["evaluate"]
    write_perplexity(arm.run_dir, 3, {64: 5.0, 128: 5.0})
    assert planned(sweep, arm) == ["evaluate"]


@pytest.mark.parametrize(
    ("measured", "left"), [([128, 256], []), ([64, 128], ["evaluate"]), ([], ["evaluate"])]
)
def test_lengths_that_a_task_overfills_are_not_asked_for_again(
    sweep_file: Path, no_slurm: None, measured: list[int], left: list[str]
) -> None:
    text = sweep_file.read_text()
    asked = '[--tasks, "passkey", --lengths, "64,128,256"]'
    sweep_file.write_text(text[: text.index("evaluate:")] + f"evaluate: {asked}\n")
    sweep = read_sweep(sweep_file)
    arm = sweep.arms[0]
    finish(arm)
    results = {
        "checkpoint": {"step": arm.config.training.steps},
        "lengths": [{"length": length} for length in measured],
    }
    file = arm.run_dir / "evaluation" / "passkey.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(results))
    assert planned(sweep, arm) == left


def test_only_training_gets_many_nodes_and_only_evaluation_a_gpu_beside_it(
    sweep_file: Path, no_slurm: None
) -> None:
    sweep_file.write_text(sweep_file.read_text() + "export: [--vocab-size, 500]\n")
    options = ["--nodes=4", "-N4", "--gpus-per-node=a100:8", "--account=me", "--ntasks-per-node=8"]
    train, export, evaluate, *_, report = submission(read_sweep(sweep_file), options)
    assert train.words[1:6] == options
    after = ["--dependency=afterok:$job_1", "--kill-on-invalid-dep=yes"]
    place = str(export.run_dir)
    assert export.words[1:] == [
        *after, "--account=me", "slurm/export.sbatch", place, f"{place}/hf", "--vocab-size", "500",
    ]  # fmt: skip
    words = [*after, "--gpus-per-node=a100:1", "--account=me", "slurm/evaluate.sbatch", place]
    assert evaluate.words[1:7] == words
    assert report.words[2:4] == ["--account=me", "slurm/report.sbatch"]
    for words in (["--nodes", "4"], ["-p", "gpu"]):
        with pytest.raises(UserError, match="in one word"):
            submission(read_sweep(sweep_file), words)


@pytest.mark.parametrize(
    ("option", "of_one_gpu"),
    [
        ("-G64", "--gpus-per-node=1"),
        ("-Ga100:64", "--gpus-per-node=a100:1"),
        ("--gpus=64", "--gpus-per-node=1"),
        ("--gpus-per-node=h100:8", "--gpus-per-node=h100:1"),
        ("--gpus-per-node=0", "--gpus-per-node=0"),
        ("--gpus-per-task=1", "--gpus-per-node=1"),
        ("--gres=gpu:8", "--gpus-per-node=1"),
        ("--gres=gpu:a100:8", "--gpus-per-node=a100:1"),
        ("--gres=gpu:a100", "--gpus-per-node=a100:1"),
        ("--gres=gpu", "--gpus-per-node=1"),
        ("--gpu-bind=none", "--gpu-bind=none"),
        ("--gres=license:1", "--gres=license:1"),
    ],
)
def test_gpus_in_any_spelling_become_one(
    option: str, of_one_gpu: str, sweep_file: Path, no_slurm: None
) -> None:
    _, evaluate, *_, report = submission(read_sweep(sweep_file), [option])
    assert evaluate.words[3:5] == [of_one_gpu, "slurm/evaluate.sbatch"]
    assert (of_one_gpu in report.words) == ("gpus" not in of_one_gpu)


def test_what_is_submitted_and_still_waits_is_not_submitted_again(
    sweep_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = read_sweep(sweep_file)
    jobs: dict[str, None] = {}
    monkeypatch.setattr("megatron_ext.jobs.queue.waiting_and_running", lambda: jobs)
    for number, one in enumerate(submission(sweep, []), 1):
        journal.record(one.run_dir, "submitted", job=str(number), what=one.what)
        jobs[str(number)] = None
    assert submission(sweep, []) == []
    del jobs["1"], jobs["2"]  # the first arm failed
    assert [one.what for one in submission(sweep, [])] == ["train", "evaluate", "report"]
