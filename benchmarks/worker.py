"""A contender in a process of its own, which takes steps when it is told to.

    worker = Worker("ours", Case(SIZES["60M"], length=512, micro_batch=4))
    worker.step(); worker.seconds, worker.results                # seconds, and the loss of each
    worker.profile(); worker.close()                             # step_profile.py; memory

A line with a word goes in, a line of JSON comes back.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.contenders import BUILDERS, Case
from benchmarks.step_profile import Profile, profiled


class Worker:
    """A process that takes one step for each line it is sent. It builds its model while others do;
    the first word to it waits for that. What it cannot do, or not in `patience` seconds, raises
    RuntimeError with the reason."""

    def __init__(self, name: str, case: Case, threads: int = 1, patience: float = 600.0) -> None:
        self.name = name
        self.patience = patience
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, name, json.dumps(asdict(case))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            start_new_session=True,  # it ends with the processes that compile for it
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        )  # fmt: skip
        self.seconds: list[float] = []
        self.results: list[float] = []
        self._ready = False

    def step(self, counts: bool = True) -> None:
        """One step; its seconds, and the loss or the rate, are kept if it counts."""
        answer = self._ask("step")
        if counts:
            self.seconds.append(answer["seconds"])
            self.results.append(answer["result"])

    def rest(self) -> None:
        """Give memory that is not needed between steps to the others on the GPU."""
        self._ask("rest")

    def profile(self) -> Profile:
        """Where the time of one step goes."""
        return Profile(**self._ask("profile"))

    def figures(self) -> dict[str, Any]:
        """Parameters and peak memory so far."""
        return self._ask("figures")

    def close(self) -> dict[str, Any]:
        """The same; the process ends."""
        answer = self.figures()
        self.kill()
        return answer

    def kill(self) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _ask(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        if not self._ready:
            self._answer()  # built
            self._ready = True
        try:
            self.process.stdin.write(word + "\n")
        except OSError:
            raise RuntimeError("died, see above") from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        late = threading.Event()
        timer = threading.Timer(self.patience, lambda: (late.set(), self.kill()))
        timer.start()
        try:
            for line in self.process.stdout:
                if line.startswith("{"):
                    answer = json.loads(line)
                    if "error" in answer:
                        raise RuntimeError(answer["error"])
                    return answer
        finally:
            timer.cancel()
        raise RuntimeError(
            f"no answer in {self.patience:g} s" if late.is_set() else "died, see above"
        )


def work(name: str, case: Case) -> None:
    """The worker's side, to its end or to its first error."""
    try:
        _answer_all(name, case)
    except Exception as error:
        _say({"error": f"{type(error).__name__}: {error}"})
        raise


def _answer_all(name: str, case: Case) -> None:
    import torch

    gpu = case.device == "cuda"
    step, parameters = BUILDERS[name](case)
    _say({"ready": True})
    for line in sys.stdin:
        word = line.strip()
        if word == "step":
            started = time.perf_counter()
            result = step()
            if gpu:
                torch.cuda.synchronize()
            _say({"seconds": time.perf_counter() - started, "result": result})
        elif word == "profile":
            _say(asdict(profiled(step, gpu)))
        elif word == "rest":
            if gpu:
                torch.cuda.empty_cache()
            _say({})
        elif word == "figures":
            peak = torch.cuda.max_memory_allocated() if gpu else _resident()
            _say({"parameters": parameters, "peak_gb": peak / 1e9, "torch": torch.__version__})


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    work(sys.argv[1], replace(Case({}, 0, 0), **json.loads(sys.argv[2])))
