"""Whether a node can be worked on: its GPUs are all there, none counts memory errors, they can add
up a tensor together, and the site's own command agrees.

    problem(gpus=8, command="dcgmi diag -r 1")     # "" when all is well, else one sentence

On a node without GPUs (gpus=0) the site's command is all there is to ask.
"""

import datetime
import multiprocessing
import socket
import subprocess

_FIELDS = "index,ecc.errors.uncorrected.volatile.total"
_ALL_REDUCE_S = 120  # import of torch and start of NCCL included
_COMMAND_S = 300
_NUMBERS = 1 << 24  # 64 MB of float32: enough to use every link


def problem(gpus: int, command: str = "", command_s: float = _COMMAND_S) -> str:
    """One sentence about what is wrong with this node, or ""."""
    found = gpu_problem(gpus, _nvidia_smi()) or all_reduce_problem(gpus) if gpus else ""
    return found or (_command_problem(command, command_s) if command else "")


def gpu_problem(gpus: int, listing: str) -> str:
    """`listing` is what nvidia-smi prints for index and uncorrected ECC errors since the driver was
    loaded, one line a GPU; "[N/A]" where a GPU has no ECC."""
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines()]
    rows = [row for row in rows if len(row) == 2 and row[0].isdigit()]
    if len(rows) < gpus:
        said = "" if rows else f" (nvidia-smi: {' '.join(listing.split())[:200]})"
        return f"{len(rows)} of {gpus} GPUs answer{said}"
    for index, errors in rows:
        if errors.isdigit() and int(errors):
            return f"GPU {index} has {errors} uncorrected ECC errors: it needs a reset or a repair"
    return ""


def all_reduce_problem(ranks: int, timeout_s: float = _ALL_REDUCE_S) -> str:
    """Let one process a GPU (or, without CUDA, a CPU) add up a tensor over this node."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_all_reduce, args=(rank, ranks, port, timeout_s), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = datetime.datetime.now() + datetime.timedelta(seconds=timeout_s)
    for process in processes:
        process.join(max(0.0, (deadline - datetime.datetime.now()).total_seconds()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    late = [str(rank) for rank, code in enumerate(codes) if code is None]
    if late:
        ranks_late = ", ".join(late)
        return f"no all-reduce over its GPUs within {timeout_s:g} s: waiting for {ranks_late}"
    wrong = [str(rank) for rank, code in enumerate(codes) if code]
    return f"an all-reduce over its GPUs failed on {', '.join(wrong)}" if wrong else ""


def _all_reduce(rank: int, ranks: int, port: int, timeout_s: float) -> None:
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    numbers = torch.full((_NUMBERS,), float(rank + 1), device=device)
    dist.all_reduce(numbers)
    expected = ranks * (ranks + 1) / 2  # 1 + 2 + ... + ranks, exact in float32
    if not bool((numbers == expected).all()):
        raise SystemExit(f"rank {rank}: the sum is wrong")
    dist.destroy_process_group()


def _nvidia_smi() -> str:
    command = ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError:
        return "is not installed"
    except subprocess.TimeoutExpired:
        return "did not answer in 60 s"
    return done.stdout if done.returncode == 0 else f"{done.stdout} {done.stderr}"


def _command_problem(command: str, timeout_s: float) -> str:
    try:
        done = subprocess.run(
            command, shell=True, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return f"HEALTH_COMMAND did not end within {timeout_s:g} s"
    said = " ".join((done.stdout + done.stderr).split())[-200:]
    return f"HEALTH_COMMAND ended with {done.returncode}: {said}" if done.returncode else ""
