"""`megatron-ext evaluate`: what a trained model makes of longer and longer contexts."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_ext.cli.options import whole_numbers
from megatron_ext.errors import UserError

TASKS = ("perplexity",)


def evaluate(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, or one of its checkpoints.")
    ],
    tasks: Annotated[str, typer.Option(help="Comma-separated; known: perplexity.")] = "perplexity",
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
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text file to score, a document each; may be repeated."),
    ] = None,
    tensor: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks (torchrun).")] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="Pipeline stages (torchrun).")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Evaluate a run's newest checkpoint; results go to RUN/evaluation/.

    Perplexity against context length, on the run's validation documents or on your own --text.
    Lengths that the results hold already are not computed again.

    Example: megatron-ext evaluate runs/demo/above --lengths 128,256,512

    In another layout: torchrun --nproc-per-node 2 -m megatron_ext.cli evaluate RUN --tensor 2
    """
    for task in tasks.split(","):
        if task.strip() not in TASKS:
            raise UserError(f"--tasks {task.strip()} is unknown: choose {', '.join(TASKS)}")
    from megatron_ext.config.layout import in_layout
    from megatron_ext.evaluation.perplexity import make_plan, measure

    plan = make_plan(source, whole_numbers("--lengths", lengths), stride, max_tokens, text or [])
    in_layout(plan.config, tensor, pipeline)  # refuses before torch is imported
    results = plan.results
    if plan.missing:
        # Torch takes seconds to import, and is not needed for results that are there. Megatron-Core
        # warns of every kernel it does not find, torch of what Megatron-Core calls.
        warnings.filterwarnings("ignore", module=r"megatron|torch\.distributed")
        from megatron_ext.evaluation.scoring import open_checkpoint

        with open_checkpoint(plan.config, plan.checkpoint, tensor, pipeline) as scorer:
            results = measure(plan, scorer)
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        if as_json:
            print(json.dumps(results, indent=1))
        else:
            _print_table(results, plan.output)


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
