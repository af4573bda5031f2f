"""`megatron-ext checkpoint` on folders made by the manifest alone, as a person calls it."""

import json
from pathlib import Path

import pytest

from megatron_ext.checkpoint import manifest
from megatron_ext.config import load_config, save_config
from tests.cli.test_cli import run


@pytest.fixture
def saved(config_file: Path, tmp_path: Path) -> Path:
    """A run with checkpoints of steps 10 .. 50, of which 20 and 40 are permanent."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    keep = ["checkpoint.interval=10", "checkpoint.keep_every=20", "checkpoint.keep_last=1"]
    save_config(load_config(config_file, keep), run_dir / "config.yaml")
    for step in range(10, 60, 10):
        folder = manifest.checkpoint_dir(run_dir, step)
        folder.mkdir(parents=True)
        layout = {"tensor": 2, "pipeline": 1, "data": 4, "world_size": 8}
        facts = {
            "step": step, "consumed_samples": step * 8, "consumed_tokens": step * 512,
            "optimizer_steps": step, "layout": layout, "config_hash": "c", "data_hash": "d",
        }  # fmt: skip
        chunk = {"offset": [0, 0], "size": [3, 4], "file": "__0_0.distcp", "at": [0, 48]}
        whole = {"dtype": "float32", "shape": [3, 4], "chunks": [chunk]}
        (folder / "run.json").write_text(json.dumps(facts))
        (folder / "tensors.json").write_text(json.dumps({"a.weight": whole}))
        (folder / "__0_0.distcp").write_bytes(bytes(48))
        names = [file.name for file in folder.iterdir()]
        manifest.write_manifest(folder, manifest.file_facts(folder, names))
    return run_dir


def steps(run_dir: Path) -> list[int]:
    return [manifest.step_of(folder) for folder in manifest.find_checkpoints(run_dir)]


def test_list_and_inspect_tell_what_is_there(saved: Path, poison: str) -> None:
    listed = run("checkpoint", "list", str(saved), PYTHONPATH=poison)
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()[1:]] == [
        "50", "40", "30", "20", "10",
    ]  # fmt: skip
    assert "25,600" in listed.stdout and "TP2 DP4" in listed.stdout
    shown = run("checkpoint", "inspect", str(saved), "--json", PYTHONPATH=poison)
    content = json.loads(shown.stdout)
    assert content["run"]["step"] == 50
    assert content["tensors"]["a.weight"] == {
        "dtype": "float32", "shape": [3, 4], "parts": 1, "bytes": 48,
    }  # fmt: skip


def test_verify_names_the_damaged_file(saved: Path, poison: str) -> None:
    assert run("checkpoint", "verify", str(saved), PYTHONPATH=poison).returncode == 0
    bad = manifest.checkpoint_dir(saved, 30) / "__0_0.distcp"
    bad.write_bytes(bytes(47) + b"\1")
    done = run("checkpoint", "verify", str(saved), PYTHONPATH=poison)
    assert done.returncode == 1
    assert f"{bad} has the right size but not the content" in done.stdout
    assert done.stdout.count("every file is as it was written") == 4


def test_prune_keeps_the_permanent_and_one_that_verifies(saved: Path, poison: str) -> None:
    dry = run("checkpoint", "prune", str(saved), "--dry-run", PYTHONPATH=poison)
    assert dry.stdout.count("would delete") == 2 and steps(saved) == [50, 40, 30, 20, 10]
    for step in (20, 40, 50):  # all that the rule keeps
        (manifest.checkpoint_dir(saved, step) / "run.json").unlink()
    done = run("checkpoint", "prune", str(saved), PYTHONPATH=poison)
    assert "step_00000030: no newer one verifies" in done.stdout, done.stderr
    assert steps(saved) == [50, 40, 30, 20]


def test_folder_without_checkpoints_is_the_users_mistake(tmp_path: Path) -> None:
    done = run("checkpoint", "list", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
