"""Figures of a plan: PNG, the CSV behind each, and one HTML page.

    write_figures(Path("plan"), config, gpus=128, gpu="a100-80gb")

memory (a bar for each stage), waterfall (seconds of a step), scaling (tokens/s against GPUs, weak
and strong) and days (against MFU). Needs matplotlib (the `report` extra), not torch.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.files import atomic_write, write_file
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.planning.layout import on_gpus, workload
from megatron_ext.planning.plan import Plan, flops_per_token, plan_of
from megatron_ext.planning.prediction import predict

GPU_COUNTS = tuple(2**k for k in range(3, 13))  # 8 .. 4096
_MFU = tuple(percent / 100 for percent in range(20, 75, 5))


def write_figures(
    folder: Path, config: Config, gpus: int, gpu: str, gpu_file: Path | None = None
) -> list[Path]:
    """All figures; returns the files, index.html last.

    Raises UserError when matplotlib is not installed or the folder cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'megatron-ext[report]'") from None
    matplotlib.use("Agg")
    work = workload(config, gpus, gpu, gpu_file)
    plan = plan_of(config, work)
    tables: dict[str, list[Any]] = {
        "memory": _memory_rows(plan),
        "waterfall": [[cause, seconds] for cause, seconds in plan.step_parts_s.items()],
        "scaling": _scaling_rows(config, gpus, gpu, gpu_file),
        "days": _days_rows(config, plan),
    }
    headers = {
        "memory": ["stage", *plan.memory_gib[0]],
        "waterfall": ["cause", "seconds"],
        "scaling": ["gpus", "weak_tokens_per_s", "strong_tokens_per_s"],
        "days": ["mfu_full_attention", "days", "gpu_hours"],
    }
    draw = {"memory": _memory, "waterfall": _waterfall, "scaling": _scaling, "days": _days}
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in tables.items():
            written.append(folder / f"{name}.csv")
            _write_csv(written[-1], headers[name], rows)
            written.append(folder / f"{name}.png")
            _write_png(written[-1], lambda axes, n=name, r=rows: draw[n](axes, r, plan))  # type: ignore[misc]
        written.append(folder / "index.html")
        write_file(written[-1], _page(plan, list(tables)))
    except OSError as error:
        raise UserError(f"--plot {folder} cannot be written ({error.strerror})") from None
    return written


def _memory_rows(plan: Plan) -> list[list[float]]:
    return [[stage, *parts.values()] for stage, parts in enumerate(plan.memory_gib)]


def _scaling_rows(
    config: Config, gpus: int, gpu: str, gpu_file: Path | None
) -> list[list[float | str]]:
    """Tokens/s of the layout at other numbers of GPUs: the batch grows with them (weak) or stays
    (strong), which ends where each data-parallel rank has one micro-batch."""
    work = workload(config, gpus, gpu, gpu_file)
    rows: list[list[float | str]] = []
    for count in GPU_COUNTS:
        if count % int(work.tp[0] * work.pp[0]):
            continue
        weak = float(predict(on_gpus(work, count, weak=True)).tokens_per_s_per_gpu[0]) * count
        strong: float | str = ""
        if count // int(work.tp[0] * work.pp[0]) * work.micro_batch[0] <= work.global_batch[0]:
            few = on_gpus(work, count, weak=False)
            strong = float(predict(few).tokens_per_s_per_gpu[0]) * count
        rows.append([count, weak, strong])
    return rows


def _days_rows(config: Config, plan: Plan) -> list[list[float]]:
    flops = flops_per_token(config) * config.training.tokens_after(config.training.steps)
    peak = plan.tflops_per_gpu / plan.mfu_full_attention * 1e12
    seconds = {mfu: flops / (peak * mfu * plan.gpus) for mfu in _MFU}
    return [[mfu, s / 86400, s / 3600 * plan.gpus] for mfu, s in seconds.items()]


def _memory(axes: Any, rows: Sequence[Any], plan: Plan) -> None:
    bottom = [0.0] * len(rows)
    for column, cause in enumerate(plan.memory_gib[0], start=1):
        heights = [row[column] for row in rows]
        if any(heights):
            axes.bar([row[0] for row in rows], heights, bottom=bottom, label=cause)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.axhline(plan.gpu_memory_gib, color="black", linestyle="--", label=f"one {plan.gpu}")
    axes.set(xlabel="pipeline stage", ylabel="GiB a rank", title="Memory")
    axes.set_xticks([row[0] for row in rows])
    axes.legend(fontsize=7)


def _waterfall(axes: Any, rows: Sequence[Any], plan: Plan) -> None:
    reached = 0.0
    for place, (_, seconds) in enumerate(rows):
        axes.barh(place, seconds, left=reached)
        axes.text(reached + seconds, place, f" {seconds:.3f} s", va="center", fontsize=7)
        reached += seconds
    axes.set_yticks(range(len(rows)), [cause.replace("_", " ") for cause, _ in rows])
    axes.invert_yaxis()
    axes.set(xlabel="seconds of a step", title=f"Step of {plan.step_time_s:.2f} s")
    axes.set_xlim(0, reached * 1.15)


def _scaling(axes: Any, rows: Sequence[Any], plan: Plan) -> None:
    axes.plot([row[0] for row in rows], [row[1] for row in rows], "o-", label="weak: batch grows")
    fixed = [(row[0], row[2]) for row in rows if row[2] != ""]
    axes.plot(
        [row[0] for row in fixed], [row[1] for row in fixed], "s--", label="strong: batch stays"
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="GPUs", ylabel="tokens/s", title="Throughput against GPUs")
    axes.legend()


def _days(axes: Any, rows: Sequence[Any], plan: Plan) -> None:
    axes.plot([row[0] for row in rows], [row[1] for row in rows])
    axes.plot(plan.mfu_full_attention, plan.days, "o", label="predicted")
    axes.set(
        xlabel="MFU (6 N + 12 L h s, attention in full)", ylabel="days",
        title=f"{plan.steps:,} steps on {plan.gpus} GPUs",
    )  # fmt: skip
    axes.legend()


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(rows)
    write_file(path, text.getvalue())


def _write_png(path: Path, draw: Any) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=130)
    draw(figure.subplots())
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png")


def _page(plan: Plan, names: Sequence[str]) -> str:
    figures = "\n".join(
        f'<figure><img src="{name}.png" alt="{name}"><figcaption><a href="{name}.csv">{name}.csv'
        "</a></figcaption></figure>"
        for name in names
    )
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Plan</title>\n'
        "<style>body{font-family:sans-serif;max-width:70em;margin:2em auto}img{max-width:100%}"
        "figure{display:inline-block;width:48%;margin:0}</style>\n"
        f"<h1>{plan.gpus} x {html.escape(plan.gpu)}</h1>\n"
        f"<pre>{html.escape(plan.text())}</pre>\n{figures}\n</html>\n"
    )
