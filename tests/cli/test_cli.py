"""`megatron-ext` as a person calls it: help, exit codes, and what it does not import."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from megatron_ext.cli import COMMANDS
from tests.conftest import ROOT


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_ext.cli", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_every_command(arguments: list[str], poison: str) -> None:
    done = run(*arguments, PYTHONPATH=poison)
    shown = done.stdout + done.stderr
    assert "Traceback" not in shown
    assert done.returncode == (0 if arguments else done.returncode)
    for command in COMMANDS:
        assert f"\n  {command} " in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_without_torch(command: str, poison: str) -> None:
    done = run(command, "--help", PYTHONPATH=poison)
    assert done.returncode == 0, done.stderr
    assert f"megatron-ext {command}" in done.stdout.split("\n", 1)[1]  # beyond the usage line
    assert "--json" in done.stdout


def test_bound_and_schema_need_no_torch(poison: str) -> None:
    assert run("bound", "--base", "1e4", "--context", "4096", PYTHONPATH=poison).returncode == 0
    assert run("schema", PYTHONPATH=poison).returncode == 0


@pytest.mark.parametrize("arguments", [["bound"], ["bound", "--base", "0.5"]])
def test_a_users_mistake_is_one_sentence_and_exit_code_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["nope"], ["bound", "--base", "x"], ["bound", "--nope"]])
def test_a_wrong_command_line_exits_with_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_another_exception_is_a_failure_of_ours_and_exits_with_1() -> None:
    code = (
        "import megatron_ext.cli.schema as s, megatron_ext.cli as c\n"
        "def broken():\n    raise RuntimeError('ours')\n"
        "s.markdown = broken\n"
        "c.main(['schema', '--markdown'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "RuntimeError: ours" in done.stderr


def test_schema_prints_json_or_the_page() -> None:
    assert json.loads(run("schema").stdout)["properties"]["rope"]
    page = run("schema", "--markdown").stdout
    assert page == (ROOT / "docs/config.md").read_text()


def test_doctor_says_what_is_here() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["packages"]["megatron-core"] == metadata.version("megatron-core")
    assert found["cpu"]["cores"] == os.cpu_count()
    assert set(found["optional"]) == {"transformer_engine", "flash_attn", "apex"}
    import torch

    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["collectives"] == ("nccl" if found["gpus"] else "gloo")


def test_doctor_tells_installed_from_importable_and_asks_slurm(tmp_path: Path) -> None:
    (tmp_path / "apex.py").write_text("import fused_layer_norm_cuda\n")
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined\\nsymbol')\n")
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho slurm 22.05.8\n")
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    shown = run("doctor", PYTHONPATH=str(tmp_path), PATH=path).stdout
    lines = {line.split()[0]: line for line in shown.splitlines()}
    assert "installed but not importable: No module named" in lines["apex"]
    assert "installed but not importable: undefined symbol" in lines["flash_attn"]
    assert "slurm 22.05.8" in lines["slurm"]
    assert "PyTorch kernels" in lines["kernels"] or "Transformer Engine" in lines["kernels"]
