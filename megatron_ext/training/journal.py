"""What a run writes about itself: metrics.jsonl, TensorBoard, and one line that a person can scan.

    journal = Journal(config, here, done_steps)
    journal.step(step, result, seconds, data_wait)

Rank 0 writes; on other ranks nothing happens. A resumed run drops the records after its checkpoint,
so that metrics.jsonl holds each step once.
"""

import json
import logging
import math
import os
import platform
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_ext.checkpoint.manifest import write_json
from megatron_ext.config import Config, save_config
from megatron_ext.training.step import StepResult
from megatron_ext.world import World

log = logging.getLogger(__name__)

# Dense bf16 peaks from NVIDIA's data sheets, TFLOP/s; the key stands in the device's name.
_PEAK_TFLOPS = {"A100": 312.0, "H100": 989.4, "H200": 989.4, "B200": 2250.0}


class Journal:
    """The metrics of one run, from the first step of this start to the last."""

    def __init__(self, config: Config, here: World, done_steps: int) -> None:
        self.config = config
        self.here = here
        self.run_dir = config.training.run_dir
        self.peak_tflops = config.logging.peak_tflops or _peak_tflops(here.device)
        self.flops_per_token = flops_per_token(config)
        self.first_step = done_steps
        self.started = time.monotonic()
        self.stalled = 0.0
        self.board: Any = None
        if here.is_main:
            _drop_records_after(self.run_dir / "metrics.jsonl", done_steps)
            self.file = (self.run_dir / "metrics.jsonl").open("a", buffering=1)
            if config.logging.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(
                    str(self.run_dir / "tensorboard"), purge_step=done_steps + 1
                )

    def step(
        self, done: int, result: StepResult, seconds: float, data_wait: float, stalled: float = 0.0
    ) -> None:
        """Record the step after which `done` steps are done, if it is one to be logged. `stalled`:
        seconds that training has waited for checkpoints since the start of this process."""
        last = done == self.config.training.steps
        if not self.here.is_main or not (done % self.config.logging.interval == 0 or last):
            return
        training = self.config.training
        tokens = training.tokens_after(done)
        tokens_per_s = (tokens - training.tokens_after(done - 1)) / seconds
        tflops = tokens_per_s * self.flops_per_token / self.here.size / 1e12
        self._write(
            {
                "step": done,
                "tokens": tokens,
                "loss": result.loss,
                "lr": result.lr,
                "grad_norm": result.grad_norm,
                "step_time_s": seconds,
                "tokens_per_s": tokens_per_s,
                "tflops_per_gpu": tflops,
                "mfu": tflops / self.peak_tflops if self.peak_tflops else None,
                "memory_gb": _memory_gb(self.here.device),
                "data_wait_s": data_wait,
                "checkpoint_stall_s": stalled - self.stalled,  # since the record before
                "skipped": result.skipped,
            }
        )
        self.stalled = stalled
        # By tokens, as batches may grow.
        rate = (time.monotonic() - self.started) / (tokens - training.tokens_after(self.first_step))
        left = training.tokens_after(training.steps) - tokens
        log.info(
            "step %d/%d  loss %.4f  lr %.2e  grad %.2f  %s tokens/s  %.2f s/step  ETA %s%s",
            done, training.steps, result.loss, result.lr, result.grad_norm,
            f"{tokens_per_s:,.0f}", seconds, _duration(rate * left),
            "  SKIPPED: non-finite gradient" if result.skipped else "",
        )  # fmt: skip

    def validation(self, done: int, loss: float) -> None:
        """Record the validation loss after `done` steps."""
        if self.here.is_main:
            self._write({"step": done, "validation_loss": loss})
            log.info("step %d  validation loss %.4f", done, loss)

    def lacks_validation(self, done: int) -> bool:
        """Whether the validation after `done` steps was due and never measured (rank 0 knows)."""
        training, interval = self.config.training, self.config.evaluation.interval
        if not self.here.is_main or not (done % interval == 0 or done == training.steps):
            return False
        records = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return not any(f'"step": {done}, "validation_loss"' in record for record in records)

    def close(self) -> None:
        if self.here.is_main:
            self.file.close()
            if self.board:
                self.board.close()

    def _write(self, record: dict[str, Any]) -> None:
        # JSON knows no NaN: a loss that is none is null.
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self.file.write(json.dumps(finite) + "\n")
        if self.board:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(name, value, record["step"])


def describe_run(config: Config, here: World, data: dict[str, Any]) -> None:
    """Write config.yaml, environment.json and data.json into the run folder (rank 0 only)."""
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
            "device": _device_name(here.device),
            "python": platform.python_version(),
            "code_revision": _code_revision(),
            "packages": {
                name: metadata.version(name)
                for name in ("torch", "megatron-core", "numpy", "megatron-ext")
                if _installed(name)
            },
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        },
    )


def flops_per_token(config: Config) -> float:
    """FLOPs of one token's forward and backward pass, 6 N + 12 L h s (Kaplan et al. 2020; Chowdhery
    et al. 2022, appendix B): N the weights of matrix products (all but the input embedding), L
    layers, h the heads' total width, s the sequence length. Attention is counted in full, not
    halved for the causal mask; recomputation is not counted."""
    model = config.model
    heads_width = model.num_heads * model.head_dim
    kv_width = model.num_kv_heads * model.head_dim
    attention = model.hidden_size * (2 * heads_width + 2 * kv_width)
    mlp = 3 * model.hidden_size * model.ffn_hidden_size
    weights = model.num_layers * (attention + mlp) + model.vocab_size * model.hidden_size
    scores = 12 * model.num_layers * heads_width * config.training.sequence_length
    return float(6 * weights + scores)


def _drop_records_after(file: Path, done_steps: int) -> None:
    if not file.is_file():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= done_steps:
                kept.append(line + "\n")
        except (ValueError, KeyError):  # the line that a kill cut short
            continue
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(file)


def _peak_tflops(device: torch.device) -> float | None:
    name = _device_name(device)
    return next((peak for key, peak in _PEAK_TFLOPS.items() if key in name), None)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({os.cpu_count()} cores)"


def _memory_gb(device: torch.device) -> float:
    """Peak allocated on the GPU, or resident now on a CPU, in 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02d}:{seconds:02d}"


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
