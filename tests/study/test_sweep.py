"""A sweep: its arms, their commands, and what makes them comparable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.study.sweep import check_data_order, read_sweep
from tests.conftest import ROOT, metrics


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
        (
            "config: tiny.yaml\naxes: {rope.base: [1e4]}\nexport: true",
            r"must be a list .*export: \[\]",
        ),
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


@pytest.mark.slow
def test_a_sweep_on_this_machine_goes_on_where_an_arm_failed(
    sweep_file: Path, tmp_path: Path
) -> None:
    text = sweep_file.read_text().replace("training.seed: [1, 2]", "training.seed: [1]")
    sweep_file.write_text(text + "export: [--proof-lengths, 64]\n")
    arms = [tmp_path / "arms" / name for name in ("base_100-seed_1", "base_5e5-seed_1")]
    arms[0].mkdir(parents=True)
    (arms[0] / "evaluation").touch()  # where a folder has to go

    first = sweep_locally(sweep_file)
    assert first.returncode == 1
    (said,) = [line for line in first.stderr.splitlines() if line.startswith("error: base_")]
    assert said.startswith("error: base_100-seed_1: ") and "evaluate" in said
    assert all(metrics(arm)[-1]["step"] == 4 for arm in arms)
    assert all((arm / "hf" / "proof.json").is_file() for arm in arms)
    assert (arms[1] / "evaluation" / "perplexity.json").is_file()

    (arms[0] / "evaluation").unlink()
    again = sweep_locally(sweep_file)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "pretrain.py" not in again.stdout and "export-hf" not in again.stdout
    assert (arms[0] / "evaluation" / "perplexity.json").is_file()
    page = (tmp_path / "arms" / "report.html").read_text()
    assert all(arm.name in page for arm in arms)


def sweep_locally(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_ext.cli", "sweep", file, "--local"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
