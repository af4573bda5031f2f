"""The page's tables: what came out, a row for each arm; what was run, a column for each run."""

from collections.abc import Iterable, Sequence
from typing import Any

from megatron_ext.planning.parameters import count_parameters
from megatron_ext.study.measures import (
    THRESHOLD,
    EffectiveContext,
    PowerLaw,
    effective_context,
    law_of,
)
from megatron_ext.study.runs import HORIZON, Arm, Run, arms, base_text, count

Cells = list[list[str]]


def outcome(runs: Sequence[Run], threshold: float = THRESHOLD) -> tuple[list[str], Cells]:
    """Theory beside measurement: the columns' names, and a row for each arm, its seeds in the order
    of their runs, a line each."""
    found = arms(runs)
    tasks = list(dict.fromkeys(task for run in runs for task in run.retrieval))
    columns = ["Arm", "Base", "Usable by theory"]
    columns += [f"Measured: {task} ≥ {threshold:.0%}" for task in tasks]
    columns += ["Validation loss", "Perplexity: trained context, longest"]
    return columns, [_outcome(arm, tasks, threshold) for arm in found]


def _outcome(arm: Arm, tasks: Sequence[str], threshold: float) -> list[str]:
    failing = arm.first.first_failing_distance

    def seeds(cells: Iterable[str | None]) -> str:
        return "\n".join(cell or "—" for cell in cells)

    def reached(run: Run, task: str) -> str | None:
        results = run.retrieval.get(task)
        return reach(effective_context(results["lengths"], threshold)) if results else None

    return [
        arm.name,
        base_text(arm.first),
        f"{failing - 1:,}" if failing else f"at least {HORIZON - 1:,}",
        *(seeds(reached(run, task) for run in arm.runs) for task in tasks),
        seeds(_validation(run) for run in arm.runs),
        seeds(_perplexity(run) for run in arm.runs),
    ]


def _perplexity(run: Run) -> str | None:
    """Over tokens, at the trained context and at the longest length."""
    entries = (run.perplexity or {"lengths": []})["lengths"]
    at = {entry["length"]: f"{entry['token_weighted_perplexity']:.2f}" for entry in entries}
    if not at:
        return None
    return f"{at.get(run.config.training.sequence_length, '—')}, {at[max(at)]} at {max(at):,}"


def table(runs: Sequence[Run], threshold: float = THRESHOLD) -> list[tuple[str, list[str]]]:
    """What was run: a row for each fact, a column for each run."""
    return [
        ("Base", [base_text(run) for run in runs]),
        ("Seed", [str(run.config.training.seed) for run in runs]),
        ("Rule", [run.config.rope.scaling.type for run in runs]),
        ("Context length", [f"{run.config.training.sequence_length:,} tokens" for run in runs]),
        ("Head dimension", [str(run.config.model.head_dim) for run in runs]),
        ("Bound at this context", [_verdict(run) for run in runs]),
        ("First failing distance", [_failing(run) for run in runs]),
        ("Parameters", [count(count_parameters(run.config.model).total) for run in runs]),
        ("Tokens", [_last(run, "tokens", count) for run in runs]),
        ("Steps", [f"{run.steps_done:,} of {run.config.training.steps:,}" for run in runs]),
        ("Final training loss", [_last(run, "loss", "{:.3f}".format) for run in runs]),
        ("Validation loss", [_validation(run) for run in runs]),
        *_effective_rows(runs, threshold),
        ("Loss over context, fitted", [_law(run) for run in runs]),
        ("Evaluated", [_evaluated(run) for run in runs]),
        ("Training time", [_seconds(run) for run in runs]),
        ("Layout", [_layout(run) for run in runs]),
        ("Device", [str(run.environment.get("device", "—")) for run in runs]),
        ("Code revision", [_revision(run) for run in runs]),
        ("Data fingerprint", [run.fingerprint or "—" for run in runs]),
        ("Slurm jobs", [_jobs(run) for run in runs]),
        ("Folder", [str(run.folder) for run in runs]),
        ("config.yaml, sha256", [run.config_hash[:12] for run in runs]),
        ("Missing", ["; ".join(run.missing) or "nothing" for run in runs]),
    ]


