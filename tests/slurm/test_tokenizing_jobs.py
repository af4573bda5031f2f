"""slurm/tokenize.sbatch: an array and its merge give the bytes of one process; what failed, and
nothing else, runs again."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm.cluster import Cluster

TASKS = 3


@pytest.fixture
def documents(corpus: Path, tmp_path: Path) -> Path:
    """The corpus in several files, as an array job would find it."""
    lines = (corpus.parent / "docs.jsonl").read_text().splitlines(keepends=True)
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jsonl").write_text("".join(lines[number::4]))
    return folder


def tokenize_jobs(cluster: Cluster, output: Path, corpus: Path, inputs: Path) -> tuple[str, ...]:
    """Call the script as a person does; the ids of array and merge, and the tasks submitted."""
    tokenizer = corpus.parent / "tokenizer.model"
    done = subprocess.run(
        ["bash", "slurm/tokenize.sbatch", str(TASKS), str(output), str(tokenizer), str(inputs)],
        cwd=ROOT, env={**cluster.environment, "SBATCH_OUTPUT": f"{output.parent}/%A_%a.out"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"job (\d+): tasks (\S+) of 3\njob (\d+): merge to .*\n", done.stdout)
    assert found is not None, done.stdout
    return found[1], found[3], found[2]


def test_array_and_merge_equal_one_process_and_a_failed_task_reruns_alone(
    cluster: Cluster, corpus: Path, documents: Path, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "jobs" / "tokens"
    output.parent.mkdir()
    subprocess.run(
        [sys.executable, "-m", "data_tools", "tokenize", documents, "--output", whole,
         "--tokenizer", corpus.parent / "tokenizer.model"],
        check=True, cwd=ROOT,
    )  # fmt: skip

    # A folder where one task's file has to go: that task fails, and no merge may begin.
    obstacle = Path(f"{output}.task-00001-of-00003.bin")
    obstacle.mkdir()
    array, merge, submitted = tokenize_jobs(cluster, output, corpus, documents)
    assert submitted == "0-2"
    cluster.wait(array)
    assert cluster.wait(merge)["JobState"] == "CANCELLED"
    receipts = {path: path.stat().st_mtime_ns for path in output.parent.glob("*.receipt.json")}
    assert len(receipts) == 2

    obstacle.rmdir()
    _, merge, submitted = tokenize_jobs(cluster, output, corpus, documents)
    assert submitted == "1"
    assert cluster.wait(merge)["JobState"] == "COMPLETED"
    assert receipts == {path: path.stat().st_mtime_ns for path in receipts}
    for suffix in (".bin", ".idx"):
        assert Path(f"{output}{suffix}").read_bytes() == Path(f"{whole}{suffix}").read_bytes()
    assert json.loads(Path(f"{output}.receipt.json").read_text())["counts"]["documents"] == 60


def test_output_that_a_job_still_makes_is_refused_however_it_is_written(
    cluster: Cluster, tmp_path: Path
) -> None:
    output = tmp_path / "tokens"
    relative = os.path.relpath(output, ROOT)
    held = ["--hold", f"--chdir={ROOT}", "--output=/dev/null", "--array=0-1"]
    for given, again in ((relative, output), (output, f"{relative}/../tokens")):
        job = cluster.submit(*held, "slurm/tokenize.sbatch", "2", given, "t.model", "raw")
        done = submit(cluster, again)
        assert done.returncode == 2, done
        assert done.stderr.startswith(f"error: job {job}_[0-1] still works on {again}: wait")
        assert done.stderr.count("\n") == 1 and done.stdout == ""
        cluster.run("scancel", job)
        cluster.wait(job)
    other = submit(cluster, tmp_path / "others")
    assert other.returncode == 0, other.stderr
    for job in re.findall(r"^job (\d+)", other.stdout, re.M):
        cluster.run("scancel", job)
        cluster.wait(job)


def submit(cluster: Cluster, output: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "slurm/tokenize.sbatch", "2", str(output), "t.model", "raw"], cwd=ROOT,
        env={**cluster.environment, "SBATCH_OUTPUT": "/dev/null"}, capture_output=True, text=True,
    )  # fmt: skip


def test_a_dry_run_prints_the_commands_and_submits_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    done = subprocess.run(
        ["bash", "slurm/tokenize.sbatch", "2", str(tmp_path / "x"), "t.model", "raw"],
        cwd=ROOT, env={**cluster.environment, "DRY_RUN": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    first, second = (line for line in done.stderr.splitlines() if line.startswith("sbatch"))
    assert first == f"sbatch --array=0-1 slurm/tokenize.sbatch 2 {tmp_path}/x t.model raw"
    assert "--dependency=afterok:ARRAY --kill-on-invalid-dep=yes" in second
    assert cluster.run("squeue", "--noheader").stdout == ""


@pytest.mark.parametrize("arguments", [["2", "x", "t.model"], ["many", "x", "t.model", "raw"]])
def test_a_mistake_is_one_sentence(arguments: list[str]) -> None:
    done = subprocess.run(
        ["bash", "slurm/tokenize.sbatch", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
