"""`megatron-ext sweep`: one run for each combination of a few settings, here or on Slurm."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_ext.errors import UserError


def sweep(
    file: Annotated[
        Path,
        typer.Argument(metavar="SWEEP", help="YAML file, such as configs/sweeps/rope_base.yaml."),
    ],
    local: Annotated[
        bool, typer.Option("--local", help="Train, evaluate, report on this machine.")
    ] = False,
    submit: Annotated[
        bool, typer.Option("--submit", help="Submit one job an arm to Slurm.")
    ] = False,
    status: Annotated[bool, typer.Option("--status", help="How far each arm is.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands of --submit, submit nothing.")
    ] = False,
    sbatch: Annotated[
        str, typer.Option(help="Options for sbatch, such as '--nodes=4 --partition=gpu'.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print results as JSON.")] = False,
) -> None:
    """Train every arm of a sweep, evaluate and export it, and write one report of all.

    Called again, finished arms are left alone, arms in the queue too, and failed ones tried again.

    Example: megatron-ext sweep configs/sweeps/rope_base.yaml --submit --dry-run
    """
    if [local, submit or dry_run, status].count(True) != 1:
        raise UserError("choose one of --local, --submit (with or without --dry-run) and --status")
    from megatron_ext.study.submission import submission
    from megatron_ext.study.submission import submit as submit_jobs
    from megatron_ext.study.sweep import StageFailed, check_data_order, read_sweep, run_locally

    plan = read_sweep(file)
    if status:
        from megatron_ext.cli.status import print_states
        from megatron_ext.jobs import queue
        from megatron_ext.jobs.state import state_of

        jobs = queue.waiting_and_running()
        print_states([state_of(arm.run_dir, jobs, None) for arm in plan.arms], as_json)
        return
    check_data_order(plan)
    try:
        if local:
            failed = run_locally(plan)
            if as_json:
                print(json.dumps({"folder": str(plan.folder), "failed": failed}))
            if failed:
                raise StageFailed("; ".join(failed))
            return
        planned = submission(plan, shlex.split(sbatch))
        if dry_run:
            shown = [one.command(number) for number, one in enumerate(planned, 1)]
        else:
            names = [f"{one.what} {one.arm.name if one.arm else plan.name}" for one in planned]
            ids = submit_jobs(planned)
            shown = [f"job {job}: {name}" for job, name in zip(ids, names, strict=True)]
        print(json.dumps(shown, indent=1) if as_json else "\n".join(shown))
    except StageFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
