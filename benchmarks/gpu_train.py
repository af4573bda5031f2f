"""Our training step on one GPU beside transformers' Llama and a plain PyTorch one, both compiled.

    python benchmarks/gpu_train.py               # the base install suffices
    python benchmarks/gpu_train.py --case "2B 4k" --rounds 10 --json train.json
    python benchmarks/gpu_train.py --toy         # a tiny model on a CPU: proves the command

bf16; what each contender is stands in contenders.py. Ours lets SDPA try cuDNN's attention first
from compute capability 9.0 on, the peers leave the choice to PyTorch. Without the package
transformers that one is left out; so is, with its reason, one that fails or gives no answer for
--patience seconds. Each is a process of its own that builds its model while others do; then they
take turns of one step that does not count and --steps that do, so that a warm or throttled moment
of the GPU meets all. A first step before them compiles, for one after the other. Medians count.
Where the states of all do not fit on the GPU, each takes all its steps in one turn, alone. Cases
come in the order of their importance; none is begun after --minutes, and one at work goes on.

tokens/s, and what share of two peaks they are: TFLOP/s and MFU count 6 N + 12 L h s FLOPs a token
(all scores) against the data sheet; the share of the matmul rate counts 6 N + 6 L h s (the causal
half, what is really computed) against the best torch.matmul over the model's own shapes in the same
turns. The profile groups the kernels of one step of ours, and says how long none was running; the
kernels of several streams may run at once.
"""

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.contenders import CONTENDERS, SIZES, Case
from benchmarks.step_profile import OTHER, Profile, by_category, longest_of
from benchmarks.worker import Worker

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
# Bytes a parameter between steps, ours and a peer's: 2 + 4 weights, 4 gradient, 8 moments; 4 + 8.
# Room: activations and logits of the one at work (~35 GB of the 2B), a peer's gradients, contexts.
_OUR_BYTES, _PEER_BYTES, _ROOM_BYTES = 18, 12, 45e9


@dataclass
class Measured:
    """One contender in one case; `failure` says why it has no figures."""

    seconds: list[float] = field(default_factory=list)
    results: list[float] = field(default_factory=list)
    peak_gb: float = 0.0
    parameters: int = 0
    profile: Profile | None = None
    failure: str = ""


def main() -> None:
    options = parse()
    started = time.monotonic()
    cases = TOY if options.toy else {name: CASES[name] for name in options.case or CASES}
    print(machine(options.toy), flush=True)
    found: dict[str, Any] = {}
    for name, case in cases.items():
        if time.monotonic() - started > 60 * options.minutes:
            print(f"\n{name}: left out, {options.minutes:g} minutes are over")
            continue
        found[name] = report(name, case, measure(case, options), options.toy)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2))
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes")
    if not any(case["contenders"] for case in found.values()):
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
    with contextlib.suppress(PackageNotFoundError):
        versions += f", transformers {version('transformers')}"
    kernels = choose(config, look())
    return f"{time.strftime('%Y-%m-%d')}, {device}, {versions}\nkernels (2B 4k): {kernels}"


def measure(case: Case, options: argparse.Namespace) -> dict[str, Measured]:
    """All contenders and the matmul rate, in turns."""
    names = [name for name in CONTENDERS if name != "transformers" or _has_transformers()]
    measured = {name: Measured() for name in (*names, "matmul")}
    rounds, steps = options.rounds, options.steps
    workers: dict[str, Worker] = {}
    if _together(case, len(names)):
        workers = {name: Worker(name, case, patience=options.patience) for name in measured}
    else:
        rounds, steps = 1, rounds * steps
    try:
        for turn in range(rounds):
            for name, mine in measured.items():
                if mine.failure:
                    continue
                if name not in workers:
                    workers[name] = Worker(name, case, patience=options.patience)
                try:
                    take_turn(workers[name], 1 if name == "matmul" else steps, first=turn == 0)
                    if turn == rounds - 1:
                        finish(workers[name], mine)
                except RuntimeError as error:  # out of memory, say
                    mine.failure = " ".join(str(error).split())
                    workers[name].kill()  # its memory is for the others
    finally:
        for worker in workers.values():
            worker.kill()
    return measured


