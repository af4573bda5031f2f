"""The rounds of `python -m tests.chaos`: start, wait for a moment, strike, compare, start again."""

import contextlib
import itertools
import json
import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from megatron_ext.checkpoint.manifest import find_checkpoints, verify
from tests.checkpoint.tensors import differing, tensors
from tests.conftest import environment, launch, metrics

STEPS, SAVE, EVALUATE = 60, 3, 8
MOMENTS = ("start-up", "step", "save", "evaluation")
STRIKES = (
    "SIGKILL rank",
    "SIGKILL all",
    "SIGKILL launcher",
    "SIGTERM",
    "SIGSTOP+CONT",
    "SIGSTOP+KILL",
)
NUMBERS = ("loss", "grad_norm", "lr", "validation_loss")
PATIENCE_S = 240.0


@dataclass
class Report:
    """What came of it all."""

    survived: Counter = field(default_factory=Counter)
    struck: Counter = field(default_factory=Counter)
    finished: int = 0
    compared: int = 0
    largest_difference: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures and self.survived == self.struck

    def text(self) -> str:
        lines = ["| strike | " + " | ".join(MOMENTS) + " |", "| --- |" + " --- |" * len(MOMENTS)]
        for strike in STRIKES:
            cells = [f"{self.survived[strike, m]}/{self.struck[strike, m]}" for m in MOMENTS]
            lines.append(f"| {strike} | " + " | ".join(cells) + " |")
        lines += [
            f"survived {self.survived.total()} of {self.struck.total()} rounds; "
            f"{self.finished} runs came to their end",
            f"{self.compared} logged steps compared; largest difference of a loss "
            f"{self.largest_difference:g}",
            *self.failures,
        ]
        return "\n".join(lines)


