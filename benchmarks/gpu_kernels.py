"""Every way to compute a kernel of the model: whether it is right, and how far from its floor.

    python benchmarks/gpu_kernels.py                # on a GPU: parity, then speed at the 2B's sizes
    python benchmarks/gpu_kernels.py --toy          # on a CPU: parity, and speed at toy size
    python benchmarks/gpu_kernels.py --parity       # the first table only

Parity: the distance of output and gradients from float64 (norm of the difference over norm), the
worst of them, at a small size; "-" where a way does not take the format. Speed: forward and
backward together and nothing that a model does once, the median of --rounds, all ways of a kernel
in turns, from cold caches, beside the least that it could take: the bytes it must move at the rate
that a large copy has in the same run, or its FLOPs at the rate of torch.matmul. What a machine
lacks is named. The ways are those of kernel_paths.py.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

from benchmarks.kernel import (
    LARGE,
    SMALL,
    TOLERANCE,
    Kernel,
    Size,
    difference,
    lacking,
    placed,
    prepared,
)
from benchmarks.kernel_paths import KERNELS, one_process

# 5 ms of a GPU: longer than Python takes to launch a kernel's forward and backward pass.
_SLEEP_CYCLES = 10_000_000
_FLUSHED_BYTES = 1 << 28  # more than the L2 cache of any GPU


def main() -> None:
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.toy else "cpu")
    if device.type == "cpu" and not (options.toy or options.parity):
        sys.exit("error: torch.cuda.is_available() is false: run on a GPU, or with --toy on a CPU")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}\n")
    with one_process(device):
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
                if dtype not in path.dtypes:
                    cells.append("-")
                    continue
                try:
                    worst = difference(kernel, path, SMALL, device, dtype)
                except Exception as error:  # a package's, of any kind: the other rows still count
                    cells.append(_said(error))
                    wrong += 1
                    continue
                wrong += not worst < limit
                cells.append(f"{worst:.1e}" + ("" if worst < limit else " WRONG"))
            print(f"| {name} | {path.name} | " + " | ".join(cells) + " |", flush=True)
    return wrong


def speed(device: torch.device, size: Size, rounds: int) -> None:
    """Print each way's time and its share of the floor."""
    dtype = torch.bfloat16
    copied, multiplied = copy_rate(device), matmul_rate(device, dtype)
    print(
        f"\n{_short(dtype)}, forward and backward; {size}\n"
        f"copy {copied / 1e9:,.0f} GB/s, matmul {multiplied / 1e12:.3g} TFLOP/s\n\n"
        "| kernel | way | ms | floor, ms | floor / time |\n" + "| --- " * 5 + "|"
    )
    for name, kernel in KERNELS.items():
        floor = _floor(kernel, size, dtype, copied, multiplied)
        inputs = placed(kernel.inputs(size), device, dtype)
        works: dict[str, Callable[[], object]] = {}
        for path in kernel.paths:
            if dtype not in path.dtypes or lacking(path, device):
                continue
            try:
                work = prepared(path.build, inputs)
                work()  # compiles, tunes, draws
            except Exception as error:  # a package's, of any kind: the other rows still count
                print(f"| {name} | {path.name} | {_said(error)} | | |")
                continue
            works[path.name] = work
        times: dict[str, list[float]] = {way: [] for way in works}
        for _ in range(rounds):
            for way, work in works.items():
                times[way].append(seconds(work, device))
        for way, mine in times.items():
            spent = statistics.median(mine)
            print(
                f"| {name} | {way} | {spent * 1e3:.3f} | {floor * 1e3:.3f} | {floor / spent:.0%} |",
                flush=True,
            )


def _floor(
    kernel: Kernel, size: Size, dtype: torch.dtype, copied: float, multiplied: float
) -> float:
    moved = kernel.bytes(size, dtype.itemsize) / copied if kernel.bytes else 0.0
    computed = kernel.flops(size) / multiplied if kernel.flops else 0.0
    return max(moved, computed)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call; on a GPU by its own clock, from caches without the inputs. It sleeps first, so
    that all kernels have been launched when the first begins."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_SLEEP_CYCLES)
        torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device).zero_()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a copy far larger than any cache."""
    count = (1 << 28) if device.type == "cuda" else (1 << 22)
    source = torch.empty(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * source.nbytes / best


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product."""
    n = 8192 if device.type == "cuda" else 512
    a = torch.randn(n, n, device=device).to(dtype)
    best = min(seconds(lambda: a @ a, device) for _ in range(10))
    return 2 * n**3 / best


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("|", "/").replace("\n", " ")[:60]


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
