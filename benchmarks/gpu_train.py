"""Our training step on one GPU beside transformers' Llama and a plain PyTorch one, both compiled.

    python benchmarks/gpu_train.py               # torch and megatron-core suffice
    python benchmarks/gpu_train.py --case "2B 4k" --rounds 10 --json train.json
    python benchmarks/gpu_train.py --toy         # a tiny model on a CPU: proves the command

bf16; what each contender is stands in contenders.py. Without the package transformers that one is
left out. Each is a process of its own that builds and compiles while the others do; then they take
turns of one step that does not count and --steps that do, so that a warm or throttled moment of the
GPU meets all. Medians count. Where the states of three together do not fit on the GPU, each turn is
a process of its own. Cases come in the order of their importance; none is begun after --minutes,
so that 8 minutes should be enough.

tokens/s, and what share of two peaks they are: TFLOP/s and MFU count 6 N + 12 L h s FLOPs a token
(all scores) against the data sheet; the share of the matmul rate counts 6 N + 6 L h s (the causal
half, what is really computed) against the best torch.matmul over the model's own shapes in the same
turns. The profile groups the kernels of one step of ours, and says how long none was running; the
kernels of several streams may run at once.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.contenders import CONTENDERS, SIZES, Case, Worker
from benchmarks.step_profile import OTHER, Profile, by_category, longest_of

# Name, size, length, micro-batch, micro-batches: at 4k 8 sequences a GPU and step, as the 2B's
# batch of 1024 has on 128 GPUs.
CASES = {
    name: Case(SIZES[size], length, micro, number, "cuda", "bf16", compiled=True)
    for name, size, length, micro, number in [
        ("2B 4k", "2B", 4096, 2, 4),
        ("7B, 4 layers, 4k", "7B, 4 layers", 4096, 2, 4),
        ("1B 4k", "1B", 4096, 2, 4),
        ("2B, 8 layers, 16k", "2B, 8 layers", 16384, 1, 2),
        ("2B, 8 layers, 32k", "2B, 8 layers", 32768, 1, 1),
    ]
}
_TINY = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 176, "num_heads": 4, "vocab_size": 512,
}  # fmt: skip
TOY = {"toy": Case(_TINY, 128, 2, 2, "cpu", "bf16")}
# Bytes of state a parameter, ours and the peers': 2 + 4 weights, 4 gradient, 8 moments; 4 + 4 + 8.
_STATE_BYTES, _ROOM_BYTES = 18, 25e9


@dataclass
class Measured:
    """One contender in one case."""

    seconds: list[float] = field(default_factory=list)
    results: list[float] = field(default_factory=list)
    peak_gb: float = 0.0
    parameters: int = 0
    profile: Profile | None = None


def main() -> None:
    options = parse()
    started = time.monotonic()
    cases = TOY if options.toy else CASES
    if options.case:
        cases = {name: cases[name] for name in options.case}
    print(machine(options.toy), flush=True)
    found: dict[str, Any] = {}
    for name, case in cases.items():
        if time.monotonic() - started > 60 * options.minutes:
            print(f"\n{name}: left out, {options.minutes:g} minutes are over")
            continue
        try:
            measured = measure(case, options)
        except RuntimeError as error:  # out of memory, say: the other cases can still be had
            print(f"\n{name}: failed: {error}", flush=True)
            continue
        found[name] = report(name, case, measured, options.toy)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2))
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes")
    if not found:
        sys.exit(1)


def machine(toy: bool) -> str:
    """Date, device, versions."""
    import torch

    if not toy and not torch.cuda.is_available():
        sys.exit("error: torch.cuda.is_available() is false: run on a GPU, or with --toy on a CPU")
    import megatron.core

    from megatron_ext.config import Config
    from megatron_ext.model.kernels import choose, look

    config = Config.model_validate(
        {
            "model": SIZES["2B"],
            "rope": {"base": 5e5},
            "training": {
                "sequence_length": 4096, "global_batch_size": 8, "micro_batch_size": 2, "steps": 1,
            },
            "optimizer": {"lr": 1e-3},
        }
    )  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = f"torch {torch.__version__}, megatron-core {megatron.core.__version__}"
    if importlib.util.find_spec("transformers"):
        import transformers

        versions += f", transformers {transformers.__version__}"
    kernels = choose(config, look())
    return f"{time.strftime('%Y-%m-%d')}, {device}, {versions}\nkernels (2B 4k): {kernels}"


def measure(case: Case, options: argparse.Namespace) -> dict[str, Measured]:
    """All contenders and the matmul rate, in turns."""
    names = [name for name in CONTENDERS if name != "transformers" or _has_transformers()]
    measured = {name: Measured() for name in (*names, "matmul")}
    together = _together(case, len(names))
    workers: dict[str, Worker] = {}
    try:
        if together:
            workers = {name: Worker(name, case) for name in measured}
        for turn in range(options.rounds):
            for name, mine in measured.items():
                worker = workers.get(name) or Worker(name, case)
                workers[name] = worker
                if turn == 0 or not together:
                    worker.step(counts=False)  # compiles
                worker.step(counts=False)
                for _ in range(1 if name == "matmul" else options.steps):
                    worker.step()
                last = turn == options.rounds - 1
                if last and name == "ours":
                    mine.profile = worker.profile()
                if together and not last:
                    worker.rest()
                    continue
                mine.seconds += worker.seconds
                mine.results += worker.results
                ended = worker.close()
                mine.peak_gb, mine.parameters = ended["peak_gb"], ended["parameters"]
                del workers[name]
    finally:
        for worker in workers.values():
            worker.kill()
    return measured


def report(name: str, case: Case, measured: dict[str, Measured], toy: bool) -> dict[str, Any]:
    """Print the tables of a case; the same as JSON values."""
    rate = max(measured["matmul"].results)
    peak = None if toy else _data_sheet()
    first = next(who for who in measured if who != "matmul")
    base = statistics.median(measured[first].seconds)
    print(
        f"\n{name}: {measured['ours'].parameters:,} parameters, {case.micro_batches} micro-batches "
        f"of {case.micro_batch} x {case.length} tokens; matmul {rate / 1e12:.3g} TFLOP/s\n\n"
        "| who | tokens/s | ratio | TFLOP/s | MFU | of the matmul rate | peak GB | loss |\n"
        + "| --- " * 8 + "|"
    )  # fmt: skip
    rows = {}
    for who, mine in measured.items():
        if who == "matmul":
            continue
        seconds = statistics.median(mine.seconds)
        speed = case.tokens / seconds
        tflops = speed * case.flops_per_token(1.0) / 1e12
        share = speed * case.flops_per_token(0.5) / rate
        mfu = f"{tflops / peak:.1%}" if peak else "-"
        print(
            f"| {who} | {speed:,.0f} | {base / seconds:.2f} | {tflops:.3g} | {mfu} | {share:.1%} "
            f"| {mine.peak_gb:.2f} | {mine.results[-1]:.4f} |"
        )
        rows[who] = {
            "tokens_per_s": speed, "ratio": base / seconds, "tflops": tflops,
            "mfu": tflops / peak if peak else None, "of_matmul": share, "peak_gb": mine.peak_gb,
            "loss": mine.results[-1], "step_s": mine.seconds,
        }  # fmt: skip
    profile = measured["ours"].profile
    assert profile is not None
    table = [*by_category(profile.kernels), ("no kernel running", profile.idle_us)]
    print("\n| where a step of ours goes | ms | share |\n| --- | --- | --- |")
    for what, spent in table:
        print(f"| {what} | {spent / 1e3:.2f} | {spent / profile.step_us:.1%} |")
        if what == OTHER:
            for kernel, part in longest_of(OTHER, profile.kernels, 5):
                print(f"| - {kernel[:90]} | {part / 1e3:.2f} | {part / profile.step_us:.1%} |")
    return {"matmul_tflops": rate / 1e12, "contenders": rows, "profile_us": dict(table)}


def _has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def _together(case: Case, contenders: int) -> bool:
    import torch

    if case.device == "cpu":
        return True
    memory = torch.cuda.get_device_properties(0).total_memory
    return contenders * _STATE_BYTES * case.parameters + _ROOM_BYTES < memory


def _data_sheet() -> float | None:
    import torch

    from megatron_ext.training.utilization import PEAK_TFLOPS

    name = torch.cuda.get_device_name()
    return next((tflops for key, tflops in PEAK_TFLOPS.items() if key in name), None)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--case", nargs="+", choices=[*CASES, *TOY], metavar="NAME",
                        help=f"only these of {', '.join(CASES)}")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn")
    parser.add_argument("--minutes", type=float, default=6.0, help="begin no case after these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
