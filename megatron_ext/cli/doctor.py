"""`megatron-ext doctor`: what is installed, which kernels will be used and why, what is missing."""

import importlib
import json as json_module
import os
import platform
import shutil
import subprocess
import warnings
from importlib import metadata
from typing import Annotated, Any

import typer

_PACKAGES = ("megatron-ext", "torch", "megatron-core", "numpy", "transformers")
# Import name, name on the package index, what it gives.
_KERNELS = (
    ("transformer_engine", "transformer-engine", "fused norms, linear layers and attention"),
    ("flash_attn", "flash-attn", "attention inside Transformer Engine"),
    ("apex", "apex", "fused Adam and multi-tensor operations"),
)


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Versions, devices, the kernels that a run would use and why, NCCL and Slurm.

    Nothing here is required beyond the base install: optional kernels that cannot be imported are
    named with the reason. Example: megatron-ext doctor --json
    """
    found = examine()
    print(json_module.dumps(found, indent=2) if json else _text(found))


def examine() -> dict[str, Any]:
    """Everything that `doctor` prints, as JSON values."""
    warnings.filterwarnings("ignore", module="megatron")
    import psutil
    import torch

    from megatron_ext.model.layers import choose_backend

    gpus = [_gpu(torch, i) for i in range(torch.cuda.device_count())]
    nccl = torch.distributed.is_nccl_available() and torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {"cores": os.cpu_count(), "memory_gb": _gb(psutil.virtual_memory().total)},
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "collectives": "nccl" if nccl else "gloo",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,  # type: ignore[no-untyped-call]
        "precision": "bf16" if gpus else "fp32",
        "kernels": choose_backend("auto").reason,
        "optional": {name: _importable(name, package) for name, package, _ in _KERNELS},
        "slurm": _slurm(),
    }


def _text(found: dict[str, Any]) -> str:
    packages = ", ".join(f"{k} {v or 'not installed'}" for k, v in found["packages"].items())
    cpu, gpus = found["cpu"], found["gpus"]
    names = [f"{gpu['name']} ({gpu['memory_gb']} GB)" for gpu in gpus]
    device = f"{len(gpus)} GPU: {', '.join(names)}" if gpus else "no GPU; runs on the CPU in fp32"
    collectives = f"nccl {found['nccl']}" if found["nccl"] else "gloo (nccl needs a GPU)"
    lines = [
        ("python", found["python"]),
        ("packages", packages),
        ("cpu", f"{cpu['cores']} cores, {cpu['memory_gb']} GB"),
        ("device", device),
        ("collectives", collectives),
        ("kernels", found["kernels"]),
    ]
    for name, _, gives in _KERNELS:
        lines.append((name, f"{found['optional'][name]} [{gives}]"))
    lines.append(("slurm", found["slurm"] or "not here; local runs only"))
    return "\n".join(f"{name:<20}{value}" for name, value in lines)


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_gb": _gb(properties.total_memory),
        "compute_capability": f"{properties.major}.{properties.minor}",
    }


def _gb(size: int) -> float:
    return round(size / 1e9, 1)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _importable(name: str, package: str) -> str:
    """Its version, or why it cannot be used: being installed is not enough."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return "not installed"
        return f"installed but not importable: {error}"
    except Exception as error:  # a wheel built against another torch raises anything
        return f"installed but not importable: {' '.join(str(error).split())[:200]}"
    return _version(package) or "importable"


def _slurm() -> str | None:
    if not shutil.which("sbatch"):
        return None
    done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=10)
    return done.stdout.strip() or "sbatch is there but does not answer"
