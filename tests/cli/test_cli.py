"""`megatron-ext` as a person calls it: help, exit codes, and what it does not import."""

import importlib
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
    assert set(found["optional"]) == {
        "transformer_engine", "flash_attn", "apex", "fused_weight_gradient_mlp_cuda", "triton",
    }  # fmt: skip
    import torch

    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["collectives"] == ("nccl" if found["gpus"] else "gloo")


def fake(folder: Path, *modules: str) -> str:
    """PYTHONPATH of packages that can be imported and do nothing."""
    for module in modules:
        place = folder.joinpath(*module.split("."))
        place.mkdir(parents=True, exist_ok=True)
        (place / "__init__.py").touch()
    return str(folder)


@pytest.mark.parametrize(
    ("name", "modules", "lacks"),
    [
        ("transformer_engine", ["transformer_engine.pytorch"], "transformer_engine.pytorch"),
        ("flash_attn", ["flash_attn"], None),
        ("apex", ["apex.optimizers", "amp_C"], "amp_C"),  # built without its CUDA part
        ("fused_weight_gradient_mlp_cuda", ["fused_weight_gradient_mlp_cuda"], None),
        ("triton", ["triton"], None),
    ],
)
def test_each_optional_package_is_seen_there_away_and_broken(
    name: str, modules: list[str], lacks: str | None, tmp_path: Path, monkeypatch
) -> None:
    from megatron_ext.model.kernels import problem_of

    def problem_with(folder: str) -> str:
        for loaded in [m for m in sys.modules if m.split(".")[0] in (name, "amp_C")]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setattr(sys, "path", [folder, *before])
        importlib.invalidate_caches()
        return problem_of(name)

    before = list(sys.path)
    if not problem_of(name):
        pytest.skip(f"{name} is installed here")
    assert problem_with(str(tmp_path)) == "not installed"
    assert problem_with(fake(tmp_path / "whole", *modules)) == ""
    if lacks:
        rest = [modules[0].split(".")[0], *(module for module in modules if module != lacks)]
        found = problem_with(fake(tmp_path / "part", *rest))
        assert found == f"installed but not importable: No module named '{lacks}'"


def test_doctor_tells_installed_from_importable_and_asks_slurm(tmp_path: Path) -> None:
    (tmp_path / "apex.py").write_text("import fused_layer_norm_cuda\n")
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined\\nsymbol')\n")
    (tmp_path / "triton.py").write_text("")
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho slurm 22.05.8\n")
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    shown = run("doctor", PYTHONPATH=str(tmp_path), PATH=path).stdout
    lines = {line.split()[0]: line for line in shown.splitlines()}
    assert "installed but not importable: No module named" in lines["apex"]
    assert "installed but not importable: undefined symbol" in lines["flash_attn"]
    assert "slurm 22.05.8" in lines["slurm"]
    assert "not installed" in lines["transformer_engine"]
    assert "importable [torch.compile" in lines["triton"]
    assert lines["kernels.attention"].split()[1] in ("sdpa", "transformer_engine")
