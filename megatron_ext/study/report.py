"""Runs to one self-contained HTML page: what the theory says, what was measured, what was run.

    write_report([Path("runs/demo/below"), Path("runs/demo/above")], Path("runs/demo/report.html"))
    write_report([Path("configs/sweeps/rope_base.yaml")])       # a sweep: every run in its folder

Works offline, in light and dark, on a phone and a desktop. The figures are also written beside the
page as figures/NAME.png and NAME.svg with NAME.csv. What a run lacks is said on the page. Refuses
(UserError) a folder that is no run, and to work without the `report` extra.
"""

import datetime
import math
import os
from collections.abc import Sequence
from pathlib import Path

from data_tools.files import write_file
from megatron_ext.errors import UserError
from megatron_ext.planning.parameters import count_parameters
from megatron_ext.study.measures import THRESHOLD, effective_context
from megatron_ext.study.runs import HORIZON, Arm, Run, arms, base_text, count, read_runs
from megatron_ext.study.sweep import read_sweep
from megatron_ext.study.table import outcome, reach, table

TEMPLATE = Path(__file__).with_name("report.html")
_MOST_IN_WORDS = 3  # arms; more would be a page of bullets


def write_report(
    folders: Sequence[Path], output: Path | None = None, threshold: float = THRESHOLD
) -> Path:
    """Write the page and its figures; returns the page. Raises UserError.

    folders: of runs, or of sweeps, also as a sweep's YAML file. threshold: share of prompts that
    counts as retrieving. `output` unset: report.html in the one folder given, or in the folder that
    holds all of them.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"--threshold {threshold:g} is no share: write one above 0, up to 1")
    folders = [_of_sweep(folder) for folder in folders]
    runs = read_runs(folders)
    if output is None:
        common = folders[0] if len(folders) == 1 else _common_parent(folders)
        output = common / "report.html"
    try:
        import jinja2

        from megatron_ext.study import drawing, figures
    except ImportError as error:
        raise UserError(
            f"the report needs {error.name}: install it with pip install 'megatron-ext[report]'"
        ) from None
    drawn = figures.draw(runs, threshold)
    columns, rows = outcome(runs, threshold)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=_title(runs),
        columns=columns,
        rows=rows,
        row_colors=[drawing.swatch(k) for k in range(len(rows))],
        summary=summary(runs, threshold),
        remarks=remarks(runs),
        figures=drawn,
        absent=_absent(runs),
        names=[run.name for run in runs],
        colors=[drawing.swatch(k) for k in _places(runs)],
        table=table(runs, threshold),
        written=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    for figure in drawn:
        figure.save(output.parent / "figures")
    write_file(output, page)
    return output


def _of_sweep(source: Path) -> Path:
    """The folder of a sweep's file; any other path as it is. Raises UserError."""
    if source.suffix not in (".yaml", ".yml"):
        return source
    folder = read_sweep(source).folder
    if not any(folder.glob("*/config.yaml")):
        raise UserError(
            f"no arm of {source} has begun in {folder}: megatron-ext sweep {source} --local"
        )
    return folder


def summary(runs: Sequence[Run], threshold: float = THRESHOLD) -> list[str]:
    """What the runs show, one sentence or two each; nothing that the numbers do not say. Of many
    arms only what is true of all: the rest is read from the table."""
    if len(arms(runs)) > _MOST_IN_WORDS:
        return _best_and_worst(runs)
    each = [_run_summary(run) for run in runs]
    return each + _retrieval(runs, threshold) + _comparison(runs) + _best_and_worst(runs)


