"""The benchmarks that wait for a GPU run, at toy size, on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment


def run(*arguments: object, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)], cwd=ROOT, env=environment(),
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_training_step_beside_its_peers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "train.json"
    shown = run("benchmarks/gpu_train.py", "--toy", "--rounds", 2, "--steps", 2, "--json", file)
    found = json.loads(file.read_text())["toy"]
    for name in ("transformers", "plain PyTorch", "ours"):
        assert f"| {name} | " in shown
        mine = found["contenders"][name]
        assert mine["tokens_per_s"] > 0 and mine["peak_gb"] > 0 and len(mine["step_s"]) == 4
        assert mine["loss"] == pytest.approx(6.24, abs=0.1)  # ln 512: all are one model
    assert found["profile_us"]["matrix products"] > 0
    assert found["profile_us"]["attention"] > 0
    assert "| no kernel running | " in shown


@pytest.mark.slow
def test_kernels_are_compared_with_float64_and_with_their_floor() -> None:
    shown = run("benchmarks/gpu_kernels.py", "--toy", "--rounds", 2)
    assert "WRONG" not in shown
    assert "| attention | flash | no GPU |" in shown
    for kernel in ("RMSNorm", "attention", "RoPE", "SwiGLU", "cross-entropy", "AdamW"):
        assert shown.count(f"| {kernel} | ") >= 2


@pytest.mark.parametrize(
    "name", ["gpu_train.py", pytest.param("gpu_kernels.py", marks=pytest.mark.slow)]
)
def test_without_a_gpu_one_sentence_says_what_to_do(name: str) -> None:
    assert "run on a GPU, or with --toy on a CPU" in run(f"benchmarks/{name}", code=1)
