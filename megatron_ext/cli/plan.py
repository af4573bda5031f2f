"""`megatron-ext plan`: what a layout costs on GPUs one does not have.

    megatron-ext plan configs/models/llama_2b.yaml --gpus 128 --gpu a100-80gb
    megatron-ext plan configs/models/llama_2b.yaml --gpus 128 --search --write best.yaml
    megatron-ext plan --rows measured.csv --json

Refuses (exit 2) unknown GPUs, layouts that do not divide and tables without the columns.
"""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated

import typer

from data_tools.files import write_file
from megatron_ext.config import load_config
from megatron_ext.errors import UserError
from megatron_ext.planning.layout import Choice, parallel_section, reason, search
from megatron_ext.planning.plan import make_plan
from megatron_ext.planning.prediction import predict
from megatron_ext.planning.workload import read_rows

_SHOWN = 10


def plan(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file of the run.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Settings to replace.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="Number of GPUs.  [parallel.world_size]")] = None,
    gpu: Annotated[
        str, typer.Option(help="a100-40gb, a100-80gb, h100, h200, b200, or of --gpu-file.")
    ] = "a100-80gb",
    gpu_file: Annotated[
        Path | None, typer.Option(help="JSON of GPUs, as megatron_ext/planning/gpus.json.")
    ] = None,
    look: Annotated[
        bool, typer.Option("--search", help="Rank all layouts and plan the best one.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(help="With --search: write the best layout's settings (YAML).")
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="CSV of workloads instead of a config; see docs/planner.md.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write figures, their CSV and index.html to this folder.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Memory, step time, MFU, days and GPU-hours of a run.

    Example: megatron-ext plan configs/models/llama_2b.yaml --gpus 128 --gpu a100-80gb --search
    """
    if rows is not None:
        _print_rows(rows, gpu_file, json)
        return
    if config is None:
        raise UserError("nothing to plan: name a config file, or a table with --rows FILE.csv")
    run = load_config(config, overrides or [])
    number = gpus or run.parallel.world_size
    choices: list[Choice] = []
    if look:
        choices = search(run, number, gpu, gpu_file)
        run = choices[0].config
    made = make_plan(run, number, gpu, gpu_file)
    if json:
        answer = made.as_dict()
        if look:
            answer["search"] = [_record(choice) for choice in choices]
            answer["reason"] = reason(choices)
        print(json_module.dumps(answer, indent=2))
    else:
        print("\n".join([*([_ranking(choices), ""] if look else []), made.text()]))
    if write is not None:
        if not look:
            raise UserError(f"--write {write} needs --search, which finds what to write: add it")
        write_file(write, parallel_section(choices[0], number))
        print(f"wrote {write}", file=sys.stderr)
    if plot is not None:
        from megatron_ext.planning.figures import write_figures

        for file in write_figures(plot, run, number, gpu, gpu_file):
            print(f"wrote {file}", file=sys.stderr)


def _print_rows(table: Path, gpu_file: Path | None, json: bool) -> None:
    work = read_rows(table, gpu_file)
    records = predict(work).records(work.row_id)
    if json:
        print(json_module.dumps(records))
        return
    print(f"{'row':<14}{'s/step':>10}{'tokens/s/GPU':>14}{'memory':>9}  fits")
    for record in records:
        print(
            f"{record['row_id']:<14}{record['step_time_s']:>10.4g}"
            f"{record['tokens_per_s_per_gpu']:>14,.0f}{record['memory_gb']:>9.1f}  "
            f"{'yes' if record['fits'] else 'no'}"
        )


def _record(choice: Choice) -> dict[str, object]:
    parallel, training = choice.config.parallel, choice.config.training
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "first_stage_layers": parallel.first_stage_layers,
        "last_stage_layers": parallel.last_stage_layers,
        "context": parallel.context,
        "sequence": parallel.sequence,
        "micro_batch_size": training.micro_batch_size,
        "recompute": training.recompute,
        "step_time_s": choice.step_time_s,
        "memory_gib": choice.memory_gib,
        "fits": choice.fits,
    }


def _ranking(choices: list[Choice]) -> str:
    lines = [f"{'layout':<46}{'s/step':>8}{'GiB':>8}"]
    best = choices[0].step_time_s
    for choice in [c for c in choices if c.fits][:_SHOWN] or choices[:_SHOWN]:
        lines.append(
            f"{choice.name:<46}{choice.step_time_s:>8.2f}{choice.memory_gib:>8.1f}"
            f"  {choice.step_time_s / best - 1:+.1%}"
        )
    misfits = sum(not choice.fits for choice in choices)
    lines.append(f"{len(choices)} layouts tried, {misfits} do not fit with 5% to spare")
    return "\n".join([*lines, f"why: {reason(choices)}"])
