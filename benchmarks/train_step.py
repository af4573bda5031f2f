"""Our training step beside transformers' Llama and a plain PyTorch one, on this machine's CPU.

    python benchmarks/train_step.py                      # both sizes, both lengths, 2 threads
    python benchmarks/train_step.py --size 60M --length 512 --rounds 5
    python benchmarks/train_step.py --profile ours --size 60M --length 512

The same Llama (same parameters, no padding), the same tokens, fp32, AdamW (PyTorch's fused one for
the peers, as transformers' Trainer has it), gradient norm clipped at 1, no recomputation. Each of
the three is a process of its own; they take single steps in turn, so that a busy moment of the
machine meets all, and the median counts. Memory is the peak of resident memory of each process.

The share of the matmul rate counts 6 N + 6 L h s FLOPs a token (the causal half of the scores)
against the best rate of torch.matmul over shapes of the model's own, measured in the same rounds.
"""

import argparse
import contextlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
CONTENDERS = ("transformers", "plain PyTorch", "ours")
_SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "vocab_size")
SIZES: dict[str, dict[str, int]] = {
    "5M": dict(zip(_SHAPE, (4, 256, 704, 4, 4096), strict=True)),
    "60M": dict(zip(_SHAPE, (8, 512, 1408, 8, 32000), strict=True)),
}
TOKENS_A_STEP = {"5M": 4096, "60M": 2048}
BASE, LR, CLIP = 1e4, 3e-4, 1.0
_open = contextlib.ExitStack()  # our process group, until the process ends


def main() -> None:
    options = parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.worker:
        work(options.worker, options.size[0], options.length[0])
    elif options.profile:
        profile(options.profile, options.size[0], options.length[0])
    else:
        print(
            f"{'size':>5}{'length':>8}  {'':16}{'tokens/s':>10}{'ratio':>8}{'GB':>7}"
            f"{'matmul share':>14}{'loss':>9}"
        )
        for size in options.size:
            for length in options.length:
                compare(size, length, options.rounds, options.threads)


def compare(size: str, length: int, rounds: int, threads: int) -> None:
    """Print three lines: one contender each."""
    names = (*CONTENDERS, "matmul")
    workers = {name: Worker(name, size, length, threads) for name in names}
    try:
        for name in names:
            workers[name].step()  # allocations and first touches
        for _ in range(rounds):
            for name in names:
                workers[name].step()
        seconds = {name: statistics.median(workers[name].seconds[1:]) for name in names}
        results = {name: workers[name].close() for name in CONTENDERS}
    finally:
        for worker in workers.values():
            worker.process.kill()
    rate = max(workers["matmul"].results)
    tokens = TOKENS_A_STEP[size]
    shape = SIZES[size]
    counts = {results[name]["parameters"] for name in CONTENDERS}
    assert len(counts) == 1, f"models differ in size: {counts}"
    for name in CONTENDERS:
        speed = tokens / seconds[name]
        share = speed * flops_per_token(shape, length) / rate
        print(
            f"{size:>5}{length:>8}  {name:16}{speed:>10,.0f}"
            f"{seconds['transformers'] / seconds[name]:>8.2f}"
            f"{results[name]['peak_gb']:>7.2f}{share:>13.0%}{workers[name].results[-1]:>10.4f}"
        )
    print(f"{'':15}{counts.pop():,} parameters; matmul {rate / 1e9:.0f} GFLOP/s", flush=True)


def flops_per_token(shape: dict[str, int], length: int) -> float:
    """6 N + 6 L h s, N the weights of matrix products."""
    h, layers = shape["hidden_size"], shape["num_layers"]
    weights = layers * (4 * h * h + 3 * h * shape["ffn_hidden_size"]) + shape["vocab_size"] * h
    return 6 * weights + 6 * layers * h * length


class Worker:
    """A process that takes one step for each line it is sent."""

    def __init__(self, name: str, size: str, length: int, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", name, "--size", size]
        command += ["--length", str(length), "--threads", str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.seconds: list[float] = []
        self.results: list[float] = []
        self._answer()  # built

    def step(self) -> None:
        """One step; its seconds, and the loss or the rate."""
        answer = self._ask("step")
        self.seconds.append(answer["seconds"])
        self.results.append(answer["result"])

    def close(self) -> dict[str, Any]:
        """Parameters and peak memory."""
        return self._ask("end")

    def _ask(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("a benchmark process died: see above")


def work(name: str, size: str, length: int) -> None:
    """The worker's side."""
    step, parameters = BUILDERS[name](SIZES[size], length, TOKENS_A_STEP[size])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
            print(json.dumps({"parameters": parameters, "peak_gb": peak}), flush=True)
            return
        started = time.perf_counter()
        result = step()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "result": result}), flush=True)


def profile(name: str, size: str, length: int) -> None:
    """Where a step's time goes, by operator."""
    import torch

    step, _ = BUILDERS[name](SIZES[size], length, TOKENS_A_STEP[size])
    step()
    with torch.profiler.profile() as recorded:
        for _ in range(3):
            step()
    print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))


