"""Memory and time of the loss: whole logits, in chunks, and PyTorch's own; each in its own process.

    python benchmarks/cross_entropy.py --tokens 4096 --vocab 32000 --hidden 2048 --device cpu

Forward and backward of output projection and cross-entropy, hidden states and weight given. Memory
is the peak above what was there before: of the process on a CPU, of the allocator on a GPU, where
ours are compiled as in a run.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))
import benchmarks  # noqa: F401  before Megatron-Core, as it says

KINDS = {
    "pytorch": "PyTorch's cross_entropy", "whole": "Megatron-Core's", "ours": "ours, whole",
    "chunked": "in chunks",
}  # fmt: skip


def main() -> None:
    options = parse()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    logits = options.tokens * options.vocab
    print(
        f"{options.tokens:,} tokens, vocabulary {options.vocab:,}, hidden size {options.hidden:,}, "
        f"{options.dtype}, {options.device}: {logits / 1e6:,.0f} million logits"
    )
    print(f"{'':28}{'peak MB':>10}{'bytes a logit':>15}{'s':>8}{'loss':>12}")
    for kind, name in KINDS.items():
        command = [sys.executable, *sys.argv, "--measure", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:28}{found['peak'] / 1e6:>10,.0f}{found['peak'] / logits:>15.1f}"
            f"{found['seconds']:>8.3f}{found['loss']:>12.6f}"
        )


def measure(options: argparse.Namespace) -> dict[str, float]:
    import torch
    import torch.nn.functional as F
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from benchmarks.kernel_paths import one_process
    from megatron_ext.model.cross_entropy import chunked_cross_entropy, cross_entropy
    from megatron_ext.model.kernels import CHUNK_TOKENS, COMPILED_CHUNK_TOKENS

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    generator = torch.Generator().manual_seed(0)
    shape = (options.tokens, 1, options.hidden)
    hidden = torch.randn(shape, generator=generator).to(options.device, dtype)
    weight = torch.randn(options.vocab, options.hidden, generator=generator) / options.hidden**0.5
    weight = weight.to(options.device, dtype)
    labels = torch.randint(0, options.vocab, (1, options.tokens), generator=generator)
    labels = labels.to(options.device)

    def pytorch(hidden, weight):
        return F.cross_entropy((hidden[:, 0] @ weight.t()).float(), labels[0], reduction="none")

    def whole(hidden, weight):
        return vocab_parallel_cross_entropy(hidden @ weight.t(), labels.t())

    def chunked(hidden, weight):
        tokens = COMPILED_CHUNK_TOKENS if gpu else CHUNK_TOKENS
        return chunked_cross_entropy(hidden, weight, labels, chunk_tokens=tokens, compiled=gpu)

    def ours(hidden, weight):
        return cross_entropy(hidden @ weight.t(), labels, compiled=gpu)

    gpu = options.device != "cpu"
    functions = {"pytorch": pytorch, "whole": whole, "ours": ours, "chunked": chunked}
    function = functions[options.measure]
    with one_process(torch.device(options.device)):
        return timed(options, function, hidden, weight)


def timed(options, function, hidden, weight) -> dict[str, float]:
    import torch

    watch = PeakMemory(torch, options.device)
    seconds = []
    for _ in range(options.rounds):
        started = time.perf_counter()
        losses = function(hidden.requires_grad_(), weight.requires_grad_())
        losses.sum().backward()
        loss = losses.mean().item()
        seconds.append(time.perf_counter() - started)
        hidden.grad = weight.grad = None
        del losses
    return {"peak": watch.stop(), "seconds": median(seconds), "loss": loss}


class PeakMemory:
    """Peak bytes above those at the beginning."""

    def __init__(self, torch, device: str) -> None:
        import psutil

        self.torch, self.gpu = torch, device != "cpu"
        self.process = psutil.Process()
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        self.before = self.peak = self.now()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def now(self) -> int:
        return self.torch.cuda.memory_allocated() if self.gpu else self.process.memory_info().rss

    def watch(self) -> None:
        while not self.stopped.wait(0.001):
            self.peak = max(self.peak, self.now())

    def stop(self) -> int:
        self.stopped.set()
        self.thread.join()
        highest = self.torch.cuda.max_memory_allocated() if self.gpu else self.peak
        return highest - self.before


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