class Run:
    """One start of the training command."""

    def __init__(self, config_file: Path, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.output = run_dir.with_suffix(".log").open("a+")
        self.process = subprocess.Popen(
            launch(config_file, f"training.run_dir={run_dir}", processes=2),
            env=environment(), stdout=self.output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.family: dict[int, psutil.Process] = {}
        self.first_step = last_step(run_dir)

    def ranks(self) -> list[psutil.Process]:
        """The launcher's own children; the watchdog, a child of a rank, is none."""
        try:
            return psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []

    def members(self) -> list[psutil.Process]:
        """All processes below the launcher seen so far that still live."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.family.setdefault(child.pid, child)
        return [member for member in self.family.values() if member.is_running()]

    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self) -> int:
        code = self.process.wait(timeout=PATIENCE_S)
        self.sweep()
        return code

    def sweep(self) -> None:
        """Kill what is left of the processes."""
        members = self.members()
        self.process.kill()
        for member in members:
            signal_to(member, signal.SIGKILL)
        self.process.wait(timeout=60)
        psutil.wait_procs(list(self.family.values()), timeout=60)


def signal_to(process: psutil.Process | subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def records(run_dir: Path) -> list[dict]:
    """Whole lines of metrics.jsonl, as far as it is written."""
    file = run_dir / "metrics.jsonl"
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def last_step(run_dir: Path) -> int:
    return max((record["step"] for record in records(run_dir)), default=0)


def wait_for(run: Run, moment: str, dice: random.Random) -> bool:
    """Until the moment has come; False when the run ended before."""
    deadline = time.monotonic() + PATIENCE_S
    if moment == "start-up":
        while not run.ranks() and not run.ended():
            time.sleep(0.01)
        time.sleep(dice.uniform(0.0, 6.0))
        return not run.ended()
    started = time.time()
    wanted = dice.randint(2, 12)
    while not run.ended():
        assert time.monotonic() < deadline, f"no {moment} within {PATIENCE_S:g} s"
        file = run.run_dir / "metrics.jsonl"
        # Steps of this very start: the file is written anew when training begins.
        if file.is_file() and file.stat().st_mtime > started:
            found = records(run.run_dir)
            resumed = (run.run_dir / "status.json").read_text()
            first = json.loads(resumed).get("first_step", 0)
            done = last_step(run.run_dir) - first
            if moment == "step" and done >= wanted:
                return True
            saving = any((run.run_dir / "checkpoints").glob("*.unfinished"))
            if moment == "save" and done >= wanted // 2 and saving:
                time.sleep(dice.choice([0.0, 0.0, 0.002, 0.01]))
                return True
            last = found[-1] if found else {}
            evaluating = "loss" in last and last["step"] % EVALUATE == 0
            if moment == "evaluation" and done > 0 and evaluating:
                return True
        time.sleep(0.001)
    return False


def strike(run: Run, how: str, dice: random.Random) -> bool:
    """Strike and clean up; False, with nothing done, when the run has just ended."""
    ranks = run.ranks()
    if not ranks:
        return False
    members, launcher = run.members(), run.process
    if how == "SIGKILL rank":
        signal_to(dice.choice(ranks), signal.SIGKILL)
        launcher.wait(timeout=PATIENCE_S)
    elif how == "SIGKILL all":
        for member in [launcher, *members]:
            signal_to(member, signal.SIGKILL)
    elif how == "SIGKILL launcher":
        signal_to(launcher, signal.SIGKILL)
        time.sleep(dice.uniform(0.0, 1.0))  # the ranks go on until the cluster ends them
    elif how == "SIGTERM":
        signal_to(launcher, signal.SIGTERM)
        launcher.wait(timeout=PATIENCE_S)
    else:
        stopped = dice.choice(ranks)
        signal_to(stopped, signal.SIGSTOP)
        time.sleep(dice.uniform(0.2, 1.5))
        if how == "SIGSTOP+CONT":
            signal_to(stopped, signal.SIGCONT)
            time.sleep(dice.uniform(0.5, 1.5))  # it goes on as if nothing had been
    run.sweep()
    return True


def draw(rounds: int, dice: random.Random) -> list[tuple[str, str]]:
    """A (strike, moment) for each round: every pair comes once before any comes again."""
    pairs = list(itertools.product(STRIKES, MOMENTS))
    first = dice.sample(pairs, min(rounds, len(pairs)))
    return first + dice.choices(pairs, k=rounds - len(first))


def compare(run_dir: Path, reference: dict, report: Report) -> list[str]:
    """Differences from the run left alone in every record written so far."""
    problems = []
    for record in records(run_dir):
        kind = "validation_loss" if "validation_loss" in record else "loss"
        wanted = reference[record["step"], kind]
        report.compared += 1
        for name in set(NUMBERS) & wanted.keys():
            if record[name] != wanted[name]:
                problems.append(
                    f"step {record['step']}: {name} {record[name]!r} != {wanted[name]!r}"
                )
                if "loss" in name:
                    difference = abs(record[name] - wanted[name])
                    report.largest_difference = max(report.largest_difference, difference)
    return problems


def chaos(
    folder: Path, config_file: Path, rounds: int, seed: int, plan: list | None = None
) -> Report:
    """Play `rounds` rounds; `plan` names (strike, moment) pairs instead of drawing them."""
    dice, report = random.Random(seed), Report()
    plan = plan or draw(rounds, dice)
    alone = Run(config_file, folder / "alone")
    assert alone.wait() == 0, (folder / "alone.log").read_text()[-4000:]
    reference = {
        (r["step"], "validation_loss" if "validation_loss" in r else "loss"): r
        for r in metrics(folder / "alone")
    }
    wanted = tensors(find_checkpoints(folder / "alone")[0], random_too=True)
    number, played = 0, 0
    while played < rounds or last_step(folder / f"run{number}"):
        run_dir = folder / f"run{number}"
        how, moment = plan[min(played, rounds - 1)]
        run = Run(config_file, run_dir)
        if played < rounds and wait_for(run, moment, dice) and strike(run, how, dice):
            report.struck[how, moment] += 1
            played += 1
            problems = compare(run_dir, reference, report)
            newest = find_checkpoints(run_dir)[:1]
            problems += [p for folder_ in newest for p in verify(folder_)]
            report.survived[how, moment] += not problems
            report.failures += [f"round {played}, {how} at {moment}: {p}" for p in problems[:3]]
            print(f"round {played}: {how} at {moment}, step {last_step(run_dir)}", flush=True)
            if problems:
                number += 1
            continue
        if run.wait() != 0:  # it did not go on after the last strike
            report.failures.append(
                f"run{number}: {(folder / f'run{number}.log').read_text()[-1500:]}"
            )
            number += 1
            played += 1
            continue
        problems = compare(run_dir, reference, report)
        problems += differing(tensors(find_checkpoints(run_dir)[0], random_too=True), wanted)
        report.failures += [f"run{number} at its end: {p}" for p in problems[:3]]
        report.finished += 1
        number += 1
    return report


CONFIG = """\
model: {{num_layers: 2, hidden_size: 64, ffn_hidden_size: 176, num_heads: 4, vocab_size: 512}}
rope: {{base: 1e4}}
data: {{num_workers: 0, corpora: {{stdlib: {{path: {corpus}}}}}}}
training: {{sequence_length: 64, global_batch_size: 4, micro_batch_size: 1, steps: {steps}}}
optimizer: {{lr: 1e-3}}
precision: {{dtype: fp32}}
parallel: {{distributed_optimizer: true}}
checkpoint: {{interval: {save}, keep_every: {keep}}}
evaluation: {{interval: {evaluate}, batches: 4}}
logging: {{interval: 1}}
"""


def write_config(folder: Path, corpus: Path, steps: int = STEPS) -> Path:
    file = folder / "chaos.yaml"
    file.write_text(
        CONFIG.format(corpus=corpus, steps=steps, save=SAVE, keep=SAVE * 8, evaluate=EVALUATE)
    )
    return file