def remarks(runs: Sequence[Run]) -> list[str]:
    """What a reader has to know before believing the figures."""
    found = []
    groups = arms(runs)
    if len(groups) > 1:
        found.append(_data_remark(groups))
    repeats = sorted({len(arm.runs) for arm in groups})
    if repeats == [1] and len(groups) > 1:
        found.append(
            "Each run was trained once: how much of a difference is chance, one seed cannot tell."
        )
    elif repeats != [1]:
        spread = " to ".join(str(n) for n in dict.fromkeys((repeats[0], repeats[-1])))
        found.append(
            f"Each setting was trained with {spread} seeds; runs of one setting have one colour."
        )
    if any(run.perplexity for run in runs):
        found.append(
            "Perplexity is a weak witness. A low one beyond the trained context does not mean that "
            "distant tokens are used: the paper's point is that a small base can keep perplexity "
            "low while retrieval fails."
        )
    if any(run.retrieval for run in runs):
        found.append(
            "An answer counts as retrieved when greedy decoding would write it to the last token. "
            "The theory speaks of distances, a prompt has facts at all depths, and a model may "
            "fail for other reasons than its base: too little training, above all."
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


def _run_summary(run: Run) -> str:
    context, failing = run.config.training.sequence_length, run.first_failing_distance
    base = f"{run.name}, base {base_text(run)}:"
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


def _retrieval(runs: Sequence[Run], threshold: float) -> list[str]:
    said = []
    for arm in arms(runs):
        failing = arm.first.first_failing_distance
        theory = f"up to {failing - 1:,}" if failing else f"{HORIZON:,} and more"
        for task in dict.fromkeys(task for run in arm.runs for task in run.retrieval):
            reached = [
                reach(effective_context(run.retrieval[task]["lengths"], threshold))
                for run in arm.runs
                if task in run.retrieval
            ]
            one = "tokens retrieved" if len(reached) == 1 else "tokens retrieved, one for each seed"
            said.append(
                f"{arm.name}, {task} at {threshold:.0%} or more: {'; '.join(reached)} {one}; the "
                f"theory allows {theory}, the trained context is "
                f"{arm.first.config.training.sequence_length:,}."
            )
    return said


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
    return said


def _best_and_worst(runs: Sequence[Run]) -> list[str]:
    """Of the runs that read the same tokens: validation draws its batches by the seed, too."""
    alike: dict[str | None, dict[str, float]] = {}
    for run in runs:
        if run.validation:
            loss = run.validation[-1]["validation_loss"]
            alike.setdefault(run.fingerprint, {})[run.name] = loss
    said = []
    for losses in alike.values():
        best, worst = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
        if best != worst:
            said.append(
                f"The least validation loss is that of {best} ({losses[best]:.3f}), the greatest "
                f"that of {worst} ({losses[worst]:.3f}), a difference of "
                f"{losses[worst] - losses[best]:.3f}"
                + ("." if len(alike) == 1 else ", among those that read the same tokens.")
            )
    return said


def _data_remark(groups: Sequence[Arm]) -> str:
    read = [sorted(str(run.fingerprint) for run in arm.runs) for arm in groups]
    if any(run.fingerprint is None for arm in groups for run in arm.runs) or any(
        other != read[0] for other in read
    ):
        return (
            "The runs did not read the same tokens in the same order, so differences between "
            "them are not due to the base alone."
        )
    if len(read[0]) > 1:
        return "Runs of one seed read the same tokens in the same order."
    return "All runs read the same tokens in the same order."


def _absent(runs: Sequence[Run]) -> list[str]:
    return [f"{run.name}: {what}" for run in runs for what in run.missing]


def _notes(run: Run) -> list[str]:
    notes = run.perplexity["text"]["notes"] if run.perplexity else []
    return [f"On the evaluation: {note}." for note in notes]


def _title(runs: Sequence[Run]) -> str:
    by_base = {run.config.rope.base: base_text(run) for run in runs}
    bases = [by_base[base] for base in sorted(by_base)]
    if len(bases) == 1:
        return f"RoPE base {bases[0]}"
    if len(bases) == 2:
        return f"RoPE base {bases[0]} against {bases[1]}"
    return f"{len(bases)} RoPE bases from {bases[0]} to {bases[-1]}"


def _places(runs: Sequence[Run]) -> list[int]:
    """Of each run, the place of its arm."""
    places = {run.folder: k for k, arm in enumerate(arms(runs)) for run in arm.runs}
    return [places[run.folder] for run in runs]


def _common_parent(folders: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([folder.parent.resolve() for folder in folders]))