def reach(found: EffectiveContext) -> str:
    """512 (95%: 256 to 1,024)."""
    least = "at least " if found.tokens == found.longest else ""
    return f"{least}{found.tokens:,} (95%: {found.low:,} to {found.high:,})"


def _effective_rows(runs: Sequence[Run], threshold: float) -> list[tuple[str, list[str]]]:
    tasks = dict.fromkeys(task for run in runs for task in run.retrieval)

    def cell(run: Run, task: str) -> str:
        results = run.retrieval.get(task)
        return reach(effective_context(results["lengths"], threshold)) if results else "—"

    return [
        (f"Effective context, {task} ≥ {threshold:.0%}", [cell(run, task) for run in runs])
        for task in tasks
    ]


def _law(run: Run) -> str:
    law = law_of(run)
    if isinstance(law, PowerLaw):
        return f"α {law.alpha:.3g} tokens, β {law.beta:.3g}, γ {law.gamma:.3f} (rms {law.rms:.2g})"
    return f"not fitted: {law}"


def _evaluated(run: Run) -> str:
    """Task by task the step, and the checksum of the checkpoint's manifest."""
    files = {**({"perplexity": run.perplexity} if run.perplexity else {}), **run.retrieval}
    of: dict[str, list[str]] = {}
    for task, results in files.items():
        known = results["checkpoint"]
        checksum = known.get("manifest_sha256", "")[:12]
        of.setdefault(f"step {known['step']:,} {checksum}".strip(), []).append(task)
    return "; ".join(f"{where}: {', '.join(tasks)}" for where, tasks in of.items()) or "—"


def _jobs(run: Run) -> str:
    last = run.environment.get("slurm_job_id")
    return ", ".join(dict.fromkeys([*run.jobs, *([str(last)] if last else [])])) or "none"


def _layout(run: Run) -> str:
    parallel, size = run.config.parallel, run.environment.get("world_size")
    if not size:
        return "—"
    data = size // parallel.model_ranks
    ranks = f"{size} ranks" if size > 1 else "1 rank"
    context = f" × context {parallel.context}" if parallel.context > 1 else ""
    model = f"tensor {parallel.tensor} × pipeline {parallel.pipeline}{context}"
    return f"{ranks}: {model} × data {data}"


def _verdict(run: Run) -> str:
    verdict = run.verdict
    if verdict.feasible:
        return f"holds (least Bₘ {verdict.min_b:.2f})"
    return f"fails at {verdict.failing_share:.0%} of distances (least Bₘ {verdict.min_b:.2f})"


def _failing(run: Run) -> str:
    failing = run.first_failing_distance
    if failing is None:
        return f"none below {HORIZON:,}"
    where = "within" if failing < run.config.training.sequence_length else "beyond"
    return f"{failing:,} ({where} the context)"


def _last(run: Run, key: str, form: Any) -> str:
    return form(run.training[-1][key]) if run.training else "—"


def _validation(run: Run) -> str:
    return f"{run.validation[-1]['validation_loss']:.3f}" if run.validation else "—"


def _seconds(run: Run) -> str:
    """Mean of the logged step times, times the steps: what the steps took, without start-ups."""
    times = [record["step_time_s"] for record in run.training]
    if not times:
        return "—"
    seconds = sum(times) / len(times) * run.steps_done
    if seconds < 120:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 7200 else f"about {seconds / 3600:.1f} h"


def _revision(run: Run) -> str:
    revision = run.environment.get("code_revision")
    if not revision:
        return "—"
    name, dirty, _ = revision.partition("-dirty")
    return name[:12] + (" with changes" if dirty else "")
