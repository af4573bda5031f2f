"""`megatron-ext sweep --submit`: two arms trained, evaluated, exported and reported, by jobs that
wait for each other, from one command."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, metrics
from tests.slurm.cluster import Cluster

SBATCH = "--nodes=1 --gpus-per-node=0 --ntasks-per-node=1 --cpus-per-task=1 --output={}/%x-%j.out"


def sweep(cluster: Cluster, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ext.cli", "sweep", *map(str, arguments)],
        cwd=ROOT, env={**cluster.environment, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_sweep_is_submitted_evaluated_exported_and_reported(
    cluster: Cluster, training: Path, tmp_path: Path
) -> None:
    file, folder = tmp_path / "two.yaml", tmp_path / "arms"
    file.write_text(
        f"""\
config: {os.path.relpath(training, tmp_path)}
folder: {folder}
settings: {{training.steps: 4, rope.bound: warn}}
axes: {{rope.base: [1e2, 1e4]}}
evaluate: [--lengths, "64,128", --max-tokens, 2000]
export: [--proof-lengths, 64]
"""
    )
    lines = sweep(cluster, file, "--submit", "--sbatch", SBATCH.format(tmp_path)).splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "train base_100", "export base_100", "evaluate base_100",
        "train base_10000", "export base_10000", "evaluate base_10000", "report two",
    ]  # fmt: skip
    # Called again while they wait or run, it submits no arm twice.
    again = sweep(cluster, file, "--submit", "--dry-run")
    assert not any(
        name in again for name in ("pretrain.sbatch", "evaluate.sbatch", "export.sbatch")
    )
    jobs = [line.split()[1].rstrip(":") for line in lines]
    for job in (jobs[-1], jobs[1], jobs[4]):
        assert cluster.wait(job)["JobState"] == "COMPLETED", list_of(tmp_path)

    for name, job in (("base_100", jobs[0]), ("base_10000", jobs[3])):
        proof = json.loads((folder / name / "hf" / "proof.json").read_text())
        assert proof["checkpoint"]["step"] == 4 and proof["lengths"][0]["length"] == 64
        assert list((folder / name / "hf").glob("*.safetensors"))
        assert metrics(folder / name)[-1]["step"] == 4
        results = json.loads((folder / name / "evaluation" / "perplexity.json").read_text())
        assert [entry["length"] for entry in results["lengths"]] == [64, 128]
        assert json.loads((folder / name / "environment.json").read_text())["slurm_job_id"] == job
    page = (folder / "report.html").read_text()
    assert "base_100" in page and "base_10000" in page

    states = json.loads(sweep(cluster, file, "--status", "--json"))
    assert [(run["name"], run["state"]) for run in states] == [
        ("base_100", "finished"), ("base_10000", "finished"),
    ]  # fmt: skip


def list_of(folder: Path) -> str:
    """What all jobs printed, for a failing test."""
    return "\n".join(f"{log.name}:\n{log.read_text()}" for log in sorted(folder.glob("*.out")))
