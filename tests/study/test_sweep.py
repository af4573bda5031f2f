"""A sweep: its arms, their commands, and what makes them comparable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.cli import main
from megatron_ext.errors import UserError
from megatron_ext.jobs import journal
from megatron_ext.study.sweep import check_data_order, read_sweep, submission
from tests.conftest import ROOT, metrics


@pytest.fixture
def sweep_file(config_file: Path, tmp_path: Path) -> Path:
    file = tmp_path / "bases.yaml"
    file.write_text(
        f"""\
config: {config_file.name}
folder: {tmp_path / "arms"}
settings: {{training.steps: 4, rope.bound: "off"}}
axes:
  rope.base: [1e2, 5e5]
  training.seed: [1, 2]
evaluate: [--lengths, "64,128", --max-tokens, 2000]
"""
    )
    return file


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


def test_arms_are_all_combinations_each_with_a_folder_of_its_own(
    sweep_file: Path, tmp_path: Path
) -> None:
    sweep = read_sweep(sweep_file)
    names = ["base_100-seed_1", "base_100-seed_2", "base_5e5-seed_1", "base_5e5-seed_2"]
    assert [arm.name for arm in sweep.arms] == names
    last = sweep.arms[-1]
    assert (last.config.rope.base, last.config.training.seed) == (5e5, 2)
    assert last.config.training.run_dir == last.run_dir == tmp_path / "arms" / names[-1]


def test_the_shipped_sweep_has_the_arms_of_the_shipped_runs() -> None:
    arms = read_sweep(ROOT / "configs/sweeps/rope_base.yaml").arms
    shipped = {p.stem for p in (ROOT / "configs/runs/rope_base").glob("base_*.yaml")}
    spelt = {f"base_{float(name.removeprefix('base_')):g}" for name in shipped}
    assert {f"base_{arm.config.rope.base:g}" for arm in arms} == spelt


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("config: tiny.yaml", "needs config: FILE, and axes"),
        ("config: tiny.yaml\naxes: {rope.base: 5}", "axes.rope.base must be a list"),
        ("config: tiny.yaml\naxes: {rope.base: [5, 5]}", "list of different values"),
        ("config: tiny.yaml\naxes: {rope.base: [5]}\nseeds: 3", "seeds is unknown"),
        ("config: tiny.yaml\naxes: {rope.bse: [5]}", "rope.bse"),
        ("config: absent.yaml\naxes: {rope.base: [5]}", "absent.yaml"),
    ],
)
def test_a_mistake_is_named(text: str, says: str, config_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=says):
        read_sweep(file)


def test_arms_that_would_read_other_samples_are_refused(
    sweep_file: Path, corpus: Path, tmp_path: Path
) -> None:
    check_data_order(read_sweep(sweep_file))
    text = sweep_file.read_text().replace(
        "training.seed: [1, 2]", "data.validation_fraction: [0.1, 0.2]"
    )
    sweep_file.write_text(text)
    with pytest.raises(UserError, match=r"base_100-validation_fraction_0.1 and .*0.1 and 0.2"):
        check_data_order(read_sweep(sweep_file))


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


def test_finished_arms_are_not_submitted_again(sweep_file: Path, no_slurm: None) -> None:
    from megatron_ext.checkpoint.manifest import checkpoint_dir, write_manifest

    sweep = read_sweep(sweep_file)
    last = checkpoint_dir(sweep.arms[0].run_dir, 4)
    last.mkdir(parents=True)
    write_manifest(last, {})
    first, second, *_ = submission(sweep, [])
    assert (first.arm, first.what) == (sweep.arms[0], "evaluate")
    assert (second.arm, second.what) == (sweep.arms[1], "train")


def test_options_of_sbatch_fit_each_job(sweep_file: Path, no_slurm: None) -> None:
    options = ["--nodes=4", "-N4", "--gpus-per-node=a100:8", "--account=me", "--ntasks-per-node=8"]
    train, evaluate, *_, report = submission(read_sweep(sweep_file), options)
    assert train.words[1:6] == options
    assert evaluate.words[3:6] == [
        "--gpus-per-node=a100:1",
        "--account=me",
        "slurm/evaluate.sbatch",
    ]
    assert report.words[2:4] == ["--account=me", "slurm/report.sbatch"]
    without = submission(read_sweep(sweep_file), ["--gpus-per-node=0"])[1]
    assert "--gpus-per-node=0" in without.words
    for words in (["--nodes", "4"], ["-p", "gpu"]):
        with pytest.raises(UserError, match="in one word"):
            submission(read_sweep(sweep_file), words)


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


@pytest.mark.slow
def test_a_sweep_on_this_machine_trains_evaluates_and_reports(
    sweep_file: Path, tmp_path: Path
) -> None:
    text = sweep_file.read_text().replace("training.seed: [1, 2]", "training.seed: [1]")
    sweep_file.write_text(text)
    command = [sys.executable, "-m", "megatron_ext.cli", "sweep", str(sweep_file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(2):  # the second time there is nothing left to train
        done = subprocess.run(
            [*command, "--local"], env=environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "pretrain.py" not in done.stdout
    arms = [tmp_path / "arms" / name for name in ("base_100-seed_1", "base_5e5-seed_1")]
    assert all(metrics(arm)[-1]["step"] == 4 for arm in arms)
    assert all((arm / "evaluation" / "perplexity.json").is_file() for arm in arms)
    page = (tmp_path / "arms" / "report.html").read_text()
    assert all(arm.name in page for arm in arms)
