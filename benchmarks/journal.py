"""What a step's record, heartbeat and guard cost, beside the step itself.

    python benchmarks/journal.py

Writes 2,000 records of a step into metrics.jsonl and TensorBoard, tells the heartbeat of 2,000
phases while its thread writes, judges 2,000 losses; prints microseconds of each.
"""

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from megatron_ext.config import load_config
from megatron_ext.training.guard import WINDOW, LossGuard
from megatron_ext.training.heartbeat import Heartbeat
from megatron_ext.training.journal import Journal
from megatron_ext.training.step import StepResult
from megatron_ext.training.utilization import Peak

CONFIG = Path(__file__).parents[1] / "configs/models/llama_2b.yaml"
STEPS = 2000


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        here = SimpleNamespace(is_main=True, size=1, device=torch.device("cpu"))
        result = StepResult(loss=2.5, grad_norm=1.0, lr=3e-4, skipped=False, stop=False)
        for name, settings in (
            ("metrics.jsonl", []),
            ("metrics.jsonl and TensorBoard", ["logging.tensorboard=true"]),
        ):
            overrides = [f"training.run_dir={run_dir}", "logging.interval=1", *settings]
            config = load_config(CONFIG, overrides)
            journal = Journal(config, here, 0, Peak(312.0, "A100"))  # type: ignore[arg-type]
            logging.disable()
            tell(name, lambda i, j=journal: j.step(i + 1, result, 8.0, 0.01, 0.0))
            journal.close()
        heart = Heartbeat(run_dir, 0, 1, every_s=0.2)
        heart.start()
        tell("phase of the heartbeat", lambda i: heart.phase("compute", i))
        tell("one writing of the heartbeat, in its thread", lambda i: heart._write())
        heart.end()
        config = load_config(CONFIG, ["faults.spike_sigma=6"])
        guard = LossGuard(config, {WINDOW: [2.5] * 100})
        tell("judging a loss against 100", lambda i: (guard.refuses(2.5), guard.judge(result)))


def tell(name: str, function: Callable[[int], object]) -> None:
    started = time.perf_counter()
    for i in range(STEPS):
        function(i)
    print(f"{name}: {(time.perf_counter() - started) / STEPS * 1e6:.1f} us")


if __name__ == "__main__":
    main()
