"""`megatron-ext report`: runs to one page."""

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders.")],
    output: Annotated[
        Path | None,
        typer.Option(help="The page to write.  [report.html in the run's or the runs' folder]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths as JSON.")] = False,
) -> None:
    """Write one self-contained HTML page about runs, with figures and their numbers beside it.

    Example: megatron-ext report runs/demo/below runs/demo/above
    """
    from megatron_ext.study.report import write_report

    page = write_report(runs, output)
    if as_json:
        print(json.dumps({"report": str(page), "figures": str(page.parent / "figures")}))
    else:
        print(f"written to {page}")