def batches(shape: dict[str, int], length: int, tokens: int) -> Iterator[Any]:
    """Token ids [batch, length + 1], the same for all."""
    import torch

    generator = torch.Generator().manual_seed(1)
    while True:
        size = (tokens // length, length + 1)
        yield torch.randint(shape["vocab_size"], size, generator=generator)


def build_ours(shape: dict[str, int], length: int, tokens: int) -> tuple[Callable[[], float], int]:
    from megatron_ext.config import Config
    from megatron_ext.model.llama import build_model
    from megatron_ext.training.optimizer import build_optimizer
    from megatron_ext.training.step import train_step
    from megatron_ext.world import world

    config = Config.model_validate(
        {
            "model": shape,
            "rope": {"base": BASE, "bound": "off"},
            "training": {
                "sequence_length": length,
                "global_batch_size": tokens // length,
                "micro_batch_size": tokens // length,
                "steps": 1000,
            },
            "optimizer": {"lr": LR, "clip_grad": CLIP},
            "schedule": {"type": "constant"},
            "precision": {"dtype": "fp32"},
        }
    )
    _open.enter_context(world(config))
    model = build_model(config)
    optimizer = build_optimizer(model, config)
    given = (as_batch(ids) for ids in batches(shape, length, tokens))
    steps = iter(range(1000))

    def step() -> float:
        return train_step(next(steps), given, model, optimizer, config).loss

    return step, sum(weight.numel() for weight in model[0].parameters())


def as_batch(ids: Any) -> dict[str, Any]:
    """As the loader gives it."""
    import torch

    return {
        "tokens": ids[:, :-1].contiguous(),
        "labels": ids[:, 1:].contiguous(),
        "loss_mask": torch.ones(ids.shape[0], ids.shape[1] - 1),
    }


def build_transformers(
    shape: dict[str, int], length: int, tokens: int
) -> tuple[Callable[[], float], int]:
    import torch.nn.functional as F
    import transformers

    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=shape["num_layers"],
            hidden_size=shape["hidden_size"],
            intermediate_size=shape["ffn_hidden_size"],
            num_attention_heads=shape["num_heads"],
            vocab_size=shape["vocab_size"],
            max_position_embeddings=length,
            rope_parameters={"rope_type": "default", "rope_theta": BASE},
            attn_implementation="sdpa",
            use_cache=False,
        )
    )

    def loss_of(ids: Any) -> Any:
        logits = model(input_ids=ids[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return peer_step(model, loss_of, shape, length, tokens)


def build_plain(shape: dict[str, int], length: int, tokens: int) -> tuple[Callable[[], float], int]:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    h, heads = shape["hidden_size"], shape["num_heads"]
    d = h // heads

    frequencies = BASE ** -(torch.arange(0, d, 2).double() / d)
    angles = torch.arange(length)[:, None] * frequencies
    cos, sin = angles.cos().float(), angles.sin().float()

    def rotate(x: Tensor) -> Tensor:  # [batch, heads, length, d]
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(h, 1e-6), nn.RMSNorm(h, 1e-6)
            self.qkv, self.out = nn.Linear(h, 3 * h, False), nn.Linear(h, h, False)
            self.up = nn.Linear(h, 2 * shape["ffn_hidden_size"], False)
            self.down = nn.Linear(shape["ffn_hidden_size"], h, False)

        def forward(self, x: Tensor) -> Tensor:
            qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, heads, d)).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            a = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + self.out(a.transpose(1, 2).flatten(2))
            gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
            return x + self.down(F.silu(gate) * up)

    model = nn.Sequential(
        nn.Embedding(shape["vocab_size"], h),
        *(Block() for _ in range(shape["num_layers"])),
        nn.RMSNorm(h, 1e-6),
        nn.Linear(h, shape["vocab_size"], False),
    )
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, 0.0, 0.02)

    def loss_of(ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    return peer_step(model, loss_of, shape, length, tokens)


def peer_step(
    model: Any, loss_of: Callable[[Any], Any], shape: dict[str, int], length: int, tokens: int
) -> tuple[Callable[[], float], int]:
    """The usual loop around a model: zero, loss, backward, clip, step."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    given = batches(shape, length, tokens)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(next(given))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step, sum(weight.numel() for weight in model.parameters())


def build_matmul(
    shape: dict[str, int], length: int, tokens: int
) -> tuple[Callable[[], float], int]:
    """FLOP/s of the best of the model's own products."""
    import torch

    h, f, v = shape["hidden_size"], shape["ffn_hidden_size"], shape["vocab_size"]
    pairs = [(torch.randn(tokens, h), torch.randn(h, n)) for n in (3 * h, 2 * f, v, 4096)]

    def step() -> float:
        best = 0.0
        for a, b in pairs:
            out = a @ b
            repeats = max(1, math.ceil(2e10 / (2 * a.numel() * b.shape[1])))
            started = time.perf_counter()
            for _ in range(repeats):
                torch.matmul(a, b, out=out)
            seconds = (time.perf_counter() - started) / repeats
            best = max(best, 2 * a.numel() * b.shape[1] / seconds)
        return best

    return step, 0


BUILDERS = {
    "ours": build_ours,
    "transformers": build_transformers,
    "plain PyTorch": build_plain,
    "matmul": build_matmul,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--length", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", choices=BUILDERS, metavar="WHO", help="operators of a step")
    parser.add_argument("--worker", choices=BUILDERS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