def take_turn(worker: Worker, steps: int, first: bool) -> None:
    if first:
        worker.step(counts=False)  # compiles
    worker.step(counts=False)
    for _ in range(steps):
        worker.step()
    worker.rest()


def finish(worker: Worker, mine: Measured) -> None:
    """Take its figures; the process ends."""
    figures = worker.figures()
    mine.seconds, mine.results = worker.seconds, worker.results
    mine.peak_gb, mine.parameters = figures["peak_gb"], figures["parameters"]
    if worker.name == "ours":
        try:
            mine.profile = worker.profile()
        except RuntimeError as error:  # a profiler without leave, or that brings the process down
            print(f"\nno profile of ours: {error}", flush=True)
    worker.kill()


def report(name: str, case: Case, measured: dict[str, Measured], toy: bool) -> dict[str, Any]:
    """Print the tables of a case; the same as JSON values."""
    rate = max(measured["matmul"].results, default=None)
    peak = None if toy else _data_sheet()
    there = {who: mine for who, mine in measured.items() if who != "matmul" and mine.seconds}
    first = next(iter(there), "")
    print(
        f"\n{name}: {case.parameters / 1e6:,.1f} million parameters, {case.micro_batches} "
        f"micro-batches of {case.micro_batch} x {case.length} tokens; matmul "
        f"{f'{rate / 1e12:.3g} TFLOP/s' if rate else 'not measured'}\n\n"
        f"| who | tokens/s | ratio to {first} "
        "| TFLOP/s | MFU | of the matmul rate | peak GB | loss |\n" + "| --- " * 8 + "|"
    )  # fmt: skip
    rows = {}
    for who, mine in there.items():
        seconds = statistics.median(mine.seconds)
        ratio = statistics.median(there[first].seconds) / seconds
        speed = case.tokens / seconds
        tflops = speed * case.flops_per_token(1.0) / 1e12
        mfu = tflops / peak if peak else None
        share = speed * case.flops_per_token(0.5) / rate if rate else None
        print(
            f"| {who} | {speed:,.0f} | {ratio:.2f} | {tflops:.3g} | {_percent(mfu)} "
            f"| {_percent(share)} | {mine.peak_gb:.2f} | {mine.results[-1]:.4f} |"
        )
        rows[who] = {
            "tokens_per_s": speed, "ratio": ratio, "tflops": tflops, "mfu": mfu,
            "of_matmul": share, "peak_gb": mine.peak_gb, "parameters": mine.parameters,
            "loss": mine.results[-1], "step_s": mine.seconds,
        }  # fmt: skip
    failures = {who: mine.failure for who, mine in measured.items() if mine.failure}
    for who, reason in failures.items():
        print(f"\n{who} left out: {reason}")
    profile = measured["ours"].profile
    return {
        "matmul_tflops": rate / 1e12 if rate else None, "contenders": rows, "left_out": failures,
        "profile_us": show_profile(profile) if profile else {},
    }  # fmt: skip


def show_profile(profile: Profile) -> dict[str, float]:
    """Print it by category; the same as microseconds."""
    table = [*by_category(profile.kernels), ("no kernel running", profile.idle_us)]
    print("\n| where a step of ours goes | ms | share |\n| --- | --- | --- |")
    for what, spent in table:
        print(f"| {what} | {spent / 1e3:.2f} | {spent / profile.step_us:.1%} |")
        if what == OTHER:
            for kernel, part in longest_of(OTHER, profile.kernels, 5):
                print(f"| - {kernel[:90]} | {part / 1e3:.2f} | {part / profile.step_us:.1%} |")
    return dict(table)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def _together(case: Case, contenders: int) -> bool:
    import torch

    if case.device == "cpu":
        return True
    memory = torch.cuda.get_device_properties(0).total_memory
    states = (_OUR_BYTES + (contenders - 1) * _PEER_BYTES) * case.parameters
    return states + _ROOM_BYTES < memory


def _data_sheet() -> float | None:
    import torch

    from megatron_ext.training.utilization import data_sheet

    return data_sheet(torch.cuda.get_device_name()).tflops


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
    parser.add_argument("--patience", type=float, default=240.0, metavar="SECONDS",
                        help="leave out who takes longer to build or for a step")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
