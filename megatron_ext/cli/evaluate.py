"""`megatron-ext evaluate`: what a trained model makes of longer and longer contexts."""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_ext.cli.options import whole_numbers
from megatron_ext.errors import UserError


def evaluate(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Run folder, a checkpoint, or a Hugging Face folder."),
    ],
    tasks: Annotated[
        str,
        typer.Option(help="Comma-separated: perplexity, passkey, lines, ..; `all` for every one."),
    ] = "perplexity",
    lengths: Annotated[
        str,
        typer.Option(
            help="Context lengths in tokens, comma-separated.  [run's evaluation.lengths]"
        ),
    ] = "",
    stride: Annotated[
        int | None, typer.Option(help="Tokens the window moves.  [run's evaluation.stride]")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of text.  [run's evaluation.max_tokens]")
    ] = None,
    depths: Annotated[
        int | None,
        typer.Option(min=1, help="Places of the fact, 0 to 100%.  [run's evaluation.depths]"),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts a length and depth.  [run's evaluation.samples]"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the prompts.  [run's evaluation.seed]")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text to score, a document each, or to hide facts in; may be repeated."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results.  [evaluation in the run's]")
    ] = None,
    tensor: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks (torchrun).")] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="Pipeline stages (torchrun).")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Evaluate a run's newest checkpoint or a Hugging Face folder; results go to RUN/evaluation/.

    Perplexity against context length, on the run's validation documents or on your own --text, and
    retrieval of facts from prompts of an exact number of tokens. Lengths that the results hold
    already are not computed again. Tasks: see docs/evaluation.md.

    Example: megatron-ext evaluate runs/demo/above --tasks perplexity,passkey --lengths 128,256,512

    In another layout: torchrun --nproc-per-node 2 -m megatron_ext.cli evaluate RUN --tensor 2
    """
    from megatron_ext.config.layout import in_layout
    from megatron_ext.evaluation import perplexity, retrieval
    from megatron_ext.evaluation.subject import find_subject

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    names = _tasks(tasks, ["perplexity", *retrieval.TASKS])
    subject = find_subject(source, output)
    in_layout(subject.config, tensor, pipeline)  # refuses before torch is imported
    asked = whole_numbers("--lengths", lengths)
    plans: list[perplexity.Plan | retrieval.Plan] = [
        perplexity.make_plan(subject, asked, stride, max_tokens, text or [])
        if name == "perplexity"
        else retrieval.make_plan(subject, name, asked, depths, samples, seed, text or [])
        for name in names
    ]
    results = [plan.results for plan in plans]
    if any(plan.missing for plan in plans):
        # Torch takes seconds to import, and is not needed for results that are there. Megatron-Core
        # warns of every kernel it does not find, torch of what Megatron-Core calls.
        warnings.filterwarnings("ignore", module=r"megatron|torch\.distributed")
        from megatron_ext.evaluation.scoring import open_checkpoint

        with open_checkpoint(subject.config, subject.weights, tensor, pipeline) as scorer:
            results = [
                perplexity.measure(plan, scorer)
                if isinstance(plan, perplexity.Plan)
                else retrieval.measure(plan, scorer)
                for plan in plans
            ]
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return
    if as_json:
        print(json.dumps(results[0] if len(results) == 1 else results, indent=1))
        return
    for plan, result in zip(plans, results, strict=True):
        show = _print_table if isinstance(plan, perplexity.Plan) else _print_retrieval
        show(result, plan.output)


def _tasks(text: str, known: list[str]) -> list[str]:
    if text.strip() == "all":
        return known
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"--tasks {name} is unknown: choose all or some of {', '.join(known)}")
    return names


def _print_retrieval(results: dict[str, Any], output: Path) -> None:
    """Accuracy in percent, a row for each length, a column for each depth."""
    depths = results["settings"]["depths"]
    print(f"{results['task']} of step {results['checkpoint']['step']}: % retrieved at each depth")
    columns = "".join(f"{'any' if depth is None else f'{depth:g}':>6}" for depth in depths)
    print(f"{'context':>8}  {'all':>5}  {columns}")
    for entry in results["lengths"]:
        shares = [100 * cell["correct"] / cell["samples"] for cell in entry["depths"]]
        cells = "".join(f"{share:>6.0f}" for share in shares)
        print(f"{entry['length']:>8}  {100 * entry['accuracy']:>5.1f}  {cells}")
    print(f"written to {output}")


def _print_table(results: dict[str, Any], output: Path) -> None:
    text = results["text"]
    print(
        f"Perplexity of step {results['checkpoint']['step']} on {text['documents']} documents, "
        f"{text['tokens']:,} tokens of {results['settings']['text']['kind']}"
    )
    print(f"{'context':>8}  {'over tokens':>11}  {'mean of documents':>17}  {'tokens scored':>13}")
    for entry in results["lengths"]:
        print(
            f"{entry['length']:>8}  {entry['token_weighted_perplexity']:>11.2f}  "
            f"{entry['mean_document_perplexity']:>17.2f}  {entry['tokens_scored']:>13,}"
        )
    for note in text["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print(f"written to {output}")
