"""Every way to compute a kernel of the model: whether it is right, and how far from its floor.

    python benchmarks/gpu_kernels.py                # on a GPU: parity, then speed at the 2B's sizes
    python benchmarks/gpu_kernels.py --toy          # on a CPU: parity, and speed at toy size
    python benchmarks/gpu_kernels.py --parity       # the first table only

Parity: the distance of output and gradients from float64 (norm of the difference over norm), the
worst of them, at a small size. Speed: forward and backward together, the median of --rounds, all
ways of a kernel in turns, beside the least that it could take: the bytes it must move at the rate
that a large copy has in the same run, or its FLOPs at the rate of torch.matmul. What a machine
lacks is named. The ways are those of kernel_paths.py.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

from benchmarks.kernel_paths import (
    KERNELS,
    LARGE,
    SMALL,
    TOLERANCE,
    Kernel,
    Size,
    differences,
    lacking,
    results,
)
from megatron_ext import cpu


def main() -> None:
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.toy else "cpu")
    if device.type == "cpu" and not (options.toy or options.parity):
        sys.exit("error: torch.cuda.is_available() is false: run on a GPU, or with --toy on a CPU")
    cpu.prepare()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}\n")
    wrong = parity(device)
    if not options.parity:
        speed(device, SMALL if options.toy else LARGE, options.rounds)
    sys.exit(f"error: {wrong} beyond tolerance" if wrong else 0)


def parity(device: torch.device) -> int:
    """Print the table; how many ways are wrong."""
    limits = ", ".join(f"{_short(dtype)} {limit:g}" for dtype, limit in TOLERANCE.items())
    print(f"worst distance from float64; tolerance {limits}\n")
    print("| kernel | way | " + " | ".join(map(_short, TOLERANCE)) + " |")
    print("| --- " * (2 + len(TOLERANCE)) + "|")
    wrong = 0
    for name, kernel in KERNELS.items():
        for path in kernel.paths:
            if missing := lacking(path, device):
                print(f"| {name} | {path.name} | {missing} |" + "  |" * (len(TOLERANCE) - 1))
                continue
            cells = []
            for dtype, limit in TOLERANCE.items():
                try:
                    worst = max(differences(kernel, path, SMALL, device, dtype))
                except RuntimeError as error:
                    cells.append(" ".join(str(error).split())[:40])
                    # Flash attention has no fp32.
                    wrong += not (name == "attention" and dtype == torch.float32)
                    continue
                wrong += not worst < limit
                cells.append(f"{worst:.1e}" + ("" if worst < limit else " WRONG"))
            print(f"| {name} | {path.name} | " + " | ".join(cells) + " |", flush=True)
    return wrong


def speed(device: torch.device, size: Size, rounds: int) -> None:
    """Print each way's time and its share of the floor."""
    dtype = torch.bfloat16
    copied, multiplied = copy_rate(device, size), matmul_rate(device, size, dtype)
    print(
        f"\n{_short(dtype)}, forward and backward; {size}\n"
        f"copy {copied / 1e9:,.0f} GB/s, matmul {multiplied / 1e12:.3g} TFLOP/s\n\n"
        "| kernel | way | ms | floor, ms | floor / time |\n" + "| --- " * 5 + "|"
    )
    for name, kernel in KERNELS.items():
        inputs = [
            x.to(device, dtype) if x.is_floating_point() else x.to(device)
            for x in kernel.inputs(size)
        ]
        floor = _floor(kernel, size, dtype, copied, multiplied)
        ways = {p.name: p.run for p in kernel.paths if not lacking(p, device)}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for way in list(ways):
            try:
                results(ways[way], inputs)  # compiles, tunes
            except RuntimeError as error:
                print(f"| {name} | {way} | {' '.join(str(error).split())[:60]} | | |")
                del ways[way]
        for _ in range(rounds):
            for way, run in ways.items():
                times[way].append(seconds(partial(results, run, inputs), device))
        for way in ways:
            spent = statistics.median(times[way])
            print(
                f"| {name} | {way} | {spent * 1e3:.3f} | {floor * 1e3:.3f} | {floor / spent:.0%} |",
                flush=True,
            )
        del inputs


def _floor(
    kernel: Kernel, size: Size, dtype: torch.dtype, copied: float, multiplied: float
) -> float:
    moved = kernel.bytes(size, dtype.itemsize) / copied if kernel.bytes else 0.0
    computed = kernel.flops(size) / multiplied if kernel.flops else 0.0
    return max(moved, computed)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def copy_rate(device: torch.device, size: Size) -> float:
    """Bytes read and written a second by a copy far larger than any cache."""
    count = (1 << 28) if device.type == "cuda" else (1 << 22)
    source = torch.empty(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * source.nbytes / best


def matmul_rate(device: torch.device, size: Size, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product."""
    n = 8192 if device.type == "cuda" else 512
    a = torch.randn(n, n, device=device).to(dtype)
    best = min(seconds(lambda: a @ a, device) for _ in range(10))
    return 2 * n**3 / best if best else math.inf


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="on a CPU, at toy size")
    parser.add_argument("--parity", action="store_true", help="only whether they are right")
    parser.add_argument("--rounds", type=int, default=20)
    return parser.parse_args()


if __name__ == "__main__":
    main()
