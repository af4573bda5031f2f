"""`megatron-ext status`: how far each run is, and why one is not running."""

import json
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_ext.jobs.state import RunState


def status(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN_OR_SWEEP]...", help="Run folders, or folders of them.  [runs]"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Queued, running at which step and until when, finished, stopped or failed, and why.

    From the run folders, and from Slurm where there is one.

    Example: megatron-ext status runs/rope_base
    """
    from megatron_ext.jobs.state import states

    print_states(states(runs or [Path("runs")]), as_json)


def print_states(found: "list[RunState]", as_json: bool) -> None:
    """As a table, or as JSON."""
    if as_json:
        print(json.dumps([run.as_dict() for run in found], indent=1))
        return
    rows = [("RUN", "STATE", "STEP", "ETA", "JOB", "STARTS", "")]
    for run in found:
        eta = "" if run.eta_s is None else str(timedelta(seconds=round(run.eta_s)))
        of = "" if run.steps is None else f"/{run.steps:,}"
        rows.append(
            (
                run.name,
                run.state,
                f"{run.step:,}{of}",
                eta,
                run.job or "",
                str(run.starts),
                run.reason,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[6]]).rstrip())
