"""`megatron-ext doctor`: what is installed, which kernels will be used and why, what is missing."""

import json as json_module
import os
import platform
import shutil
import subprocess
import warnings
from dataclasses import asdict
from importlib import metadata
from typing import Annotated, Any

import typer

_PACKAGES = ("megatron-ext", "torch", "megatron-core", "numpy", "transformers")
# Import name, name on the package index, what it gives. How to install them: docs/install-gpu.md.
_OPTIONAL = (
    ("transformer_engine", "transformer-engine", "fused norms, linear layers, attention, fp8"),
    ("flash_attn", "flash-attn", "attention"),
    ("apex", "apex", "fused Adam"),
    (
        "fused_weight_gradient_mlp_cuda",
        "apex",
        "of apex: gradients added up within matrix products",
    ),
    ("triton", "triton", "torch.compile on a GPU"),
)
_MODEL = {  # only its shape matters, to what auto takes
    "model": {
        "num_layers": 32, "hidden_size": 2048, "ffn_hidden_size": 5504, "num_heads": 16,
        "vocab_size": 32000,
    },
    "rope": {"base": 5e5},
    "training": {
        "sequence_length": 4096, "global_batch_size": 1, "micro_batch_size": 1, "steps": 1,
    },
    "optimizer": {"lr": 1e-4},
}  # fmt: skip


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Versions, devices, the kernels that a run would use and why, NCCL and Slurm.

    Nothing here is required beyond the base install: optional kernels that cannot be imported are
    named with the reason; docs/install-gpu.md says how to get them. The kernels are those that
    `auto` takes for the 2B model in bf16. Example: megatron-ext doctor --json
    """
    found = examine()
    print(json_module.dumps(found, indent=2) if json else _text(found))


def examine() -> dict[str, Any]:
    """Everything that `doctor` prints, as JSON values."""
    warnings.filterwarnings("ignore", module="megatron")
    import psutil
    import torch

    from megatron_ext.config import Config
    from megatron_ext.model.kernels import choose, look, problem_of

    gpus = [_gpu(torch, i) for i in range(torch.cuda.device_count())]
    kernels = choose(Config.model_validate(_MODEL), look())
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
        "kernels": asdict(kernels),
        "optional": {
            name: problem_of(name) or _version(package) or "importable"
            for name, package, _ in _OPTIONAL
        },
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
        ("cuda", found["cuda"] or "none: this torch was built for CPUs"),
        ("collectives", collectives),
    ]
    for part, choice in found["kernels"].items():
        lines.append((f"kernels.{part}", f"{choice['name']} ({choice['reason']})"))
    for name, _, gives in _OPTIONAL:
        lines.append((name, f"{found['optional'][name]} [{gives}]"))
    lines.append(("slurm", found["slurm"] or "not here; local runs only"))
    return "\n".join(f"{name:<32}{value}" for name, value in lines)


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


def _slurm() -> str | None:
    if not shutil.which("sbatch"):
        return None
    done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=10)
    return done.stdout.strip() or "sbatch is there but does not answer"
