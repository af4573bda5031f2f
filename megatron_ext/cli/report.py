"""`megatron-ext report`: runs to one page."""

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_SWEEP", help="Folders of runs or sweeps, or a sweep's YAML file."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The page to write.  [report.html in the folder given, or that holds all given]"
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Share of prompts answered right that counts as retrieving.")
    ] = 0.8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths as JSON.")] = False,
) -> None:
    """Write one self-contained HTML page about runs, with figures and their numbers beside it.

    Example: megatron-ext report runs/demo/below runs/demo/above
    Example: megatron-ext report configs/sweeps/rope_base.yaml --threshold 0.9
    """
    from megatron_ext.study.report import write_report

    page = write_report(runs, output, threshold)
    if as_json:
        print(json.dumps({"report": str(page), "figures": str(page.parent / "figures")}))
    else:
        print(f"written to {page}")
