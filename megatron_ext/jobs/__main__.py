"""The commands that slurm/*.sbatch call; see `python -m megatron_ext.jobs --help`.

`end` says with its exit code what the script has to do: 0 the run is finished, 75 ("try again
later" in sysexits.h) queue the job again, any other number stop with it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.config import load_config, named_run_dir
from megatron_ext.errors import UserError
from megatron_ext.jobs import journal, outcome
from megatron_ext.jobs.decision import decide

REQUEUE = 75


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        return int(options.run(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def begin(options: argparse.Namespace) -> int:
    """A job's life begins; prints the run folder."""
    try:
        config = load_config(options.config, options.overrides)
    except UserError as error:
        journal.refuse(named_run_dir(options.config, options.overrides), str(error))
        raise
    run_dir = config.training.run_dir
    journal.record(
        run_dir,
        "began",
        nodes=options.nodes,
        steps=config.training.steps,
        step=outcome.last_step(run_dir),
        log=str(options.log),
        log_start=options.log.stat().st_size if options.log.is_file() else 0,
    )
    print(run_dir)
    return 0


def end(options: argparse.Namespace) -> int:
    """A job's life ends; says what comes next."""
    lives, now = journal.before_this(options.run_dir)
    how = outcome.end_of(
        options.run_dir,
        now,
        options.code,
        options.signal,
        tuple(filter(None, options.bad_nodes.split(","))),
    )
    decision = decide(how, lives)
    journal.record(
        options.run_dir,
        "ended",
        code=how.code,
        step=how.step,
        checkpoint=how.checkpoint,
        stopped=how.stopped,
        error=how.error,
        action=decision.action,
        reason=decision.reason,
    )
    print(f"verdict: {decision.action}, {decision.reason}", flush=True)
    return {"finished": 0, "requeue": REQUEUE}.get(decision.action, options.code or 1)


def health(options: argparse.Namespace) -> int:
    """Prints ok, or what is wrong with this node."""
    from megatron_ext.jobs.health import problem

    found = problem(options.gpus, options.command)
    print(found or "ok", flush=True)
    return 1 if found else 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m megatron_ext.jobs", description=__doc__)
    made = parser.add_subparsers(required=True, metavar="COMMAND")

    add = made.add_parser("begin", help="write that a job of the run begins; print the run folder")
    add.set_defaults(run=begin)
    add.add_argument("--log", type=Path, default=Path("/dev/null"), help="what the job prints to")
    add.add_argument("--nodes", type=int, default=1)
    add.add_argument("config", type=Path)
    add.add_argument("overrides", nargs="*")

    add = made.add_parser("end", help="write how it ended, and say what comes next")
    add.set_defaults(run=end)
    add.add_argument("run_dir", type=Path)
    add.add_argument("--code", type=int, required=True, help="exit code of the training")
    add.add_argument("--signal", default="", help="that came to the script, such as USR1")
    add.add_argument("--bad-nodes", default="", help="that failed their check, with commas")

    add = made.add_parser("health", help="whether this node can be worked on")
    add.set_defaults(run=health)
    add.add_argument("--gpus", type=int, default=0, help="that it must have")
    add.add_argument("--command", default="", help="of the site, which has to succeed")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
