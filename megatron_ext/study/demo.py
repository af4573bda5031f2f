"""The main job in small: from raw text to a report that compares a RoPE base below the bound with
one above it. Minutes on two CPU cores; `make demo` runs it.

    python -m megatron_ext.study.demo
    python -m megatron_ext.study.demo --corpus my_texts/ --output runs/mine

Every stage is one of the commands that a real run uses, printed before it starts. Interrupted and
started again it goes on where it was: finished stages are skipped, training resumes from its last
checkpoint. Refuses to start beside another demo in the same folder, and an output that was made
from another corpus. Exit codes: 0, 2 for a mistake in the request, 1 for a failure, 130 when it
was interrupted.
"""

import argparse
import contextlib
import ctypes
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from megatron_ext.checkpoint.manifest import find_checkpoints, step_of
from megatron_ext.config import load_config
from megatron_ext.errors import UserError
from megatron_ext.study.demo_corpus import build_corpus

ROOT = Path(__file__).parents[2]
CONFIGS = Path(os.path.relpath(ROOT / "configs" / "demo"))
OUTPUT = Path("runs/demo")
RUNS = ("below", "above")
PROCESSES = 2  # tensor-parallel ranks
VOCAB_SIZE = 2048
_SECONDS_TO_SAVE = 60  # for an interrupted training to write its checkpoint


class StageFailed(RuntimeError):
    """A stage's command ended with an error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages; returns the exit code."""
    options = parse(arguments)
    started = time.monotonic()
    # `kill` is answered as Ctrl-C is: the running command is ended first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = demo(options.output, options.corpus)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StageFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on from here", file=sys.stderr)
        return 130
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\nDone in {minutes} min {seconds} s. The report: {report}")
    return 0


def demo(output: Path, corpus: Path | None = None) -> Path:
    """All stages into the folder `output`; returns the report. Raises UserError, StageFailed."""
    data = output / "data"
    data.mkdir(parents=True, exist_ok=True)
    lock = (output / ".lock").open("w")  # held until this process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"another demo is writing into {output}: wait for it, or write --output FOLDER"
        ) from None

    source, tokenizer = data / "corpus.jsonl.zst", data / "tokenizer.model"
    prefix, report = data / "corpus", output / "report.html"
    python = (sys.executable, "-m")

    stage(1, "Corpus: documents in RedPajama's schema")
    facts = build_corpus(source, corpus)
    print(
        f"      {facts['documents']:,} documents, {facts['bytes'] / 1e6:.1f} MB: {facts['origin']}"
    )

    stage(2, f"Tokenizer: sentencepiece, {VOCAB_SIZE:,} pieces")
    size = ("--vocab-size", VOCAB_SIZE)
    run(*python, "data_tools", "train-tokenizer", source, *size, "--output", tokenizer)

    stage(3, "Token files: .bin/.idx")
    to = ("--tokenizer", tokenizer, "--output", prefix)
    run(*python, "data_tools", "tokenize", source, *to)

    torchrun = (*python, "torch.distributed.run", "--standalone", "--nproc-per-node", PROCESSES)
    for number, name in enumerate(RUNS, start=4):
        config = CONFIGS / f"{name}.yaml"
        places = [
            f"training.run_dir={output / name}",
            f"data.corpora.demo.path={prefix}",
            f"data.tokenizer={tokenizer}",
        ]
        if output == OUTPUT:  # what the configs say themselves
            places = []
        settings = load_config(config, places)
        stage(number, f"Pre-training with base {settings.rope.base:g}, {name} the bound")
        run_dir, steps = settings.training.run_dir, settings.training.steps
        if newest_step(run_dir) == steps:
            print("      already done")
            continue
        run(*torchrun, os.path.relpath(ROOT / "pretrain.py"), config, *places, processes=PROCESSES)
        if newest_step(run_dir) != steps:
            raise StageFailed(f"training stopped before step {steps}: run the same command again")

    cli = (*python, "megatron_ext.cli")
    stage(6, "Evaluation: perplexity against context length")
    for name in RUNS:
        run(*cli, "evaluate", output / name, "--tasks", "perplexity")

    stage(7, "Report")
    run(*cli, "report", *(output / name for name in RUNS), "--output", report)
    return report


def stage(number: int, what: str) -> None:
    """Announce a stage."""
    print(f"\n[{number}/7] {what}", flush=True)


def newest_step(run_dir: Path) -> int | None:
    """Step of a run's newest finished checkpoint."""
    checkpoints = find_checkpoints(run_dir)
    return step_of(checkpoints[0]) if checkpoints else None


def run(*command: object, processes: int = 1) -> None:
    """Run one command to its end; when we are interrupted it is ended first. Raises StageFailed."""
    words = [str(word) for word in command]
    shown = ["python", *words[1:]] if words[0] == sys.executable else words
    print(f"      $ {shlex.join(shown)}", flush=True)
    # More than two threads a process do nothing for so small a model, and harm where a container
    # may use fewer cores than it sees. A number that the user set is left alone.
    threads = os.environ.get("OMP_NUM_THREADS") or max(
        1, min(2, (os.cpu_count() or 1) // processes)
    )
    child = subprocess.Popen(
        words,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
        # Its own group: Ctrl-C reaches only us, and we pass it on as one SIGTERM, on which training
        # saves a checkpoint and ends.
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    try:
        code = child.wait()
    except BaseException:
        end(child, processes)
        raise
    if code:
        raise StageFailed(f"`{shlex.join(shown)}` ended with exit code {code}; see above")


def end(child: subprocess.Popen, processes: int) -> None:
    """End a command and all its processes, politely first."""
    # torchrun takes a signal for a failure; its ranks save, end well, and then so does torchrun.
    leader = psutil.Process(child.pid)
    ranks = leader.children() if processes > 1 else []
    try:
        for process in ranks or [leader]:
            process.terminate()
        child.wait(_SECONDS_TO_SAVE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):  # or Ctrl-C a second time
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # whatever is left of its group
    child.wait()


def end_with_parent() -> None:
    """In the child: get SIGTERM should this process be killed outright (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ext.study.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        default=os.environ.get("CORPUS") or None,
        metavar="PATH",
        help="your own texts instead of the standard library: a file or a folder (.txt, .md, .py, "
        ".jsonl, .jsonl.gz, .jsonl.zst); also the environment variable CORPUS",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER", help="[runs/demo]")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
