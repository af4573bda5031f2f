"""Runs to one self-contained HTML page: what the theory says, what was measured, what was run.

    write_report([Path("runs/demo/below"), Path("runs/demo/above")], Path("runs/demo/report.html"))

Works offline, in light and dark, on a phone and a desktop. The figures are also written beside the
page as figures/NAME.png with NAME.csv. What a run lacks is said on the page. Refuses (UserError) a
folder that is no run, and to work without the `report` extra.
"""

import datetime
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.planning.parameters import count_parameters
from megatron_ext.study.runs import HORIZON, Run, count, read_run

TEMPLATE = Path(__file__).with_name("report.html")


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page and its figures; returns the page. Raises UserError.

    `output` unset: report.html in the run's folder, or in the folder that holds all the runs.
    """
    runs = [read_run(folder) for folder in folders]
    if output is None:
        common = folders[0] if len(runs) == 1 else _common_parent(folders)
        output = common / "report.html"
    try:
        import jinja2

        from megatron_ext.study import drawing, figures
    except ImportError as error:
        raise UserError(
            f"the report needs {error.name}: install it with pip install 'megatron-ext[report]'"
        ) from None
    drawn = figures.draw(runs)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=_title(runs),
        summary=summary(runs),
        remarks=remarks(runs),
        figures=drawn,
        absent=_absent(runs),
        names=[run.name for run in runs],
        colors=[f"var(--s{k % 8})" for k in range(len(runs))],
        table=table(runs),
        written=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    for figure in drawn:
        figure.save(output.parent / "figures")
    drawing.replace_file(output, page.encode())
    return output


def summary(runs: Sequence[Run]) -> list[str]:
    """What the runs show, one sentence or two each; nothing that the numbers do not say."""
    return [_run_summary(run) for run in runs] + _comparison(runs)


def remarks(runs: Sequence[Run]) -> list[str]:
    """What a reader has to know before believing the figures."""
    found = []
    fingerprints = {run.fingerprint for run in runs}
    if len(runs) > 1:
        if len(fingerprints) == 1 and None not in fingerprints:
            found.append("All runs read the same tokens in the same order.")
        else:
            found.append(
                "The runs did not read the same tokens in the same order, so differences between "
                "them are not due to the base alone."
            )
        found.append(
            "Each run was trained once: how much of a difference is chance, one seed cannot tell."
        )
    if any(run.perplexity for run in runs):
        found.append(
            "Perplexity is a weak witness. A low one beyond the trained context does not mean that "
            "distant tokens are used: the paper's point is that a small base can keep perplexity "
            "low while retrieval fails."
        )
    tokens = max((run.training[-1]["tokens"] for run in runs if run.training), default=0)
    weights = max(count_parameters(run.config.model).total for run in runs)
    if 0 < tokens < 20 * weights:
        found.append(
            f"{count(tokens)} tokens are {tokens / weights:.2g} for each of {count(weights)} "
            "parameters, far from the 20 or so of a well-trained model: read shapes, not values."
        )
    found += [note for run in runs for note in _notes(run)]
    return list(dict.fromkeys(found))


def table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What was run: a row for each fact, a column for each run."""
    return [
        ("Base", [f"{run.config.rope.base:,.6g}" for run in runs]),
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
        ("Training time", [_seconds(run) for run in runs]),
        ("Layout", [_layout(run) for run in runs]),
        ("Device", [str(run.environment.get("device", "—")) for run in runs]),
        ("Code revision", [_revision(run) for run in runs]),
        ("Data fingerprint", [run.fingerprint or "—" for run in runs]),
        ("Slurm job", [str(run.environment.get("slurm_job_id") or "none") for run in runs]),
        ("Folder", [str(run.folder) for run in runs]),
        ("Missing", ["; ".join(run.missing) or "nothing" for run in runs]),
    ]


def _run_summary(run: Run) -> str:
    context, failing = run.config.training.sequence_length, run.first_failing_distance
    base = f"{run.name}, base {run.config.rope.base:,g}:"
    if failing is None:
        theory = f"Bₘ stays non-negative at every distance up to {HORIZON:,} tokens."
    elif failing < context:
        theory = (
            f"Bₘ turns negative at distance {failing:,}, within the trained context of {context:,}"
            f" ({run.verdict.failing_share:.0%} of its distances fail)."
        )
    else:
        theory = (
            f"Bₘ stays non-negative over the trained context of {context:,} and turns negative "
            f"at distance {failing:,}, beyond it."
        )
    if not run.validation:
        return f"{base} {theory} No validation loss yet."
    loss, chance = run.validation[-1]["validation_loss"], math.log(run.config.model.vocab_size)
    return (
        f"{base} {theory} Validation loss fell from about {chance:.2f} (guessing) to {loss:.2f} "
        f"in {run.steps_done:,} steps."
    )


def _comparison(runs: Sequence[Run]) -> list[str]:
    known = [run for run in runs if run.perplexity]
    said = []
    for run in known:
        at = {e["length"]: e["token_weighted_perplexity"] for e in run.perplexity["lengths"]}  # type: ignore[index]
        context, longest = run.config.training.sequence_length, max(at)
        if context in at and longest > context:
            change = at[longest] / at[context] - 1
            word = "unchanged" if abs(change) < 0.01 else f"{abs(change):.0%} "
            word += "" if abs(change) < 0.01 else ("higher" if change > 0 else "lower")
            said.append(
                f"{run.name}: perplexity {at[context]:.1f} at the trained {context:,} tokens, "
                f"{at[longest]:.1f} at {longest:,}, {word}."
            )
    losses = {run.name: run.validation[-1]["validation_loss"] for run in runs if run.validation}
    if len(losses) > 1:
        best, worst = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
        said.append(
            f"The least validation loss is that of {best} ({losses[best]:.3f}), the greatest that "
            f"of {worst} ({losses[worst]:.3f}), a difference of {losses[worst] - losses[best]:.3f}."
        )
    return said


def _absent(runs: Sequence[Run]) -> list[str]:
    return [f"{run.name}: {what}" for run in runs for what in run.missing]


def _notes(run: Run) -> list[str]:
    notes = run.perplexity["text"]["notes"] if run.perplexity else []
    return [f"On the evaluation: {note}." for note in notes]


def _title(runs: Sequence[Run]) -> str:
    bases = sorted({run.config.rope.base for run in runs})
    if len(bases) == 1:
        return f"RoPE base {bases[0]:,g}"
    if len(bases) == 2:
        return f"RoPE base {bases[0]:,g} against {bases[1]:,g}"
    return f"{len(bases)} RoPE bases from {bases[0]:,g} to {bases[-1]:,g}"


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


def _layout(run: Run) -> str:
    parallel, size = run.config.parallel, run.environment.get("world_size")
    if not size:
        return "—"
    data = size // parallel.model_ranks
    ranks = f"{size} ranks" if size > 1 else "1 rank"
    context = f" × context {parallel.context}" if parallel.context > 1 else ""
    model = f"tensor {parallel.tensor} × pipeline {parallel.pipeline}{context}"
    return f"{ranks}: {model} × data {data}"


def _revision(run: Run) -> str:
    revision = run.environment.get("code_revision")
    if not revision:
        return "—"
    name, dirty, _ = revision.partition("-dirty")
    return name[:12] + (" with changes" if dirty else "")


def _common_parent(folders: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([folder.parent.resolve() for folder in folders]))
