"""GPU packages that are installed where there is no GPU: a run does without, `doctor` sees them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, pretrain

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@pytest.fixture(autouse=True)
def apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An apex whose every function ends as a CUDA kernel does that is given a tensor of the CPU."""
    kernel = "def {0}(*_, **__): raise RuntimeError('{0} on a CPU')\n".format
    modules = {
        "apex/__init__.py": "",
        "apex/optimizers.py": kernel("FusedAdam") + kernel("FusedSGD"),
        "apex/multi_tensor_apply.py": kernel("multi_tensor_applier"),
        "amp_C.py": kernel("multi_tensor_l2norm") + kernel("multi_tensor_scale"),
    }
    for name, text in modules.items():
        file = tmp_path / "packages" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'packages'}{os.pathsep}{ROOT}")


def test_they_are_found_and_not_imported() -> None:
    code = """
import importlib.util, megatron_ext
from megatron_ext.model.kernels import look, problem_of
assert importlib.util.find_spec("apex") and not importlib.util.find_spec("transformer_engine")
assert look().problems == {}
from megatron.core.optimizer import Adam, clip_grads
assert Adam.__module__ == "torch.optim.adamw", Adam
assert clip_grads.l2_norm_impl.__module__ == "megatron.core.utils"
assert problem_of("apex") == "" and problem_of("transformer_engine") == "not installed"
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_benchmarks_hide_them_before_they_import_anything_else() -> None:
    code = "import benchmarks, sys; assert 'megatron.core' not in sys.modules; import apex"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "apex is for GPUs, and there is none" in done.stderr, done.stderr


def test_an_editable_installation_is_hidden_too(tmp_path: Path) -> None:
    """Its finder stands in sys.meta_path, and the folder in no sys.path."""
    code = f"""
import importlib.util, sys, megatron_ext

class Editable:
    def find_spec(self, name, path=None, target=None):
        if name == "transformer_engine":
            return importlib.util.spec_from_file_location(name, {str(tmp_path / "te.py")!r})

sys.meta_path.append(Editable())
assert importlib.util.find_spec("transformer_engine")
try:
    import transformer_engine
except ModuleNotFoundError:
    sys.exit(0)
sys.exit("imported")
"""
    (tmp_path / "te.py").touch()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_run_and_its_check_do_without(config_file: Path) -> None:
    pretrain(config_file, "training.steps=2", "--check", "--world-size", "1")
    assert "loss" in pretrain(config_file, "training.steps=2")
