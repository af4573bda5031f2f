"""Our training step beside transformers' Llama and a plain PyTorch one, on this machine's CPU.

    python benchmarks/train_step.py                      # both sizes, both lengths, 2 threads
    python benchmarks/train_step.py --size 60M --length 512 --rounds 5
    python benchmarks/train_step.py --profile ours --size 60M --length 512

fp32; what each contender is stands in contenders.py. Each is a process of its own; they take single
steps in turn, so that a busy moment of the machine meets all, and the median counts. Memory is the
peak of resident memory of each process. On a GPU: benchmarks/gpu_train.py.

The share of the matmul rate counts 6 N + 6 L h s FLOPs a token (the causal half of the scores)
against the best rate of torch.matmul over shapes of the model's own, measured in the same rounds.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.contenders import CONTENDERS, SIZES, Case
from benchmarks.worker import Worker

TOKENS_A_STEP = {"5M": 4096, "60M": 2048}


def main() -> None:
    options = parse()
    if options.profile:
        worker = Worker(
            options.profile, case_of(options.size[0], options.length[0]), options.threads
        )
        worker.step()
        profile = worker.profile()
        for name, spent in sorted(profile.kernels, key=lambda row: -row[1])[:30]:
            print(f"{name[:70]:72}{spent / 1e3:>10.1f} ms{spent / profile.step_us:>8.1%}")
        worker.close()
        return
    print(
        f"{'size':>5}{'length':>8}  {'':16}{'tokens/s':>10}{'ratio':>8}{'GB':>7}"
        f"{'matmul share':>14}{'loss':>9}"
    )
    for size in options.size:
        for length in options.length:
            compare(size, length, options.rounds, options.threads)


def case_of(size: str, length: int) -> Case:
    return Case(SIZES[size], length, TOKENS_A_STEP[size] // length)


def compare(size: str, length: int, rounds: int, threads: int) -> None:
    """Print three lines: one contender each."""
    names, case = (*CONTENDERS, "matmul"), case_of(size, length)
    workers = {name: Worker(name, case, threads) for name in names}
    try:
        for name in names:
            workers[name].step(counts=False)  # allocations and first touches
        for _ in range(rounds):
            for name in names:
                workers[name].step()
        seconds = {name: statistics.median(workers[name].seconds) for name in names}
        results = {name: workers[name].close() for name in CONTENDERS}
    finally:
        for worker in workers.values():
            worker.kill()
    rate = max(workers["matmul"].results)
    counts = {results[name]["parameters"] for name in CONTENDERS}
    assert len(counts) == 1, f"models differ in size: {counts}"
    for name in CONTENDERS:
        speed = case.tokens / seconds[name]
        share = speed * case.flops_per_token() / rate
        print(
            f"{size:>5}{length:>8}  {name:16}{speed:>10,.0f}"
            f"{seconds['transformers'] / seconds[name]:>8.2f}"
            f"{results[name]['peak_gb']:>7.2f}{share:>13.0%}{workers[name].results[-1]:>10.4f}"
        )
    print(f"{'':15}{counts.pop():,} parameters; matmul {rate / 1e9:.0f} GFLOP/s", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=TOKENS_A_STEP, default=list(TOKENS_A_STEP))
    parser.add_argument("--length", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", choices=CONTENDERS, metavar="WHO", help="operators of a step")
    return parser.parse_args()


if __name__ == "__main__":
    main()
