"""What a run came from: config.yaml, environment.json and data.json in the run folder.

describe_run(config, here, fingerprint, peak)
"""

import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.manifest import write_json
from megatron_ext.config import Config, save_config
from megatron_ext.training.utilization import CONVENTION, Peak, flops_per_token
from megatron_ext.world import World, device_name

# Variables of the environment that change how fast a run is, or whether it works.
_SETTING = ("CUDA_", "GLOO_", "NCCL_", "NVTE_", "OMP_", "PYTORCH_", "TORCH", "TRITON_", "UB_")


def describe_run(
    config: Config,
    here: World,
    data: dict[str, Any],
    peak: Peak,
    predicted: dict[str, Any] | None = None,
) -> None:
    """Write config.yaml, environment.json and data.json into the run folder (rank 0 only).

    predicted: what the planner expects of this layout on these GPUs, to stand beside what is
    measured; None where it knows no such device.
    """
    if not here.is_main:
        return
    run_dir = config.training.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.yaml")
    write_json(run_dir / "data.json", data)
    write_json(
        run_dir / "environment.json",
        {
            "command": sys.argv,
            "host": socket.gethostname(),
            "world_size": here.size,
            "device": device_name(here.device),
            "python": platform.python_version(),
            "code_revision": _code_revision(),
            "packages": {
                name: metadata.version(name)
                for name in ("torch", "megatron-core", "numpy", "megatron-ext")
                if _installed(name)
            },
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
            "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_SETTING)},
            "utilization": {
                "convention": CONVENTION,
                "flops_per_token": flops_per_token(config),
                "flops_per_token_causal": flops_per_token(config, 0.5),
                "peak_tflops_per_rank": peak.tflops,
                "peak_of": peak.name,
            },
            "predicted": predicted,
        },
    )


def _code_revision() -> str | None:
    root = Path(__file__).parents[2]
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=root, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
