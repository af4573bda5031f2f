"""What the third training step of a config asks of the GPU, as JSON on standard output.

    python -m tests.simulated_gpu python -m tests.simulated_gpu.one_step CONFIG [a.b=c ...]

    {"kernels": {name: launches}, "copies": [[bytes, direction]], "waits": 3, "peak_bytes": ...}

direction: 1 to the GPU, 2 from it, 3 within it. peak_bytes is PyTorch's allocator's.
"""

import ctypes
import itertools
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from megatron_ext.config import load_config
from megatron_ext.model.llama import build_model
from megatron_ext.training import step as training
from megatron_ext.training.optimizer import build_optimizer
from megatron_ext.world import world


def main(config_file: str, *overrides: str) -> dict:
    runtime = ctypes.CDLL(None)
    config = load_config(config_file, overrides)
    shape = config.training.micro_batch_size, config.training.sequence_length
    tokens = torch.zeros(shape, dtype=torch.int64).pin_memory()
    counts = torch.ones(shape).pin_memory()
    batches = itertools.repeat({"tokens": tokens, "labels": tokens, "loss_mask": counts})
    read = training._sum_over_ranks
    # No kernel has counted the tokens, by which the loss is divided.
    training._sum_over_ranks = lambda *given: (read(*given), (1.0, 1.0, 0.0))[1]
    with world(config), tempfile.TemporaryDirectory() as folder:
        model = build_model(config)
        optimizer = build_optimizer(model, config)
        for step in range(3):
            if step == 2:
                torch.cuda.reset_peak_memory_stats()
                runtime.begin_trace(f"{folder}/trace".encode())
            training.train_step(step, batches, model, optimizer, config)
        runtime.end_trace()
        lines = [line.split(" ", 1) for line in Path(folder, "trace").read_text().splitlines()]
    return {
        "kernels": Counter(what for kind, what in lines if kind == "kernel"),
        "copies": [list(map(int, what.split())) for kind, what in lines if kind == "copy"],
        "waits": sum(kind == "wait" for kind, _ in lines),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


if __name__ == "__main__":
    json.dump(main(*sys.argv[1:]), sys.stdout)
